/* The whole model in C for inference: prefill of many characters, decode of one after the other, and
   losses of whole windows.

      embed -> n_layer x (x += proj attention(LayerNorm(x)), x += out gelu(fc LayerNorm(x))) -> LayerNorm -> logits

   Python (picogpt/inference) packs the weights, allocates the KV cache and the workspace, and calls
   `prefill`, `decode` and `score`. Shapes come at run time, so one library serves all models: L layers,
   B sequences side by side ("texts"), k new positions of each, R = B k rows, H heads of D entries, C =
   n_embd, S slots (positions) of a window, V ids. Vectors run over C, 4 C, V and D, which are padded
   with zeros to multiples of PANEL: D becomes DP. The outputs of all heads are H DP wide, and their q, k
   and v 3 H DP, head by head, so that a head's q, k and v are one piece of memory.

   Every number of every result is computed by one thread, in an order that does not depend on the number
   of threads: results are bit-identical for any number. */

#define HEAD 16 /* for simd.h: the longest vectors that the processor has */
#define WIDTH 16
#include "simd.h"
#include "layout.h"
#include "panels.h"
#include "sampling.h"
#include "threads.h"

#define EPSILON 1e-5f /* of LayerNorm, as in torch */

/* ---- The structures of `picogpt.inference.layout`, field by field ---- */

/* Weights of one layer: the four packed matrices, and the two LayerNorms. */
struct layer {
    const float *ln1_weight, *ln1_bias; /* (C) of the LayerNorm before attention */
    struct matrix qkv, proj;
    const float *ln2_weight, *ln2_bias; /* (C) of the LayerNorm before the MLP */
    struct matrix fc, out;
};

/* The model. The matrix `head` is the token embedding, packed: nanoGPT ties the two. */
struct model {
    const float *tokens;    /* (V, C) */
    const float *positions; /* (S, C) */
    const struct layer *layers;
    const float *lnf_weight, *lnf_bias; /* (C) of the final LayerNorm */
    struct matrix head;
    int32_t n_layer, n_head, head_size, n_embd, slots, vocab_size;
};

/* Types of the KV cache. With many texts it does not fit in the processor's caches, and reading it takes
   longer than converting it: then bfloat16 halves the bytes. */
enum cache_type { CACHE_FLOAT32, CACHE_BFLOAT16 };

/* Windows of B texts: the KV cache, and the sums of the final LayerNorm's outputs, whose mean is the
   next context vector. Keys are stored so that those of PANEL neighbouring slots are a line for each
   entry of the head: the scores of PANEL slots are then vectors, and no reduction over lanes is needed. */
struct windows {
    void *keys;            /* (L, B, H, SP / PANEL, D, PANEL), SP = S padded */
    void *values;          /* (L, B, H, S, DP) */
    float *sums;           /* (B, C) of the final LayerNorm's outputs */
    float *contexts;       /* (B, C) context vectors, which take the first slot */
    int32_t texts, filled; /* B, and slots that are in the cache */
    int32_t cache;         /* enum cache_type of keys and values */
    int32_t reserved;
};

/* A request to read k ids of each text, behind those in the windows. */
struct prefill {
    const struct model *model;
    struct windows *windows;
    const int32_t *ids; /* (B, k) */
    float *logits;      /* (B, V) after the last of them, or (B, k, V) after each for `every` */
    void *workspace;
    int32_t length, every, threads, reserved;
};

/* A request to read one id of each text and draw the next, `count` times. */
struct decode {
    const struct model *model;
    struct windows *windows;
    const struct sampling *sampling;
    const int32_t *ids;     /* (B) drawn before, and not read yet */
    const double *uniforms; /* (count, B) random numbers in [0, 1) */
    int32_t *drawn;         /* (count, B) written */
    void *workspace;
    int32_t count, threads;
};

/* A request for the losses of whole windows, each by itself, from its context vector. */
struct scoring {
    const struct model *model;
    const int32_t *ids;    /* (windows, length + 1) the inputs, and one target more */
    const float *contexts; /* (windows, C) */
    float *losses;         /* (windows, length) in nats */
    float *means;          /* (windows, C) written: context vectors for the windows that follow */
    void *workspace;
    int32_t windows, length, threads, reserved;
};

/* count rounded up to whole panels. */
static inline long padded(long count) { return UP(count, PANEL); }

