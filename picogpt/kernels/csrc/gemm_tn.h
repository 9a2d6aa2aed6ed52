/* GEMM with a transposed left operand, sums (n, m) = left^T (n, rows) right (rows, m): the gradients of
   weights, dW = dout^T x, and the Gram matrices X^T X of Muon.

   left and right are elems, row-major; sums are float32. One of n and m is WIDTH, the other may be up to
   4 WIDTH. Threads divide the wider side. Each packs its own part of that side and all of the other one
   into its own workspace: some packing is done twice, but no thread waits for another.

   The sum over rows is cut into chunks, so that what is packed of a chunk stays in the cache. The order
   of additions depends on the number of rows only, never on threads: a result is bit-identical for any
   number of them. */

#define MAX_CHUNK_ROWS 512 /* rows of left and right that are packed at once */

/* Which entries of a square result are needed. */
/* UPPER_ENTRIES: at least those on and above the diagonal, as the result is symmetric. */
enum triangle { ALL_ENTRIES, UPPER_ENTRIES };

/* Operands of one transposed GEMM. */
struct gemm_tn {
    /* (n, m), written or added to */
    float *sums;
    /* (rows, n) and (rows, m) */
    const elem *left, *right;
    int n, m;
    long rows;
    enum result result;
    enum triangle triangle;
};

/* packed_elem k of LANES columns of x: rows k PER_PACKED and the one after it, of `rows` rows that are
   `stride` elems apart. Rows beyond the last one are zeros, so a sum may be deeper than there are rows. */
static inline packed_vec load_row_pair(const elem *x, long stride, int rows, int k) {
    static const elem none[LANES];
    int first = k * PER_PACKED, second = first + PER_PACKED - 1;
    return pack_rows(first < rows ? x + first * stride : none, second < rows ? x + second * stride : none);
}

/* Rows of a chunk: all chunks are as even as can be, as a short last one would waste its packing; a
   multiple of 32, the depth of an AMX tile in elems. */
static inline long rows_per_chunk(long rows) {
    long chunks = UP(rows, MAX_CHUNK_ROWS) / MAX_CHUNK_ROWS;
    return UP(UP(rows, chunks) / chunks, 32);
}

#ifdef MATRIX_TILES
/* A thread's workspace, in packed_elems: the operand that is packed whole (`whole`), its part of the
   wider one (`part`), and the float32 sums of that part. */
#define WHOLE_ELEMS ((long)WIDTH * DEPTH_OF(MAX_CHUNK_ROWS))
#define PART_ELEMS (4 * WHOLE_ELEMS)
#define THREAD_ELEMS (WHOLE_ELEMS + PART_ELEMS + 4L * WIDTH * WIDTH)

/* Pack the first `columns` of x, transposed, for the left side of AMX tiles: 32 columns after the other,
   in tiles of 16 columns x 16 packed_elems, which the tile loads read 64 bytes at a time. Rows are read
   in the outer loop, as whole cache lines of them are used then; `pack_right` does so too. */
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

/* Indices that interleave four entries of one vector with four of the next. */
#define PAIRS_FROM(k) k, 32 + k, k + 1, 33 + k, k + 2, 34 + k, k + 3, 35 + k

/* Pack the first `columns` of x into panels of pairs: words of row 2 k and row 2 k + 1. One shuffle
   interleaves 16 columns of both, instead of two widenings, a shift and an or. */
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
    /* An odd last row, and zeros up to the depth. */
    for (; k < depth; k++) {
        for (int c = 0; c < columns; c += LANES) {
            *(packed_vec *)(packed + ((long)(c / PANEL) * depth + k) * PANEL + c % PANEL) = load_row_pair(x + c, stride, rows, k);
        }
    }
}

/* Whether a tile of sums is written as it is or transposed. */
enum orientation { UNTRANSPOSED, TRANSPOSED };

/* Write a tile (32, 32) of sums to the result, whose rows are `row` floats apart, by way of 16 x 16
   blocks in registers where it is transposed. */
