/* A head in vectors of floats, in tiles of as many as there are registers for. */

#define VECTORS (HEAD / LANES) /* that hold the entries of one slot in a head */
#define ROWS (REGISTERS / VECTORS > 1 ? REGISTERS / VECTORS : 1)
/* A tile of scores: so many rows, and vectors of columns. */
#define TILE_COLUMNS (LANES == 16 ? 3 : 2)
#define TILE_ROWS (REGISTERS / TILE_COLUMNS)
#define COLUMNS UP(SLOTS, (TILE_COLUMNS * LANES))
#define PADDED UP(SLOTS, TILE_ROWS)

struct head {
    vector q[PADDED][VECTORS], k[PADDED][VECTORS], v[PADDED][VECTORS], gradient[PADDED][VECTORS];
    vector columns[HEAD][COLUMNS / LANES]; /* keys or values, transposed */
    float weights[PADDED][COLUMNS] __attribute__((aligned(64))), scores[PADDED][COLUMNS] __attribute__((aligned(64)));
};

static _Thread_local struct head own;

/* Rows beyond the last slot are zero, as tiles reach beyond it. */
static void read_rows(vector to[PADDED][VECTORS], const number *from, long stride, float scale, int slots) {
    for (int v = 0; v < VECTORS; v++) {
        for (int i = 0; i < slots; i++) to[i][v] = load(from + i * stride + v * LANES) * scale;
        for (int i = slots; i < PADDED; i++) to[i][v] = (vector){0};
    }
}

static void transpose(vector to[HEAD][COLUMNS / LANES], vector from[PADDED][VECTORS], int slots) {
    float *out = (float *)to;
    const float *in = (const float *)from;
    for (int d = 0; d < HEAD; d++) {
#pragma GCC unroll 8
        for (int i = 0; i < slots; i++) out[d * COLUMNS + i] = in[i * HEAD + d];
        for (int i = slots; i < COLUMNS; i++) out[d * COLUMNS + i] = 0;
    }
}

/* scores = rows x columns, tile by tile, as far as some row of the tile may look. */
static void multiply_causal(float scores[PADDED][COLUMNS], vector rows[PADDED][VECTORS], vector columns[HEAD][COLUMNS / LANES],
                            int slots) {
    const float *entries = (const float *)rows;
    for (int i = 0; i < slots; i += TILE_ROWS) {
        for (int j = 0; j < i + TILE_ROWS && j < slots; j += TILE_COLUMNS * LANES) {
            vector sums[TILE_ROWS][TILE_COLUMNS] = {0};
            for (int d = 0; d < HEAD; d++) {
                for (int r = 0; r < TILE_ROWS; r++) {
                    for (int c = 0; c < TILE_COLUMNS; c++) {
                        sums[r][c] += entries[(i + r) * HEAD + d] * columns[d][j / LANES + c];
                    }
                }
            }
            for (int r = 0; r < TILE_ROWS; r++) {
                for (int c = 0; c < TILE_COLUMNS; c++) *(vector *)&scores[i + r][j + c * LANES] = sums[r][c];
            }
        }
    }
}