/* Inputs of the widest matrix: rows of the MLP's hidden layer, or of all heads. */
static inline long max_inputs(const struct model *m) {
    const long hidden = padded(4L * m->n_embd), heads = m->n_head * padded(m->head_size);
    return hidden > heads ? hidden : heads;
}

/* ---- Memory ---- */

/* Buffers that all workers share, for R rows. */
struct activations {
    float *x, *normed, *qkv, *heads, *hidden; /* (R, C), (R, C), (R, 3 H DP), (R, H DP), (R, 4 C) */
    float *logits;                            /* (R, V) */
};

/* Buffers that each worker has for itself. */
struct scratch {
    float *normed, *scores, *panels; /* (C), (SP), (TILE_PANELS, max_inputs, PANEL) */
    /* the row that GEMV multiplies, quantized */
    struct quantized int8_row;
    double *probs; /* (V) */
    int *order;    /* (V) */
};

/* A bump allocator over the workspace that Python gives: each piece begins at a cache line, so that
   workers do not share one. With no memory it only counts bytes, so the same code measures the workspace
   and cuts it up. */
struct arena {
    char *memory;
    long taken;
};

/* `bytes` bytes, or null while counting. */
static void *arena_take(struct arena *arena, long bytes) {
    void *piece = arena->memory ? arena->memory + arena->taken : 0;
    arena->taken += UP(bytes, 64);
    return piece;
}

/* The shared buffers for `rows` rows. */
static struct activations arena_activations(const struct model *m, struct arena *arena, long rows) {
    const long C = padded(m->n_embd), heads = m->n_head * padded(m->head_size);
    struct activations activations;
    activations.x = arena_take(arena, 4 * rows * C);
    activations.normed = arena_take(arena, 4 * rows * C);
    activations.qkv = arena_take(arena, 4 * rows * 3 * heads);
    activations.heads = arena_take(arena, 4 * rows * heads);
    activations.hidden = arena_take(arena, 4 * rows * padded(4L * m->n_embd));
    activations.logits = arena_take(arena, 4 * rows * padded(m->vocab_size));
    return activations;
}

/* One worker's buffers. Worker i takes i + 1 of them and uses the last. */
static struct scratch arena_scratch(const struct model *m, struct arena *arena) {
    const long inputs = UP(max_inputs(m), GROUP);
    struct scratch scratch;
    scratch.normed = arena_take(arena, 4 * padded(m->n_embd));
    scratch.scores = arena_take(arena, 4 * padded(m->slots));
    scratch.panels = arena_take(arena, 4L * TILE_PANELS * inputs * PANEL);
    scratch.int8_row.words = arena_take(arena, inputs);
    scratch.int8_row.scales = arena_take(arena, 4 * inputs / GROUP);
    scratch.int8_row.offsets = arena_take(arena, 4 * inputs / GROUP);
    scratch.probs = arena_take(arena, 8L * m->vocab_size);
    scratch.order = arena_take(arena, 4L * m->vocab_size);
    return scratch;
}

/* ---- One pass of all layers, as one worker sees it ---- */

/* State of a pass as one worker sees it: the request, the buffers, and which worker this is. */
struct pass {
    const struct model *model;
    const struct windows *windows;
    struct activations activations;
    struct scratch scratch;
    struct worker worker;
    int filled, length;     /* slots in the cache before this pass, and k */
    int shares_layer_cache; /* scoring: one layer's KV cache serves all in turn, as nothing reads it later */
    int quantizes_rows;     /* scoring: rows are quantized for int8 matrices, as in decode */
};

/* R = B k, the rows of this pass. */
static inline int row_count(const struct pass *pass) { return pass->windows->texts * pass->length; }

/* LayerNorm of one row (C): (x - mean) / sqrt(variance + epsilon) weight + bias. Padding stays zero, as
   weight and bias are zero there. */
static void layer_norm_row(const struct model *m, const float *x, const float *weight, const float *bias, float *out) {
    const int C = m->n_embd;
    vf32 sum = {0}, squares = {0};
    for (int c = 0; c < C; c += LANES) sum += load_float(x + c);
    const float mean = reduce_sum(sum) / (float)C;
    /* Padding is zero, not the mean: it must not count in the variance. */
    vi32 lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int c = 0; c < C; c += LANES) {
        vf32 distance = load_float(x + c) - mean;
        if (c + LANES > C) distance = select_lanes(lane < C - c, distance, (vf32){0});
        squares += distance * distance;
    }
    const float scale = 1 / sqrtf(reduce_sum(squares) / (float)C + EPSILON);
    for (int c = 0; c < padded(C); c += LANES) {
        store_float(out + c, (load_float(x + c) - mean) * scale * load_float(weight + c) + load_float(bias + c));
    }
}

