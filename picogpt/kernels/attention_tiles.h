/* A head in bfloat16, by the processor's tiles of matrices: products of 32 slots with 32 slots, or with 32 entries of a head.

   Each of the two passes goes from 32 rows of scores to the next, so that scores and weights are never far. Weights are rounded
   for the products that they are in, as scores are not. */

#define SIDE UP(SLOTS, 32)

typedef unit rows_of_head[SIDE][HEAD / 2] __attribute__((aligned(64)));    /* as they are: two entries are a unit */
typedef unit columns_of_head[HEAD / 2][SIDE] __attribute__((aligned(64))); /* the same, transposed */
typedef unit pairs_of_head[HEAD / 32][SIDE / 2][32]
    __attribute__((aligned(64))); /* entries of one slot and the next are a unit */

struct head {
    rows_of_head q, gradient;
    columns_of_head k_columns, v_columns;
    pairs_of_head q_pairs, k_pairs, v_pairs, gradient_pairs;
    /* Of 32 rows: */
    float scores[32][SIDE] __attribute__((aligned(64))), d_weights[32][SIDE] __attribute__((aligned(64)));
    number weights[32][SIDE] __attribute__((aligned(64))), d_scores[32][SIDE] __attribute__((aligned(64)));
    float result[32][HEAD] __attribute__((aligned(64)));
    float d_k[SIDE][HEAD] __attribute__((aligned(64))), d_v[SIDE][HEAD] __attribute__((aligned(64)));
};

static _Thread_local struct head own;

/* 16 units of slot i, or zeros beyond the last slot. */
static inline units of_slot(const number *from, long stride, int i, int slots) {
    typedef uint32_t some __attribute__((vector_size(64), aligned(2), may_alias));
    return i < slots ? (units) * (const some *)(from + i * stride) : (units){0};
}

static void read_rows(rows_of_head to, const number *from, long stride, int slots) {
    for (int i = 0; i < UP(slots, 32); i++) {
        for (int u = 0; u < HEAD / 2; u += 16) *(units *)&to[i][u] = of_slot(from + 2 * u, stride, i, slots);
    }
}

static void read_columns(columns_of_head to, const number *from, long stride, int slots) {
    for (int i = 0; i < UP(slots, 32); i += 16) {
        for (int u = 0; u < HEAD / 2; u += 16) {
            integers tile[16];
            for (int r = 0; r < 16; r++) tile[r] = (integers)of_slot(from + 2 * u, stride, i + r, slots);
            transpose_lanes(tile);
            for (int r = 0; r < 16; r++) *(integers *)&to[u + r][i] = tile[r];
        }
    }
}

static void read_pairs(pairs_of_head to, const number *from, long stride, int slots) {
    for (int d = 0; d < HEAD; d += 32) pack_right(from + d, to[d / 32][0], stride, 32, slots, UP(slots, 32) / 2);
}

/* 32 rows of scores, or gradients of weights, from row `first` on: rows x columns, as far as the last of them sees. */
static inline void multiply_rows_with_columns(float scores[32][SIDE], rows_of_head rows, columns_of_head columns, int first) {
    for (int j = 0; j <= first; j += 32) {
        multiply_tiles(1, &scores[0][j], SIDE, 0, (struct tiles){rows[first], 2 * HEAD, 64},
                       (struct tiles){&columns[0][j], 4 * SIDE, 64 * SIDE}, HEAD / 32);
    }
}

/* (32, HEAD) = weights x those rows, given in pairs, that are seen by the last of the 32 from `first` on. */
static inline void multiply_with_pairs(float result[32][HEAD], number weights[32][SIDE], pairs_of_head pairs, int first) {
    for (int d = 0; d < HEAD; d += 32) {
        multiply_tiles(1, &result[0][d], HEAD, 0, (struct tiles){weights, 2 * SIDE, 64}, tiles_of_panel(pairs[d / 32][0]),
                       first / 32 + 1);
    }
}

/* sums (slots, HEAD) += the weights of 32 rows from `first` on, transposed, x those rows, given in pairs. */
static inline void add_transposed_product(float sums[SIDE][HEAD], number weights[32][SIDE], pairs_of_head pairs, int first) {
    unit columns[32][16] __attribute__((aligned(64)));
    for (int j = 0; j <= first; j += 32) {
        pack_left(&weights[0][j], columns[0], SIDE, 32, 32, 16);
        for (int d = 0; d < HEAD; d += 32) {
            struct tiles left = {columns, 64, 0}, right = tiles_of_panel(pairs[d / 32][first / 2]);
            if (j < first) multiply_tiles(1, &sums[j][d], HEAD, 1, left, right, 1);
            else multiply_tiles(1, &sums[j][d], HEAD, 0, left, right, 1);
        }
    }
}

