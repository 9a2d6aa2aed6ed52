/* Transposed products, summed over the rows of both sides: gradients of matrices, and Gram matrices.

   One of the two matrices is WIDTH wide. Each thread packs all of that one, and of the other, which may be wider, its own part, so
   that no thread waits for another. */

#define MAX_CHUNK_ROWS 512 /* what is packed of them stays in the cache */

/* Which entries of a square product are needed. */
enum triangle { ALL_ENTRIES, UPPER_ENTRIES /* at least those on the diagonal and above: the product is symmetric */ };

/* sums (n, m) = left (rows, n), transposed, x right (rows, m). */
struct gemm_tn {
    float *sums;
    const elem *left, *right;
    int n, m;
    long rows;
    enum result result;
    enum triangle triangle;
};

/* Units of LANES entries of row k x PAIR and the one after it, of `rows` that are `stride` apart; zeros where there are none. */
static inline packed_vec load_row_pair(const elem *x, long stride, int rows, int k) {
    static const elem none[LANES];
    int first = k * PER_PACKED, second = first + PER_PACKED - 1;
    return pack_rows(first < rows ? x + first * stride : none, second < rows ? x + second * stride : none);
}

/* Rows that are packed at once: as even parts of them as can be, of a multiple of 32. */
static inline long rows_per_chunk(long rows) {
    long chunks = UP(rows, MAX_CHUNK_ROWS) / MAX_CHUNK_ROWS;
    return UP(UP(rows, chunks) / chunks, 32);
}

#ifdef MATRIX_TILES
/* For each thread: units of the matrix that is packed whole, of its part of the other one, and sums of that. */
#define WHOLE_ELEMS ((long)WIDTH * DEPTH_OF(MAX_CHUNK_ROWS))
#define PART_ELEMS (4 * WHOLE_ELEMS)
#define THREAD_ELEMS (WHOLE_ELEMS + PART_ELEMS + 4L * WIDTH * WIDTH)

/* The first `columns` of x, whose rows are `stride` apart, 32 of them after the other, in tiles of 16 columns and 16 units. Rows
   are read from beginning to end, for the sake of memory; so they are by `pack_right`. */
static void pack_left(const elem *x, packed_elem *packed, long stride, int columns, int rows, int depth) {
    for (int k = 0; k < depth; k += 16) {
        for (int i = 0; i < columns; i += 16) {
            vi32 tile[16];
            for (int r = 0; r < 16; r++) tile[r] = (vi32)load_row_pair(x + i, stride, rows, k + r);
            transpose_lanes(tile);
            packed_elem *to = packed + (long)(i / 32) * 32 * depth + (2 * k + i % 32) * 16;
            for (int r = 0; r < 16; r++) *(vi32 *)(to + 16 * r) = tile[r];
        }
    }
}

/* Four entries of one vector of 32 and the next, by turns. */
#define PAIRS_FROM(k) k, 32 + k, k + 1, 33 + k, k + 2, 34 + k, k + 3, 35 + k

/* Panels of the first `columns` of x, whose rows are `stride` apart. */
static void pack_right(const elem *x, packed_elem *packed, long stride, int columns, int rows, int depth) {
    typedef uint16_t line __attribute__((vector_size(64), aligned(2), may_alias));
    int k = 0;
    for (; 2 * k + 1 < rows; k++) {
        for (int j = 0; j < columns / PANEL; j++) {
            packed_elem *to = packed + ((long)j * depth + k) * PANEL;
            line a = *(const line *)(x + 2 * k * stride + j * PANEL), b = *(const line *)(x + (2 * k + 1) * stride + j * PANEL);
            *(line *)to = SHUFFLE(line, a, b, PAIRS_FROM(0), PAIRS_FROM(4), PAIRS_FROM(8), PAIRS_FROM(12));
            *(line *)(to + LANES) = SHUFFLE(line, a, b, PAIRS_FROM(16), PAIRS_FROM(20), PAIRS_FROM(24), PAIRS_FROM(28));
        }
    }
    for (; k < depth; k++) {
        for (int c = 0; c < columns; c += LANES) {
            *(packed_vec *)(packed + ((long)(c / PANEL) * depth + k) * PANEL + c % PANEL) =
                load_row_pair(x + c, stride, rows, k);
        }
    }
}