/* LayerNorm of all rows: workers divide them, and meet at a barrier. A single row is normalized by every
   worker for itself, to its own scratch: that takes less time than a barrier. */
static const float *layer_norm(struct pass *pass, const float *weight, const float *bias) {
    const struct model *m = pass->model;
    const long C = padded(m->n_embd), rows = row_count(pass);
    if (rows == 1) {
        layer_norm_row(m, pass->activations.x, weight, bias, pass->scratch.normed);
        return pass->scratch.normed;
    }
    const long first = first_of(rows, pass->worker.index, pass->worker.count);
    const long end = first_of(rows, pass->worker.index + 1, pass->worker.count);
    for (long r = first; r < end; r++)
        layer_norm_row(m, pass->activations.x + r * C, weight, bias, pass->activations.normed + r * C);
    barrier_wait(pass->worker);
    return pass->activations.normed;
}

/* Panels [first, end) of rows W^T with an epilogue: GEMM for many rows, GEMV for one. With
   quantizes_rows, rows times an int8 matrix go one by one through GEMV, which rounds them as decode
   does. */
static void matmul(struct pass *pass, const struct matrix *matrix, struct rows rows, enum epilogue epilogue, int first, int end) {
    const int is_int8 = matrix->type == INT8_FOURS;
    if (rows.count > 1 && !(is_int8 && pass->quantizes_rows)) {
        gemm(matrix, rows, epilogue, first, end, pass->scratch.panels);
        return;
    }
    for (int r = 0; r < rows.count && first < end; r++) {
        const float *x = rows.x + r * rows.x_stride;
        if (is_int8) quantize(x, matrix->n_in, pass->scratch.int8_row);
        gemv(matrix, x, pass->scratch.int8_row, rows.out + r * rows.out_stride, epilogue, first, end);
    }
}

/* The same for this worker's share of the panels. */
static void matmul_share(struct pass *pass, const struct matrix *matrix, struct rows rows, enum epilogue epilogue) {
    const struct worker worker = pass->worker;
    const long panels = matrix->n_out / PANEL;
    matmul(pass, matrix, rows, epilogue, (int)first_of(panels, worker.index, worker.count),
           (int)first_of(panels, worker.index + 1, worker.count));
}

/* ---- Attention ---- */

/* The KV cache of one head of one text in one layer: keys (SP / PANEL, D, PANEL) and values (S, DP). */
struct head {
    char *keys, *values;
    int entries, entries_padded;
    int size; /* bytes of an element: 4, or 2 in bfloat16 */
};

/* The head's addresses in the cache. */
static struct head head_of(const struct pass *pass, int layer, int text, int index) {
    const struct model *m = pass->model;
    struct head head = {.entries = m->head_size, .entries_padded = (int)padded(m->head_size)};
    const long at = ((long)(pass->shares_layer_cache ? 0 : layer) * pass->windows->texts + text) * m->n_head + index;
    head.size = pass->windows->cache == CACHE_BFLOAT16 ? 2 : 4;
    head.keys = (char *)pass->windows->keys + at * head.entries * padded(m->slots) * head.size;
    head.values = (char *)pass->windows->values + at * m->slots * head.entries_padded * head.size;
    return head;
}

/* Index of the first entry of a slot's key; its other entries are PANEL apart. */
static inline long key_offset(struct head head, int slot) { return (long)slot / PANEL * PANEL * head.entries + slot % PANEL; }

/* LANES elements of a cache from index `place` on. `size` must be a constant where this is inlined. */
static inline __attribute__((always_inline)) vf32 load_cached(const char *cache, long place, int size) {
    return size == 2 ? load_bfloat16((const uint16_t *)cache + place) : load_float((const float *)cache + place);
}