static void write_tile(float *sums, long row, float *tile, enum orientation orientation, enum result result) {
    const int transposed = orientation == TRANSPOSED;
    for (int i = 0; i < 32; i += 16) {
        for (int j = 0; j < 32; j += 16) {
            vi32 x[16];
            for (int r = 0; r < 16; r++) x[r] = *(vi32 *)(tile + (i + r) * 32 + j);
            if (transposed) transpose_lanes(x);
            /* a transposed block goes to the mirrored place */
            float *to = transposed ? sums + j * row + i : sums + i * row + j;
            for (int r = 0; r < 16; r++) {
                if (result == ACCUMULATE) accumulate(to + r * row, (vf32)x[r]);
                else store_float(to + r * row, (vf32)x[r]);
            }
        }
    }
}

/* This thread's part of the result, on AMX: some panels of the wider operand, times all of the narrow
   one. The wider operand is always the right one, as `pack_right` is the faster packing; if it is
   p.left, the transposed result is computed and each tile is transposed when it is written. */
static void gemm_tn(struct gemm_tn p, packed_elem *workspace, int thread, int threads) {
    const int swapped = p.n > p.m, columns = swapped ? p.n : p.m, panels = columns / PANEL;
    const int first = first_of(panels, thread, threads), end = first_of(panels, thread + 1, threads);
    const elem *narrow = swapped ? p.right : p.left, *wide = swapped ? p.left : p.right;
    packed_elem *whole = workspace + (long)thread * THREAD_ELEMS, *part = whole + WHOLE_ELEMS;
    float *totals = (float *)(part + PART_ELEMS);
    /* Sums of all chunks stay in `totals`, in the workspace, and are written to p.sums once, after the
       last chunk. */
    const long chunk = rows_per_chunk(p.rows);
    for (long start = 0; start < p.rows; start += chunk) {
        int count = p.rows - start < chunk ? p.rows - start : chunk, depth = DEPTH_OF(count), last = start + chunk >= p.rows;
        pack_left(narrow + start * WIDTH, whole, WIDTH, WIDTH, count, depth);
        pack_right(wide + start * columns + first * PANEL, part, columns, (end - first) * PANEL, count, depth);
        for (int j = first; j < end; j++) {
            struct tiles panel = tiles_of_panel(part + (long)(j - first) * PANEL * depth);
            for (int i = 0; i < WIDTH; i += 32) {
                if (p.triangle == UPPER_ENTRIES && i > j * PANEL) continue; /* the tile is below the diagonal */
                float *tile = totals + (long)((j - first) * WIDTH + i) * 32;
                struct tiles block = {whole + (long)i * depth, 64, 64 * 32};
                /* The first chunk writes the sums, so they need no zeros before. */
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
/* A thread's workspace, in packed_elems: its packed parts of both operands, of which one may be four times
   as wide as WIDTH, with padding to whole register tiles. */
#define THREAD_ELEMS ((5L * WIDTH + TILE + PANEL + 1) * DEPTH_OF(MAX_CHUNK_ROWS))

/* One packed_elem of two neighbouring rows. */
static inline packed_elem pack_elem(const elem *first, const elem *second) {
#ifdef BFLOAT16
    return *first | (packed_elem)*second << 16;
#else
    (void)second;
    return *first;
#endif
}

/* Pack the first `columns` of x in blocks of TILE columns (depth, TILE), with zeros beyond the last
   column: `micro_kernel` then broadcasts a column's entries from one cache line. Rows are read in the
   outer loop, as whole cache lines of them are used then; `pack_right` does so too. */
static void pack_left(const elem *x, packed_elem *packed, long stride, int columns, int rows, int depth) {
    static const elem none[TILE];
    for (int k = 0; k < depth; k++) {
        int first = k * PER_PACKED, second = first + PER_PACKED - 1;
        for (int i = 0; i < columns; i += TILE) {
            const elem *a = first < rows ? x + first * stride + i : none, *b = second < rows ? x + second * stride + i : none;
            packed_elem *to = packed + (long)i * depth + k * TILE;
            /* float32, a whole block: a plain copy */
            if (PER_PACKED == 1 && i + TILE <= columns) memcpy(to, a, TILE * sizeof *to);
            else {
                for (int r = 0; r < TILE; r++) to[r] = i + r < columns ? pack_elem(a + r, b + r) : 0;
            }
        }
    }
}

/* Pack the first `columns` of x in panels (depth, PANEL), with zeros beyond the last column. */
static void pack_right(const elem *x, packed_elem *packed, long stride, int columns, int rows, int depth) {
    for (int k = 0; k < depth; k++) {
        for (int c = 0; c < UP(columns, PANEL); c += LANES) {
            packed_elem *to = packed + (long)(c / PANEL) * PANEL * depth + k * PANEL + c % PANEL;
            *(packed_vec *)to = c < columns ? load_row_pair(x + c, stride, rows, k) : (packed_vec){0};
        }
    }
}

/* A register tile of the result: TILE x PANEL floats, of which only rows x columns belong to the matrix,
   as it may end within the tile. */
struct sums_tile {
    float *sums;
    long row; /* entries from one row to the next */
    int rows, columns;
};

/* One register tile: sums = or += packed left x packed right, over one chunk. */
static void gemm_tn_tile(struct sums_tile at, const packed_elem *left, const packed_elem *right, int depth, enum result result) {
    vf32 tile[TILE][2];
    /* Fetch the rows of the tile below this one, for writing. */
    for (int r = TILE; r < 2 * TILE && r < at.rows; r++) __builtin_prefetch(at.sums + r * at.row, 1);
    micro_kernel(TILE, tile, left, 1, TILE, right, depth);
    for (int r = 0; r < TILE && r < at.rows; r++) {
        /* Only entries within the matrix are stored; the others are sums of zeros. */
        for (int c = 0; c < 2 && c * LANES < at.columns; c++) {
            float *to = at.sums + r * at.row + c * LANES;
            if (result == ACCUMULATE) accumulate(to, tile[r][c]);
            else store_float(to, tile[r][c]);
        }
    }
}

/* This thread's part of the result: rows of sums if it has more rows than columns, else columns, so that
   the parts are as even as can be. */
static void gemm_tn(struct gemm_tn p, packed_elem *workspace, int thread, int threads) {
    const int blocks = UP(p.n, TILE) / TILE, panels = UP(p.m, PANEL) / PANEL, by_blocks = p.n > p.m;
    const int i_first = by_blocks ? first_of(blocks, thread, threads) * TILE : 0,
              j_first = by_blocks ? 0 : first_of(panels, thread, threads) * PANEL;
    const int i_end = by_blocks ? first_of(blocks, thread + 1, threads) * TILE : p.n,
              j_end = by_blocks ? p.m : first_of(panels, thread + 1, threads) * PANEL;
    const int i_count = (i_end < p.n ? i_end : p.n) - i_first, j_count = (j_end < p.m ? j_end : p.m) - j_first;
    /* The workspace: packed left, then packed right at the next vector. */
    packed_elem *lefts = workspace + (long)thread * THREAD_ELEMS;
    const long chunk = rows_per_chunk(p.rows);
    for (long start = 0; start < p.rows; start += chunk, p.result = ACCUMULATE) { /* chunks after the first add to sums */
        int count = p.rows - start < chunk ? p.rows - start : chunk, depth = DEPTH_OF(count);
        packed_elem *rights = lefts + UP((long)UP(i_count, TILE) * depth, LANES);
        pack_left(p.left + start * p.n + i_first, lefts, p.n, i_count, count, depth);
        pack_right(p.right + start * p.m + j_first, rights, p.m, j_count, count, depth);
        /* A panel of right stays in the cache for all blocks of left. Where only the upper triangle is
           needed, the loop stops at the diagonal. */
        for (int j = 0; j < j_count; j += PANEL) {
            for (int i = 0; i < i_count && !(p.triangle == UPPER_ENTRIES && i_first + i >= j_first + j + PANEL); i += TILE) {
                struct sums_tile at = {p.sums + (long)(i_first + i) * p.m + j_first + j, p.m, i_count - i, j_count - j};
                gemm_tn_tile(at, lefts + (long)i * depth, rights + (long)j * depth, depth, p.result);
            }
        }
    }
}
#endif
