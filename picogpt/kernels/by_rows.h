/* Products of matrices summed over their rows: gradients of matrices, and gram matrices.

   One of the two matrices is WIDTH wide. Each thread packs all of that one, and of the other, which may be wider, what it has
   to do, so that none waits for another. */

#define ROWS_AT_ONCE 512 /* what is packed of them stays in the cache */

/* Units of LANES entries of row k x PAIR and the one after it, of `rows` that are `stride` apart; zeros where there are none. */
static inline units of_rows(const number *x, long stride, int rows, int k) {
    static const number none[LANES];
    int first = k * PAIR, second = first + PAIR - 1;
    return units_of(first < rows ? x + first * stride : none, second < rows ? x + second * stride : none);
}

/* Rows that are packed at once: as even parts of them as can be, of a multiple of 32. */
static inline long rows_at_once(long rows) {
    long chunks = UP(rows, ROWS_AT_ONCE) / ROWS_AT_ONCE;
    return UP(UP(rows, chunks) / chunks, 32);
}

#ifdef MATRIX_TILES
/* For each thread: units of the matrix that is packed whole, of its part of the other one, and sums of that. */
#define WHOLE_UNITS ((long)WIDTH * DEPTH_OF(ROWS_AT_ONCE))
#define PART_UNITS (4 * WHOLE_UNITS)
#define THREAD_UNITS (WHOLE_UNITS + PART_UNITS + 4L * WIDTH * WIDTH)

/* The first `columns` of x, whose rows are `stride` apart, 32 of them after the other, in tiles of 16 columns and 16 units. Rows
   are read from beginning to end, for the sake of memory; so they are by `pack_right`. */
static void pack_left(const number *x, unit *packed, long stride, int columns, int rows, int depth) {
    for (int k = 0; k < depth; k += 16) {
        for (int i = 0; i < columns; i += 16) {
            integers tile[16];
            for (int r = 0; r < 16; r++) tile[r] = (integers)of_rows(x + i, stride, rows, k + r);
            transpose_lanes(tile);
            unit *to = packed + (long)(i / 32) * 32 * depth + (2 * k + i % 32) * 16;
            for (int r = 0; r < 16; r++) *(integers *)(to + 16 * r) = tile[r];
        }
    }
}

/* Panels of the first `columns` of x, whose rows are `stride` apart. */
static void pack_right(const number *x, unit *packed, long stride, int columns, int rows, int depth) {
    typedef uint16_t line __attribute__((vector_size(64), aligned(2), may_alias));
    static const line low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                             8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    int k = 0;
    for (; 2 * k + 1 < rows; k++) {
        for (int j = 0; j < columns / PANEL; j++) {
            unit *to = packed + ((long)j * depth + k) * PANEL;
            line a = *(const line *)(x + 2 * k * stride + j * PANEL), b = *(const line *)(x + (2 * k + 1) * stride + j * PANEL);
            *(line *)to = __builtin_shuffle(a, b, low);
            *(line *)(to + LANES) = __builtin_shuffle(a, b, low + 16);
        }
    }
    for (; k < depth; k++) {
        for (int c = 0; c < columns; c += LANES) {
            *(units *)(packed + ((long)(c / PANEL) * depth + k) * PANEL + c % PANEL) = of_rows(x + c, stride, rows, k);
        }
    }
}

/* A tile of 32 x 32 sums, or its transpose, to `sums`, or added to what is there. */
static void put_tile(float *sums, long row, float *tile, int transposed, int add) {
    for (int i = 0; i < 32; i += 16) {
        for (int j = 0; j < 32; j += 16) {
            integers x[16];
            for (int r = 0; r < 16; r++) x[r] = *(integers *)(tile + (i + r) * 32 + j);
            if (transposed) transpose_lanes(x);
            float *to = transposed ? sums + j * row + i : sums + i * row + j;
            for (int r = 0; r < 16; r++) {
                if (add) accumulate(to + r * row, (vector)x[r]);
                else store_float(to + r * row, (vector)x[r]);
            }
        }
    }
}

/* `sums` (n, m) = left (rows, n), transposed, x right (rows, m), or that added to them; of what is `symmetric` at least what is
   on the diagonal and above. The wider one is multiplied from the right, as it is sooner packed so; what comes out is
   transposed where it was the left one. */