/* sums (PANEL) += the keys' entry at `at`, of PANEL slots, times the query's entry. */
static inline __attribute__((always_inline)) void add_scores(vf32 sums[LINE_VECTORS], struct head head, int size, long at,
                                                             float entry) {
#pragma GCC unroll 4
    for (int v = 0; v < LINE_VECTORS; v++) sums[v] += load_cached(head.keys, at + v * LANES, size) * entry;
}

/* sums (PANEL) += PANEL entries of a slot's value, times its weight. */
static inline __attribute__((always_inline)) void add_values(vf32 sums[LINE_VECTORS], struct head head, int size, long at,
                                                             float weight) {
#pragma GCC unroll 4
    for (int v = 0; v < LINE_VECTORS; v++) sums[v] += load_cached(head.values, at + v * LANES, size) * weight;
}

/* scores (count) = q k^T / sqrt(D), in powers of two: log2(e) is part of the scale, so softmax needs 2^x
   instead of e^x. -inf follows up to the next multiple of LANES. Returns the maximum. */
static inline __attribute__((always_inline)) float attention_scores(const float *query, struct head head, int size, int count,
                                                                    float *scores) {
    const float by = 1.44269504f / sqrtf((float)head.entries);
    vi32 lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vf32 largest = (vf32){0} + (float)NEG_INF;
    for (int s = 0; s < count; s += PANEL) {
        vf32 sums[2][LINE_VECTORS] = {0}; /* two chains, as one would wait for the latency of each multiply-add */
        const long at = key_offset(head, s);
        int d = 0;
        for (; d + 2 <= head.entries; d += 2) {
            add_scores(sums[0], head, size, at + d * PANEL, query[d]);
            add_scores(sums[1], head, size, at + (d + 1) * PANEL, query[d + 1]);
        }
        if (d < head.entries) add_scores(sums[0], head, size, at + d * PANEL, query[d]);
        for (int v = 0; v < LINE_VECTORS; v++) {
            /* Slots beyond `count` in the last panel are masked: the cache holds anything there. */
            const int first = s + v * LANES;
            vf32 score = (sums[0][v] + sums[1][v]) * by;
            if (first + LANES > count) score = select_lanes(lane < count - first, score, (vf32){0} + (float)NEG_INF);
            store_float(scores + first, score);
            largest = select_lanes(score > largest, score, largest);
        }
    }
    return reduce_max(largest);
}

/* Attention of one head for a query that attends to `count` slots: out (DP) = softmax(scores) values. */
static inline __attribute__((always_inline)) void attend_head(const float *query, struct head head, int size, int count,
                                                              float *scores, float *out) {
    const float max_score = attention_scores(query, head, size, count, scores);
    vf32 total = {0};
    for (int s = 0; s < count; s += LANES) {
        vf32 weight = vexp2(load_float(scores + s) - max_score);
        if (s + LANES > count) {
            /* Masked lanes give about 1e-38, not zero. */
            for (int i = count - s; i < LANES; i++) weight[i] = 0;
        }
        store_float(scores + s, weight);
        total += weight;
    }
    const float by = 1 / reduce_sum(total); /* the softmax denominator divides the output, not each weight */
    const long row = head.entries_padded;
    for (int d = 0; d < row; d += PANEL) {
        /* Four chains, each over every fourth slot. */
        vf32 sums[4][LINE_VECTORS] = {0};
        int s = 0;
        for (; s + 4 <= count; s += 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) add_values(sums[i], head, size, (s + i) * row + d, scores[s + i]);
        }
        for (; s < count; s++) add_values(sums[0], head, size, s * row + d, scores[s]);
        for (int v = 0; v < LINE_VECTORS; v++) {
            store_float(out + d + v * LANES, ((sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v])) * by);
        }
    }
}

/* Two copies of the code, so that the size of an element is a constant in each. */
static void attend(const float *query, struct head head, int count, float *scores, float *out) {
    if (head.size == 2) attend_head(query, head, 2, count, scores, out);
    else attend_head(query, head, 4, count, scores, out);
}

/* Write the key (D) and value (DP) of a slot to the cache. Keys are scattered, so that scores read them
   in lines. */
