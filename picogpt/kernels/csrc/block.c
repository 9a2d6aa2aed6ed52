/* The model without its head, forward and backward, for all windows of a step's sequences; packing of
   its matrices; and Muon's update of them. For each window

      x = [context, wte[ids]] + wpe
      x = x + attention(LayerNorm(x)),   x = x + W_out gelu(W_fc LayerNorm(x))   for each block
      hidden = LayerNorm(x),   context = mean over the slots of hidden

   with biases. `forward` writes the final hidden states, and saves activations for `backward`, which
   turns their gradient into those of all weights. bindings.h describes the buffers.
   `picogpt.kernels.compiled` compiles this file for one shape of model; simd.h lists the macros.

   Threads: each works on rows of its own, and on heads of its own. They meet at a barrier only where one
   reads rows of another: before and after attention if the sequences cannot be dealt out evenly, around
   weight gradients that are added up window by window, and for the context vector between two windows.

   Memory: what only the backward pass will read is written with non-temporal stores, past the cache.
   What the next kernel reads is in scratch buffers that all blocks and windows share, and so in the
   cache. Gradients that are kept until all windows are done are written over activations that have been
   read for the last time. Gradients of norms and biases go to rows of one thread, or of one sequence, so
   sums do not depend on timing: results are deterministic. */

#include <omp.h>

#include "simd.h"
#include "gemm.h"
#include "gemm_tn.h"
#include "bindings.h"
#include "attention.h"
#include "muon.h"
#include "denormals.h"

#define EPSILON 1e-5f /* of LayerNorm, as in torch */

#ifdef __clang__
/* clang's OpenMP runtime has threads of its own beside those of torch. At a barrier they would spin for
   200 ms, on cores that torch's threads need; they sleep after 1 ms instead. */
__attribute__((constructor)) static void sleep_soon(void) { kmp_set_blocktime(1); }
#endif

/* What a thread of a parallel region sets up for itself; OpenMP keeps its threads, and torch uses them too.
   Returns what `end_thread` needs to put back. */
static unsigned begin_thread(void) {
    begin_tiles();
    return flush_denormals();
}

static void end_thread(unsigned denormals) {
    restore_denormals(denormals);
    end_tiles();
}

/* ---- LayerNorm and the residual path, for the rows of one thread ---- */

/* One LayerNorm over R rows: y = (x - mean) / sqrt(variance + epsilon) weight + bias. */
struct norm {
    const float *weight, *bias; /* (C) */
    float *stats;               /* (2, R) mean and 1 / standard deviation; the backward pass reads them */
    elem *out;                  /* (R, C) written, and written again by the backward pass */
};

/* LayerNorm of row i of R = rows: x (C) to out (C). noinline: the forward pass and its recomputation
   must round identically. */
static __attribute__((noinline)) void layer_norm_row(const float *x, const struct norm *norm, long i, long rows) {
    const float *weight = norm->weight, *bias = norm->bias;
    elem *out = norm->out + i * WIDTH;
    vf32 sum = {0}, squares = {0};
    for (int c = 0; c < WIDTH; c += LANES) sum += load_float(x + c); /* three passes over a row that is in the L1 cache */
    const float mean = reduce_sum(sum) / WIDTH;
    for (int c = 0; c < WIDTH; c += LANES) {
        vf32 distance = load_float(x + c) - mean;
        squares += distance * distance;
    }
    const float inv_std = 1 / sqrtf(reduce_sum(squares) / WIDTH + EPSILON);
    for (int c = 0; c < WIDTH; c += LANES) {
        store(out + c, (load_float(x + c) - mean) * inv_std * load_float(weight + c) + load_float(bias + c));
    }
    norm->stats[i] = mean;
    norm->stats[rows + i] = inv_std;
}

/* LayerNorm of this thread's rows of x (R, C). */
static void layer_norm(const float *x, struct norm norm, struct work work) {
    for (long i = work.first; i < work.end; i++) layer_norm_row(x + i * WIDTH, &norm, i, work.rows);
}

/* One step of the residual path: sum = x + branch + bias. The GEMM of the branch leaves its bias to
   this. */
