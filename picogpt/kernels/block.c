/* The blocks of the model, forward and backward, for one window of all rolls.

   `picogpt.kernels.compiled` has this compiled for one shape of model; vectors.h says how. Every thread has a share of the rows, and
   another of the heads. They wait for each other only where they need each other's: not at all where each has rolls of its own.

   A bias is added where the product before it is read, as one pass more would cost as much as the reading. What is made of gradients
   on the way is written over what has been read for the last time. Gradients of norms and biases are added to sums in which each
   thread, or each roll, has a row of its own, so that they do not depend on who is first. */

#include <omp.h>

#include "vectors.h"
#include "product.h"
#include "attention.h"

#define EPSILON 1e-5f

/* ---- LayerNorm and the residual paths, for a share of the rows ---- */

static inline void add_row(const float *x, const number *branch, const float *bias, float *out) {
    for (int c = 0; c < WIDTH; c += LANES) store_float(out + c, load_float(x + c) + load(branch + c) + load_float(bias + c));
}

static void add(const float *x, const number *branch, const float *bias, float *out, struct share share) {
    for (long at = share.first * WIDTH; at < share.end * WIDTH; at += WIDTH) add_row(x + at, branch + at, bias, out + at);
}

static inline void normalize(const float *x, const float *weight, const float *bias, number *out, float *mean, float *scale) {
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
static void layer_norm(const float *x, const float *weight, const float *bias, number *out, float *statistics, struct share share) {
    for (long i = share.first; i < share.end; i++) {
        normalize(x + i * WIDTH, weight, bias, out + i * WIDTH, statistics + i, statistics + share.rows + i);
    }
}

/* The LayerNorm of what `add` gives, while that is at hand. */
static void add_layer_norm(const float *x, const number *branch, const float *branch_bias, const float *weight, const float *bias,
                           float *sum, number *out, float *statistics, struct share share) {
    for (long i = share.first; i < share.end; i++) {
        add_row(x + i * WIDTH, branch + i * WIDTH, branch_bias, sum + i * WIDTH);
        normalize(sum + i * WIDTH, weight, bias, out + i * WIDTH, statistics + i, statistics + share.rows + i);
    }
}

/* The gradient through a LayerNorm of x is added to dx, and that sum written to `branch`, unless it is null, for the product that x
   was made by; the LayerNorm itself is written again to `out`, likewise. `sums` are of weight, bias and that product's bias. */
static void layer_norm_backward(const number *gradient, const float *x, const float *weight, const float *bias, const float *statistics,
                                number *out, float *dx, number *branch, float *sums, struct share share) {
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
            if (out) store(out + at + c, normal[v] * w + load_float(bias + c));
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

/* ---- GELU: x times the chance that a normal variable is less than x ---- */

/* That chance, and the density at x: Abramowitz and Stegun, 7.1.26, to 1e-7. */
static inline vector chance_below(vector x, vector *density) {
    vector size = choose(x < 0.0f, -x, x), e = exponential(x * x * -0.5f), t = 1.0f / (size * 0.23164189f + 1.0f);
    vector p = t * 0.5307027145f - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    p = p * t * e;
    *density = e * 0.39894228f;
    return choose(x < 0.0f, p, 1.0f - p);
}

static void gelu(const number *x, const float *bias, number *out, struct share share) {
    for (long i = share.first; i < share.end; i++) {
        for (int c = 0; c < 4 * WIDTH; c += LANES) {
            long at = i * 4 * WIDTH + c;
            vector density, y = load(x + at) + load_float(bias + c);
            store(out + at, y * chance_below(y, &density));
        }
    }
}

/* The gradient of x is written over it, and the GELU again to `out`, unless it is null. */
static void gelu_backward(const number *gradient, number *x, const float *bias, number *out, float *sums, struct share share) {
    vector d_bias[4 * WIDTH / LANES] = {0};
    for (long i = share.first; i < share.end; i++) {
        for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) {
            long at = i * 4 * WIDTH + c;
            vector density, y = load(x + at) + load_float(bias + c), chance = chance_below(y, &density);
            vector d = load(gradient + at) * (chance + y * density);
            if (out) store(out + at, y * chance);
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
    number *normed_2, *hidden, *active, *branch, *d_branch, *d_active, *d_normed, *d_middle, *d_read;
};

/* Gradients of a block's weights: those of norms come with that of the bias of the product before them. */
struct sums {
    float *norm_1, *attn, *attn_bias, *proj, *norm_2, *fc, *fc_bias, *out;
};

static struct share share_of(long rolls, long slots) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads(), rows = rolls * slots, heads = rolls * HEADS;
    return (struct share){
        .thread = thread, .threads = threads, .rows = rows, .slots = slots,
        .first = rows * thread / threads, .end = rows * (thread + 1) / threads,
        .first_head = heads * thread / threads, .end_head = heads * (thread + 1) / threads,
    };
}

/* For the rows of other threads; where all of them have whole rolls, the heads of a thread are in its own rows. */
static inline void wait_for_rows(struct share share) {
    if (share.rows / share.slots % share.threads) {
#pragma omp barrier
    }
}

/* What of a block comes after its first LayerNorm: `branch` is to be added to `middle`, with the last bias. */
static void forward_block(const struct weights *w, const struct values *v, struct share share) {
    multiply_1_to_3(v->qkv, v->normed_1, w->attn, share);
    wait_for_rows(share);
    attention(v->qkv, w->attn_bias, v->read, v->scores, share);
    wait_for_rows(share);
    multiply_1_to_1(v->branch, v->read, w->proj, share);
    add_layer_norm(v->x, v->branch, w->proj_bias, w->norm_2, w->norm_2_bias, v->middle, v->normed_2, v->statistics_2, share);
    multiply_1_to_4(v->hidden, v->normed_2, w->fc, share);
    gelu(v->hidden, w->fc_bias, v->active, share);
    multiply_4_to_1(v->branch, v->active, w->out, share);
}

/* x of the first block through all of them, to `out`. */
void forward(const struct weights *weights, const struct values *values, float *out, int layers, int rolls, int slots, int threads) {
#pragma omp parallel num_threads(threads)
    {
        struct share share = share_of(rolls, slots);
        begin_tiles();
        layer_norm(values->x, weights->norm_1, weights->norm_1_bias, values->normed_1, values->statistics_1, share);
        for (int i = 0; i < layers; i++) {
            const struct weights *w = weights + i, *next = w + 1;
            const struct values *v = values + i, *after = v + 1;
            forward_block(w, v, share);
            if (i + 1 == layers) add(v->middle, v->branch, w->out_bias, out, share);
            else {
                add_layer_norm(v->middle, v->branch, w->out_bias, next->norm_1, next->norm_1_bias, after->x, after->normed_1,
                               after->statistics_1, share);
            }
        }
        end_tiles();
    }
}

/* The product summed over rows, for whoever has all of them. */
void gradient_of_matrix(float *sums, const number *left, const number *right, unit *room, int n, int m, int rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
        multiply_by_rows(sums, left, n, right, m, rows, 0, room, omp_get_thread_num(), omp_get_num_threads());
        end_tiles();
    }
}

/* Backward through a block: `dx` is the gradient of its result and becomes that of its x. If there is `room`, gradients of
   matrices are added up in it, and what they are made of is made again where it has been written over; else it all stays. */
static void backward_block(const struct weights *w, const struct values *v, const struct sums *s, float *dx, number *d_branch,
                           unit *room, struct share share) {
    const long rows = share.rows;
    const int thread = share.thread, threads = share.threads;
    multiply_1_to_4(v->d_active, v->d_branch, w->out_back, share);
    gelu_backward(v->d_active, v->hidden, w->fc_bias, room ? v->active : 0, s->fc_bias, share);
    multiply_4_to_1(v->d_normed, v->hidden, w->fc_back, share);
    layer_norm_backward(v->d_normed, v->middle, w->norm_2, w->norm_2_bias, v->statistics_2, room ? v->normed_2 : 0, dx, v->d_middle,
                        s->norm_2, share);
    multiply_1_to_1(v->d_read, v->d_middle, w->proj_back, share);
    if (!room) wait_for_rows(share);
    else {
#pragma omp barrier
        multiply_by_rows(s->out, v->d_branch, WIDTH, v->active, 4 * WIDTH, rows, 1, room, thread, threads);
        multiply_by_rows(s->fc, v->hidden, 4 * WIDTH, v->normed_2, WIDTH, rows, 1, room, thread, threads);
        multiply_by_rows(s->proj, v->d_middle, WIDTH, v->read, WIDTH, rows, 1, room, thread, threads);
    }
    attention_backward(v->d_read, v->qkv, w->attn_bias, v->read, v->scores, s->attn_bias, share);
    wait_for_rows(share);
    multiply_3_to_1(v->d_normed, v->qkv, w->attn_back, share);
    layer_norm_backward(v->d_normed, v->x, w->norm_1, w->norm_1_bias, v->statistics_1, room ? v->normed_1 : 0, dx, d_branch,
                        s->norm_1, share);
    if (room) {
#pragma omp barrier
        multiply_by_rows(s->attn, v->qkv, 3 * WIDTH, v->normed_1, WIDTH, rows, 1, room, thread, threads);
    }
}

/* `dx`, the gradient of what `forward` gave, becomes that of the first block's x. `last_bias` are sums of the last block's last bias.
   With `recompute` what a block makes is made again of its x. */
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
                layer_norm(v->x, w->norm_1, w->norm_1_bias, v->normed_1, v->statistics_1, share);
                forward_block(w, v, share);
            }
            backward_block(w, v, sums + i, dx, i ? v[-1].d_branch : 0, room, share);
        }
        end_tiles();
    }
}