static void write_kv(struct head head, int slot, const float *key, const float *value) {
    const long key_at = key_offset(head, slot), value_at = (long)slot * head.entries_padded;
    if (head.size == 2) {
        uint16_t *keys = (uint16_t *)head.keys + key_at, *values = (uint16_t *)head.values + value_at;
        for (int d = 0; d < head.entries; d++) keys[d * PANEL] = (uint16_t)round_bfloat16(key[d]);
        for (int d = 0; d < head.entries_padded; d++) values[d] = (uint16_t)round_bfloat16(value[d]);
    } else {
        float *keys = (float *)head.keys + key_at, *values = (float *)head.values + value_at;
        for (int d = 0; d < head.entries; d++) keys[d * PANEL] = key[d];
        for (int d = 0; d < head.entries_padded; d += LANES) store_float(values + d, load_float(value + d));
    }
}

/* Prefetch the first `count` slots of a head while another head is computed: each head is read in
   streams of its own, too short for the hardware prefetcher. */
static void prefetch_head(struct head head, int count) {
    const long keys = padded(count) * head.entries * head.size, values = (long)count * head.entries_padded * head.size;
    prefetch_lines(head.keys, 0, UP(keys, 64) / 64);
    prefetch_lines(head.values, 0, UP(values, 64) / 64);
}

/* One head of one text: write keys and values of the k new slots to the cache, and let each query attend
   to the slots up to its own. Row by row, so causality needs no mask. */
static void attend_rows(struct pass *pass, int layer, int text, int index) {
    const struct head head = head_of(pass, layer, text, index);
    const long width = (long)pass->model->n_head * head.entries_padded;
    for (int i = 0; i < pass->length; i++) {
        const long row = (long)text * pass->length + i;
        const float *query = pass->activations.qkv + (row * pass->model->n_head + index) * 3 * head.entries_padded;
        float *out = pass->activations.heads + row * width + (long)index * head.entries_padded;
        write_kv(head, pass->filled + i, query + head.entries_padded, query + 2 * head.entries_padded);
        attend(query, head, pass->filled + i + 1, pass->scratch.scores, out);
    }
}

/* One layer: x += proj attention(LayerNorm(x)), then x += out gelu(fc LayerNorm(x)). For attention,
   workers divide the heads: each computes q, k, v of its own heads and attends with them, so no barrier
   is needed in between. The other GEMMs are divided by panels of outputs, and each ends at a barrier, as
   the next step reads whole rows. */
static void run_layer(struct pass *pass, int index) {
    const struct model *m = pass->model;
    const struct layer *layer = m->layers + index;
    const struct worker worker = pass->worker;
    const struct activations a = pass->activations;
    const long C = padded(m->n_embd), hidden = padded(4L * m->n_embd), DP = padded(m->head_size), heads = m->n_head * DP;
    const int rows = row_count(pass), panels = (int)(3 * DP / PANEL);
    const int first = (int)first_of(m->n_head, worker.index, worker.count);
    const int end = (int)first_of(m->n_head, worker.index + 1, worker.count);

    const float *normed = layer_norm(pass, layer->ln1_weight, layer->ln1_bias);
    matmul(pass, &layer->qkv, (struct rows){normed, a.qkv, C, 3 * heads, rows}, STORE, first * panels, end * panels);
    /* In decode the next head's cache is fetched while this head is computed. */
    for (int text = 0; text < pass->windows->texts; text++) {
        for (int head = first; head < end; head++) {
            if (pass->length == 1 && head + 1 < end) prefetch_head(head_of(pass, index, text, head + 1), pass->filled);
            else if (pass->length == 1 && text + 1 < pass->windows->texts)
                prefetch_head(head_of(pass, index, text + 1, first), pass->filled);
            attend_rows(pass, index, text, head);
        }
    }
    barrier_wait(worker);
    matmul_share(pass, &layer->proj, (struct rows){a.heads, a.x, heads, C, rows}, ADD);
    barrier_wait(worker);
    normed = layer_norm(pass, layer->ln2_weight, layer->ln2_bias);
    matmul_share(pass, &layer->fc, (struct rows){normed, a.hidden, C, hidden, rows}, GELU);
    barrier_wait(worker);
    matmul_share(pass, &layer->out, (struct rows){a.hidden, a.x, hidden, C, rows}, ADD);
    barrier_wait(worker);
}

/* ---- From ids to logits ---- */

/* Whether a pass begins with the context vector's slot. */
static inline int has_context(const struct pass *pass) { return pass->filled == 0; }

/* x = token embedding + position embedding, for this worker's rows. ids are (B, k), or (B, k - 1) behind
   the context vector, which takes the place of a token embedding in the first slot. */
