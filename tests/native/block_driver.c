/* Runs the training kernels on odd shapes under sanitizers: every buffer has exactly the size that it
   needs, so one entry too many is an error that AddressSanitizer reports.

   tests/kernels/test_native.py compiles this with block.c for one shape of model. All memory begins as NaN, so
   that reading what was never written shows in the results, which must be finite. Saved, recomputed and
   deferred activations must give bit-identical gradients. */

#include <stdio.h>
#include <stdlib.h>

/* The kernels are included rather than linked, so that sanitizers and warnings see one program. */
#include "block.c"

enum { LAYERS = 2, MATRICES = 4, WINDOWS = 2, VOCAB = 3 };

/* (out, in) of attn, proj, fc and out. */
static const int shapes[MATRICES][2] = {{3 * WIDTH, WIDTH}, {WIDTH, WIDTH}, {4 * WIDTH, WIDTH}, {WIDTH, 4 * WIDTH}};

/* All buffers of a case, which `free_all` frees at its end. */
static void *allocated[4096];
static int n_allocated;

/* A buffer of `count` entries of `size` bytes, aligned as torch aligns them. Bytes of 0xff are NaN in
   float32 and in bfloat16. */
static void *buffer(size_t count, size_t size) {
    void *memory;
    if (n_allocated == 4096 || posix_memalign(&memory, 64, count * size)) exit(3);
    memset(memory, 0xff, count * size);
    return allocated[n_allocated++] = memory;
}

/* End of a case. */
static void free_all(void) {
    while (n_allocated) free(allocated[--n_allocated]);
}

/* `count` floats in (-scale, scale), from a linear congruential generator: the same numbers in every
   run. */
static float *floats_of(size_t count, float scale) {
    static uint32_t state = 1;
    float *x = buffer(count, sizeof *x);
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = scale * ((float)(state >> 8) / (1 << 23) - 1);
    }
    return x;
}

/* Gradients of vectors are added to, so they begin as zeros. */
static float *zeros(size_t count) { return memset(buffer(count, sizeof(float)), 0, count * sizeof(float)); }

/* End with an error unless `holds`. */
static void check(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "block_driver: %s\n", what);
    exit(1);
}

/* Every entry must be a number: NaN would come from memory that nobody wrote, or from a kernel's error. */
static void check_finite(const float *x, size_t count, const char *what) {
    for (size_t i = 0; i < count; i++) check(isfinite(x[i]), what);
}

/* Packed weights of LAYERS blocks and the final LayerNorm, the matrices that they were packed from, and embeddings. */
struct model {
    struct layer_weights layers[LAYERS + 1];
    float *matrices[LAYERS * MATRICES];
    float *wte, *wpe;
};

/* Random weights. p[2 i] is matrix i packed for the forward pass, p[2 i + 1] for the backward pass. */
static void make_model(struct model *m, int slots, int threads) {
    packed_elem *packed[2 * LAYERS * MATRICES];
    for (int i = 0; i < LAYERS * MATRICES; i++) {
        const int out = shapes[i % MATRICES][0], in = shapes[i % MATRICES][1];
        m->matrices[i] = floats_of((size_t)out * in, 0.3f);
        /* Whole panels: as Python's Kernels.packed allocates them. */
        packed[2 * i] = buffer((size_t)UP(out, PANEL) * in, sizeof(elem));
        packed[2 * i + 1] = buffer((size_t)UP(in, PANEL) * out, sizeof(elem));
    }
    pack((const float *const *)m->matrices, packed, LAYERS, threads);
    for (int i = 0; i < LAYERS; i++) {
        packed_elem **p = packed + 2 * MATRICES * i;
        m->layers[i] = (struct layer_weights){
            floats_of(WIDTH, 1), floats_of(WIDTH, 1), p[0], p[1], floats_of(3 * WIDTH, 1), p[2], p[3], floats_of(WIDTH, 1),
            floats_of(WIDTH, 1), floats_of(WIDTH, 1), p[4], p[5], floats_of(4 * WIDTH, 1), p[6], p[7], floats_of(WIDTH, 1),
        };
    }
    /* The final LayerNorm: all other fields are null. */
    m->layers[LAYERS] = (struct layer_weights){.ln1_weight = floats_of(WIDTH, 1), .ln1_bias = floats_of(WIDTH, 1)};
    m->wte = floats_of(VOCAB * WIDTH, 1);
    m->wpe = floats_of(slots * WIDTH, 1);
}

