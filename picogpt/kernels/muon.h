/* Muon's updates of matrices: `picogpt.optim.Muon` for one, from its gradient to its weights.

   In the iteration X becomes X times a polynomial in its Gram matrix, again and again. X is (rows, WIDTH) here, with at least
   as many rows; what is wide is transposed. Of what is symmetric however it is rounded, as X^T X is and F G F, only what is not
   below the diagonal is computed. Products of two polynomials in G are symmetric only before they are rounded: if they are
   taken for it, the error grows until the iteration runs away. */

#define SQUARE ((long)WIDTH * WIDTH)
#define PACKED_SQUARE (UP(WIDTH, PANEL) * (long)WIDTH / PER_PACKED)
/* Two matrices of 4 WIDTH rows, four small ones, and sums: no number is longer than a unit. */
#define MUON_ELEMS (UP(13 * SQUARE + PACKED_SQUARE, LANES) + THREAD_ELEMS)

/* Buffers of one matrix's update, all of them in the workspace of its thread. */
struct iteration {
    elem *x, *next;                          /* (rows, WIDTH): X, and the X that is made of it */
    elem *gram, *factor, *product, *scratch; /* (WIDTH, WIDTH): X^T X, a polynomial in it, and the product of several */
    float *sums;                             /* (WIDTH, WIDTH): a symmetric product before it is rounded, its upper half */
    packed_elem *packed;                     /* one of the small matrices, packed */
    packed_elem *workspace;                  /* of `gemm_tn` */
    int rows;
};

static void pack_square(const elem *matrix, packed_elem *packed) {
    pack_right(matrix, packed, WIDTH, WIDTH, WIDTH, WIDTH / PER_PACKED);
}

/* What is above the diagonal is copied below it. */
static void mirror_upper(float *sums) {
    for (int i = 0; i < WIDTH; i += LANES) {
        for (int j = i; j < WIDTH; j += LANES) {
            vi32 tile[LANES];
            for (int r = 0; r < LANES; r++) tile[r] = (vi32)load_float(sums + (long)(i + r) * WIDTH + j);
            transpose_lanes(tile);
            for (int r = 0; r < LANES; r++) {
                int below = i == j ? r : LANES; /* entries of this row */
                memcpy(sums + (long)(j + r) * WIDTH + i, &tile[r], below * sizeof *sums);
            }
        }
    }
}

/* out = sums, of which there is what is on the diagonal and above, + diagonal. */
static void round_symmetric(float *sums, float diagonal, elem *out) {
    for (int i = 0; i < WIDTH; i++) sums[i * (WIDTH + 1L)] += diagonal;
    mirror_upper(sums);
    for (long i = 0; i < SQUARE; i += LANES) store(out + i, load_float(sums + i));
}

/* scale x a product + weight x plus, with `plus` null for none. */
struct epilogue {
    float scale;
    const elem *addend;
    float weight;
};

static inline vf32 apply_epilogue(vf32 sum, struct epilogue f, long at) {
    return f.addend ? sum * f.scale + load(f.addend + at) * f.weight : sum * f.scale;
}

/* f of a (rows, WIDTH) x packed: rounded to `out`, or where that is null, to `sums`, of which only the entries on the diagonal
   and above are written. */
