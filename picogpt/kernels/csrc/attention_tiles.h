/* Attention of one head on AMX, in bfloat16: GEMMs of 32 slots with 32 slots, or with 32 entries of a
   head.

   Both passes go through the rows of the score matrix 32 at a time: scores, softmax and the product with
   v of one block of rows are done before the next block begins, so that they are still in the cache.
   Blocks of columns above the diagonal are skipped: that is half of the work. Scores stay float32;
   weights and their gradients are rounded to bfloat16 for the GEMMs that take them.

   AMX wants its left operand as rows of pairs and its right operand in pairs along the inner dimension.
   So q, k, v and d_out are copied into the order that each GEMM needs, and the same matrix may be copied
   in two orders. */

/* Slots, rounded up to blocks of 32; slots beyond the last one are zeros. */
#define SIDE UP(SLOTS, 32)

/* left operand: as it is; two entries are a pair */
typedef packed_elem head_rows[SIDE][HEAD / 2] __attribute__((aligned(64)));
/* right operand of rows x columns^T: pairs of entries */
typedef packed_elem head_columns[HEAD / 2][SIDE] __attribute__((aligned(64)));
/* Right operand of weights x rows: pairs of neighbouring slots, in panels of 32 entries. */
typedef packed_elem head_pairs[HEAD / 32][SIDE / 2][32]
    __attribute__((aligned(64))); /* entries of one slot and the next are a pair */

/* Buffers of one head, of SIDE slots. They are thread-local, and reused for each head. */
struct buffers {
    head_rows q, d_out;
    head_columns k_columns, v_columns;
    head_pairs q_pairs, k_pairs, v_pairs, d_out_pairs;
    /* The current block of 32 rows. */
    float scores[32][SIDE] __attribute__((aligned(64))), d_weights[32][SIDE] __attribute__((aligned(64)));
    /* rounded: left operands */
    elem weights[32][SIDE] __attribute__((aligned(64))), d_scores[32][SIDE] __attribute__((aligned(64)));
    float result[32][HEAD] __attribute__((aligned(64))); /* a GEMM's output on its way to elems */
    /* sums over all blocks of rows */
    float d_k[SIDE][HEAD] __attribute__((aligned(64))), d_v[SIDE][HEAD] __attribute__((aligned(64)));
};

/* One head's buffers are too large for a stack frame. */
static _Thread_local struct buffers tls_buffers;

/* 16 pairs of slot i from `from` on, or zeros beyond the last slot; slots are `stride` elems apart. */
static inline packed_vec load_slot(const elem *from, long stride, int i, int slots) {
    typedef uint32_t some __attribute__((vector_size(64), aligned(2), may_alias));
    return i < slots ? (packed_vec) * (const some *)(from + i * stride) : (packed_vec){0};
}

/* Copy the head's part of each slot, (slots, HEAD), to rows that stand side by side. */
static void load_rows(head_rows to, const elem *from, long stride, int slots) {
    for (int i = 0; i < UP(slots, 32); i++) {
        for (int u = 0; u < HEAD / 2; u += 16) *(packed_vec *)&to[i][u] = load_slot(from + 2 * u, stride, i, slots);
    }
}

/* Copy and transpose: pair u of slot i goes to row u, column i, by 16 x 16 words in registers. */
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

/* Copy into panels of pairs of slots, as `pack_right` of gemm_tn.h does for weight gradients. */
static void load_pairs(head_pairs to, const elem *from, long stride, int slots) {
    for (int d = 0; d < HEAD; d += 32) pack_right(from + d, to[d / 32][0], stride, 32, slots, UP(slots, 32) / 2);
}

/* 32 rows of q k^T, or of d_out v^T, from row `first` on: (32, first + 32), up to the block on the
   diagonal. */
static inline void rows_times_columns(float scores[32][SIDE], head_rows rows, head_columns columns, int first) {
    for (int j = 0; j <= first; j += 32) {
        amx_micro_kernel(32, &scores[0][j], SIDE, OVERWRITE, (struct tiles){rows[first], 2 * HEAD, 64},
                         (struct tiles){&columns[0][j], 4 * SIDE, 64 * SIDE}, HEAD / 32);
    }
}

/* result (32, HEAD) = weights (32, first + 32) rows (first + 32, HEAD): only slots that the last of the
   32 rows may attend to. */
static inline void weights_times_pairs(float result[32][HEAD], elem weights[32][SIDE], head_pairs pairs, int first) {
    for (int d = 0; d < HEAD; d += 32) {
        amx_micro_kernel(32, &result[0][d], HEAD, OVERWRITE, (struct tiles){weights, 2 * SIDE, 64},
                         tiles_of_panel(pairs[d / 32][0]), first / 32 + 1);
    }
}

/* sums (slots, HEAD) += weights^T rows: what 32 rows of weights, or of their gradients, from `first` on
   contribute to d_v, or d_k. The block on the diagonal is the first that reaches its slots, and
   overwrites: the sums need no zeros before. */