/* Buffers of all blocks and the final LayerNorm for `rows` rows of a window, none of them shared, in the sizes of bindings.h. */
static void make_activations(struct activations *a, size_t rows) {
    for (int i = 0; i < LAYERS; i++) {
        a[i] = (struct activations){
            .x = buffer(rows * WIDTH, 4),
            .ln1_stats = buffer(2 * rows, 4),
            .ln1_out = buffer(rows * WIDTH, sizeof(elem)),
            .qkv = buffer(rows * 3 * WIDTH, sizeof(elem)),
            .att_out = buffer(rows * WIDTH, sizeof(elem)),
            .softmax_stats = buffer(2 * rows * HEADS, 4),
            .resid_mid = buffer(rows * WIDTH, 4),
            .ln2_stats = buffer(2 * rows, 4),
            .ln2_out = buffer(rows * WIDTH, sizeof(elem)),
            .fc = buffer(rows * 4 * WIDTH, sizeof(elem)),
            .fc_gelu = buffer(rows * 4 * WIDTH, sizeof(elem)),
            .d_mlp_out = buffer(rows * WIDTH, sizeof(elem)),
            .d_attn_out = buffer(rows * WIDTH, sizeof(elem)),
            .qkv_scratch = buffer(rows * 3 * WIDTH, sizeof(elem)),
            .fc_scratch = buffer(rows * 4 * WIDTH, sizeof(elem)),
            .ln_scratch = buffer(rows * WIDTH, sizeof(elem)),
            .branch = buffer(rows * WIDTH, sizeof(elem)),
        };
    }
    a[LAYERS] = (struct activations){
        .x = buffer(rows * WIDTH, 4),
        .ln1_stats = buffer(2 * rows, 4),
        .ln_scratch = buffer(rows * WIDTH, sizeof(elem)),
        .branch = buffer(rows * WIDTH, sizeof(elem)),
    };
}

/* Gradients, with a row for each thread or each sequence where bindings.h says so. */
static void make_grads(struct param_grads *g, int sequences, int threads) {
    for (int i = 0; i < LAYERS; i++) {
        g[i] = (struct param_grads){
            .ln1 = zeros(threads * 3 * WIDTH),
            .attn = buffer(3 * WIDTH * WIDTH, 4),
            .attn_bias = zeros(sequences * 3 * WIDTH),
            .proj = buffer(WIDTH * WIDTH, 4),
            .ln2 = zeros(threads * 3 * WIDTH),
            .fc = buffer(4 * WIDTH * WIDTH, 4),
            .fc_bias = zeros(threads * 4 * WIDTH),
            .out = buffer(4 * WIDTH * WIDTH, 4),
        };
    }
    g[LAYERS] = (struct param_grads){.ln1 = zeros(threads * 3 * WIDTH)};
}

/* `count` entries of the final hidden states must be finite. */
static void check_hidden(const elem *hidden, size_t count) {
    for (size_t i = 0; i < count; i += LANES) {
        float x[LANES];
        store_float(x, load(hidden + i));
        check_finite(x, LANES, "the hidden states are not finite");
    }
}

/* Forward and backward; returns the gradient of the position embeddings (slots, C), or null without a
   backward pass. The batch has a window of one character, and one of `slots`. All buffers are new and hold
   NaN, so each call shows what it reads too early. */
static float *run(const struct model *m, int sequences, int slots, int threads, enum save save, enum weight_grads when) {
    const int32_t of_windows[WINDOWS] = {2, slots};
    const size_t chars = slots, rows = (size_t)sequences * slots; /* 1 + slots - 1 characters */
    struct activations activations[WINDOWS][LAYERS + 1];
    struct param_grads params[LAYERS + 1];
    /* As SAVE_ACTIVATIONS needs them; others use fewer. */
    for (int i = 0; i < WINDOWS; i++) make_activations(activations[i], (size_t)sequences * of_windows[i]);
    make_grads(params, sequences, threads);
    int64_t *ids = buffer(sequences * chars, sizeof *ids);
    for (size_t i = 0; i < sequences * chars; i++) ids[i] = i % VOCAB;
    struct batch batch = {
        .weights = m->layers,
        .activations = activations[0],
        .wte = m->wte,
        .wpe = m->wpe,
        .ids = ids,
        .slots = of_windows,
        .hidden = buffer(sequences * chars * WIDTH, sizeof(elem)),
        .residual = buffer(rows * WIDTH, 4),
        .context = zeros(sequences * WIDTH),
        .layers = LAYERS,
        .sequences = sequences,
        .windows = WINDOWS,
        .chars = chars,
        .threads = threads,
        .save = save,
    };
    packed_elem *workspace = buffer(workspace_elems(threads), sizeof *workspace);
    forward(&batch);
    check_hidden(batch.hidden, sequences * chars * WIDTH);
    /* Validation ends here. The gradient of the hidden states is, for want of a loss, what they are. */
    if (save == SAVE_NOTHING) return 0;
    batch.context = zeros(sequences * WIDTH);
    struct batch_grads grads = {
        .params = params,
        .wte = zeros(VOCAB * WIDTH),
        .wpe = zeros(slots * WIDTH),
        .hidden = batch.hidden,
        .workspace = workspace,
        .weight_grads = when,
    };
    backward(&batch, &grads);
    check_finite(grads.wte, VOCAB * WIDTH, "an embedding's gradient is not finite");
    check_finite(grads.wpe, slots * WIDTH, "an embedding's gradient is not finite");
    check_finite(params[LAYERS].ln1, 3 * WIDTH, "the final norm's gradient is not finite");
    for (int i = 0; i < LAYERS; i++) {
        const struct param_grads *g = params + i;
        /* Deferred weight gradients are computed from the saved activations, as kernels/autograd.py does; here of
           one window after the other, as their buffers are apart. */
        for (int window = 0; when == GRADS_DEFERRED && window < WINDOWS; window++) {
            const struct activations *a = activations[window] + i;
            const int n = sequences * of_windows[window];
            const struct matrix_grad of[MATRICES] = {
                /* left: gradient of the GEMM's output, which now stands in qkv, d_attn_out, fc and
                   d_mlp_out; right: its input */
                {g->attn, a->qkv, a->ln1_out, 3 * WIDTH, WIDTH, n, threads},
                {g->proj, a->d_attn_out, a->att_out, WIDTH, WIDTH, n, threads},
                {g->fc, a->fc, a->ln2_out, 4 * WIDTH, WIDTH, n, threads},
                {g->out, a->d_mlp_out, a->fc_gelu, WIDTH, 4 * WIDTH, n, threads},
            };
            for (int k = 0; k < MATRICES; k++) weight_grad(of + k, workspace);
        }
        /* Row 0 of each vector's gradient, and the matrices. */
        check_finite(g->ln1, 3 * WIDTH, "a norm's gradient is not finite");
        check_finite(g->attn, 3 * WIDTH * WIDTH, "a matrix's gradient is not finite");
        check_finite(g->proj, WIDTH * WIDTH, "a matrix's gradient is not finite");
        check_finite(g->fc, 4 * WIDTH * WIDTH, "a matrix's gradient is not finite");
        check_finite(g->out, 4 * WIDTH * WIDTH, "a matrix's gradient is not finite");
        check_finite(g->fc_bias, 4 * WIDTH, "a bias's gradient is not finite");
    }
    return grads.wpe;
}