static void embed(struct pass *pass, const int32_t *ids) {
    const struct model *m = pass->model;
    const long C = padded(m->n_embd), rows = row_count(pass), has_context_slot = has_context(pass);
    const long end = first_of(rows, pass->worker.index + 1, pass->worker.count);
    for (long r = first_of(rows, pass->worker.index, pass->worker.count); r < end; r++) {
        const long text = r / pass->length, i = r % pass->length;
        const float *what = pass->windows->contexts + text * C, *position = m->positions + (pass->filled + i) * C;
        if (i >= has_context_slot) what = m->tokens + ids[text * (pass->length - has_context_slot) + i - has_context_slot] * C;
        for (long c = 0; c < C; c += LANES)
            store_float(pass->activations.x + r * C + c, load_float(what + c) + load_float(position + c));
    }
}

/* The final LayerNorm of all rows. Its outputs are added to the windows' sums (B, C): each column by one
   worker, row after row, so the order of additions is fixed. */
static const float *final_norm(struct pass *pass) {
    const struct model *m = pass->model;
    const struct worker worker = pass->worker;
    const long C = padded(m->n_embd), vectors = C / LANES;
    const float *normed = layer_norm(pass, m->lnf_weight, m->lnf_bias);
    const long first = first_of(vectors, worker.index, worker.count) * LANES;
    const long end = first_of(vectors, worker.index + 1, worker.count) * LANES;
    for (long r = 0; r < row_count(pass); r++) {
        float *sums = pass->windows->sums + r / pass->length * C;
        for (long c = first; c < end; c += LANES) accumulate(sums + c, load_float(normed + r * C + c));
    }
    return normed;
}

/* logits = rows W^T for the tied embedding W (V, C): for each id that was read (B, k, V) with `every`,
   or the last one of each text (B, V). `normed` is what `final_norm` returned. The context vector's slot
   has no logits. */
static void compute_logits(struct pass *pass, const float *normed, int every, float *logits) {
    const struct model *m = pass->model;
    const long C = padded(m->n_embd), V = padded(m->vocab_size), has_context_slot = has_context(pass),
               texts = pass->windows->texts;
    if (!every) {
        /* The last row of each text: rows that are k rows apart. */
        const float *last = normed + (pass->length - 1) * C;
        matmul_share(pass, &m->head, (struct rows){last, logits, pass->length * C, V, (int)texts}, STORE);
        return;
    }
    const int count = pass->length - (int)has_context_slot;
    for (long text = 0; text < texts; text++) {
        const float *first = normed + (text * pass->length + has_context_slot) * C;
        matmul_share(pass, &m->head, (struct rows){first, logits + text * count * V, C, V, count}, STORE);
    }
}

/* All layers, for rows that have been embedded; a barrier must have passed since. */
static const float *run_layers(struct pass *pass) {
    for (int i = 0; i < pass->model->n_layer; i++) run_layer(pass, i);
    return final_norm(pass);
}

/* A worker's part of a prefill. */
static void prefill_job(void *job, struct worker worker) {
    struct prefill *p = job;
    const int has_context_slot = p->windows->filled == 0;
    struct pass pass = {.model = p->model, .windows = p->windows, .worker = worker, .filled = p->windows->filled};
    pass.length = p->length + has_context_slot;
    struct arena arena = {.memory = p->workspace};
    pass.activations = arena_activations(p->model, &arena, row_count(&pass));
    for (int i = 0; i <= worker.index; i++) pass.scratch = arena_scratch(p->model, &arena);
    embed(&pass, p->ids);
    barrier_wait(worker);
    const float *normed = run_layers(&pass);
    compute_logits(&pass, normed, p->every, p->logits);
}

/* ---- Decode ---- */

/* A worker's part of decode. Sampling is divided by texts: a worker draws for its texts and embeds what
   it has drawn, so between two characters there are two barriers. */