/* Which way a tile of sums is written. */
enum orientation { UNTRANSPOSED, TRANSPOSED };

/* A tile of 32 x 32 sums to `sums`, whose rows are `row` apart. */
static void write_tile(float *sums, long row, float *tile, enum orientation orientation, enum result result) {
    const int transposed = orientation == TRANSPOSED;
    for (int i = 0; i < 32; i += 16) {
        for (int j = 0; j < 32; j += 16) {
            vi32 x[16];
            for (int r = 0; r < 16; r++) x[r] = *(vi32 *)(tile + (i + r) * 32 + j);
            if (transposed) transpose_lanes(x);
            float *to = transposed ? sums + j * row + i : sums + i * row + j;
            for (int r = 0; r < 16; r++) {
                if (result == ACCUMULATE) accumulate(to + r * row, (vf32)x[r]);
                else store_float(to + r * row, (vf32)x[r]);
            }
        }
    }
}

/* The part of a transposed product that is one thread's. The wider matrix is multiplied from the right, as it is sooner packed so;
   what comes out is transposed where it was the left one. */
static void gemm_tn(struct gemm_tn p, packed_elem *workspace, int thread, int threads) {
    const int swapped = p.n > p.m, columns = swapped ? p.n : p.m, panels = columns / PANEL;
    const int first = first_of(panels, thread, threads), end = first_of(panels, thread + 1, threads);
    const elem *narrow = swapped ? p.right : p.left, *wide = swapped ? p.left : p.right;
    packed_elem *whole = workspace + (long)thread * THREAD_ELEMS, *part = whole + WHOLE_ELEMS;
    float *totals = (float *)(part + PART_ELEMS);
    const long chunk = rows_per_chunk(p.rows);
    for (long start = 0; start < p.rows; start += chunk) {
        int count = p.rows - start < chunk ? p.rows - start : chunk, depth = DEPTH_OF(count), last = start + chunk >= p.rows;
        pack_left(narrow + start * WIDTH, whole, WIDTH, WIDTH, count, depth);
        pack_right(wide + start * columns + first * PANEL, part, columns, (end - first) * PANEL, count, depth);
        for (int j = first; j < end; j++) {
            struct tiles panel = tiles_of_panel(part + (long)(j - first) * PANEL * depth);
            for (int i = 0; i < WIDTH; i += 32) {
                if (p.triangle == UPPER_ENTRIES && i > j * PANEL) continue;
                float *tile = totals + (long)((j - first) * WIDTH + i) * 32;
                struct tiles block = {whole + (long)i * depth, 64, 64 * 32};
                if (start) amx_micro_kernel(32, tile, 32, ACCUMULATE, block, panel, depth / 16);
                else amx_micro_kernel(32, tile, 32, OVERWRITE, block, panel, depth / 16);
                if (!last) continue;
                if (swapped) write_tile(p.sums + (long)j * PANEL * p.m + i, p.m, tile, TRANSPOSED, p.result);
                else write_tile(p.sums + (long)i * p.m + j * PANEL, p.m, tile, UNTRANSPOSED, p.result);
            }
        }
    }
}
#else
/* For each thread: units of what it packs of both matrices, of which one may be four times as wide as WIDTH. */
#define THREAD_ELEMS ((5L * WIDTH + TILE + PANEL + 1) * DEPTH_OF(MAX_CHUNK_ROWS))

static inline packed_elem pack_elem(const elem *first, const elem *second) {
#ifdef BFLOAT16
    return *first | (packed_elem)*second << 16;
#else
    (void)second;
    return *first;
#endif
}

/* The first `columns` of x in blocks of TILE, and zeros beyond them. Rows are read from beginning to end, for the sake of
   memory; so they are by `pack_right`. */