/* out[r] = shares[r] x sum over k of factors[r * row_step + k * step] x rows[k], for `count` rows r, and added to `total`; it
   is called with a constant there, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void combine(int count, number *out, long stride, vector total[VECTORS],
                                                          const float *shares, const float *factors, int row_step, int step,
                                                          vector rows[PADDED][VECTORS], int first, int end) {
    vector sums[ROWS][VECTORS] = {0};
    for (int k = first; k < end; k++) {
        for (int r = 0; r < count; r++) {
            for (int v = 0; v < VECTORS; v++) sums[r][v] += factors[r * row_step + k * step] * rows[k][v];
        }
    }
    for (int r = 0; r < count; r++) {
        for (int v = 0; v < VECTORS; v++) {
            if (shares) sums[r][v] *= shares[r];
            store(out + r * stride + v * LANES, sums[r][v]);
            total[v] += sums[r][v];
        }
    }
}

/* Each row i of `factors` times those `rows` that it sees, up to its own; the sum of all that in `sums`, if there is one. */
static inline void combine_seen(number *out, long stride, float *sums, const float *shares, float factors[PADDED][COLUMNS],
                                vector rows[PADDED][VECTORS], int slots) {
    vector total[VECTORS] = {0};
    int i = 0;
    for (; i + ROWS <= slots; i += ROWS) {
        combine(ROWS, out + i * stride, stride, total, shares ? shares + i : 0, factors[i], COLUMNS, 1, rows, 0, i + ROWS);
    }
    for (; i < slots; i++) {
        combine(1, out + i * stride, stride, total, shares ? shares + i : 0, factors[i], COLUMNS, 1, rows, 0, i + 1);
    }
    for (int v = 0; sums && v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* Each column j of `factors` times those `rows` that see it, from its own on; the sum of all that in `sums`. */
static void combine_seeing(number *out, long stride, float *sums, float factors[PADDED][COLUMNS], vector rows[PADDED][VECTORS],
                           int slots) {
    vector total[VECTORS] = {0};
    int j = 0;
    for (; j + ROWS <= slots; j += ROWS) {
        combine(ROWS, out + j * stride, stride, total, 0, &factors[0][j], 1, COLUMNS, rows, j, slots);
    }
    for (; j < slots; j++) combine(1, out + j * stride, stride, total, 0, &factors[0][j], 1, COLUMNS, rows, j, slots);
    for (int v = 0; v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* Columns that a row has to have for the tiles of `combine`, beyond those that it sees. */
static inline int end_of(int row) {
    int end = UP(row + ROWS, LANES);
    return end < COLUMNS ? end : COLUMNS;
}

/* Scores of row i to share x e^(score - top), and to zero beyond what it sees; returns their sum. */
static inline float weigh(float *scores, int i, float top, float share) {
    vector sum = {0};
    for (int j = 0; j < end_of(i); j += LANES) {
        vector weights = exponential(load_float(scores + j) - top) * share;
        if (j + LANES > i + 1) weights = only(seen(i, j), weights);
        store_float(scores + j, weights);
        sum += weights;
    }
    return sum_of(sum);
}

static void attend(struct head *head, const number *qkv, number *out, float *tops, float *shares, int slots) {
    const long row = 3 * WIDTH;
    read_rows(head->q, qkv, row, 1 / sqrtf(HEAD), slots);
    read_rows(head->k, qkv + WIDTH, row, 1, slots);
    read_rows(head->v, qkv + 2 * WIDTH, row, 1, slots);
    transpose(head->columns, head->k, slots);
    multiply_causal(head->scores, head->q, head->columns, slots);
    for (int i = 0; i < slots; i++) {
        tops[i] = largest(head->scores[i], i);
        shares[i] = 1 / weigh(head->scores[i], i, tops[i], 1);
    }
    combine_seen(out, WIDTH, 0, shares, head->scores, head->v, slots);
}

static void attend_backward(struct head *head, const number *gradient, number *qkv, const number *out, const float *tops,
                            const float *shares, float *sums, int slots) {
    const long row = 3 * WIDTH;
    const float scale = 1 / sqrtf(HEAD);
    read_rows(head->q, qkv, row, scale, slots);
    read_rows(head->k, qkv + WIDTH, row, 1, slots);
    read_rows(head->v, qkv + 2 * WIDTH, row, 1, slots);
    read_rows(head->gradient, gradient, WIDTH, 1, slots);
    transpose(head->columns, head->k, slots);
    multiply_causal(head->weights, head->q, head->columns, slots);
    transpose(head->columns, head->v, slots);
    multiply_causal(head->scores, head->gradient, head->columns, slots);
    for (int i = 0; i < slots; i++) {
        float *weights = head->weights[i], *scores = head->scores[i];
        vector products = {0};
        for (int v = 0; v < VECTORS; v++) products += load(out + (long)i * WIDTH + v * LANES) * head->gradient[i][v];
        float mean = sum_of(products);
        weigh(weights, i, tops[i], shares[i]);
        for (int j = 0; j < end_of(i); j += LANES) {
            vector difference = load_float(scores + j) - mean;
            if (j + LANES > i + 1) difference = only(seen(i, j), difference);
            store_float(scores + j, load_float(weights + j) * difference);
        }
    }
    for (int i = 0; i < slots; i++) {
        for (int v = 0; v < VECTORS; v++) head->k[i][v] *= scale;
    }
    combine_seen(qkv, row, sums, 0, head->scores, head->k, slots);
    combine_seeing(qkv + WIDTH, row, sums + WIDTH, head->scores, head->q, slots);
    combine_seeing(qkv + 2 * WIDTH, row, sums + 2 * WIDTH, head->weights, head->gradient, slots);
}