struct residual {
    const float *x;     /* (R, C) */
    const elem *branch; /* (R, C) output of attention's projection or of the MLP, without bias */
    const float *bias;  /* (C) bias of that GEMM */
    float *sum;         /* (R, C) written; may be x itself */
    float *saved;       /* (R, C) a copy of the sum for the backward pass, or null */
};

/* Row i of the residual path; the copy is streamed, as nothing reads it before the backward pass. */
static inline void add_row(const struct residual *r, long i) {
    for (long at = i * WIDTH, c = 0; c < WIDTH; c += LANES) {
        vf32 y = load_float(r->x + at + c) + load(r->branch + at + c) + load_float(r->bias + c);
        store_float(r->sum + at + c, y);
        if (r->saved) stream_float(r->saved + at + c, y);
    }
}

/* Residual path and the LayerNorm of its sum, fused row by row: the row is still in the cache when it is
   normalized. */
static void add_layer_norm(struct residual residual, struct norm norm, struct work work) {
    for (long i = work.first; i < work.end; i++) {
        add_row(&residual, i);
        layer_norm_row(residual.sum + i * WIDTH, &norm, i, work.rows);
    }
}

/* Store an input of a weight gradient: to the cache if that GEMM comes next, or past it if all gradients
   wait for the last window. */
static inline void store_or_stream(elem *to, vf32 x, enum weight_grads when) {
    if (when == GRADS_PER_WINDOW) store(to, x);
    else stream(to, x);
}

/* Operands of a LayerNorm's backward pass: the gradient of its input is added to the gradient of the
   residual path, which bypasses the branch. */
struct norm_grads {
    const elem *d_out; /* (R, C) gradient of the output y */
    const float *x;    /* (R, C) input */
    float *d_resid;    /* (R, C) gradient of the residual path; added to */
    elem *d_branch;    /* (R, C) that sum in elems: d_out of the GEMM whose branch was added to x; may be null */
    float *params;     /* (T, 3, C) gradients of weight, of bias, and of that GEMM's bias; added to */
};

/* Sums over one thread's rows, held in vectors until all its rows are through. */
struct norm_sums {
    vf32 weight[WIDTH / LANES], bias[WIDTH / LANES], branch_bias[WIDTH / LANES];
};

/* Backward through row i of a LayerNorm. With n = (x - mean) inv_std and g = d_out weight:

      d_x = (g - mean(g) - n mean(g n)) inv_std

   The first loop also recomputes y = n weight + bias: cheaper than to save it, and the weight gradient
   needs it. The second one adds d_x to d_resid; the gradient of the branch's bias is the sum of that. */
static inline __attribute__((always_inline)) void norm_row_backward(const struct norm_grads *g, const struct norm *norm,
                                                                    struct norm_sums *sums, long i, long rows,
                                                                    enum weight_grads when) {
    const long at = i * WIDTH;
    const float mean = norm->stats[i], inv_std = norm->stats[rows + i];
    vf32 normal[WIDTH / LANES], d_normal[WIDTH / LANES], sum = {0}, products = {0};
    for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
        vf32 d = load(g->d_out + at + c), w = load_float(norm->weight + c);
        normal[v] = (load_float(g->x + at + c) - mean) * inv_std;
        d_normal[v] = d * w;
        sum += d_normal[v];
        products += d_normal[v] * normal[v];
        sums->weight[v] += d * normal[v];
        sums->bias[v] += d;
        store_or_stream(norm->out + at + c, normal[v] * w + load_float(norm->bias + c), when);
    }
    float d_mean = reduce_sum(sum) / WIDTH, mean_product = reduce_sum(products) / WIDTH; /* the two means of the formula */
    for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
        vf32 d = load_float(g->d_resid + at + c) + (d_normal[v] - d_mean - normal[v] * mean_product) * inv_std;
        store_float(g->d_resid + at + c, d);
        if (g->d_branch) store(g->d_branch + at + c, d);
        sums->branch_bias[v] += d;
    }
}

/* Backward through this thread's rows; its sums are added to row `thread` of params. */
static void layer_norm_backward(struct norm_grads grads, struct norm norm, enum weight_grads when, struct work work) {
    struct norm_sums sums = {0};
    for (long i = work.first; i < work.end; i++) norm_row_backward(&grads, &norm, &sums, i, work.rows, when);
    float *params = grads.params + 3L * work.thread * WIDTH;
    for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
        accumulate(params + c, sums.weight[v]);
        accumulate(params + WIDTH + c, sums.bias[v]);
        accumulate(params + 2 * WIDTH + c, sums.branch_bias[v]);
    }
}

