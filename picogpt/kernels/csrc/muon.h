/* One step of Muon for one matrix, from its gradient to its new weights: the same as
   `picogpt.training.optim.Muon`.

      momentum -> nesterov -> X = gradient / norm -> Newton-Schulz iterations -> NorMuon scale -> weights

   Muon (Jordan et al., 2024) replaces the gradient by the nearest orthogonal matrix, all of whose
   singular values are 1. The Newton-Schulz iteration comes near to it with GEMMs alone: X becomes X
   p(X^T X) for one polynomial p after the other. The coefficients come from Python (Polar Express: Amsel
   et al., 2025). X is (rows, WIDTH) here, with rows >= WIDTH, so that the Gram matrix is the smaller
   one; a wide matrix is transposed first.

   Where several iterations share a Gram matrix G, they run on G alone: with F = p(G), X F has the Gram
   matrix F G F. Only the product of all F is multiplied with X.

   Of symmetric matrices only the entries on and above the diagonal are computed: of X^T X, of F G F, and
   of polynomials in G. They are symmetric however they are rounded. A product of two polynomials in G is
   symmetric only before rounding: treated as symmetric, its error grows until the iteration diverges. */

/* Sizes in packed_elems: an elem or a float takes no more than one. */
#define SQUARE ((long)WIDTH * WIDTH)
#define PACKED_SQUARE (UP(WIDTH, PANEL) * (long)WIDTH / PER_PACKED)
/* A thread's workspace: two matrices (4 WIDTH, WIDTH), four small ones, float32 sums, a packed small
   matrix, and the workspace of `gemm_tn`. */
#define MUON_ELEMS (UP(13 * SQUARE + PACKED_SQUARE, LANES) + THREAD_ELEMS)

/* Buffers of one update, all in the workspace of its thread. */
struct iteration {
    elem *x, *next;                          /* (rows, WIDTH) X, and the next X */
    elem *gram, *factor, *product, *scratch; /* (WIDTH, WIDTH) each: G, F, the product of all F, and a temporary */
    float *sums;                             /* (WIDTH, WIDTH) a symmetric result before rounding: upper half */
    packed_elem *packed;                     /* the small matrix that is the right operand next */
    packed_elem *workspace;                  /* for `gemm_tn` */
    int rows;
};

/* Pack a small matrix as the right operand of a GEMM. */
static void pack_square(const elem *matrix, packed_elem *packed) {
    pack_right(matrix, packed, WIDTH, WIDTH, WIDTH, WIDTH / PER_PACKED);
}

/* Copy the upper triangle to the lower one, in LANES x LANES tiles transposed in registers. */
static void mirror_upper(float *sums) {
    for (int i = 0; i < WIDTH; i += LANES) {
        for (int j = i; j < WIDTH; j += LANES) {
            vi32 tile[LANES];
            for (int r = 0; r < LANES; r++) tile[r] = (vi32)load_float(sums + (long)(i + r) * WIDTH + j);
            transpose_lanes(tile);
            for (int r = 0; r < LANES; r++) {
                int below = i == j ? r : LANES; /* a tile on the diagonal copies only what is left of it */
                memcpy(sums + (long)(j + r) * WIDTH + i, &tile[r], below * sizeof *sums);
            }
        }
    }
}

/* out = sums + diagonal I, rounded to elems; `sums` has the entries on and above the diagonal, and gets
   the others. */
static void round_symmetric(float *sums, float diagonal, elem *out) {
    for (int i = 0; i < WIDTH; i++) sums[i * (WIDTH + 1L)] += diagonal;
    mirror_upper(sums);
    for (long i = 0; i < SQUARE; i += LANES) store(out + i, load_float(sums + i));
}

/* Epilogue of a GEMM: its sums become scale x sum + weight x addend, without addend if it is null. */
struct epilogue {
    float scale;
    const elem *addend;
    float weight;
};

/* The epilogue of LANES sums at index `at` of the result. */
static inline vf32 apply_epilogue(vf32 sum, struct epilogue f, long at) {
    return f.addend ? sum * f.scale + load(f.addend + at) * f.weight : sum * f.scale;
}

/* GEMM with an epilogue: f(a (rows, WIDTH) x packed (WIDTH, WIDTH)), rounded to `out`; or, where `out`
   is null, in float32 to `sums`, of which only tiles that reach the diagonal or lie above it are
   written. */