static void multiply_by_rows(float *sums, const number *left, int n, const number *right, int m, long rows, int add,
                             int symmetric, unit *room, int thread, int threads) {
    const int swapped = n > m, columns = swapped ? n : m, panels = columns / PANEL;
    const int first = first_of(panels, thread, threads), end = first_of(panels, thread + 1, threads);
    const number *narrow = swapped ? right : left, *wide = swapped ? left : right;
    unit *whole = room + (long)thread * THREAD_UNITS, *part = whole + WHOLE_UNITS;
    float *totals = (float *)(part + PART_UNITS);
    const long most = rows_at_once(rows);
    for (long start = 0; start < rows; start += most) {
        int count = rows - start < most ? rows - start : most, depth = DEPTH_OF(count), last = start + most >= rows;
        pack_left(narrow + start * WIDTH, whole, WIDTH, WIDTH, count, depth);
        pack_right(wide + start * columns + first * PANEL, part, columns, (end - first) * PANEL, count, depth);
        for (int j = first; j < end; j++) {
            struct tiles panel = tiles_of_panel(part + (long)(j - first) * PANEL * depth);
            for (int i = 0; i < WIDTH; i += 32) {
                if (symmetric && i > j * PANEL) continue;
                float *tile = totals + (long)((j - first) * WIDTH + i) * 32;
                struct tiles block = {whole + (long)i * depth, 64, 64 * 32};
                if (start) multiply_tiles(1, tile, 32, 1, block, panel, depth / 16);
                else multiply_tiles(1, tile, 32, 0, block, panel, depth / 16);
                if (last) put_tile(sums + (swapped ? (long)j * PANEL * m + i : (long)i * m + j * PANEL), m, tile, swapped, add);
            }
        }
    }
}
#else
/* For each thread: units of what it packs of both matrices, of which one may be four times as wide as WIDTH. */
#define THREAD_UNITS ((5L * WIDTH + TILE + PANEL + 1) * DEPTH_OF(ROWS_AT_ONCE))

static inline unit unit_of(const number *first, const number *second) {
#ifdef BFLOAT16
    return *first | (unit)*second << 16;
#else
    (void)second;
    return *first;
#endif
}

/* The first `columns` of x in blocks of TILE, and zeros beyond them. Rows are read from beginning to end, for the sake of
   memory; so they are by `pack_right`. */
static void pack_left(const number *x, unit *packed, long stride, int columns, int rows, int depth) {
    static const number none[TILE];
    for (int k = 0; k < depth; k++) {
        int first = k * PAIR, second = first + PAIR - 1;
        for (int i = 0; i < columns; i += TILE) {
            const number *a = first < rows ? x + first * stride + i : none,
                         *b = second < rows ? x + second * stride + i : none;
            unit *to = packed + (long)i * depth + k * TILE;
            if (PAIR == 1 && i + TILE <= columns) memcpy(to, a, TILE * sizeof *to);
            else {
                for (int r = 0; r < TILE; r++) to[r] = i + r < columns ? unit_of(a + r, b + r) : 0;
            }
        }
    }
}

/* The first `columns` of x in panels, and zeros beyond them. */
static void pack_right(const number *x, unit *packed, long stride, int columns, int rows, int depth) {
    for (int k = 0; k < depth; k++) {
        for (int c = 0; c < UP(columns, PANEL); c += LANES) {
            unit *to = packed + (long)(c / PANEL) * PANEL * depth + k * PANEL + c % PANEL;
            *(units *)to = c < columns ? of_rows(x + c, stride, rows, k) : (units){0};
        }
    }
}

/* A tile of sums = packed left x packed right, or that added to them; of a matrix that has so many rows and columns from there
   on. */
static void sum_tile(float *sums, const unit *left, const unit *right, long row, int rows, int columns, int depth, int add) {
    vector tile[TILE][2];
    for (int r = TILE; r < 2 * TILE && r < rows; r++) __builtin_prefetch(sums + r * row, 1); /* of the next tile */
    multiply_tile(TILE, tile, left, 1, TILE, right, depth);
    for (int r = 0; r < TILE && r < rows; r++) {
        for (int c = 0; c < 2 && c * LANES < columns; c++) {
            float *to = sums + r * row + c * LANES;
            if (add) accumulate(to, tile[r][c]);
            else store_float(to, tile[r][c]);
        }
    }
}

/* `sums` (n, m) = left (rows, n), transposed, x right (rows, m), or that added to them; of what is `symmetric` at least what is
   on the diagonal and above. */
static void multiply_by_rows(float *sums, const number *left, int n, const number *right, int m, long rows, int add,
                             int symmetric, unit *room, int thread, int threads) {
    const int blocks = UP(n, TILE) / TILE, panels = UP(m, PANEL) / PANEL, by_blocks = n > m;
    const int i_first = by_blocks ? first_of(blocks, thread, threads) * TILE : 0,
              j_first = by_blocks ? 0 : first_of(panels, thread, threads) * PANEL;
    const int i_end = by_blocks ? first_of(blocks, thread + 1, threads) * TILE : n,
              j_end = by_blocks ? m : first_of(panels, thread + 1, threads) * PANEL;
    const int i_count = (i_end < n ? i_end : n) - i_first, j_count = (j_end < m ? j_end : m) - j_first;
    unit *lefts = room + (long)thread * THREAD_UNITS;
    const long most = rows_at_once(rows);
    for (long start = 0; start < rows; start += most, add = 1) {
        int count = rows - start < most ? rows - start : most, depth = DEPTH_OF(count);
        unit *rights = lefts + UP((long)UP(i_count, TILE) * depth, LANES);
        pack_left(left + start * n + i_first, lefts, n, i_count, count, depth);
        pack_right(right + start * m + j_first, rights, m, j_count, count, depth);
        for (int j = 0; j < j_count; j += PANEL) {
            for (int i = 0; i < i_count && !(symmetric && i_first + i >= j_first + j + PANEL); i += TILE) {
                sum_tile(sums + (long)(i_first + i) * m + j_first + j, lefts + (long)i * depth, rights + (long)j * depth, m,
                         i_count - i, j_count - j, depth, add);
            }
        }
    }
}
#endif