/* Save this thread's rows (R, width) for the backward pass with non-temporal stores, unless `saved` is
   null. x itself is a scratch buffer that the next kernel reads from the cache. */
static void save_rows(const elem *x, elem *saved, long width, struct work work) {
    if (!saved) return;
    for (long at = work.first * width; at < work.end * width; at += LANES) stream(saved + at, load(x + at));
}

/* ---- GELU: gelu(x) = x P(x), with the CDF P of the normal distribution (exact, not the tanh form) ---- */

/* P(x), and the density p(x) = e^(-x^2 / 2) / sqrt(2 pi), for gelu'(x) = P(x) + x p(x). Abramowitz and
   Stegun, formula 7.1.26, a polynomial in t = 1 / (1 + 0.2316 |x|) times the exponential that the
   density needs anyway: exact to 1e-7, and to 1e-4 where `vreciprocal` is an approximation. */
static inline vf32 normal_cdf(vf32 x, vf32 *density) {
    const int32_t sign = INT32_MIN;
    /* |x|: the sign bit cleared */
    vf32 size = (vf32)((vi32)x & ~sign), e = vexp2(x * x * -0.72134752f), t = vreciprocal(size * 0.23164189f + 1.0f);
    vf32 p = t * 0.5307027145f - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    *density = e * 0.39894228f;
    vf32 beyond = 0.5f - p * t * e; /* P(|x|) - 1/2, which gets the sign of x: P is symmetric about (0, 1/2) */
    return 0.5f + (vf32)((vi32)beyond ^ ((vi32)x & sign));
}

/* Forward: x (R, 4C) becomes gelu(x), in place. The input x is saved for the backward pass, unless
   `saved` is null. */
static void gelu(elem *x, elem *saved, struct work work) {
    for (long at = work.first * 4 * WIDTH; at < work.end * 4 * WIDTH; at += LANES) {
        vf32 density, y = load(x + at);
        if (saved) stream(saved + at, y);
        store(x + at, y * normal_cdf(y, &density));
    }
}

/* Backward: the gradient of GELU's input a->fc (R, 4C), d_out gelu'(fc), goes to d_fc, which may be
   a->fc or d_out. gelu(fc) is recomputed into a->fc_gelu for the gradient of `out`: it shares its CDF
   with gelu'. The bias gradient of `fc` is the sum over rows, added to row `thread` of bias_grad (T, 4C). */
static void gelu_backward(const elem *d_out, const struct activations *a, elem *d_fc, float *bias_grad, enum weight_grads when,
                          struct work work) {
    vf32 sums[4 * WIDTH / LANES] = {0};
    for (long i = work.first; i < work.end; i++) {
        for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) {
            long at = i * 4 * WIDTH + c;
            vf32 density, y = load(a->fc + at), cdf = normal_cdf(y, &density);
            vf32 d = load(d_out + at) * (cdf + y * density);
            store_or_stream(a->fc_gelu + at, y * cdf, when);
            store(d_fc + at, d);
            sums[v] += d;
        }
    }
    for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) accumulate(bias_grad + 4L * work.thread * WIDTH + c, sums[v]);
}

/* ---- Blocks ---- */