static void decode_job(void *job, struct worker worker) {
    struct decode *d = job;
    const struct model *m = d->model;
    struct pass pass = {.model = m, .windows = d->windows, .worker = worker, .filled = d->windows->filled, .length = 1};
    const int texts = d->windows->texts;
    const int first = (int)first_of(texts, worker.index, worker.count),
              end = (int)first_of(texts, worker.index + 1, worker.count);
    struct arena arena = {.memory = d->workspace};
    pass.activations = arena_activations(m, &arena, texts);
    for (int i = 0; i <= worker.index; i++) pass.scratch = arena_scratch(m, &arena);
    embed(&pass, d->ids);
    for (int i = 0; i < d->count; i++) {
        barrier_wait(worker);
        compute_logits(&pass, run_layers(&pass), 0, pass.activations.logits);
        barrier_wait(worker);
        pass.filled++; /* the slot that has just been read */
        int32_t *drawn = d->drawn + (long)i * texts;
        for (int text = first; text < end; text++) {
            const float *logits = pass.activations.logits + text * padded(m->vocab_size);
            const double uniform = d->uniforms[(long)i * texts + text];
            drawn[text] = draw(d->sampling, logits, m->vocab_size, uniform, pass.scratch.probs, pass.scratch.order);
        }
        if (i + 1 < d->count) embed(&pass, drawn);
    }
}

/* ---- Losses ---- */

/* Windows to score, which workers take one by one. */
struct scoring_job {
    struct scoring *scoring;
    atomic_int next; /* next window that no worker has taken */
};

/* Cross entropy: -log softmax(logits)[target], with the sum in float64. */
static float cross_entropy(const float *logits, int count, int target) {
    float max_logit = logits[0];
    double sum = 0;
    for (int v = 1; v < count; v++) max_logit = logits[v] > max_logit ? logits[v] : max_logit;
    for (int v = 0; v < count; v += LANES) {
        vf32 e = vexp(load_float(logits + v) - max_logit);
        for (int lane = 0; lane < LANES && v + lane < count; lane++) sum += e[lane];
    }
    return (float)log(sum) + max_logit - logits[target];
}

/* Losses of one window (length), and the mean of its final LayerNorm outputs: context vector and ids are
   read in one prefill. */
static void score_window(struct pass *pass, const struct scoring *s, int window) {
    const struct model *m = pass->model;
    const long C = padded(m->n_embd), V = padded(m->vocab_size);
    const int32_t *ids = s->ids + (long)window * (s->length + 1);
    float *sums = pass->windows->sums;
    memset(sums, 0, 4UL * C);
    embed(pass, ids);
    compute_logits(pass, run_layers(pass), 1, pass->activations.logits);
    for (int i = 0; i < s->length; i++) {
        s->losses[(long)window * s->length + i] = cross_entropy(pass->activations.logits + i * V, m->vocab_size, ids[i + 1]);
    }
    for (long c = 0; c < C; c++) s->means[window * C + c] = sums[c] / (float)(s->length + 1);
}

/* Elements of one layer's keys, or values, for one text. */
static long kv_floats(const struct model *m, int values) {
    const long slots = values ? m->slots : padded(m->slots), entries = values ? padded(m->head_size) : m->head_size;
    return (long)m->n_head * slots * entries;
}

/* A worker's part of scoring: whole windows, with buffers of its own, so workers never wait for each
   other. */
static void scoring_job(void *job, struct worker worker) {
    struct scoring_job *all = job;
    const struct scoring *s = all->scoring;
    const struct model *m = s->model;
    struct windows windows = {.texts = 1};
    struct pass pass = {.model = m, .windows = &windows, .worker = {0, 1}, .length = s->length + 1, .shares_layer_cache = 1};
    pass.quantizes_rows = 1; /* the losses in int8 are then those of generated text */
    struct arena arena = {.memory = s->workspace};
    for (int i = 0; i <= worker.index; i++) {
        windows.keys = arena_take(&arena, 4 * kv_floats(m, 0));
        windows.values = arena_take(&arena, 4 * kv_floats(m, 1));
        windows.sums = arena_take(&arena, 4 * padded(m->n_embd));
        pass.activations = arena_activations(m, &arena, pass.length);
        pass.scratch = arena_scratch(m, &arena);
    }
    for (int window; (window = atomic_fetch_add(&all->next, 1)) < s->windows;) {
        windows.contexts = (float *)s->contexts + window * padded(m->n_embd);
        score_window(&pass, s, window);
    }
}

/* ---- Exported functions ---- */

/* Bytes of workspace that `threads` threads need for passes of `rows` rows. */
long workspace_bytes(const struct model *model, int rows, int threads) {
    struct arena arena = {0};
    arena_activations(model, &arena, rows);
    for (int i = 0; i < threads; i++) arena_scratch(model, &arena);
    return arena.taken;
}

