/* Attention of one head on vectors of floats, for float32, and for bfloat16 without AMX: elems are
   widened once, and all sums are float32.

   All score rows of a head are computed at once, by GEMMs in register tiles as large as the registers
   allow. The tiles skip columns that no row of theirs may attend to. Buffers are padded to whole tiles,
   with zeros, so that no tile needs a special case at the edges of the matrices. */

#define VECTORS (HEAD / LANES) /* vectors per slot of a head */
/* Rows of a register tile of weights x rows, each as wide as the head. */
#define ROWS (REGISTERS / VECTORS > 1 ? REGISTERS / VECTORS : 1)
/* A register tile of scores: TILE_ROWS slots of q, and TILE_COLUMNS vectors of slots of k. The shape
   keeps loads per multiply-add low within the registers that there are. */
#define TILE_COLUMNS (LANES == 16 ? 3 : 2)
#define TILE_ROWS (REGISTERS / TILE_COLUMNS)
/* Slots rounded up to whole tiles, in columns and in rows. */
#define COLUMNS UP(SLOTS, (TILE_COLUMNS * LANES))
#define PADDED UP(SLOTS, TILE_ROWS)

/* Buffers of one head. They are thread-local, and reused for each head. */
struct buffers {
    vf32 q[PADDED][VECTORS], k[PADDED][VECTORS], v[PADDED][VECTORS], d_out[PADDED][VECTORS];
    vf32 columns[HEAD][COLUMNS / LANES];                         /* k or v, transposed: (HEAD, slots) */
    float weights[PADDED][COLUMNS] __attribute__((aligned(64))); /* scores, then softmax weights: backward pass only */
    float scores[PADDED][COLUMNS] __attribute__((aligned(64)));  /* softmax weights; backward: d_weights, then d_scores */
};

/* One head's buffers are too large for a stack frame. */
static _Thread_local struct buffers tls_buffers;

/* Copy a head's slots, `stride` elems apart, to vectors of floats, times `scale`. Rows beyond the last
   slot are zeros, as tiles reach beyond it. */
static void load_rows(vf32 to[PADDED][VECTORS], const elem *from, long stride, float scale, int slots) {
    for (int i = 0; i < slots; i++) {
        for (int v = 0; v < VECTORS; v++) to[i][v] = load(from + i * stride + v * LANES) * scale;
    }
    memset(to + slots, 0, (PADDED - slots) * sizeof *to);
}

/* Transpose (slots, HEAD) to (HEAD, slots), with zeros beyond the last slot: then neighbouring slots are
   one vector of scores. */
static void transpose_head(vf32 to[HEAD][COLUMNS / LANES], vf32 from[PADDED][VECTORS], int slots) {
    float *out = (float *)to;
    const float *in = (const float *)from;
    for (int d = 0; d < HEAD; d++) {
#pragma GCC unroll 8
        for (int i = 0; i < slots; i++) out[d * COLUMNS + i] = in[i * HEAD + d];
        for (int i = slots; i < COLUMNS; i++) out[d * COLUMNS + i] = 0;
    }
}

/* scores (slots, slots) = rows columns, tile by tile, with an inner dimension of HEAD. Tiles right of
   the diagonal are skipped, as no row of theirs attends to their columns. */