/* Three matrices through a step of Muon, with both ways to share Gram matrices: 1 + 2 + 2 iterations and
   all five at once. */
static void update(int rows, int columns, int threads) {
    static const float polynomials[5][3] = {
        {8.2f, -22.5f, 16.6f}, {4, -2.9f, .5f}, {3.9f, -2.8f, .5f}, {3.3f, -2.4f, .5f}, {2.3f, -1.6f, .4f}};
    /* Ended by a zero, as gram_reuse is. */
    static const int32_t reuse[][4] = {{1, 2, 2, 0}, {5, 0}};
    for (int k = 0; k < 2; k++) {
        struct muon_matrix matrices[3];
        const size_t size = (size_t)rows * columns;
        for (int i = 0; i < 3; i++) {
            /* weights, gradient, momentum, and the running mean square of the longer side */
            matrices[i] = (struct muon_matrix){floats_of(size, 1), floats_of(size, 1), floats_of(size, 1),
                                               zeros(rows > columns ? rows : columns)};
        }
        /* polynomials, reuse, momentum, beta2, decay, step, margin; then the shape, the number of
           matrices and threads */
        struct muon_settings settings = {polynomials[0], reuse[k], .95f, .95f, .99f, .02f, 1.01f, rows, columns, 3, threads};
        update_matrices(matrices, &settings, buffer(workspace_elems(threads), sizeof(packed_elem)));
        for (int i = 0; i < 3; i++) check_finite(matrices[i].weights, size, "an updated matrix is not finite");
        /* Each case has matrices and a workspace of its own. */
        free_all();
    }
}

/* All combinations of sequences, window lengths and threads: fewer sequences than threads, one character, and
   full windows. */
int main(void) {
    static const int sequences[] = {1, 7}, characters[] = {1, 37, SLOTS - 1}, threads[] = {1, 9};
    for (int r = 0; r < 2; r++) {
        for (int c = 0; c < 3; c++) {
            for (int t = 0; t < 2; t++) {
                const int slots = characters[c] + 1; /* the context vector's slot, and one for each character */
                const size_t bytes = (size_t)slots * WIDTH * sizeof(float);
                struct model model;
                make_model(&model, slots, threads[t]);
                run(&model, sequences[r], slots, threads[t], SAVE_NOTHING, GRADS_PER_WINDOW);
                /* The three ways to train: from saved activations, from recomputed ones, and with weight
                   gradients at the end. */
                float *saved = run(&model, sequences[r], slots, threads[t], SAVE_ACTIVATIONS, GRADS_PER_WINDOW);
                float *recomputed = run(&model, sequences[r], slots, threads[t], SAVE_INPUTS, GRADS_PER_WINDOW);
                float *deferred = run(&model, sequences[r], slots, threads[t], SAVE_ACTIVATIONS, GRADS_DEFERRED);
                /* To the last bit, not nearly. */
                check(!memcmp(saved, deferred, bytes), "deferred weight gradients change the gradient");
                check(!memcmp(saved, recomputed, bytes), "recomputed activations change the gradient");
                free_all();
            }
        }
    }
    /* attn is three matrices (C, C) for Muon, as proj is. */
    for (int i = 1; i < MATRICES; i++) update(shapes[i][0], shapes[i][1], 2);
    puts("ok");
    return 0;
}
