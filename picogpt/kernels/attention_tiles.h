/* A head in bfloat16, by the processor's tiles of matrices: products of 32 slots with 32 slots, or with 32 entries of a head.

   Each of the two passes goes from 32 rows of scores to the next, so that scores and weights are never far. Weights are rounded
   for the products that they are in, as scores are not. */

#define SIDE UP(SLOTS, 32)

typedef packed_elem head_rows[SIDE][HEAD / 2] __attribute__((aligned(64)));    /* as they are: two entries are a unit */
typedef packed_elem head_columns[HEAD / 2][SIDE] __attribute__((aligned(64))); /* the same, transposed */
typedef packed_elem head_pairs[HEAD / 32][SIDE / 2][32]
    __attribute__((aligned(64))); /* entries of one slot and the next are a unit */

/* Everything of one head, of the slots of a window. */
struct buffers {
    head_rows q, d_out;
    head_columns k_columns, v_columns;
    head_pairs q_pairs, k_pairs, v_pairs, d_out_pairs;
    /* Of 32 rows: */
    float scores[32][SIDE] __attribute__((aligned(64))), d_weights[32][SIDE] __attribute__((aligned(64)));
    elem weights[32][SIDE] __attribute__((aligned(64))), d_scores[32][SIDE] __attribute__((aligned(64)));
    float result[32][HEAD] __attribute__((aligned(64)));
    float d_k[SIDE][HEAD] __attribute__((aligned(64))), d_v[SIDE][HEAD] __attribute__((aligned(64)));
};

static _Thread_local struct buffers tls_buffers;

/* 16 units of slot i, or zeros beyond the last slot. */
static inline packed_vec load_slot(const elem *from, long stride, int i, int slots) {
    typedef uint32_t some __attribute__((vector_size(64), aligned(2), may_alias));
    return i < slots ? (packed_vec) * (const some *)(from + i * stride) : (packed_vec){0};
}

static void load_rows(head_rows to, const elem *from, long stride, int slots) {
    for (int i = 0; i < UP(slots, 32); i++) {
        for (int u = 0; u < HEAD / 2; u += 16) *(packed_vec *)&to[i][u] = load_slot(from + 2 * u, stride, i, slots);
    }
}

static void load_columns(head_columns to, const elem *from, long stride, int slots) {
    for (int i = 0; i < UP(slots, 32); i += 16) {
        for (int u = 0; u < HEAD / 2; u += 16) {
            vi32 tile[16];
            for (int r = 0; r < 16; r++) tile[r] = (vi32)load_slot(from + 2 * u, stride, i + r, slots);
            transpose_lanes(tile);
            for (int r = 0; r < 16; r++) *(vi32 *)&to[u + r][i] = tile[r];
        }
    }
}

static void load_pairs(head_pairs to, const elem *from, long stride, int slots) {
    for (int d = 0; d < HEAD; d += 32) pack_right(from + d, to[d / 32][0], stride, 32, slots, UP(slots, 32) / 2);
}

/* 32 rows of scores, or gradients of weights, from row `first` on: rows x columns, as far as the last of them sees. */
static inline void rows_times_columns(float scores[32][SIDE], head_rows rows, head_columns columns, int first) {
    for (int j = 0; j <= first; j += 32) {
        amx_micro_kernel(32, &scores[0][j], SIDE, OVERWRITE, (struct tiles){rows[first], 2 * HEAD, 64},
                         (struct tiles){&columns[0][j], 4 * SIDE, 64 * SIDE}, HEAD / 32);
    }
}

/* (32, HEAD) = weights x those rows, given in pairs, that are seen by the last of the 32 from `first` on. */
static inline void weights_times_pairs(float result[32][HEAD], elem weights[32][SIDE], head_pairs pairs, int first) {
    for (int d = 0; d < HEAD; d += 32) {
        amx_micro_kernel(32, &result[0][d], HEAD, OVERWRITE, (struct tiles){weights, 2 * SIDE, 64},
                         tiles_of_panel(pairs[d / 32][0]), first / 32 + 1);
    }
}

/* sums (slots, HEAD) += the weights of 32 rows from `first` on, transposed, x those rows, given in pairs. */
static inline void add_weights_t_times_pairs(float sums[SIDE][HEAD], elem weights[32][SIDE], head_pairs pairs, int first) {
    packed_elem columns[32][16] __attribute__((aligned(64)));
    for (int j = 0; j <= first; j += 32) {
        pack_left(&weights[0][j], columns[0], SIDE, 32, 32, 16);
        for (int d = 0; d < HEAD; d += 32) {
            struct tiles left = {columns, 64, 0}, right = tiles_of_panel(pairs[d / 32][first / 2]);
            if (j < first) amx_micro_kernel(32, &sums[j][d], HEAD, ACCUMULATE, left, right, 1);
            else amx_micro_kernel(32, &sums[j][d], HEAD, OVERWRITE, left, right, 1);
        }
    }
}

/* The softmax of row i, rounded, and zeros up to `end`; returns the sum. */
static inline float softmax_numerators(elem *weights, const float *scores, int i, int end, struct softmax_row row) {
    vf32 sum = {0};
    int j = 0;
    for (; j <= i; j += LANES) {
        vf32 found = vexp(load_float(scores + j) * row.scale - row.row_max) * row.inv_sum;
        if (j + LANES > i + 1) found = mask_and(causal_mask(i, j), found);
        store(weights + j, found);
        sum += found;
    }
    for (; j < end; j += LANES) store(weights + j, (vf32){0});
    return reduce_sum(sum);
}

