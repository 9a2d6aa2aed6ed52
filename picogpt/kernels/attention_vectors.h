/* A head in vectors of floats, in tiles of as many as there are registers for. */

#define VECTORS (HEAD / LANES) /* that hold the entries of one slot in a head */
#define ROWS (REGISTERS / VECTORS > 1 ? REGISTERS / VECTORS : 1)
/* A tile of scores: so many rows, and vectors of columns. */
#define TILE_COLUMNS (LANES == 16 ? 3 : 2)
#define TILE_ROWS (REGISTERS / TILE_COLUMNS)
#define COLUMNS UP(SLOTS, (TILE_COLUMNS * LANES))
#define PADDED UP(SLOTS, TILE_ROWS)

/* Everything of one head, of the slots of a window. */
struct buffers {
    vf32 q[PADDED][VECTORS], k[PADDED][VECTORS], v[PADDED][VECTORS], d_out[PADDED][VECTORS];
    vf32 columns[HEAD][COLUMNS / LANES];                         /* keys or values, transposed */
    float weights[PADDED][COLUMNS] __attribute__((aligned(64))); /* the backward pass's softmax */
    float scores[PADDED][COLUMNS] __attribute__((aligned(64)));  /* and then the softmax or the gradient of the scores */
};

static _Thread_local struct buffers tls_buffers;

/* Rows beyond the last slot are zero, as tiles reach beyond it. */
static void load_rows(vf32 to[PADDED][VECTORS], const elem *from, long stride, float scale, int slots) {
    for (int v = 0; v < VECTORS; v++) {
        for (int i = 0; i < slots; i++) to[i][v] = load(from + i * stride + v * LANES) * scale;
        for (int i = slots; i < PADDED; i++) to[i][v] = (vf32){0};
    }
}

static void transpose_head(vf32 to[HEAD][COLUMNS / LANES], vf32 from[PADDED][VECTORS], int slots) {
    float *out = (float *)to;
    const float *in = (const float *)from;
    for (int d = 0; d < HEAD; d++) {
#pragma GCC unroll 8
        for (int i = 0; i < slots; i++) out[d * COLUMNS + i] = in[i * HEAD + d];
        for (int i = slots; i < COLUMNS; i++) out[d * COLUMNS + i] = 0;
    }
}

/* scores = rows x columns, tile by tile, as far as some row of the tile may look. */
static void scores_gemm(float scores[PADDED][COLUMNS], vf32 rows[PADDED][VECTORS], vf32 columns[HEAD][COLUMNS / LANES],
                        int slots) {
    const float *entries = (const float *)rows;
    for (int i = 0; i < slots; i += TILE_ROWS) {
        for (int j = 0; j < i + TILE_ROWS && j < slots; j += TILE_COLUMNS * LANES) {
            vf32 sums[TILE_ROWS][TILE_COLUMNS] = {0};
            for (int d = 0; d < HEAD; d++) {
                for (int r = 0; r < TILE_ROWS; r++) {
                    for (int c = 0; c < TILE_COLUMNS; c++) {
                        sums[r][c] += entries[(i + r) * HEAD + d] * columns[d][j / LANES + c];
                    }
                }
            }
            for (int r = 0; r < TILE_ROWS; r++) {
                for (int c = 0; c < TILE_COLUMNS; c++) *(vf32 *)&scores[i + r][j + c * LANES] = sums[r][c];
            }
        }
    }
}

/* Rows of an output, `stride` apart, with the sum of all of them. */
struct out_rows {
    elem *at;
    long stride;
    vf32 *total; /* (VECTORS) added to */
};

/* Factors of a sum over rows k: factor k of output row r is at[r * row_step + k * step]. */
struct row_weights {
    const float *at;
    int row_step, step, first, end; /* k from `first` to `end` */
};

/* out[r] = inv_sum[r], if there is one, x the sum over k of factor k x rows[k], for `count` rows r; it is called with a constant
   there, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void weighted_sum_rows(int count, struct out_rows out, const float *inv_sum,
                                                                    struct row_weights f, vf32 rows[PADDED][VECTORS]) {
    vf32 sums[ROWS][VECTORS] = {0};
    for (int k = f.first; k < f.end; k++) {
        for (int r = 0; r < count; r++) {
            for (int v = 0; v < VECTORS; v++) sums[r][v] += f.at[r * f.row_step + k * f.step] * rows[k][v];
        }
    }
    for (int r = 0; r < count; r++) {
        for (int v = 0; v < VECTORS; v++) {
            if (inv_sum) sums[r][v] *= inv_sum[r];
            store(out.at + r * out.stride + v * LANES, sums[r][v]);
            out.total[v] += sums[r][v];
        }
    }
}

/* The causal product of factors (slots, slots) and rows: row i is summed over k <= i. With `sums`, the sum of all output rows is added
   to it. */