static void scores_gemm(float scores[PADDED][COLUMNS], vf32 rows[PADDED][VECTORS], vf32 columns[HEAD][COLUMNS / LANES],
                        int slots) {
    const float *entries = (const float *)rows;
    for (int i = 0; i < slots; i += TILE_ROWS) {
        for (int j = 0; j < i + TILE_ROWS && j < slots; j += TILE_COLUMNS * LANES) {
            vf32 sums[TILE_ROWS][TILE_COLUMNS] = {0};
            /* The outer product of TILE_ROWS broadcast entries and TILE_COLUMNS vectors, added to the
               tile. */
            for (int d = 0; d < HEAD; d++) {
                /* Each broadcast entry of a row is used for all vectors of columns. */
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

/* Where rows of an output go: `stride` elems apart, and their sum, for the gradient of a bias. */
struct out_rows {
    elem *at;
    long stride;
    vf32 *total; /* (VECTORS) added to */
};

/* Weights of a weighted sum over rows k: that of row k in output row r is at[r * row_step + k * step].
   So one function serves weights and transposed weights. */
struct row_weights {
    const float *at;
    int row_step, step, first, end; /* k in [first, end) */
};

/* The micro-kernel: out[r] = inv_sum[r] sum over k of weight[r][k] rows[k], for `count` output rows,
   without inv_sum if it is null. `count` must be a constant where this is inlined: then the accumulators
   stay in registers. */
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
            /* The softmax denominator divides the output instead of each weight. */
            if (inv_sum) sums[r][v] *= inv_sum[r];
            store(out.at + r * out.stride + v * LANES, sums[r][v]);
            out.total[v] += sums[r][v];
        }
    }
}

/* out = weights rows, with causal weights (slots, slots): row i is a sum over k <= i. Columns between i
   and the end of a tile are zeros in `weights`. With `sums`, the sum of all output rows is added to it. */
static inline void causal_gemm(elem *out, long stride, float *sums, const float *inv_sum, float weights[PADDED][COLUMNS],
                               vf32 rows[PADDED][VECTORS], int slots) {
    vf32 total[VECTORS] = {0};
    int i = 0;
    for (; i + ROWS <= slots; i += ROWS) {
        struct row_weights f = {weights[i], COLUMNS, 1, 0, i + ROWS};
        weighted_sum_rows(ROWS, (struct out_rows){out + i * stride, stride, total}, inv_sum ? inv_sum + i : 0, f, rows);
    }
    /* The last rows, fewer than a tile. */
    for (; i < slots; i++) {
        struct row_weights f = {weights[i], COLUMNS, 1, 0, i + 1};
        weighted_sum_rows(1, (struct out_rows){out + i * stride, stride, total}, inv_sum ? inv_sum + i : 0, f, rows);
    }
    for (int v = 0; sums && v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* out = weights^T rows: row j is a sum over k >= j, which is k's causal range seen from the other side. */
static inline void causal_gemm_tn(elem *out, long stride, float *sums, float weights[PADDED][COLUMNS], vf32 rows[PADDED][VECTORS],
                                  int slots) {
    vf32 total[VECTORS] = {0};
    int j = 0;
    for (; j + ROWS <= slots; j += ROWS) {
        struct row_weights f = {&weights[0][j], 1, COLUMNS, j, slots};
        weighted_sum_rows(ROWS, (struct out_rows){out + j * stride, stride, total}, 0, f, rows);
    }
    /* The last rows, fewer than a tile. */
    for (; j < slots; j++) {
        struct row_weights f = {&weights[0][j], 1, COLUMNS, j, slots};
        weighted_sum_rows(1, (struct out_rows){out + j * stride, stride, total}, 0, f, rows);
    }
    for (int v = 0; v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* End of the columns that must hold valid weights in row `row`: tiles of `weighted_sum_rows` read up to
   ROWS - 1 columns beyond the diagonal. */
static inline int padded_end(int row) {
    int end = UP(row + ROWS, LANES);
    return end < COLUMNS ? end : COLUMNS;
}

/* Softmax numerators of row i, e^(score - row_max), in place of its scores (which were scaled by way of
   q), with zeros beyond column i. Returns their sum. */
static inline float softmax_numerators(float *scores, int i, float row_max) {
    vf32 sum = {0};
    for (int j = 0; j < padded_end(i); j += LANES) {
        vf32 weights = vexp(load_float(scores + j) - row_max);
        /* the vector on the diagonal, and zeros behind it */
        if (j + LANES > i + 1) weights = mask_and(causal_mask(i, j), weights);
        store_float(scores + j, weights);
        sum += weights;
    }
    return reduce_sum(sum);
}

/* Forward pass of one head: reads q, k, v, writes out, row max and 1 / denominator. */
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
        head.inv_sum[i] = 1 / softmax_numerators(b->scores[i], i, head.row_max[i]);
    }
    causal_gemm(head.out, WIDTH, 0, head.inv_sum, b->scores, b->v, slots);
}

/* Backward through the softmax of row i. `weights` holds its scores, scaled before, and becomes the
   softmax; `scores` holds d_weights and becomes d_scores = weights (d_weights - mean), mean = sum of
   weights x d_weights.

   The mean is computed from the very weights that it is multiplied with. Where all weight is on one
   slot, the difference then cancels exactly; with the equivalent sum of out x d_out, which is rounded in
   another way, it would not. */
static inline void softmax_backward(float *weights, float *scores, int i, float row_max, float inv_sum) {
    vf32 products = {0};
    for (int j = 0; j < padded_end(i); j += LANES) {
        vf32 weight = vexp(load_float(weights + j) - row_max) * inv_sum, d_weight = load_float(scores + j);
        if (j + LANES > i + 1) {
            /* Beyond the diagonal both are masked: a score there may be anything, even NaN. */
            vi32 mask = causal_mask(i, j);
            weight = mask_and(mask, weight), d_weight = mask_and(mask, d_weight);
        }
        store_float(weights + j, weight);
        products += weight * d_weight;
    }
    /* A second pass, as the mean needs the whole row. */
    float mean = reduce_sum(products);
    for (int j = 0; j < padded_end(i); j += LANES) {
        vf32 difference = load_float(scores + j) - mean;
        if (j + LANES > i + 1) difference = mask_and(causal_mask(i, j), difference);
        store_float(scores + j, load_float(weights + j) * difference);
    }
}

/* Backward pass of one head: recomputes the weights, then

      d_weights = d_out v^T,   d_q = d_scores k / sqrt(D),   d_k = d_scores^T q / sqrt(D),   d_v = weights^T d_out

   d_out (slots, C) is the gradient of the head's output. The gradients go to head.d_qkv, which may be
   q, k and v, as they have been copied; their sums over slots are added to `bias_grad` (3C). */
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
    scores_gemm(b->scores, b->d_out, b->columns, slots); /* d_weights */
    for (int i = 0; i < slots; i++) {
        softmax_backward(b->weights[i], b->scores[i], i, head.row_max[i], head.inv_sum[i]);
    }
    for (int i = 0; i < slots; i++) {
        /* q was scaled when it was read, which serves scores and d_k; d_q needs k scaled. */
        for (int v = 0; v < VECTORS; v++) b->k[i][v] *= scale;
    }
    causal_gemm(head.d_qkv, row, bias_grad, 0, b->scores, b->k, slots);
    causal_gemm_tn(head.d_qkv + WIDTH, row, bias_grad + WIDTH, b->scores, b->q, slots);
    causal_gemm_tn(head.d_qkv + 2 * WIDTH, row, bias_grad + 2 * WIDTH, b->weights, b->d_out, slots);
}
