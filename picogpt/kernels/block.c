/* The blocks of the model, forward and backward, for one window of all rolls.

   `picogpt.kernels.compiled` has this compiled for one shape of model; vectors.h says how. Every thread has a share of the
   rows, and another of the heads. They wait for each other only where they need each other's rows: where rolls are not dealt
   out evenly, and for gradients of matrices that are added up window by window.

   Most of what is needed in the backward pass is written row after row and past the cache; what is read next is in rows that
   all blocks and windows have in common, and so in the cache. What is made of gradients is written over what has been read for
   the last time. Gradients of norms and biases are added to sums in which each thread, or each roll, has a row of its own, so
   that they do not depend on who is first. */

#include <omp.h>

#include "vectors.h"
#include "product.h"
#include "by_rows.h"
#include "attention.h"
#include "muon.h"

#define EPSILON 1e-5f

/* ---- LayerNorm and the residual paths, for a share of the rows ---- */

/* As everything that is done again in the backward pass it is there once, so that it is rounded in the same way. */
static __attribute__((noinline)) void normalize(const float *x, const float *weight, const float *bias, number *out, float *mean,
                                                float *scale) {
    vector sum = {0}, squares = {0};
    for (int c = 0; c < WIDTH; c += LANES) sum += load_float(x + c);
    *mean = sum_of(sum) / WIDTH;
    for (int c = 0; c < WIDTH; c += LANES) {
        vector distance = load_float(x + c) - *mean;
        squares += distance * distance;
    }
    *scale = 1 / sqrtf(sum_of(squares) / WIDTH + EPSILON);
    for (int c = 0; c < WIDTH; c += LANES) {
        store(out + c, (load_float(x + c) - *mean) * *scale * load_float(weight + c) + load_float(bias + c));
    }
}

/* Of 2 R statistics the first half are the rows' means, the second what the distance from them was multiplied by. */
static void layer_norm(const float *x, const float *weight, const float *bias, number *out, float *statistics,
                       struct share share) {
    for (long i = share.first; i < share.end; i++) {
        normalize(x + i * WIDTH, weight, bias, out + i * WIDTH, statistics + i, statistics + share.rows + i);
    }
}

/* sum = x + branch + bias, which is also `kept`, unless that is null. */
static inline void add_row(const float *x, const number *branch, const float *bias, float *sum, float *kept) {
    for (int c = 0; c < WIDTH; c += LANES) {
        vector y = load_float(x + c) + load(branch + c) + load_float(bias + c);
        store_float(sum + c, y);
        if (kept) stream_float(kept + c, y);
    }
}

static void add(const float *x, const number *branch, const float *bias, float *sum, struct share share) {
    for (long at = share.first * WIDTH; at < share.end * WIDTH; at += WIDTH) add_row(x + at, branch + at, bias, sum + at, 0);
}

/* The LayerNorm of what `add` gives, while that is at hand. */
static void add_layer_norm(const float *x, const number *branch, const float *branch_bias, const float *weight, const float *bias,
                           float *sum, float *kept, number *out, float *statistics, struct share share) {
    for (long i = share.first; i < share.end; i++) {
        long at = i * WIDTH;
        add_row(x + at, branch + at, branch_bias, sum + at, kept ? kept + at : 0);
        normalize(sum + at, weight, bias, out + at, statistics + i, statistics + share.rows + i);
    }
}

/* What a product with the row is made of later is streamed, or stored if it comes next. */
static inline void put(number *to, vector x, int next) {
    if (next) store(to, x);
    else stream(to, x);
}

/* The gradient through a LayerNorm of x is added to dx, and that sum written to `branch`, unless it is null, for the product
   that x was made by; the LayerNorm itself is written again to `out`. `sums` are of weight, bias and that product's bias. */
