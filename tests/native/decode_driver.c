/* Runs prefill, decode and scoring of the engine over odd shapes, number types and numbers of threads,
   under sanitizers.

   Every buffer has exactly the size that it needs. The workspace begins as NaN, so that reading what was
   never written shows in the results: they must be finite, and bit-identical for any number of threads.
   tests/inference/test_decode.py compiles and runs this. */

#include <stdio.h>
#include <stdlib.h>

#include "decode.c"

/* Ids: more than a panel, and no multiple of it. */
#define V 19
#define TEXTS 3

/* A model's shape: layers, heads, n_embd and characters of a window. */
struct shape {
    int layers, heads, width, context_len;
};

/* `bytes` bytes at a cache line, each set to `fill`. */
static void *memory(size_t bytes, int fill) {
    void *found;
    if (posix_memalign(&found, 64, bytes ? UP(bytes, 64) : 64)) exit(3);
    return memset(found, fill, bytes);
}

/* A float in [-1, 1), from a linear congruential generator: the same numbers in every run. */
static float random_float(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 23) - 1;
}

/* `count` floats: `used` random ones, then zeros, as padding must be. */
static float *floats_of(long count, long used) {
    float *x = memory(4UL * count, 0);
    for (long i = 0; i < used; i++) x[i] = random_float();
    return x;
}

/* A packed matrix (n_out, n_in) of random numbers with padding of zeros: the sizes are those of
   `NativeModel._matrix` in Python. */
static struct matrix random_matrix(int n_out, int n_in, enum number_type type) {
    const int per_word = type == INT8_FOURS ? 4 : type == BFLOAT16_PAIRS ? 2 : 1;  /* inputs in a 32-bit word */
    const int inputs = (int)(type == INT8_FOURS ? UP(n_in, GROUP) : padded(n_in)); /* padding of the inputs */
    struct matrix m = {.type = type, .n_out = (int)padded(n_out), .n_in = (int)padded(n_in), .lines = inputs / per_word};
    m.packed = memory(64UL * (m.n_out / PANEL) * m.lines, 0); /* zeros, which `pack` leaves where the matrix ends */
    m.scales = floats_of(m.n_out, 0);                         /* written by `pack` in int8 */
    m.bias = floats_of(m.n_out, n_out);
    float *rows = malloc(sizeof(float) * n_out * n_in);
    for (long i = 0; i < (long)n_out * n_in; i++) rows[i] = 0.3f * random_float();
    pack(&m, rows, n_out, n_in);
    free(rows);
    return m;
}

/* The buffers of one matrix. */
static void free_matrix(struct matrix m) {
    free((void *)m.packed);
    free((void *)m.scales);
    free((void *)m.bias);
}

/* Random weights in the layout of engine/native.py: heads padded to DP, everything else to whole panels. */
static struct model random_model(struct shape s, enum number_type type) {
    const int C = s.width, CP = (int)padded(C), heads = s.heads * (int)padded(C / s.heads);
    struct layer *layers = malloc(sizeof(struct layer) * s.layers);
    for (int i = 0; i < s.layers; i++) {
        /* Norms are padded with zeros, so that padding of x stays zero. */
        layers[i] = (struct layer){.ln1_weight = floats_of(CP, C),
                                   .ln1_bias = floats_of(CP, C),
                                   .ln2_weight = floats_of(CP, C),
                                   .ln2_bias = floats_of(CP, C)};
        layers[i].qkv = random_matrix(3 * heads, C, type);
        layers[i].proj = random_matrix(C, heads, type);
        layers[i].fc = random_matrix(4 * C, C, type);
        layers[i].out = random_matrix(C, 4 * C, type);
    }
    struct model m = {.layers = layers, .n_layer = s.layers, .n_head = s.heads, .head_size = C / s.heads, .n_embd = C};
    m.slots = s.context_len + 1, m.vocab_size = V;
    /* Embeddings: rows are padded to CP entries with zeros. */
    float *tokens = floats_of(V * CP, 0), *positions = floats_of((long)m.slots * CP, 0);
    for (int c = 0; c < C; c++) {
        for (int v = 0; v < V; v++) tokens[v * CP + c] = random_float();
        for (int t = 0; t < m.slots; t++) positions[(long)t * CP + c] = random_float();
    }
    m.tokens = tokens, m.positions = positions;
    m.lnf_weight = floats_of(CP, C), m.lnf_bias = floats_of(CP, C);
    /* In int8 the head is bfloat16, as in Python. */
    m.head = random_matrix(V, C, type == INT8_FOURS ? BFLOAT16_PAIRS : type);
    return m;
}