/* Bytes of workspace that `threads` threads need to score windows of `length` ids. */
long scoring_bytes(const struct model *model, int length, int threads) {
    struct arena arena = {0};
    for (int i = 0; i < threads; i++) {
        arena_take(&arena, 4 * kv_floats(model, 0));
        arena_take(&arena, 4 * kv_floats(model, 1));
        arena_take(&arena, 4 * padded(model->n_embd));
        arena_activations(model, &arena, length + 1);
        arena_scratch(model, &arena);
    }
    return arena.taken;
}

void prefill(struct prefill *prefill) { run_job(prefill_job, prefill, prefill->threads); }
void decode(struct decode *decode) { run_job(decode_job, decode, decode->threads); }

void score(struct scoring *scoring) {
    struct scoring_job job = {.scoring = scoring};
    run_job(scoring_job, &job, scoring->threads);
}

/* Pack rows (count, in) of a float32 matrix into its panels, which must be zero before. */
void pack(const struct matrix *matrix, const float *rows, int count, int in) {
    for (int o = 0; o < count; o++) pack_row(matrix, o, rows + (long)o * in, in);
}

/* The table of structures and constants that `picogpt.inference.layout` compares when the library is
   loaded; an entry without a name ends it. */
const struct layout_entry *layout(void) {
    static const struct layout_entry entries[] = {
        /* A structure begins a line. */
        /* clang-format off */
        STRUCTURE(matrix), FIELD(matrix, packed), FIELD(matrix, scales), FIELD(matrix, bias), FIELD(matrix, type),
        FIELD(matrix, n_out), FIELD(matrix, n_in), FIELD(matrix, lines),
        STRUCTURE(layer), FIELD(layer, ln1_weight), FIELD(layer, ln1_bias), FIELD(layer, qkv), FIELD(layer, proj),
        FIELD(layer, ln2_weight), FIELD(layer, ln2_bias), FIELD(layer, fc), FIELD(layer, out),
        STRUCTURE(model), FIELD(model, tokens), FIELD(model, positions), FIELD(model, layers), FIELD(model, lnf_weight),
        FIELD(model, lnf_bias), FIELD(model, head), FIELD(model, n_layer), FIELD(model, n_head), FIELD(model, head_size),
        FIELD(model, n_embd), FIELD(model, slots), FIELD(model, vocab_size),
        STRUCTURE(windows), FIELD(windows, keys), FIELD(windows, values), FIELD(windows, sums), FIELD(windows, contexts),
        FIELD(windows, texts), FIELD(windows, filled), FIELD(windows, cache), FIELD(windows, reserved),
        STRUCTURE(sampling), FIELD(sampling, temperature), FIELD(sampling, top_p), FIELD(sampling, min_p),
        FIELD(sampling, allowed), FIELD(sampling, top_k), FIELD(sampling, reserved),
        STRUCTURE(prefill), FIELD(prefill, model), FIELD(prefill, windows), FIELD(prefill, ids), FIELD(prefill, logits),
        FIELD(prefill, workspace), FIELD(prefill, length), FIELD(prefill, every), FIELD(prefill, threads),
        FIELD(prefill, reserved),
        STRUCTURE(decode), FIELD(decode, model), FIELD(decode, windows), FIELD(decode, sampling), FIELD(decode, ids),
        FIELD(decode, uniforms), FIELD(decode, drawn), FIELD(decode, workspace), FIELD(decode, count), FIELD(decode, threads),
        STRUCTURE(scoring), FIELD(scoring, model), FIELD(scoring, ids), FIELD(scoring, contexts), FIELD(scoring, losses),
        FIELD(scoring, means), FIELD(scoring, workspace), FIELD(scoring, windows), FIELD(scoring, length),
        FIELD(scoring, threads), FIELD(scoring, reserved),
        /* clang-format on */
        CONSTANT(PANEL),
        CONSTANT(GROUP),
        CONSTANT(FLOAT32),
        CONSTANT(BFLOAT16_PAIRS),
        CONSTANT(INT8_FOURS),
        CONSTANT(CACHE_FLOAT32),
        CONSTANT(CACHE_BFLOAT16),
        {0},
    };
    return entries;
}