static inline void causal_gemm(elem *out, long stride, float *sums, const float *inv_sum, float weights[PADDED][COLUMNS],
                               vf32 rows[PADDED][VECTORS], int slots) {
    vf32 total[VECTORS] = {0};
    int i = 0;
    for (; i + ROWS <= slots; i += ROWS) {
        struct row_weights f = {weights[i], COLUMNS, 1, 0, i + ROWS};
        weighted_sum_rows(ROWS, (struct out_rows){out + i * stride, stride, total}, inv_sum ? inv_sum + i : 0, f, rows);
    }
    for (; i < slots; i++) {
        struct row_weights f = {weights[i], COLUMNS, 1, 0, i + 1};
        weighted_sum_rows(1, (struct out_rows){out + i * stride, stride, total}, inv_sum ? inv_sum + i : 0, f, rows);
    }
    for (int v = 0; sums && v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* The same of the factors transposed: row j is summed over k >= j. */
static inline void causal_gemm_tn(elem *out, long stride, float *sums, float weights[PADDED][COLUMNS],
                                  vf32 rows[PADDED][VECTORS], int slots) {
    vf32 total[VECTORS] = {0};
    int j = 0;
    for (; j + ROWS <= slots; j += ROWS) {
        struct row_weights f = {&weights[0][j], 1, COLUMNS, j, slots};
        weighted_sum_rows(ROWS, (struct out_rows){out + j * stride, stride, total}, 0, f, rows);
    }
    for (; j < slots; j++) {
        struct row_weights f = {&weights[0][j], 1, COLUMNS, j, slots};
        weighted_sum_rows(1, (struct out_rows){out + j * stride, stride, total}, 0, f, rows);
    }
    for (int v = 0; v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* Columns that a row has to have for the tiles of `combine`, beyond those that it sees. */
static inline int padded_end(int row) {
    int end = UP(row + ROWS, LANES);
    return end < COLUMNS ? end : COLUMNS;
}

/* Scores of row i, scaled before, become their softmax, and zero beyond slot i; returns the sum. */
static inline float softmax_numerators(float *scores, int i, struct softmax_row row) {
    vf32 sum = {0};
    for (int j = 0; j < padded_end(i); j += LANES) {
        vf32 weights = vexp(load_float(scores + j) - row.row_max) * row.inv_sum;
        if (j + LANES > i + 1) weights = mask_and(causal_mask(i, j), weights);
        store_float(scores + j, weights);
        sum += weights;
    }
    return reduce_sum(sum);
}

static void attend(struct buffers *b, struct head head) {
    const long row = 3 * WIDTH;
    const int slots = head.slots;
    load_rows(b->q, head.qkv, row, 1 / sqrtf(HEAD), slots);
    load_rows(b->k, head.qkv + WIDTH, row, 1, slots);
    load_rows(b->v, head.qkv + 2 * WIDTH, row, 1, slots);
    transpose_head(b->columns, b->k, slots);
    scores_gemm(b->scores, b->q, b->columns, slots);
    for (int i = 0; i < slots; i++) {
        head.row_max[i] = causal_row_max(b->scores[i], i);
        head.inv_sum[i] = 1 / softmax_numerators(b->scores[i], i, (struct softmax_row){1, head.row_max[i], 1});
    }
    causal_gemm(head.out, WIDTH, 0, head.inv_sum, b->scores, b->v, slots);
}

/* Scores of row i, scaled before, become their softmax, and `scores`, the softmax's gradient, becomes that of the scores: softmax x (its
   gradient - their weighted mean). The mean is taken with the very weights that it is subtracted with: where all weight is on one
   slot the two cancel exactly, as they would not with output x d_out, which is the same number rounded in another way. */
static inline void softmax_backward(float *weights, float *scores, int i, struct softmax_row row) {
    vf32 products = {0};
    for (int j = 0; j < padded_end(i); j += LANES) {
        vf32 weight = vexp(load_float(weights + j) - row.row_max) * row.inv_sum, d_weight = load_float(scores + j);
        if (j + LANES > i + 1) {
            vi32 mask = causal_mask(i, j);
            weight = mask_and(mask, weight), d_weight = mask_and(mask, d_weight);
        }
        store_float(weights + j, weight);
        products += weight * d_weight;
    }
    float mean = reduce_sum(products);
    for (int j = 0; j < padded_end(i); j += LANES) {
        vf32 difference = load_float(scores + j) - mean;
        if (j + LANES > i + 1) difference = mask_and(causal_mask(i, j), difference);
        store_float(scores + j, load_float(weights + j) * difference);
    }
}

/* d_out is the gradient of the head's output, in rows of C; the gradient of its part of qkv's bias is added to `bias_grad` (3C). */
static void attend_backward(struct buffers *b, struct head head, const elem *d_out, float *bias_grad) {
    const long row = 3 * WIDTH;
    const int slots = head.slots;
    const float scale = 1 / sqrtf(HEAD);
    load_rows(b->q, head.qkv, row, scale, slots);
    load_rows(b->k, head.qkv + WIDTH, row, 1, slots);
    load_rows(b->v, head.qkv + 2 * WIDTH, row, 1, slots);
    load_rows(b->d_out, d_out, WIDTH, 1, slots);
    transpose_head(b->columns, b->k, slots);
    scores_gemm(b->weights, b->q, b->columns, slots);
    transpose_head(b->columns, b->v, slots);
    scores_gemm(b->scores, b->d_out, b->columns, slots); /* the gradient of the softmax */
    for (int i = 0; i < slots; i++) {
        softmax_backward(b->weights[i], b->scores[i], i, (struct softmax_row){1, head.row_max[i], head.inv_sum[i]});
    }
    for (int i = 0; i < slots; i++) {
        for (int v = 0; v < VECTORS; v++) b->k[i][v] *= scale;
    }
    causal_gemm(head.qkv, row, bias_grad, 0, b->scores, b->k, slots);
    causal_gemm_tn(head.qkv + WIDTH, row, bias_grad + WIDTH, b->scores, b->q, slots);
    causal_gemm_tn(head.qkv + 2 * WIDTH, row, bias_grad + 2 * WIDTH, b->weights, b->d_out, slots);
}