/* Everything that `random_model` allocated. */
static void free_model(struct model m) {
    for (int i = 0; i < m.n_layer; i++) {
        const struct layer l = m.layers[i];
        const struct matrix matrices[] = {l.qkv, l.proj, l.fc, l.out};
        const float *const vectors[] = {l.ln1_weight, l.ln1_bias, l.ln2_weight, l.ln2_bias};
        for (int k = 0; k < 4; k++) free_matrix(matrices[k]), free((void *)vectors[k]);
    }
    const float *const vectors[] = {m.tokens, m.positions, m.lnf_weight, m.lnf_bias, (const float *)m.layers};
    for (int k = 0; k < 5; k++) free((void *)vectors[k]);
    free_matrix(m.head);
}

/* End with an error that names the case, unless `holds`. */
static void check(int holds, const char *what, struct shape s, int type, int threads) {
    if (holds) return;
    fprintf(stderr, "%s: heads %d, width %d, window %d, type %d, threads %d\n", what, s.heads, s.width, s.context_len, type,
            threads);
    exit(1);
}

/* Everything that a run computes, for comparison. */
struct results {
    float *logits, *losses, *means;
    int32_t *drawn;
    long n_logits, n_losses, n_means, n_drawn;
};

/* One run of everything for `texts` texts: a prefill of half a window with all logits, one of the rest
   but one character, decode of the last; and scoring of whole windows. Several texts have a cache in
   bfloat16. */
static struct results run_all(const struct model *m, int texts, int threads) {
    /* P is for padded; T characters of a window, of which the first prefill reads half. */
    const long CP = padded(m->n_embd), VP = padded(V), T = m->slots - 1, half = (T + 1) / 2;
    const long per_layer = (long)texts * m->n_head;
    const int size = texts > 1 ? 2 : 4;
    struct windows w = {.texts = texts, .cache = texts > 1 ? CACHE_BFLOAT16 : CACHE_FLOAT32};
    /* Values begin as NaN: a slot that was not written must not be read. */
    w.keys = memory((size_t)size * m->n_layer * per_layer * m->head_size * padded(m->slots), 0);
    w.values = memory((size_t)size * m->n_layer * per_layer * m->slots * padded(m->head_size), 0xff);
    w.sums = floats_of(texts * CP, 0);
    w.contexts = floats_of(texts * CP, 0);
    int32_t *ids = malloc(sizeof(int32_t) * TEXTS * (T + 1)); /* any ids below V */
    for (long i = 0; i < TEXTS * (T + 1); i++) ids[i] = (int32_t)((i * i + i / 7) % V);
    /* As much workspace as the longest prefill needs, all NaN. */
    void *workspace = memory((size_t)workspace_bytes(m, (int)(texts * (half + 1)), threads), 0xff);
    struct results r = {.n_logits = texts * half * VP, .n_losses = TEXTS * T, .n_means = TEXTS * CP, .n_drawn = texts};
    r.logits = floats_of(r.n_logits, 0), r.losses = floats_of(r.n_losses, 0), r.means = floats_of(r.n_means, 0);
    r.drawn = malloc(sizeof(int32_t) * r.n_drawn);