static void gemm_epilogue(elem *out, float *sums, const elem *a, const packed_elem *packed, struct epilogue f, int rows) {
    const int depth = WIDTH / PER_PACKED;
    for (int j = 0; j < WIDTH; j += PANEL) {
        const packed_elem *panel = packed + (long)j * depth;
        for (int i = 0; i < rows && (out || i < j + PANEL);) {
#ifdef MATRIX_TILES
            const int count = 32; /* rows and columns are multiples of 32 with AMX */
            struct tiles left = {a + (long)i * WIDTH, 2 * WIDTH, 64};
            amx_micro_kernel(32, tls_tile_sums[0], PANEL, OVERWRITE, left, tiles_of_panel(panel), depth / 16);
#define SUM(r, c) (*(vf32 *)&tls_tile_sums[r][(c) * LANES])
#else
            /* The last tile ends with the last row, and computes some rows again. Only a matrix that is
               smaller than a tile is computed row by row. */
            const int count = rows >= TILE ? TILE : 1;
            if (i + count > rows) i = rows - count;
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

/* out (WIDTH, WIDTH) = f(a x packed) + diagonal I, for a symmetric result. */
static void gemm_symmetric(struct iteration *it, elem *out, const elem *a, struct epilogue f, float diagonal) {
    gemm_epilogue(0, it->sums, a, it->packed, f, WIDTH);
    round_symmetric(it->sums, diagonal, out);
}

/* G = X^T X, its upper half summed in float32. */
static void form_gram(struct iteration *it) {
    struct gemm_tn gram = {it->sums, it->x, it->x, WIDTH, WIDTH, it->rows, OVERWRITE, UPPER_ENTRIES};
    gemm_tn(gram, it->workspace, 0, 1);
    round_symmetric(it->sums, 0, it->gram);
}

/* The next X becomes X, and its buffer is free for the one after. */
static void swap(elem **a, elem **b) {
    elem *before = *a;
    *a = *b;
    *b = before;
}

/* X = X packed + weight X. */
static void update_x(struct iteration *it, float weight) {
    gemm_epilogue(it->next, 0, it->x, it->packed, (struct epilogue){1, weight != 0 ? it->x : 0, weight}, it->rows);
    swap(&it->x, &it->next);
}

/* Apply `count` polynomials p[0] + p[1] G + p[2] G^2, with the Gram matrix G formed once: `_polar_iterations`
   of picogpt.training.optim. X itself is read for G and for the last product only. */
static void iterate(struct iteration *it, const float (*polynomials)[3], int count) {
    const struct epilogue plain = {1, 0, 0};
    const float *p = polynomials[0];
    form_gram(it);
    pack_square(it->gram, it->packed);
    /* A single polynomial: X p(G) = X (p[1] G + p[2] G^2) + p[0] X. The epilogue adds p[0] X,
       instead of p[0] I to the small matrix. */
    if (count == 1) {
        gemm_symmetric(it, it->factor, it->gram, (struct epilogue){p[2], it->gram, p[1]}, 0);
        pack_square(it->factor, it->packed);
        update_x(it, p[0]);
        return;
    }
    /* F = p(G) = p[2] G^2 + p[1] G + p[0] I. */
    gemm_symmetric(it, it->factor, it->gram, (struct epilogue){p[2], it->gram, p[1]}, p[0]);
    memcpy(it->product, it->factor, SQUARE * sizeof *it->product);
    for (int k = 1; k < count; k++) {
        p = polynomials[k];
        /* G becomes F G F, the Gram matrix of X F; then F is the next polynomial in it. */
        pack_square(it->gram, it->packed);
        gemm_epilogue(it->scratch, 0, it->factor, it->packed, plain, WIDTH);
        pack_square(it->factor, it->packed);
        gemm_symmetric(it, it->gram, it->scratch, plain, 0);
        pack_square(it->gram, it->packed);
        gemm_symmetric(it, it->factor, it->gram, (struct epilogue){p[2], it->gram, p[1]}, p[0]);
        /* The product of all F so far. */
        pack_square(it->product, it->packed);
        gemm_epilogue(it->scratch, 0, it->factor, it->packed, plain, WIDTH);
        swap(&it->product, &it->scratch);
    }
    pack_square(it->product, it->packed);
    update_x(it, 0);
}

/* out (columns, rows) = x^T, x (rows, columns); both sides are multiples of LANES. */
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

/* out = momentum m + (1 - momentum) gradient, for the mean gradient m that Python has updated already:
   Nesterov's look ahead. Returns the Frobenius norm of out. */
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

/* NorMuon (Li et al., 2025): each row of the update is divided by the root of its mean square over time,
   as Adam divides each entry. A common factor keeps the Frobenius norm as it was; the step size is part
   of it. out = x (rows, WIDTH) scaled: `_normuon_scale` of picogpt.training.optim. */
static void normuon_scale(const elem *x, float *mean_square, const struct muon_settings *settings, float *out, int rows) {
    float factors[4 * WIDTH], before = 0, after = 0;
    for (int r = 0; r < rows; r++) {
        vf32 sum = {0};
        for (int c = 0; c < WIDTH; c += LANES) sum += load(x + (long)r * WIDTH + c) * load(x + (long)r * WIDTH + c);
        float square = reduce_sum(sum) / WIDTH;
        mean_square[r] += (square - mean_square[r]) * (1 - settings->beta2);
        factors[r] = 1 / (sqrtf(mean_square[r]) + 1e-8f);
        /* Sums of squares before and after the division. */
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

/* The buffers' places in a thread's workspace of MUON_ELEMS. */
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

/* The whole update of one matrix by one thread: weights = weights x decay - update. */
static void update_matrix(const struct muon_matrix *matrix, const struct muon_settings *settings, packed_elem *workspace) {
    const int rows = settings->rows, columns = settings->columns, wide = rows < columns;
    const long size = (long)rows * columns;
    struct iteration it = iteration_in(workspace, size / WIDTH);
    /* The buffers of X and the next X hold floats before and after the iteration. */
    float *first = (float *)it.x, *second = (float *)it.next, *mean = wide ? first : second;
    /* The singular values must begin at 1 at most, or the polynomials diverge: the Frobenius norm bounds
       them, and the margin covers rounding. */
    float scale = 1 / (nesterov(matrix, settings->momentum, mean, size) * settings->margin + 1e-7f);
    if (wide) transpose_floats(second, mean, rows, columns);
    for (long i = 0; i < size; i += LANES) store(it.x + i, load_float(second + i) * scale);
    const float (*polynomials)[3] = (const float (*)[3])settings->polynomials;
    for (const int32_t *count = settings->gram_reuse; *count; polynomials += *count, count++) iterate(&it, polynomials, *count);
    /* The orthogonalized gradient, scaled, and transposed back where the matrix is wide. */
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