static inline void add_weights_t_times_pairs(float sums[SIDE][HEAD], elem weights[32][SIDE], head_pairs pairs, int first) {
    packed_elem columns[32][16] __attribute__((aligned(64)));
    for (int j = 0; j <= first; j += 32) {
        /* 32 columns of the weights, transposed, become the left operand; the sum runs over the 32 rows. */
        pack_left(&weights[0][j], columns[0], SIDE, 32, 32, 16);
        for (int d = 0; d < HEAD; d += 32) {
            struct tiles left = {columns, 64, 0}, right = tiles_of_panel(pairs[d / 32][first / 2]);
            if (j < first) amx_micro_kernel(32, &sums[j][d], HEAD, ACCUMULATE, left, right, 1);
            else amx_micro_kernel(32, &sums[j][d], HEAD, OVERWRITE, left, right, 1);
        }
    }
}

/* The softmax of a row: inv_sum x e^(scale x score - row_max). */
struct softmax_row {
    float scale, row_max, inv_sum;
};

/* Softmax numerators of row i, e^(scale x score - row_max): rounded to `weights`, with zeros from column
   i + 1 to `end`, as the GEMM reads whole blocks. Returns their sum in float32, before rounding. */
static inline float softmax_numerators(elem *weights, const float *scores, int i, int end, float scale, float row_max) {
    vf32 sum = {0};
    int j = 0;
    for (; j <= i; j += LANES) {
        vf32 found = vexp(load_float(scores + j) * scale - row_max);
        if (j + LANES > i + 1) found = mask_and(causal_mask(i, j), found); /* the vector on the diagonal */
        store(weights + j, found);
        sum += found;
    }
    for (; j < end; j += LANES) store(weights + j, (vf32){0});
    return reduce_sum(sum);
}

/* Forward pass of one head: writes out, row max and 1 / denominator. */
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
            /* row_max is of the scaled scores, so that scale x score - row_max is one multiply-subtract. */
            head.row_max[i] = scale * causal_row_max(b->scores[r], i);
            float sum = softmax_numerators(b->weights[r], b->scores[r], i, first + 32, scale, head.row_max[i]);
            head.inv_sum[i] = 1 / sum;
        }
        weights_times_pairs(b->result, b->weights, b->v_pairs, first);
        for (int r = 0; r < count; r++) {
            /* The output is divided by the denominator last: once for each entry of out, instead of once
               for each weight. */
            elem *to = head.out + (long)(first + r) * WIDTH;
            for (int d = 0; d < HEAD; d += LANES) store(to + d, load_float(&b->result[r][d]) * head.inv_sum[first + r]);
        }
    }
}

/* Backward through the softmax of row i, which is row r of the block:

      d_scores = weights (d_weights - mean) scale,   mean = sum of weights x d_weights over the row

   Both weights and d_scores are rounded for the GEMMs that follow, with zeros from column i + 1 to
   `end`. With i = -1 the whole row is zeros. */
static inline void softmax_backward(struct buffers *b, int r, int i, int end, struct softmax_row row, float mean) {
    float *scores = b->scores[r], *d_weights = b->d_weights[r];
    int j = 0;
    for (; j <= i; j += LANES) {
        vf32 weights = vexp(load_float(scores + j) * row.scale - row.row_max) * row.inv_sum;
        vf32 d_scores = weights * (load_float(d_weights + j) - mean) * row.scale;
        /* The vector on the diagonal. */
        if (j + LANES > i + 1) weights = mask_and(causal_mask(i, j), weights), d_scores = mask_and(causal_mask(i, j), d_scores);
        store(b->weights[r] + j, weights);
        store(b->d_scores[r] + j, d_scores);
    }
    for (; j < end; j += LANES) {
        store(b->weights[r] + j, (vf32){0});
        store(b->d_scores[r] + j, (vf32){0});
    }
}

/* Round `count` rows to `out`, and add their sum to `sums` (HEAD): the gradient of the bias. The sum is
   of the floats before rounding. */
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

/* Copy q, k, v and d_out of a head into each order that a GEMM of the backward pass needs. */
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

/* Backward pass of one head. d_out (slots, C) is the gradient of the head's output; the gradients of q,
   k and v go to head.d_qkv, and their sums over slots are added to `bias_grad` (3C). For each block
   of 32 rows it recomputes scores and weights, then d_q = d_scores k; d_k and d_v are sums over all
   blocks. */
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
            /* mean = sum of out x d_out: equal to the sum of weights x d_weights, since out = weights v,
               and HEAD entries instead of a row of scores. */
            vf32 products = {0};
            for (int d = 0; r < count && d < HEAD; d += LANES) {
                products += load(head.out + (long)i * WIDTH + d) * load(d_out + (long)i * WIDTH + d);
            }
            struct softmax_row none = {0};
            /* rows beyond the last slot: zeros for the GEMMs */
            if (r >= count) softmax_backward(b, r, -1, first + 32, none, 0);
            else {
                struct softmax_row softmax = {scale, head.row_max[i], head.inv_sum[i]};
                softmax_backward(b, r, i, first + 32, softmax, reduce_sum(products));
            }
        }
        weights_times_pairs(b->result, b->d_scores, b->k_pairs, first);
        /* may replace q, all of which has been copied */
        store_rows(head.d_qkv + first * row, row, bias_grad, b->result, count);
        add_weights_t_times_pairs(b->d_k, b->d_scores, b->q_pairs, first);
        add_weights_t_times_pairs(b->d_v, b->weights, b->d_out_pairs, first);
    }
    store_rows(head.d_qkv + WIDTH, row, bias_grad + WIDTH, b->d_k, slots);
    store_rows(head.d_qkv + 2 * WIDTH, row, bias_grad + 2 * WIDTH, b->d_v, slots);
}