static void layer_norm_backward(const number *gradient, const float *x, const float *weight, const float *bias,
                                const float *statistics, number *out, int next, float *dx, number *branch, float *sums,
                                struct share share) {
    const float *means = statistics, *scales = statistics + share.rows;
    vector d_weight[WIDTH / LANES] = {0}, d_bias[WIDTH / LANES] = {0}, d_branch[WIDTH / LANES] = {0};
    for (long i = share.first; i < share.end; i++) {
        long at = i * WIDTH;
        vector normal[WIDTH / LANES], d_normal[WIDTH / LANES], sum = {0}, products = {0};
        for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
            vector d = load(gradient + at + c), w = load_float(weight + c);
            normal[v] = (load_float(x + at + c) - means[i]) * scales[i];
            d_normal[v] = d * w;
            sum += d_normal[v];
            products += d_normal[v] * normal[v];
            d_weight[v] += d * normal[v];
            d_bias[v] += d;
            put(out + at + c, normal[v] * w + load_float(bias + c), next);
        }
        float mean = sum_of(sum) / WIDTH, mean_product = sum_of(products) / WIDTH;
        for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
            vector d = load_float(dx + at + c) + (d_normal[v] - mean - normal[v] * mean_product) * scales[i];
            store_float(dx + at + c, d);
            if (branch) store(branch + at + c, d);
            d_branch[v] += d;
        }
    }
    sums += 3L * share.thread * WIDTH;
    for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
        accumulate(sums + c, d_weight[v]);
        accumulate(sums + WIDTH + c, d_bias[v]);
        accumulate(sums + 2 * WIDTH + c, d_branch[v]);
    }
}

/* The gradient of `add`, for the last block's product and its bias. */
static void add_backward(const float *gradient, number *branch, float *sums, struct share share) {
    vector d_branch[WIDTH / LANES] = {0};
    for (long i = share.first; i < share.end; i++) {
        for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
            vector d = load_float(gradient + i * WIDTH + c);
            store(branch + i * WIDTH + c, d);
            d_branch[v] += d;
        }
    }
    for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) accumulate(sums + (long)share.thread * WIDTH + c, d_branch[v]);
}

/* Rows of `width` numbers to where they are kept, unless that is null. */
static void keep_rows(const number *x, number *kept, long width, struct share share) {
    if (!kept) return;
    for (long at = share.first * width; at < share.end * width; at += LANES) stream(kept + at, load(x + at));
}

/* ---- GELU: x times the chance that a normal variable is less than x ---- */

/* That chance, and the density at x: Abramowitz and Stegun, 7.1.26, to 1e-7, and to 1e-4 where `reciprocal` is in bfloat16. */
static inline vector chance_below(vector x, vector *density) {
    const int32_t sign = INT32_MIN;
    vector size = (vector)((integers)x & ~sign), e = exponential_2(x * x * -0.72134752f),
           t = reciprocal(size * 0.23164189f + 1.0f);
    vector p = t * 0.5307027145f - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    *density = e * 0.39894228f;
    vector beyond = 0.5f - p * t * e; /* the middle, up to x */
    return 0.5f + (vector)((integers)beyond ^ ((integers)x & sign));
}

/* The GELU is written over x, which is also `kept`, unless that is null. */
static void gelu(number *x, number *kept, struct share share) {
    for (long at = share.first * 4 * WIDTH; at < share.end * 4 * WIDTH; at += LANES) {
        vector density, y = load(x + at);
        if (kept) stream(kept + at, y);
        store(x + at, y * chance_below(y, &density));
    }
}

/* The gradient of x is written over it, and the GELU again to `out`. */
static void gelu_backward(const number *gradient, number *x, number *out, int next, float *sums, struct share share) {
    vector d_bias[4 * WIDTH / LANES] = {0};
    for (long i = share.first; i < share.end; i++) {
        for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) {
            long at = i * 4 * WIDTH + c;
            vector density, y = load(x + at), chance = chance_below(y, &density);
            vector d = load(gradient + at) * (chance + y * density);
            put(out + at, y * chance, next);
            store(x + at, d);
            d_bias[v] += d;
        }
    }
    for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) accumulate(sums + 4L * share.thread * WIDTH + c, d_bias[v]);
}

/* ---- Blocks ---- */

/* Of one block; a matrix is packed twice, as it is multiplied with in the forward pass and in the backward pass. */
struct weights {
    const float *norm_1, *norm_1_bias;
    const unit *attn, *attn_back;
    const float *attn_bias;
    const unit *proj, *proj_back;
    const float *proj_bias, *norm_2, *norm_2_bias;
    const unit *fc, *fc_back;
    const float *fc_bias;
    const unit *out, *out_back;
    const float *out_bias;
};

/* What a block makes of a window: `picogpt.kernels.room.Values`. */
struct values {
    float *x, *statistics_1;
    number *normed_1, *qkv, *read;
    float *scores, *middle, *statistics_2;
    number *normed_2, *hidden, *active, *d_branch, *d_middle, *fresh, *wide, *narrow, *branch;
};

/* Gradients of a block's weights: those of norms come with that of the bias of the product before them. */
struct sums {
    float *norm_1, *attn, *attn_bias, *proj, *norm_2, *fc, *fc_bias, *out;
};