static void attend(struct buffers *b, struct head head) {
    const long row = 3 * WIDTH;
    const int slots = head.slots;
    const float scale = 1 / sqrtf(HEAD);
    load_rows(b->q, head.qkv, row, slots);
    load_columns(b->k_columns, head.qkv + WIDTH, row, slots);
    load_pairs(b->v_pairs, head.qkv + 2 * WIDTH, row, slots);
    for (int first = 0; first < slots; first += 32) {
        int count = slots - first < 32 ? slots - first : 32;
        rows_times_columns(b->scores, b->q, b->k_columns, first);
        for (int r = 0; r < count; r++) {
            int i = first + r;
            head.row_max[i] = scale * causal_row_max(b->scores[r], i);
            struct softmax_row softmax = {scale, head.row_max[i], 1};
            head.inv_sum[i] = 1 / softmax_numerators(b->weights[r], b->scores[r], i, first + 32, softmax);
        }
        weights_times_pairs(b->result, b->weights, b->v_pairs, first);
        for (int r = 0; r < count; r++) {
            elem *to = head.out + (long)(first + r) * WIDTH;
            for (int d = 0; d < HEAD; d += LANES) store(to + d, load_float(&b->result[r][d]) * head.inv_sum[first + r]);
        }
    }
}

/* The softmax of row i, r of the 32, and the gradient of its scores, scale and all; zeros from slot i on, up to `end`. `mean` is that
   of the softmax's gradient. */
static inline void softmax_backward(struct buffers *b, int r, int i, int end, struct softmax_row row, float mean) {
    float *scores = b->scores[r], *d_weights = b->d_weights[r];
    int j = 0;
    for (; j <= i; j += LANES) {
        vf32 weights = vexp(load_float(scores + j) * row.scale - row.row_max) * row.inv_sum;
        vf32 d_scores = weights * (load_float(d_weights + j) - mean) * row.scale;
        if (j + LANES > i + 1) weights = mask_and(causal_mask(i, j), weights), d_scores = mask_and(causal_mask(i, j), d_scores);
        store(b->weights[r] + j, weights);
        store(b->d_scores[r] + j, d_scores);
    }
    for (; j < end; j += LANES) {
        store(b->weights[r] + j, (vf32){0});
        store(b->d_scores[r] + j, (vf32){0});
    }
}

/* `count` rows to `out`, rounded, and added to `sums`. */
static inline void store_rows(elem *out, long stride, float *sums, float rows[][HEAD], int count) {
    for (int d = 0; d < HEAD; d += LANES) {
        vf32 total = {0};
        for (int i = 0; i < count; i++) {
            vf32 x = load_float(&rows[i][d]);
            store(out + i * stride + d, x);
            total += x;
        }
        accumulate(sums + d, total);
    }
}

/* What the backward pass multiplies with, in each order that it is needed in. */
static void load_for_backward(struct buffers *b, struct head head, const elem *d_out) {
    const long row = 3 * WIDTH;
    load_rows(b->q, head.qkv, row, head.slots);
    load_pairs(b->q_pairs, head.qkv, row, head.slots);
    load_columns(b->k_columns, head.qkv + WIDTH, row, head.slots);
    load_pairs(b->k_pairs, head.qkv + WIDTH, row, head.slots);
    load_columns(b->v_columns, head.qkv + 2 * WIDTH, row, head.slots);
    load_rows(b->d_out, d_out, WIDTH, head.slots);
    load_pairs(b->d_out_pairs, d_out, WIDTH, head.slots);
}

/* d_out is the gradient of the head's output, in rows of C; the gradient of its part of qkv's bias is added to `bias_grad` (3C). */
static void attend_backward(struct buffers *b, struct head head, const elem *d_out, float *bias_grad) {
    const long row = 3 * WIDTH;
    const int slots = head.slots;
    const float scale = 1 / sqrtf(HEAD);
    load_for_backward(b, head, d_out);
    for (int first = 0; first < slots; first += 32) {
        int count = slots - first < 32 ? slots - first : 32;
        rows_times_columns(b->scores, b->q, b->k_columns, first);
        rows_times_columns(b->d_weights, b->d_out, b->v_columns, first);
        for (int r = 0; r < 32; r++) {
            int i = first + r;
            vf32 products = {0};
            for (int d = 0; r < count && d < HEAD; d += LANES) {
                products += load(head.out + (long)i * WIDTH + d) * load(d_out + (long)i * WIDTH + d);
            }
            struct softmax_row none = {0};
            if (r >= count) softmax_backward(b, r, -1, first + 32, none, 0);
            else {
                struct softmax_row softmax = {scale, head.row_max[i], head.inv_sum[i]};
                softmax_backward(b, r, i, first + 32, softmax, reduce_sum(products));
            }
        }
        weights_times_pairs(b->result, b->d_scores, b->k_pairs, first);
        store_rows(head.qkv + first * row, row, bias_grad, b->result, count);
        add_weights_t_times_pairs(b->d_k, b->d_scores, b->q_pairs, first);
        add_weights_t_times_pairs(b->d_v, b->weights, b->d_out_pairs, first);
    }
    store_rows(head.qkv + WIDTH, row, bias_grad + WIDTH, b->d_k, slots);
    store_rows(head.qkv + 2 * WIDTH, row, bias_grad + 2 * WIDTH, b->d_v, slots);
}