static void gemm_epilogue(elem *out, float *sums, const elem *a, const packed_elem *packed, struct epilogue f, int rows) {
    const int depth = WIDTH / PER_PACKED;
    for (int j = 0; j < WIDTH; j += PANEL) {
        const packed_elem *panel = packed + (long)j * depth;
        for (int i = 0; i < rows && (out || i < j + PANEL);) {
#ifdef MATRIX_TILES
            const int count = 32;
            struct tiles left = {a + (long)i * WIDTH, 2 * WIDTH, 64};
            amx_micro_kernel(32, tls_tile_sums[0], PANEL, OVERWRITE, left, tiles_of_panel(panel), depth / 16);
#define SUM(r, c) (*(vf32 *)&tls_tile_sums[r][(c) * LANES])
#else
            const int count = i + TILE <= rows ? TILE : 1;
            vf32 tile[TILE][2];
            if (count == TILE) micro_kernel(TILE, tile, (const packed_elem *)(a + (long)i * WIDTH), depth, 1, panel, depth);
            else micro_kernel(1, tile, (const packed_elem *)(a + (long)i * WIDTH), depth, 1, panel, depth);
#define SUM(r, c) tile[r][c]
#endif
            for (int r = 0; r < count; r++) {
                for (int c = 0; c < 2 && j + c * LANES < WIDTH; c++) {
                    long at = (long)(i + r) * WIDTH + j + c * LANES;
                    vf32 y = apply_epilogue(SUM(r, c), f, at);
                    if (out) store(out + at, y);
                    else store_float(sums + at, y);
                }
            }
            i += count;
        }
    }
#undef SUM
}

/* f of a x packed, plus `diagonal` on the diagonal, to `out`: a small matrix that is symmetric. */
static void gemm_symmetric(struct iteration *it, elem *out, const elem *a, struct epilogue f, float diagonal) {
    gemm_epilogue(0, it->sums, a, it->packed, f, WIDTH);
    round_symmetric(it->sums, diagonal, out);
}

static void form_gram(struct iteration *it) {
    struct gemm_tn gram = {it->sums, it->x, it->x, WIDTH, WIDTH, it->rows, OVERWRITE, UPPER_ENTRIES};
    gemm_tn(gram, it->workspace, 0, 1);
    round_symmetric(it->sums, 0, it->gram);
}

static void swap(elem **a, elem **b) {
    elem *before = *a;
    *a = *b;
    *b = before;
}

/* X x packed + weight x X becomes X. */
static void update_x(struct iteration *it, float weight) {
    gemm_epilogue(it->next, 0, it->x, it->packed, (struct epilogue){1, weight != 0 ? it->x : 0, weight}, it->rows);
    swap(&it->x, &it->next);
}

/* Apply `count` polynomials p[0] + p[1] G + p[2] G^2, the Gram matrix G formed once: `_iterate` of picogpt.optim. */
static void iterate(struct iteration *it, const float (*polynomials)[3], int count) {
    const struct epilogue plain = {1, 0, 0};
    const float *p = polynomials[0];
    form_gram(it);
    pack_square(it->gram, it->packed);
    if (count == 1) {
        gemm_symmetric(it, it->factor, it->gram, (struct epilogue){p[2], it->gram, p[1]}, 0);
        pack_square(it->factor, it->packed);
        update_x(it, p[0]);
        return;
    }
    gemm_symmetric(it, it->factor, it->gram, (struct epilogue){p[2], it->gram, p[1]}, p[0]);
    memcpy(it->product, it->factor, SQUARE * sizeof *it->product);
    for (int k = 1; k < count; k++) {
        p = polynomials[k];
        /* G becomes F G F, the Gram matrix of X F; then F the polynomial of that. */
        pack_square(it->gram, it->packed);
        gemm_epilogue(it->scratch, 0, it->factor, it->packed, plain, WIDTH);
        pack_square(it->factor, it->packed);
        gemm_symmetric(it, it->gram, it->scratch, plain, 0);
        pack_square(it->gram, it->packed);
        gemm_symmetric(it, it->factor, it->gram, (struct epilogue){p[2], it->gram, p[1]}, p[0]);
        pack_square(it->product, it->packed);
        gemm_epilogue(it->scratch, 0, it->factor, it->packed, plain, WIDTH);
        swap(&it->product, &it->scratch);
    }
    pack_square(it->product, it->packed);
    update_x(it, 0);
}

/* out (columns, rows) = x (rows, columns), transposed; both are multiples of LANES. */
static void transpose_floats(float *out, const float *x, int rows, int columns) {
    for (int i = 0; i < rows; i += LANES) {
        for (int j = 0; j < columns; j += LANES) {
            vi32 tile[LANES];
            for (int r = 0; r < LANES; r++) tile[r] = (vi32)load_float(x + (long)(i + r) * columns + j);
            transpose_lanes(tile);
            for (int r = 0; r < LANES; r++) store_float(out + (long)(j + r) * rows + i, (vf32)tile[r]);
        }
    }
}