static void pack_left(const elem *x, packed_elem *packed, long stride, int columns, int rows, int depth) {
    static const elem none[TILE];
    for (int k = 0; k < depth; k++) {
        int first = k * PER_PACKED, second = first + PER_PACKED - 1;
        for (int i = 0; i < columns; i += TILE) {
            const elem *a = first < rows ? x + first * stride + i : none, *b = second < rows ? x + second * stride + i : none;
            packed_elem *to = packed + (long)i * depth + k * TILE;
            if (PER_PACKED == 1 && i + TILE <= columns) memcpy(to, a, TILE * sizeof *to);
            else {
                for (int r = 0; r < TILE; r++) to[r] = i + r < columns ? pack_elem(a + r, b + r) : 0;
            }
        }
    }
}

/* The first `columns` of x in panels, and zeros beyond them. */
static void pack_right(const elem *x, packed_elem *packed, long stride, int columns, int rows, int depth) {
    for (int k = 0; k < depth; k++) {
        for (int c = 0; c < UP(columns, PANEL); c += LANES) {
            packed_elem *to = packed + (long)(c / PANEL) * PANEL * depth + k * PANEL + c % PANEL;
            *(packed_vec *)to = c < columns ? load_row_pair(x + c, stride, rows, k) : (packed_vec){0};
        }
    }
}

/* Where a tile of sums is, and how much of it belongs to the matrix, which may end within it. */
struct sums_tile {
    float *sums;
    long row; /* entries from one row to the next */
    int rows, columns;
};

/* A tile of sums = packed left x packed right. */
static void gemm_tn_tile(struct sums_tile at, const packed_elem *left, const packed_elem *right, int depth,
                         enum result result) {
    vf32 tile[TILE][2];
    for (int r = TILE; r < 2 * TILE && r < at.rows; r++) __builtin_prefetch(at.sums + r * at.row, 1); /* of the next tile */
    micro_kernel(TILE, tile, left, 1, TILE, right, depth);
    for (int r = 0; r < TILE && r < at.rows; r++) {
        for (int c = 0; c < 2 && c * LANES < at.columns; c++) {
            float *to = at.sums + r * at.row + c * LANES;
            if (result == ACCUMULATE) accumulate(to, tile[r][c]);
            else store_float(to, tile[r][c]);
        }
    }
}

/* The part of a transposed product that is one thread's: rows of the sums where there are more of them, else columns. */
static void gemm_tn(struct gemm_tn p, packed_elem *workspace, int thread, int threads) {
    const int blocks = UP(p.n, TILE) / TILE, panels = UP(p.m, PANEL) / PANEL, by_blocks = p.n > p.m;
    const int i_first = by_blocks ? first_of(blocks, thread, threads) * TILE : 0,
              j_first = by_blocks ? 0 : first_of(panels, thread, threads) * PANEL;
    const int i_end = by_blocks ? first_of(blocks, thread + 1, threads) * TILE : p.n,
              j_end = by_blocks ? p.m : first_of(panels, thread + 1, threads) * PANEL;
    const int i_count = (i_end < p.n ? i_end : p.n) - i_first, j_count = (j_end < p.m ? j_end : p.m) - j_first;
    packed_elem *lefts = workspace + (long)thread * THREAD_ELEMS;
    const long chunk = rows_per_chunk(p.rows);
    for (long start = 0; start < p.rows; start += chunk, p.result = ACCUMULATE) {
        int count = p.rows - start < chunk ? p.rows - start : chunk, depth = DEPTH_OF(count);
        packed_elem *rights = lefts + UP((long)UP(i_count, TILE) * depth, LANES);
        pack_left(p.left + start * p.n + i_first, lefts, p.n, i_count, count, depth);
        pack_right(p.right + start * p.m + j_first, rights, p.m, j_count, count, depth);
        for (int j = 0; j < j_count; j += PANEL) {
            for (int i = 0; i < i_count && !(p.triangle == UPPER_ENTRIES && i_first + i >= j_first + j + PANEL); i += TILE) {
                struct sums_tile at = {p.sums + (long)(i_first + i) * p.m + j_first + j, p.m, i_count - i, j_count - j};
                gemm_tn_tile(at, lefts + (long)i * depth, rights + (long)j * depth, depth, p.result);
            }
        }
    }
}
#endif