/* The calling thread's part of a window of `sequences` sequences with `slots` positions each. */
static struct work work_of(long sequences, long slots) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads(), rows = sequences * slots, heads = sequences * HEADS;
    return (struct work){
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

/* Barrier before rows of other threads are read. Where the threads divide the sequences evenly it is not
   needed: rows and heads of a thread then belong to the same sequences, and attention never looks beyond
   one. */
static inline void wait_for_rows(struct work work) {
    if (work.rows / work.slots % work.threads) {
#pragma omp barrier
    }
}

/* The two LayerNorms of a block, with their statistics; `out` is scratch in the forward pass. */
static struct norm norm_1(const struct layer_weights *w, const struct activations *a, elem *out) {
    return (struct norm){w->ln1_weight, w->ln1_bias, a->ln1_stats, out};
}

static struct norm norm_2(const struct layer_weights *w, const struct activations *a, elem *out) {
    return (struct norm){w->ln2_weight, w->ln2_bias, a->ln2_stats, out};
}

/* One block forward, up to GELU. The first LayerNorm has been computed, to a->ln_scratch. The last GEMM, of
   a->fc_scratch, is left to the caller: the backward pass does not need it again. Reads x (R, C) and
   writes resid (R, C), which may be x.

   noinline: the backward pass recomputes blocks with the same code, and must round identically. */
static __attribute__((noinline)) void forward_block(const struct layer_weights *w, const struct activations *a, const float *x,
                                                    float *resid, enum save save, struct work work) {
    const int saves = save == SAVE_ACTIVATIONS;
    gemm_c_3c(a->qkv_scratch, a->ln_scratch, w->attn, w->attn_bias, work); /* q, k, v */
    save_rows(a->qkv_scratch, saves ? a->qkv : 0, 3 * WIDTH, work);
    wait_for_rows(work);
    /* Attention reads whole sequences, whose rows may belong to other threads. */
    attention(a->qkv_scratch, a->att_out, a->softmax_stats, work);
    wait_for_rows(work);
    gemm_c_c(a->branch, a->att_out, w->proj, 0, work); /* its bias is added below */
    /* When the backward pass recomputes the block, resid is resid_mid itself, and no copy is needed. */
    struct residual residual = {x, a->branch, w->proj_bias, resid, saves && resid != a->resid_mid ? a->resid_mid : 0};
    add_layer_norm(residual, norm_2(w, a, a->ln_scratch), work);
    gemm_c_4c(a->fc_scratch, a->ln_scratch, w->fc, w->fc_bias, work);
    gelu(a->fc_scratch, saves ? a->fc : 0, work);
}

/* ---- Before and after the blocks: embeddings, and the context roll ---- */

/* This thread's rows of x (R, C) for the window that begins at character `start`: the context vector in
   slot 0, the embeddings of the characters in the others, and the position embeddings of all. */
static void embed(const struct batch *batch, float *x, long start, struct work work) {
    for (long i = work.first; i < work.end; i++) {
        const long sequence = i / work.slots, slot = i % work.slots;
        const float *token = slot ? batch->wte + batch->ids[sequence * batch->chars + start + slot - 1] * WIDTH
                                  : batch->context + sequence * WIDTH;
        for (long c = 0; c < WIDTH; c += LANES) {
            store_float(x + i * WIDTH + c, load_float(token + c) + load_float(batch->wpe + slot * WIDTH + c));
        }
    }
}

/* Columns of this thread, for sums over the rows of all threads: each is summed in the order of the
   rows, so that a result is bit-identical for any number of threads. */
static inline long first_column(struct work work, int next) {
    return first_of(WIDTH / LANES, work.thread + next, work.threads) * LANES;
}

/* The end of a window, whose final hidden states are `rows` (R, C): those of characters go to
   batch->hidden, and their mean over all slots is the context vector of the next window. */
static void end_window(const struct batch *batch, const elem *rows, long start, struct work work) {
    for (long sequence = 0; sequence < batch->sequences; sequence++, rows += work.slots * WIDTH) {
        elem *hidden = batch->hidden + (sequence * batch->chars + start) * WIDTH;
        for (long c = first_column(work, 0); c < first_column(work, 1); c += LANES) {
            vf32 sum = load(rows + c);
            for (long slot = 1; slot < work.slots; slot++) {
                vf32 y = load(rows + slot * WIDTH + c);
                sum += y;
                store(hidden + (slot - 1) * WIDTH + c, y);
            }
            store_float(batch->context + sequence * WIDTH + c, sum * (1.0f / work.slots));
        }
    }
}

/* Backward of `end_window`, for this thread's rows: the gradient of a final hidden state comes from the
   head, unless it is slot 0, and from the mean. The residual stream begins without a gradient. */
static void end_window_backward(const struct batch *batch, const elem *d_hidden, elem *d_rows, long start, struct work work) {
    for (long i = work.first; i < work.end; i++) {
        const long sequence = i / work.slots, slot = i % work.slots;
        const elem *d = slot ? d_hidden + (sequence * batch->chars + start + slot - 1) * WIDTH : 0;
        for (long c = 0; c < WIDTH; c += LANES) {
            vf32 sum = load_float(batch->context + sequence * WIDTH + c) * (1.0f / work.slots);
            if (d) sum += load(d + c);
            store(d_rows + i * WIDTH + c, sum);
            store_float(batch->residual + i * WIDTH + c, (vf32){0});
        }
    }
}

/* Backward of `embed`, for this thread's columns: the gradient of x, in batch->residual, is added to that
   of the embeddings; that of slot 0 is the gradient of the context vector. */
static void embed_backward(const struct batch *batch, const struct batch_grads *grads, long start, struct work work) {
    for (long i = 0; i < work.rows; i++) {
        const long sequence = i / work.slots, slot = i % work.slots;
        float *token = slot ? grads->wte + batch->ids[sequence * batch->chars + start + slot - 1] * WIDTH
                            : batch->context + sequence * WIDTH;
        for (long c = first_column(work, 0); c < first_column(work, 1); c += LANES) {
            vf32 d = load_float(batch->residual + i * WIDTH + c);
            accumulate(grads->wpe + slot * WIDTH + c, d);
            if (slot) accumulate(token + c, d);
            else store_float(token + c, d);
        }
    }
}

/* ---- Forward ---- */

/* Forward pass of the window that begins at character `start`. */
static void forward_window(const struct batch *batch, const struct activations *a, long slots, long start) {
    struct work work = work_of(batch->sequences, slots);
    const struct layer_weights *w = batch->weights;
    float *resid = batch->residual;
    embed(batch, a->x, start, work);
    layer_norm(a->x, norm_1(w, a, a->ln_scratch), work);
    for (int i = 0; i < batch->layers; i++, w++, a++) {
        forward_block(w, a, i ? resid : a->x, resid, batch->save, work);
        gemm_4c_c(a->branch, a->fc_scratch, w->out, 0, work); /* its bias is added below */
        /* The block's last addition, fused with the LayerNorm that follows: the next block's, or the final one. */
        struct residual residual = {resid, a->branch, w->out_bias, resid, batch->save == SAVE_NOTHING ? 0 : a[1].x};
        add_layer_norm(residual, norm_1(w + 1, a + 1, a[1].ln_scratch), work);
    }
#pragma omp barrier
    end_window(batch, a->ln_scratch, start, work); /* sums over the rows of all threads */
#pragma omp barrier
}

/* Forward pass of a batch. One parallel region for all of it: threads start once, and no Python runs
   between the windows. */
void forward(const struct batch *batch) {
#pragma omp parallel num_threads(batch->threads)
    {
        const unsigned denormals = begin_thread();
        for (long i = 0, start = 0; i < batch->windows; start += batch->slots[i++] - 1) {
            forward_window(batch, batch->activations + i * (batch->layers + 1), batch->slots[i], start);
        }
        finish_streams(); /* before other threads, or the backward pass, read what was streamed */
        end_thread(denormals);
    }
}

/* ---- Backward ---- */

/* The gradient of one matrix over all windows at once: sums (outputs, inputs) = left^T right. One deep
   GEMM writes its sums once, instead of adding to them window by window. */
void weight_grad(const struct matrix_grad *grad, packed_elem *workspace) {
#pragma omp parallel num_threads(grad->threads)
    {
        const struct gemm_tn p = {
            .sums = grad->sums,
            .left = grad->left,
            .right = grad->right,
            .n = grad->outputs,
            .m = grad->inputs,
            .rows = grad->rows,
            .result = OVERWRITE,
            .triangle = ALL_ENTRIES,
        };
        const unsigned denormals = begin_thread();
        gemm_tn(p, workspace, omp_get_thread_num(), omp_get_num_threads());
        end_thread(denormals);
    }
}

/* Where and how the gradients of a window's matrices are computed: the last window, which comes first,
   writes them, and the others add to them. */
struct window_grads {
    enum weight_grads when;
    enum result result;
    packed_elem *workspace;
};

/* The gradient of a matrix (n, m) over one window, written or added to `sums`: left (R, n) is the
   gradient of the GEMM's output, and right (R, m) its input. */
static void window_weight_grad(float *sums, const elem *left, int n, const elem *right, int m, struct window_grads grads,
                               const struct work *work) {
    const struct gemm_tn p = {sums, left, right, n, m, work->rows, grads.result, ALL_ENTRIES};
    gemm_tn(p, grads.workspace, work->thread, work->threads);
}

/* One block backward: dx (R, C), the gradient of its output, becomes that of its x, by way of scratch
   buffers. a->d_mlp_out holds dx in elems already: the LayerNorm after it left it there. d_branch (R,
   C), or null, is where this block leaves the same for the block before it.

   dx of a GEMM is dout W, by the copy of W that was packed untransposed (`*_back`). Deferred, the
   gradients of fc and qkv are kept in place of the activations; else they are read within the block, and
   stay in scratch, which never leaves the cache. */
static void backward_block(const struct layer_weights *w, const struct activations *a, const struct param_grads *g,
                           struct window_grads grads, float *dx, elem *d_branch, struct work work) {
    const enum weight_grads when = grads.when;
    elem *d_fc = when == GRADS_DEFERRED ? a->fc : a->fc_scratch, *d_qkv = when == GRADS_DEFERRED ? a->qkv : a->qkv_scratch;
    /* MLP: back through `out`, GELU, `fc` and the second LayerNorm. */
    gemm_c_4c(a->fc_scratch, a->d_mlp_out, w->out_back, 0, work);
    gelu_backward(a->fc_scratch, a, d_fc, g->fc_bias, when, work);
    gemm_4c_c(a->ln_scratch, d_fc, w->fc_back, 0, work);
    struct norm_grads ln2 = {a->ln_scratch, a->resid_mid, dx, a->d_attn_out, g->ln2};
    layer_norm_backward(ln2, norm_2(w, a, a->ln2_out), when, work);
    /* Attention: back through `proj`; a->branch becomes the gradient of the heads' outputs. */
    gemm_c_c(a->branch, a->d_attn_out, w->proj_back, 0, work);
    /* Weight gradients sum over the rows of all threads: all of them must be written. Deferred, only
       attention may need rows of others. */
    if (when == GRADS_DEFERRED) wait_for_rows(work);
    else {
#pragma omp barrier
        window_weight_grad(g->out, a->d_mlp_out, WIDTH, a->fc_gelu, 4 * WIDTH, grads, &work);
        window_weight_grad(g->fc, d_fc, 4 * WIDTH, a->ln2_out, WIDTH, grads, &work);
        window_weight_grad(g->proj, a->d_attn_out, WIDTH, a->att_out, WIDTH, grads, &work);
    }
    attention_backward(a->branch, a, d_qkv, g->attn_bias, work);
    if (when == GRADS_DEFERRED) wait_for_rows(work);
    else {
        /* gemm_3c_c reads rows of qkv's gradient that other threads wrote, and what follows overwrites
           buffers that their window_weight_grad may still read. */
#pragma omp barrier
    }
    /* Back through `attn` and the first LayerNorm, into dx. */
    gemm_3c_c(a->ln_scratch, d_qkv, w->attn_back, 0, work);
    struct norm_grads ln1 = {a->ln_scratch, a->x, dx, d_branch, g->ln1};
    layer_norm_backward(ln1, norm_1(w, a, a->ln1_out), when, work);
    if (when == GRADS_PER_WINDOW) {
#pragma omp barrier
        window_weight_grad(g->attn, d_qkv, 3 * WIDTH, a->ln1_out, WIDTH, grads, &work);
    }
}

/* Backward pass of the window that begins at character `start`, last block first. With SAVE_INPUTS each
   block's activations are recomputed from its x before its backward pass (gradient checkpointing; Chen
   et al., 2016). */
static void backward_window(const struct batch *batch, const struct batch_grads *grads, const struct activations *a, long slots,
                            long start) {
    struct work work = work_of(batch->sequences, slots);
    const int is_last = start + slots - 1 == batch->chars;
    const struct window_grads of_window = {grads->weight_grads, is_last ? OVERWRITE : ACCUMULATE, grads->workspace};
    const struct layer_weights *w = batch->weights + batch->layers;
    const struct param_grads *g = grads->params + batch->layers;
    float *dx = batch->residual;
    a += batch->layers;
    end_window_backward(batch, grads->hidden, a->ln_scratch, start, work);
    /* The final LayerNorm; its output, which is recomputed to a->branch, is not needed. */
    struct norm_grads final = {a->ln_scratch, a->x, dx, a[-1].d_mlp_out, g->ln1};
    layer_norm_backward(final, norm_1(w, a, a->branch), GRADS_PER_WINDOW, work);
    for (int i = batch->layers - 1; i >= 0; i--) {
        w--, a--, g--;
        if (batch->save == SAVE_INPUTS) {
            /* qkv's gradient, in scratch, is about to be overwritten, which other threads may still read. */
#pragma omp barrier
            layer_norm(a->x, norm_1(w, a, a->ln_scratch), work);
            forward_block(w, a, a->x, a->resid_mid, SAVE_ACTIVATIONS, work);
            finish_streams(); /* the backward pass reads what was streamed */
        }
        backward_block(w, a, g, of_window, dx, i ? a[-1].d_mlp_out : 0, work);
    }
#pragma omp barrier
    embed_backward(batch, grads, start, work); /* adds the rows of all threads */
#pragma omp barrier
}

/* Backward pass of a batch, last window first: each gets a part of its gradient by way of the context
   vector of the next one. */
void backward(const struct batch *batch, const struct batch_grads *grads) {
#pragma omp parallel num_threads(batch->threads)
    {
        const unsigned denormals = begin_thread();
        for (long i = batch->windows - 1, start = batch->chars; i >= 0; i--) {
            start -= batch->slots[i] - 1;
            backward_window(batch, grads, batch->activations + i * (batch->layers + 1), batch->slots[i], start);
        }
        finish_streams();
        end_thread(denormals);
    }
}

/* ---- Packing and updates of matrices ---- */

/* Pack matrix (out, in) for the forward pass, UP(out, PANEL) x in, and for the backward pass, UP(in,
   PANEL) x out; threads divide the panels. */
static void pack_matrix(const float *matrix, packed_elem *packed, packed_elem *back, int out, int in) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int panels = UP(out, PANEL) / PANEL, panels_back = UP(in, PANEL) / PANEL;
    for (int j = first_of(panels, thread, threads); j < first_of(panels, thread + 1, threads); j++) {
        pack_transposed(matrix, packed + (long)j * PANEL * (in / PER_PACKED), out, in, j * PANEL);
    }
    for (int j = first_of(panels_back, thread, threads); j < first_of(panels_back, thread + 1, threads); j++) {
        pack_untransposed(matrix, back + (long)j * PANEL * (out / PER_PACKED), out, in, j * PANEL);
    }
}