/* out = the mean gradient, looking one step ahead (Nesterov); returns its norm. */
static float nesterov(const struct muon_matrix *matrix, float momentum, float *out, long size) {
    vf32 squares = {0};
    for (long i = 0; i < size; i += LANES) {
        vf32 mean = load_float(matrix->momentum + i);
        mean -= (mean - load_float(matrix->gradient + i)) * (1 - momentum);
        store_float(out + i, mean);
        squares += mean * mean;
    }
    return sqrtf(reduce_sum(squares));
}

/* out = x (rows, WIDTH), each row times the length of a step and a factor that evens them out over time; the norm of the whole
   stays as it was: `_evened_out` of picogpt.optim. */
static void normuon_scale(const elem *x, float *mean_square, const struct muon_settings *settings, float *out, int rows) {
    float factors[4 * WIDTH], before = 0, after = 0;
    for (int r = 0; r < rows; r++) {
        vf32 sum = {0};
        for (int c = 0; c < WIDTH; c += LANES) sum += load(x + (long)r * WIDTH + c) * load(x + (long)r * WIDTH + c);
        float square = reduce_sum(sum) / WIDTH;
        mean_square[r] += (square - mean_square[r]) * (1 - settings->beta2);
        factors[r] = 1 / (sqrtf(mean_square[r]) + 1e-8f);
        before += square;
        after += square * factors[r] * factors[r];
    }
    float same = settings->step * sqrtf(before / (after + 1e-12f));
    for (int r = 0; r < rows; r++) {
        for (long at = (long)r * WIDTH; at < (r + 1L) * WIDTH; at += LANES) {
            store_float(out + at, load(x + at) * (factors[r] * same));
        }
    }
}

/* Where the buffers of an update are in a thread's MUON_UNITS; no number is longer than a unit. */
static struct iteration iteration_in(packed_elem *workspace, int rows) {
    return (struct iteration){.x = (elem *)workspace,
                              .next = (elem *)(workspace + 4 * SQUARE),
                              .gram = (elem *)(workspace + 8 * SQUARE),
                              .factor = (elem *)(workspace + 9 * SQUARE),
                              .product = (elem *)(workspace + 10 * SQUARE),
                              .scratch = (elem *)(workspace + 11 * SQUARE),
                              .sums = (float *)(workspace + 12 * SQUARE),
                              .packed = workspace + 13 * SQUARE,
                              .workspace = workspace + MUON_ELEMS - THREAD_ELEMS,
                              .rows = rows};
}

/* One step for one matrix, by one thread. */
static void update_matrix(const struct muon_matrix *matrix, const struct muon_settings *settings, packed_elem *workspace) {
    const int rows = settings->rows, columns = settings->columns, wide = rows < columns;
    const long size = (long)rows * columns;
    struct iteration it = iteration_in(workspace, size / WIDTH);
    /* X and the next one are used as floats before and after the iteration. */
    float *first = (float *)it.x, *second = (float *)it.next, *mean = wide ? first : second;
    float scale = 1 / (nesterov(matrix, settings->momentum, mean, size) * settings->margin + 1e-7f);
    if (wide) transpose_floats(second, mean, rows, columns);
    for (long i = 0; i < size; i += LANES) store(it.x + i, load_float(second + i) * scale);
    const float (*polynomials)[3] = (const float (*)[3])settings->polynomials;
    for (const int32_t *count = settings->gram_reuse; *count; polynomials += *count, count++) iterate(&it, polynomials, *count);
    float *update = (float *)it.next;
    normuon_scale(it.x, matrix->mean_square, settings, update, it.rows);
    if (wide) {
        transpose_floats((float *)it.x, update, columns, rows);
        update = (float *)it.x;
    }
    for (long i = 0; i < size; i += LANES) {
        store_float(matrix->weights + i, load_float(matrix->weights + i) * settings->decay - load_float(update + i));
    }
}
