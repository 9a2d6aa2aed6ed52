/* The iteration of `picogpt.optim.orthogonalize`: X becomes X times a polynomial in its gram matrix, again and again.

   X is (rows, WIDTH) here, with at least as many rows; what is wide is transposed. The small matrices are symmetric, and as they are
   polynomials in one of them their products are too: what is below the diagonal need not be computed. */

#define SQUARE ((long)WIDTH * WIDTH)
#define PACKED_SQUARE (UP(WIDTH, PANEL) * (long)WIDTH / PAIR)
/* Two matrices of 4 WIDTH rows, four small ones, and sums: no number is longer than a unit. */
#define ORTHOGONAL_UNITS (UP(13 * SQUARE + PACKED_SQUARE, LANES) + THREAD_UNITS)

/* Small matrices (WIDTH, WIDTH), X and the next one, and room for what they are made in. */
struct iteration {
    number *x, *next, *gram, *factor, *product, *other;
    float *sums;
    unit *packed, *room;
    int rows;
};

static void pack_square(const number *matrix, unit *packed) {
#ifdef MATRIX_TILES
    pack_right(matrix, packed, WIDTH, WIDTH / PANEL, WIDTH, WIDTH / PAIR);
#else
    pack_right(matrix, packed, WIDTH, WIDTH, WIDTH, WIDTH / PAIR);
#endif
}

/* What is above the diagonal is copied below it. */
static void mirror(float *sums) {
    for (int i = 0; i < WIDTH; i += LANES) {
        for (int j = i; j < WIDTH; j += LANES) {
            integers tile[LANES];
            for (int r = 0; r < LANES; r++) tile[r] = (integers)load_float(sums + (long)(i + r) * WIDTH + j);
            transpose_lanes(tile);
            for (int r = 0; r < LANES; r++) {
                int below = i == j ? r : LANES; /* entries of this row */
                memcpy(sums + (long)(j + r) * WIDTH + i, &tile[r], below * sizeof *sums);
            }
        }
    }
}

/* out = sums, of which there is what is on the diagonal and above, + diagonal. */
static void round_square(float *sums, float diagonal, number *out) {
    for (int i = 0; i < WIDTH; i++) sums[i * (WIDTH + 1L)] += diagonal;
    mirror(sums);
    for (long i = 0; i < SQUARE; i += LANES) store(out + i, load_float(sums + i));
}

/* scale x a sum of products + share x what is at `plus`, if there is something. */
static inline vector combined(vector sum, float scale, const number *plus, float share) {
    return plus ? sum * scale + load(plus) * share : sum * scale;
}

/* `out`, or where that is null `sums`, of which only what is on the diagonal and above, (rows, WIDTH) = scale x a (rows, WIDTH) x packed
   + share x plus. */
static void combine_products(number *out, float *sums, const number *a, const unit *packed, float scale, const number *plus, float share,
                             int rows) {
    const int depth = WIDTH / PAIR;
    for (int j = 0; j < WIDTH; j += PANEL) {
        const unit *panel = packed + (long)j * depth;
        for (int i = 0; i < rows && (out || i < j + PANEL);) {
#ifdef MATRIX_TILES
            const int count = 32;
            struct tiles left = {a + (long)i * WIDTH, 2 * WIDTH, 64};
            multiply_tiles(1, tile_sums[0], PANEL, 0, left, tiles_of_panel(panel), depth / 16);
#define SUM(r, c) (*(vector *)&tile_sums[r][(c) * LANES])
#else
            const int count = i + TILE <= rows ? TILE : 1;
            vector tile[TILE][2];
            if (count == TILE) multiply_tile(TILE, tile, (const unit *)(a + (long)i * WIDTH), depth, 1, panel, depth);
            else multiply_tile(1, tile, (const unit *)(a + (long)i * WIDTH), depth, 1, panel, depth);
#define SUM(r, c) tile[r][c]
#endif
            for (int r = 0; r < count; r++) {
                for (int c = 0; c < 2 && j + c * LANES < WIDTH; c++) {
                    long at = (long)(i + r) * WIDTH + j + c * LANES;
                    vector y = combined(SUM(r, c), scale, plus ? plus + at : 0, share);
                    if (out) store(out + at, y);
                    else store_float(sums + at, y);
                }
            }
            i += count;
        }
    }
#undef SUM
}