    /* The context vector's slot and half of the window. */
    struct prefill first = {m, &w, ids, r.logits, workspace, (int)half, 1, threads, 0};
    prefill(&first);
    w.filled = (int)half + 1;
    /* The rest but one character; a window of one or two characters has none. */
    if (T - half > 1) {
        float *last = floats_of(texts * VP, 0);
        struct prefill second = {m, &w, ids, last, workspace, (int)(T - half - 1), 0, threads, 0};
        prefill(&second);
        w.filled += second.length;
        free(last);
    }
    if (w.filled < m->slots) {
        /* All filters at once. Id 0 may not be drawn. */
        double allowed[V] = {NEG_INF}, uniforms[TEXTS] = {0.1, 0.5, 0.9};
        struct sampling how = {.temperature = 1.5, .top_p = 0.9, .min_p = 0.01, .allowed = allowed, .top_k = 7};
        struct decode step = {m, &w, &how, ids, uniforms, r.drawn, workspace, 1, threads};
        /* One character of each text: the slot that is left. */
        decode(&step);
    } else {
        memset(r.drawn, 0, sizeof(int32_t) * r.n_drawn);
    }
    /* Scoring takes whole windows from context vectors of zeros. */
    float *contexts = floats_of(TEXTS * CP, 0);
    void *scoring_memory = memory((size_t)scoring_bytes(m, (int)T, threads), 0xff);
    /* Losses and context vectors of TEXTS windows. */
    struct scoring all = {m, ids, contexts, r.losses, r.means, scoring_memory, TEXTS, (int)T, threads, 0};
    score(&all);
    void *const used[] = {w.keys, w.values, w.sums, w.contexts, ids, workspace, contexts, scoring_memory};
    for (int i = 0; i < 8; i++) free(used[i]);
    return r;
}

/* Whether no entry is NaN or infinite. */
static int all_finite(const float *x, long count) {
    for (long i = 0; i < count; i++) {
        if (!isfinite(x[i])) return 0;
    }
    return 1;
}

/* Whether two runs are bit-identical. */
static int equal(struct results a, struct results b) {
    return !memcmp(a.logits, b.logits, 4UL * a.n_logits) && !memcmp(a.losses, b.losses, 4UL * a.n_losses) &&
           !memcmp(a.means, b.means, 4UL * a.n_means) && !memcmp(a.drawn, b.drawn, 4UL * a.n_drawn);
}

/* The buffers of one run. */
static void free_results(struct results r) {
    free(r.logits);
    free(r.losses);
    free(r.means);
    free(r.drawn);
}

/* Shapes: heads smaller than a panel and larger, windows of one character and of 511, a model of one
   entry. Threads: also more than there are heads or texts. */
int main(void) {
    static const struct shape shapes[] = {{2, 2, 8, 37}, {1, 3, 102, 1}, {1, 1, 1, 2}, {1, 5, 20, 511}, {2, 2, 96, 16}};
    static const int threads[] = {1, 2, 3, 9};
    for (unsigned i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        /* All number types, one text and several, all numbers of threads. */
        for (int type = FLOAT32; type <= INT8_FOURS; type++) {
            for (int texts = 1; texts <= TEXTS; texts += TEXTS - 1) {
                struct model m = random_model(shapes[i], (enum number_type)type);
                /* One thread is the reference. */
                struct results expected = run_all(&m, texts, 1);
                for (int t = 0; t < 4; t++) {
                    struct results found = run_all(&m, texts, threads[t]);
                    /* Padding of the results is zero, and so is finite too. */
                    check(all_finite(found.logits, found.n_logits) && all_finite(found.losses, found.n_losses) &&
                              all_finite(found.means, found.n_means),
                          "not finite", shapes[i], type, threads[t]);
                    check(equal(expected, found), "threads change the result", shapes[i], type, threads[t]);
                    free_results(found);
                }
                free_results(expected);
                free_model(m);
            }
        }
    }
    puts("ok");
    return 0;
}