/* share x e^(scale x score - top) for what row i sees, and zeros up to `end`; returns their sum. */
static inline float weigh(number *weights, const float *scores, int i, int end, float scale, float top, float share) {
    vector sum = {0};
    int j = 0;
    for (; j <= i; j += LANES) {
        vector found = exponential(load_float(scores + j) * scale - top) * share;
        if (j + LANES > i + 1) found = only(seen(i, j), found);
        store(weights + j, found);
        sum += found;
    }
    for (; j < end; j += LANES) store(weights + j, (vector){0});
    return sum_of(sum);
}

static void attend(struct head *head, const number *qkv, number *out, float *tops, float *shares, int slots) {
    const long row = 3 * WIDTH;
    const float scale = 1 / sqrtf(HEAD);
    read_rows(head->q, qkv, row, slots);
    read_columns(head->k_columns, qkv + WIDTH, row, slots);
    read_pairs(head->v_pairs, qkv + 2 * WIDTH, row, slots);
    for (int first = 0; first < slots; first += 32) {
        int count = slots - first < 32 ? slots - first : 32;
        multiply_rows_with_columns(head->scores, head->q, head->k_columns, first);
        for (int r = 0; r < count; r++) {
            int i = first + r;
            tops[i] = scale * largest(head->scores[r], i);
            shares[i] = 1 / weigh(head->weights[r], head->scores[r], i, first + 32, scale, tops[i], 1);
        }
        multiply_with_pairs(head->result, head->weights, head->v_pairs, first);
        for (int r = 0; r < count; r++) {
            for (int d = 0; d < HEAD; d += LANES)
                store(out + (long)(first + r) * WIDTH + d, load_float(&head->result[r][d]) * shares[first + r]);
        }
    }
}

/* Weights of row i, and the gradient of its scores, scale and all. */
static inline void weigh_backward(struct head *head, int r, int i, int end, float scale, float top, float share, float mean) {
    float *scores = head->scores[r], *d_weights = head->d_weights[r];
    int j = 0;
    for (; j <= i; j += LANES) {
        vector weights = exponential(load_float(scores + j) * scale - top) * share;
        vector d_scores = weights * (load_float(d_weights + j) - mean) * scale;
        if (j + LANES > i + 1) weights = only(seen(i, j), weights), d_scores = only(seen(i, j), d_scores);
        store(head->weights[r] + j, weights);
        store(head->d_scores[r] + j, d_scores);
    }
    for (; j < end; j += LANES) {
        store(head->weights[r] + j, (vector){0});
        store(head->d_scores[r] + j, (vector){0});
    }
}

/* `count` rows to `out`, rounded, and added to `sums`. */
static inline void put_rows(number *out, long stride, float *sums, float rows[][HEAD], int count) {
    for (int d = 0; d < HEAD; d += LANES) {
        vector total = {0};
        for (int i = 0; i < count; i++) {
            vector x = load_float(&rows[i][d]);
            store(out + i * stride + d, x);
            total += x;
        }
        accumulate(sums + d, total);
    }
}

static void attend_backward(struct head *head, const number *gradient, number *qkv, const number *out, const float *tops,
                            const float *shares, float *sums, int slots) {
    const long row = 3 * WIDTH;
    const float scale = 1 / sqrtf(HEAD);
    read_rows(head->q, qkv, row, slots);
    read_pairs(head->q_pairs, qkv, row, slots);
    read_columns(head->k_columns, qkv + WIDTH, row, slots);
    read_pairs(head->k_pairs, qkv + WIDTH, row, slots);
    read_columns(head->v_columns, qkv + 2 * WIDTH, row, slots);
    read_rows(head->gradient, gradient, WIDTH, slots);
    read_pairs(head->gradient_pairs, gradient, WIDTH, slots);
    for (int first = 0; first < slots; first += 32) {
        int count = slots - first < 32 ? slots - first : 32;
        multiply_rows_with_columns(head->scores, head->q, head->k_columns, first);
        multiply_rows_with_columns(head->d_weights, head->gradient, head->v_columns, first);
        for (int r = 0; r < 32; r++) {
            int i = first + r;
            vector products = {0};
            for (int d = 0; r < count && d < HEAD; d += LANES) {
                products += load(out + (long)i * WIDTH + d) * load(gradient + (long)i * WIDTH + d);
            }
            if (r < count) weigh_backward(head, r, i, first + 32, scale, tops[i], shares[i], sum_of(products));
            else weigh_backward(head, r, -1, first + 32, 0, 0, 0, 0);
        }
        multiply_with_pairs(head->result, head->d_scores, head->k_pairs, first);
        put_rows(qkv + first * row, row, sums, head->result, count);
        add_transposed_product(head->d_k, head->d_scores, head->q_pairs, first);
        add_transposed_product(head->d_v, head->weights, head->gradient_pairs, first);
    }
    put_rows(qkv + WIDTH, row, sums + WIDTH, head->d_k, slots);
    put_rows(qkv + 2 * WIDTH, row, sums + 2 * WIDTH, head->d_v, slots);
}