/* out = scale x a x b + share x plus + diagonal, all of them small and polynomials in one of them; b is what is packed. */
static void multiply_squares(struct iteration *it, number *out, const number *a, float scale, const number *plus, float share, float diagonal) {
    combine_products(0, it->sums, a, it->packed, scale, plus, share, WIDTH);
    round_square(it->sums, diagonal, out);
}

static void form_gram(struct iteration *it) {
    multiply_by_rows(it->sums, it->x, WIDTH, it->x, WIDTH, it->rows, 0, 1, it->room, 0, 1);
    round_square(it->sums, 0, it->gram);
}

/* X x packed + share x X becomes X. */
static void multiply_x(struct iteration *it, float share) {
    combine_products(it->next, 0, it->x, it->packed, 1, share != 0 ? it->x : 0, share, it->rows);
    number *before = it->x;
    it->x = it->next;
    it->next = before;
}

/* One polynomial after the other is applied, the gram matrix formed once: `_iterate` there. */
static void iterate(struct iteration *it, const float (*polynomials)[3], int count) {
    form_gram(it);
    pack_square(it->gram, it->packed);
    const float *p = polynomials[0];
    if (count == 1) {
        multiply_squares(it, it->factor, it->gram, p[2], it->gram, p[1], 0);
        pack_square(it->factor, it->packed);
        multiply_x(it, p[0]);
        return;
    }
    multiply_squares(it, it->factor, it->gram, p[2], it->gram, p[1], p[0]);
    memcpy(it->product, it->factor, SQUARE * sizeof *it->product);
    for (int k = 1; k < count; k++) {
        p = polynomials[k];
        pack_square(it->factor, it->packed);
        multiply_squares(it, it->other, it->gram, 1, 0, 0, 0);
        multiply_squares(it, it->gram, it->other, 1, 0, 0, 0);
        pack_square(it->gram, it->packed);
        multiply_squares(it, it->factor, it->gram, p[2], it->gram, p[1], p[0]);
        pack_square(it->product, it->packed);
        multiply_squares(it, it->other, it->factor, 1, 0, 0, 0);
        number *before = it->product;
        it->product = it->other;
        it->other = before;
    }
    pack_square(it->product, it->packed);
    multiply_x(it, 0);
}

/* out (columns, rows) = x (rows, columns), transposed; both are multiples of LANES. */
static void transpose_floats(float *out, const float *x, int rows, int columns) {
    for (int i = 0; i < rows; i += LANES) {
        for (int j = 0; j < columns; j += LANES) {
            integers tile[LANES];
            for (int r = 0; r < LANES; r++) tile[r] = (integers)load_float(x + (long)(i + r) * columns + j);
            transpose_lanes(tile);
            for (int r = 0; r < LANES; r++) store_float(out + (long)(j + r) * rows + i, (vector)tile[r]);
        }
    }
}

/* The matrix is divided by its norm times `margin`; `in_a_row` says how many polynomials share a gram matrix, until there is a zero. */
static void orthogonalize_matrix(const float *matrix, float *out, unit *room, float margin, const float (*polynomials)[3],
                                 const int *in_a_row, int rows, int columns) {
    const long size = (long)rows * columns;
    float *transposed = (float *)room + 4 * SQUARE;
    number *parts = (number *)room;
    struct iteration it = {.x = parts, .next = (number *)(room + 4 * SQUARE), .gram = (number *)(room + 8 * SQUARE),
                           .factor = (number *)(room + 9 * SQUARE), .product = (number *)(room + 10 * SQUARE),
                           .other = (number *)(room + 11 * SQUARE), .sums = (float *)(room + 12 * SQUARE), .packed = room + 13 * SQUARE,
                           .room = room + ORTHOGONAL_UNITS - THREAD_UNITS, .rows = size / WIDTH};
    vector squares = {0};
    for (long i = 0; i < size; i += LANES) squares += load_float(matrix + i) * load_float(matrix + i);
    float scale = 1 / (sqrtf(sum_of(squares)) * margin + 1e-7f);
    const float *x = matrix;
    if (rows < columns) {
        transpose_floats(transposed, matrix, rows, columns);
        x = transposed;
    }
    for (long i = 0; i < size; i += LANES) store(it.x + i, load_float(x + i) * scale);
    for (; *in_a_row; polynomials += *in_a_row++) iterate(&it, polynomials, *in_a_row);
    float *result = rows < columns ? (float *)it.next : out;
    for (long i = 0; i < size; i += LANES) store_float(result + i, load(it.x + i));
    if (rows < columns) transpose_floats(out, result, columns, rows);
}