/* Pack matrix (out, in) as it is multiplied with in the forward pass and in the backward pass. */
static void pack_matrix(const float *matrix, unit *packed, unit *back, int out, int in, int thread, int threads) {
    const int panels = UP(out, PANEL) / PANEL, panels_back = UP(in, PANEL) / PANEL;
    for (int j = panels * thread / threads; j < panels * (thread + 1) / threads; j++) {
        pack_transposed(matrix, packed + (long)j * PANEL * (in / PAIR), out, in, j * PANEL);
    }
    for (int j = panels_back * thread / threads; j < panels_back * (thread + 1) / threads; j++) {
        pack_as_it_is(matrix, back + (long)j * PANEL * (out / PAIR), out, in, j * PANEL);
    }
}

/* `matrices` are four for each block, and `packed` the room for each of them twice, UP(out, PANEL) x in and UP(in, PANEL) x out. */
void pack(const float *const *matrices, unit *const *packed, int layers, int threads) {
    static const int shapes[4][2] = {{3 * WIDTH, WIDTH}, {WIDTH, WIDTH}, {4 * WIDTH, WIDTH}, {WIDTH, 4 * WIDTH}};
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < 4 * layers; i++) {
        pack_matrix(matrices[i], packed[2 * i], packed[2 * i + 1], shapes[i % 4][0], shapes[i % 4][1], omp_get_thread_num(),
                    omp_get_num_threads());
    }
}

/* Columns of a panel, and units for what is packed of two matrices that are multiplied row by row. */
int panel_columns(void) { return PANEL; }
long room_units(int threads) { return (long)threads * THREAD_UNITS; }
int uses_matrix_tiles(void) {
#ifdef MATRIX_TILES
    return 1;
#else
    return 0;
#endif
}