static struct share share_of(long rolls, long slots) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads(), rows = rolls * slots, heads = rolls * HEADS;
    return (struct share){
        .thread = thread,
        .threads = threads,
        .rows = rows,
        .slots = slots,
        .first = first_of(rows, thread, threads),
        .end = first_of(rows, thread + 1, threads),
        .first_head = first_of(heads, thread, threads),
        .end_head = first_of(heads, thread + 1, threads),
    };
}

/* For the rows of other threads; where all of them have whole rolls, the heads of a thread are in its own rows. */
static inline void wait_for_rows(struct share share) {
    if (share.rows / share.slots % share.threads) {
#pragma omp barrier
    }
}

/* What of a block comes after its first LayerNorm, which is in v->narrow: its result is `path` + v->branch + the last bias.
   `path` is written to, x is read, and they may be the same. What is not null is kept. */
static __attribute__((noinline)) void forward_block(const struct weights *w, const struct values *v, const float *x, float *path,
                                                    float *middle, number *qkv, number *hidden, struct share share) {
    multiply_1_to_3(v->fresh, v->narrow, w->attn, w->attn_bias, share);
    keep_rows(v->fresh, qkv, 3 * WIDTH, share);
    wait_for_rows(share);
    attention(v->fresh, v->read, v->scores, share);
    wait_for_rows(share);
    multiply_1_to_1(v->branch, v->read, w->proj, 0, share);
    add_layer_norm(x, v->branch, w->proj_bias, w->norm_2, w->norm_2_bias, path, middle, v->narrow, v->statistics_2, share);
    multiply_1_to_4(v->wide, v->narrow, w->fc, w->fc_bias, share);
    gelu(v->wide, hidden, share);
    multiply_4_to_1(v->branch, v->wide, w->out, 0, share);
}

/* x of the first block through all of them, to `out`. Each block's x is kept if `trained`, and all else that the backward pass
   needs if `kept`. */
void forward(const struct weights *weights, const struct values *values, float *out, int trained, int kept, int layers, int rolls,
             int slots, int threads) {
#pragma omp parallel num_threads(threads)
    {
        struct share share = share_of(rolls, slots);
        begin_tiles();
        layer_norm(values->x, weights->norm_1, weights->norm_1_bias, values->narrow, values->statistics_1, share);
        for (int i = 0; i < layers; i++) {
            const struct weights *w = weights + i, *next = w + 1;
            const struct values *v = values + i, *after = v + 1;
            forward_block(w, v, i ? out : v->x, out, kept ? v->middle : 0, kept ? v->qkv : 0, kept ? v->hidden : 0, share);
            if (i + 1 == layers) add(out, v->branch, w->out_bias, out, share);
            else {
                add_layer_norm(out, v->branch, w->out_bias, next->norm_1, next->norm_1_bias, out, trained ? after->x : 0,
                               after->narrow, after->statistics_1, share);
            }
        }
        finish_streams();
        end_tiles();
    }
}

/* The product summed over rows, for whoever has all of them. */
void gradient_of_matrix(float *sums, const number *left, const number *right, unit *room, int n, int m, int rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
        multiply_by_rows(sums, left, n, right, m, rows, 0, 0, room, omp_get_thread_num(), omp_get_num_threads());
        end_tiles();
    }
}

/* Backward through a block: `dx` is the gradient of its result and becomes that of its x. If there is `room`, gradients of
   matrices are added up in it; else what they are made of stays. */
