/* Muon's updates of matrices: `picogpt.optim.Muon` for one, from its gradient to its weights.

   In the iteration X becomes X times a polynomial in its gram matrix, again and again. It is (rows, WIDTH) here, with at least
   as many rows; what is wide is transposed. Of what is symmetric however it is rounded, as X^T X is and F G F, only what is not
   below the diagonal is computed. Products of two polynomials in G are symmetric only before they are rounded: if they are
   taken for it, the error grows until the iteration runs away. */

#define SQUARE ((long)WIDTH * WIDTH)
#define PACKED_SQUARE (UP(WIDTH, PANEL) * (long)WIDTH / PAIR)
/* Two matrices of 4 WIDTH rows, four small ones, and sums: no number is longer than a unit. */
#define MUON_UNITS (UP(13 * SQUARE + PACKED_SQUARE, LANES) + THREAD_UNITS)

/* Small matrices (WIDTH, WIDTH), X and the next one, and room for what they are made in. */
struct iteration {
    number *x, *next, *gram, *factor, *product, *other;
    float *sums;
    unit *packed, *room;
    int rows;
};

static void pack_square(const number *matrix, unit *packed) { pack_right(matrix, packed, WIDTH, WIDTH, WIDTH, WIDTH / PAIR); }

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
static inline vector scaled_sum(vector sum, float scale, const number *plus, float share) {
    return plus ? sum * scale + load(plus) * share : sum * scale;
}

/* `out`, or where that is null `sums`, of which only what is on the diagonal and above, (rows, WIDTH) = scale x a (rows, WIDTH)
   x packed + share x plus. */
static void combine_products(number *out, float *sums, const number *a, const unit *packed, float scale, const number *plus,
                             float share, int rows) {
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
                    vector y = scaled_sum(SUM(r, c), scale, plus ? plus + at : 0, share);
                    if (out) store(out + at, y);
                    else store_float(sums + at, y);
                }
            }
            i += count;
        }
    }
#undef SUM
}

/* out = scale x a x packed + share x plus + diagonal, all of them small, where that is symmetric. */
static void multiply_symmetric(struct iteration *it, number *out, const number *a, float scale, const number *plus, float share,
                               float diagonal) {
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
        multiply_symmetric(it, it->factor, it->gram, p[2], it->gram, p[1], 0);
        pack_square(it->factor, it->packed);
        multiply_x(it, p[0]);
        return;
    }
    multiply_symmetric(it, it->factor, it->gram, p[2], it->gram, p[1], p[0]);
    memcpy(it->product, it->factor, SQUARE * sizeof *it->product);
    for (int k = 1; k < count; k++) {
        p = polynomials[k];
        pack_square(it->gram, it->packed);
        combine_products(it->other, 0, it->factor, it->packed, 1, 0, 0, WIDTH);
        pack_square(it->factor, it->packed);
        multiply_symmetric(it, it->gram, it->other, 1, 0, 0, 0);
        pack_square(it->gram, it->packed);
        multiply_symmetric(it, it->factor, it->gram, p[2], it->gram, p[1], p[0]);
        pack_square(it->product, it->packed);
        combine_products(it->other, 0, it->factor, it->packed, 1, 0, 0, WIDTH);
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

/* What Muon updates a matrix (rows, columns) with, all of that shape but the last. */
struct part {
    float *weights;
    const float *gradient, *momentum;
    float *mean_square; /* of each row's updates over time, or of each column's where there are more columns */
};

/* Numbers of an update: `keep` is what weight decay leaves, `length` that of the step. */
struct settings {
    float momentum, beta2, keep, length, margin, polynomials[][3];
};

/* out = the mean gradient, looking one step ahead (Nesterov); returns its norm. */
static float look_ahead(const struct part *part, float momentum, float *out, long size) {
    vector squares = {0};
    for (long i = 0; i < size; i += LANES) {
        vector mean = load_float(part->momentum + i);
        mean -= (mean - load_float(part->gradient + i)) * (1 - momentum);
        store_float(out + i, mean);
        squares += mean * mean;
    }
    return sqrtf(sum_of(squares));
}

/* out = x (rows, WIDTH), each row times the length of a step and a factor that evens them out over time; the norm of the whole
   stays as it was: `_evened_out` there. */
static void even_out(const number *x, float *mean_square, const struct settings *settings, float *out, int rows) {
    float factors[4 * WIDTH], before = 0, after = 0;
    for (int r = 0; r < rows; r++) {
        vector sum = {0};
        for (int c = 0; c < WIDTH; c += LANES) sum += load(x + (long)r * WIDTH + c) * load(x + (long)r * WIDTH + c);
        float square = sum_of(sum) / WIDTH;
        mean_square[r] += (square - mean_square[r]) * (1 - settings->beta2);
        factors[r] = 1 / (sqrtf(mean_square[r]) + 1e-8f);
        before += square;
        after += square * factors[r] * factors[r];
    }
    float same = settings->length * sqrtf(before / (after + 1e-12f));
    for (int r = 0; r < rows; r++) {
        for (long at = (long)r * WIDTH; at < (r + 1L) * WIDTH; at += LANES) {
            store_float(out + at, load(x + at) * (factors[r] * same));
        }
    }
}

/* `in_a_row` says how many polynomials share a gram matrix, until there is a zero. */
static void update_matrix(const struct part *part, const struct settings *settings, const int *in_a_row, unit *room, int rows,
                          int columns) {
    const long size = (long)rows * columns;
    const int wide = rows < columns;
    unit *second = room + 4 * SQUARE;
    struct iteration it = {.x = (number *)room,
                           .next = (number *)second,
                           .gram = (number *)(room + 8 * SQUARE),
                           .factor = (number *)(room + 9 * SQUARE),
                           .product = (number *)(room + 10 * SQUARE),
                           .other = (number *)(room + 11 * SQUARE),
                           .sums = (float *)(room + 12 * SQUARE),
                           .packed = room + 13 * SQUARE,
                           .room = room + MUON_UNITS - THREAD_UNITS,
                           .rows = size / WIDTH};
    float *mean = (float *)(wide ? room : second);
    float scale = 1 / (look_ahead(part, settings->momentum, mean, size) * settings->margin + 1e-7f);
    if (wide) transpose_floats((float *)second, mean, rows, columns);
    for (long i = 0; i < size; i += LANES) store(it.x + i, load_float((float *)second + i) * scale);
    for (const float (*p)[3] = settings->polynomials; *in_a_row; p += *in_a_row++) iterate(&it, p, *in_a_row);
    float *update = (float *)it.next;
    even_out(it.x, part->mean_square, settings, update, it.rows);
    if (wide) {
        transpose_floats((float *)it.x, update, columns, rows);
        update = (float *)it.x;
    }
    for (long i = 0; i < size; i += LANES) {
        store_float(part->weights + i, load_float(part->weights + i) * settings->keep - load_float(update + i));
    }
}