/* Pack the four matrices of each block, attn, proj, fc and out, once for all windows of a step. `packed`
   has two buffers for each: forward and backward. */
void pack(const float *const *matrices, packed_elem *const *packed, int layers, int threads) {
    static const int shapes[4][2] = {{3 * WIDTH, WIDTH}, {WIDTH, WIDTH}, {4 * WIDTH, WIDTH}, {WIDTH, 4 * WIDTH}};
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < 4 * layers; i++) {
        pack_matrix(matrices[i], packed[2 * i], packed[2 * i + 1], shapes[i % 4][0], shapes[i % 4][1]);
    }
}

/* One step of Muon for matrices of one shape. Each matrix is updated by one thread, in a workspace of
   its own: whole matrices in parallel need no barriers, and a result does not depend on the number of
   threads. */
void update_matrices(const struct muon_matrix *matrices, const struct muon_settings *settings, packed_elem *workspace) {
#pragma omp parallel num_threads(settings->threads)
    {
        const unsigned denormals = begin_thread();
/* Dynamic: a thread that is done takes the next matrix. */
#pragma omp for schedule(dynamic)
        for (int i = 0; i < settings->matrices; i++) {
            update_matrix(matrices + i, settings, workspace + omp_get_thread_num() * MUON_ELEMS);
        }
        end_thread(denormals);
    }
}

/* Sizes for Python's allocations: columns of a panel, and packed_elems of workspace for all threads.
   Muon needs the most; weight gradients use a part of it. */
int panel_columns(void) { return PANEL; }
long workspace_elems(int threads) { return threads * MUON_ELEMS; }
/* Whether this library was compiled for AMX. */
int uses_matrix_tiles(void) {
#ifdef MATRIX_TILES
    return 1;
#else
    return 0;
#endif
}