static void backward_block(const struct weights *w, const struct values *v, const struct sums *s, float *dx, number *d_branch,
                           unit *room, struct share share) {
    const long rows = share.rows;
    const int thread = share.thread, threads = share.threads, next = room != 0;
    multiply_1_to_4(v->wide, v->d_branch, w->out_back, 0, share);
    gelu_backward(v->wide, v->hidden, v->active, next, s->fc_bias, share);
    multiply_4_to_1(v->narrow, v->hidden, w->fc_back, 0, share);
    layer_norm_backward(v->narrow, v->middle, w->norm_2, w->norm_2_bias, v->statistics_2, v->normed_2, next, dx, v->d_middle,
                        s->norm_2, share);
    multiply_1_to_1(v->branch, v->d_middle, w->proj_back, 0, share);
    if (!room) wait_for_rows(share);
    else {
#pragma omp barrier
        multiply_by_rows(s->out, v->d_branch, WIDTH, v->active, 4 * WIDTH, rows, 1, 0, room, thread, threads);
        multiply_by_rows(s->fc, v->hidden, 4 * WIDTH, v->normed_2, WIDTH, rows, 1, 0, room, thread, threads);
        multiply_by_rows(s->proj, v->d_middle, WIDTH, v->read, WIDTH, rows, 1, 0, room, thread, threads);
    }
    attention_backward(v->branch, v->qkv, v->read, v->scores, s->attn_bias, share);
    if (!room) wait_for_rows(share);
    else {
#pragma omp barrier /* also as gradients are about to be written over what others may still multiply by rows */
    }
    multiply_3_to_1(v->narrow, v->qkv, w->attn_back, 0, share);
    layer_norm_backward(v->narrow, v->x, w->norm_1, w->norm_1_bias, v->statistics_1, v->normed_1, next, dx, d_branch, s->norm_1,
                        share);
    if (room) {
#pragma omp barrier
        multiply_by_rows(s->attn, v->qkv, 3 * WIDTH, v->normed_1, WIDTH, rows, 1, 0, room, thread, threads);
    }
}

/* `dx`, the gradient of what `forward` gave, becomes that of the first block's x. `last_bias` are sums of the last block's last
   bias. With `recompute` what a block makes is made again of its x. */
void backward(const struct weights *weights, const struct values *values, const struct sums *sums, float *dx, float *last_bias,
              unit *room, int recompute, int layers, int rolls, int slots, int threads) {
#pragma omp parallel num_threads(threads)
    {
        struct share share = share_of(rolls, slots);
        begin_tiles();
        add_backward(dx, values[layers - 1].d_branch, last_bias, share);
        for (int i = layers - 1; i >= 0; i--) {
            const struct weights *w = weights + i;
            const struct values *v = values + i;
            if (recompute) {
#pragma omp barrier /* as qkv is about to be written over, which others may still multiply by rows */
                layer_norm(v->x, w->norm_1, w->norm_1_bias, v->narrow, v->statistics_1, share);
                forward_block(w, v, v->x, v->middle, 0, v->qkv, v->hidden, share);
                finish_streams();
            }
            backward_block(w, v, sums + i, dx, i ? v[-1].d_branch : 0, room, share);
        }
        finish_streams();
        end_tiles();
    }
}

/* Pack matrix (out, in) as it is multiplied with in the forward pass and in the backward pass. */
static void pack_matrix(const float *matrix, unit *packed, unit *back, int out, int in, int thread, int threads) {
    const int panels = UP(out, PANEL) / PANEL, panels_back = UP(in, PANEL) / PANEL;
    for (int j = first_of(panels, thread, threads); j < first_of(panels, thread + 1, threads); j++) {
        pack_transposed(matrix, packed + (long)j * PANEL * (in / PAIR), out, in, j * PANEL);
    }
    for (int j = first_of(panels_back, thread, threads); j < first_of(panels_back, thread + 1, threads); j++) {
        pack_as_it_is(matrix, back + (long)j * PANEL * (out / PAIR), out, in, j * PANEL);
    }
}

/* `matrices` are four for each block, and `packed` the room for each of them twice, UP(out, PANEL) x in and UP(in, PANEL) x
   out. */
void pack(const float *const *matrices, unit *const *packed, int layers, int threads) {
    static const int shapes[4][2] = {{3 * WIDTH, WIDTH}, {WIDTH, WIDTH}, {4 * WIDTH, WIDTH}, {WIDTH, 4 * WIDTH}};
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < 4 * layers; i++) {
        pack_matrix(matrices[i], packed[2 * i], packed[2 * i + 1], shapes[i % 4][0], shapes[i % 4][1], omp_get_thread_num(),
                    omp_get_num_threads());
    }
}

/* Update `count` matrices (rows, columns), each by one thread; one side is WIDTH, and the other as long or four times. */
void update_matrices(const struct part *parts, const struct settings *settings, const int *in_a_row, unit *room, int count,
                     int rows, int columns, int threads) {
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int i = 0; i < count; i++) {
            update_matrix(parts + i, settings, in_a_row, room + omp_get_thread_num() * MUON_UNITS, rows, columns);
        }
        end_tiles();
    }
}

/* Columns of a panel, and units of the room that threads need: for Muon's updates the most. */
int panel_columns(void) { return PANEL; }
long room_units(int threads) { return threads * MUON_UNITS; }
int uses_matrix_tiles(void) {
#ifdef MATRIX_TILES
    return 1;
#else
    return 0;
#endif
}
