/* Products of matrices, for rows that are as long as those of the model and matrices that have been packed for it.

   A packed matrix stands in panels of PANEL columns, and in a panel row after row, as it is read (Goto and van de Geijn, 2008).
   In bfloat16 two numbers that follow each other in a sum are one `unit`, as the processor multiplies them together. */

#ifdef BFLOAT16
typedef uint32_t packed_elem __attribute__((may_alias));
typedef uint32_t packed_vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float float_elem __attribute__((may_alias));
#define PER_PACKED 2 /* numbers of a unit */
#else
typedef float packed_elem __attribute__((may_alias));
typedef vf32 packed_vec;
#define PER_PACKED 1
#endif
#define PANEL (2 * LANES)
#define PREFETCH_ROWS 16     /* rows of a panel that are asked for before they are needed */
#define TILE (REGISTERS / 2) /* rows that are multiplied with a panel at once */

#if defined(AMX) && defined(BFLOAT16) && defined(__AMX_BF16__) && LANES == 16 && WIDTH % 32 == 0
#define MATRIX_TILES /* registers for tiles of 16 rows, and products of them */
#endif

/* Depth of a sum over `rows` in units; with zeros up to there where tiles are 16 units deep. */
#define DEPTH_OF(rows) UP(UP(rows, PER_PACKED) / PER_PACKED, PER_PACKED == 2 ? 16 : 1)

/* A unit in all lanes. */
static inline packed_vec broadcast(const packed_elem *a) {
#if defined(BFLOAT16) && LANES == 16
    return (packed_vec)_mm512_set1_ps(*(const float_elem *)a); /* as a float it comes straight from memory */
#else
    return (packed_vec){0} + *a;
#endif
}

/* sums + a x b, lane by lane; in bfloat16 of both numbers of a unit. */
static inline vf32 multiply_add(vf32 sums, packed_vec a, packed_vec b) {
#ifndef BFLOAT16
    return sums + a * b;
#elif LANES == 16 && defined(__AVX512BF16__)
    return (vf32)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    return sums + (vf32)(a << 16) * (vf32)(b << 16) + (vf32)(a & 0xffff0000u) * (vf32)(b & 0xffff0000u);
#endif
}

/* sums[r] = row r of a x panel, over `depth` units, for `count` rows; called with a constant there, so that the sums stay in
   registers. Unit k of row r is a[r * row + k * step]. */
static inline __attribute__((always_inline)) void micro_kernel(int count, vf32 sums[TILE][2], const packed_elem *a, long row,
                                                               long step, const packed_elem *panel, int depth) {
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = (vf32){0};
    for (int k = 0; k < depth; k++) {
        __builtin_prefetch(panel + (long)(k + PREFETCH_ROWS) * PANEL); /* a long panel does not fit in the first cache */
        packed_vec first = *(const packed_vec *)(panel + (long)k * PANEL),
                   second = *(const packed_vec *)(panel + (long)k * PANEL + LANES);
        for (int r = 0; r < count; r++) {
            packed_vec x = broadcast(a + r * row + k * step);
            sums[r][0] = multiply_add(sums[r][0], x, first);
            sums[r][1] = multiply_add(sums[r][1], x, second);
        }
    }
}

/* Whether a product is written, or added to what is there. */
enum result { OVERWRITE, ACCUMULATE };

/* out (rows, columns) = x (rows, inner) x packed (inner, columns) + bias, if there is one; inner and columns are constants. */
struct gemm {
    elem *out;
    const elem *x;
    const packed_elem *packed;
    const float *bias; /* (columns), or null */
    int inner, columns;
};

static inline vf32 load_bias(const float *bias, int column) { return bias ? load_float(bias + column) : (vf32){0}; }

#ifdef MATRIX_TILES
struct tile_shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

static _Thread_local struct tile_shape saved_tile_config;
static _Thread_local float tls_tile_sums[32][PANEL] __attribute__((aligned(64)));

/* Eight tiles of 16 rows of 64 bytes. What other code of this thread has set is put back by `end_tiles`. */
static void begin_tiles(void) {
    static const struct tile_shape shape = {
        .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_storeconfig(&saved_tile_config);
    _tile_loadconfig(&shape);
}

static void end_tiles(void) {
    if (saved_tile_config.palette) _tile_loadconfig(&saved_tile_config);
    else _tile_release();
}

/* Where tiles of a matrix are: their rows are `stride` bytes apart, and what follows in the sum is `step` bytes further. */
struct tiles {
    const void *at;
    long stride, step;
};

/* 16 or 32 rows of a x 32 columns of b, over 32 `steps` numbers, to rows of `sums` that are `row` apart. b has units of two
   numbers that follow each other in the sum. */
static inline __attribute__((always_inline)) void amx_micro_kernel(int rows, float *sums, long row, enum result result,
                                                                   struct tiles a, struct tiles b, int steps) {
    const char *left = a.at, *right = b.at;
    const int both = rows == 32;       /* the second 16 rows too */
    __asm__ volatile("" ::: "memory"); /* the loads below do not tell the compiler what they read */
    if (result == ACCUMULATE) {
        _tile_loadd(0, sums, 4 * row);
        _tile_loadd(1, sums + 16, 4 * row);
        if (both) _tile_loadd(2, sums + 16 * row, 4 * row);
        if (both) _tile_loadd(3, sums + 16 * row + 16, 4 * row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < steps; k++, left += a.step, right += b.step) {
        _tile_loadd(4, left, a.stride);
        _tile_loadd(6, right, b.stride);
        _tile_loadd(7, right + 64, b.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!both) continue;
        _tile_loadd(5, left + 16 * a.stride, a.stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * row);
    _tile_stored(1, sums + 16, 4 * row);
    if (both) _tile_stored(2, sums + 16 * row, 4 * row);
    if (both) _tile_stored(3, sums + 16 * row + 16, 4 * row);
    __asm__ volatile("" ::: "memory");
}

/* A panel of `depth` units, from its first tile on. */
static inline struct tiles tiles_of_panel(const packed_elem *panel) { return (struct tiles){panel, 4 * PANEL, 64 * PANEL}; }

static inline __attribute__((always_inline)) void gemm_amx(struct gemm p, int first, int end) {
    const int depth = p.inner / PER_PACKED;
    for (int j = 0; j < p.columns; j += PANEL) {
        struct tiles panel = tiles_of_panel(p.packed + (long)j * depth);
        vf32 low = load_bias(p.bias, j), high = load_bias(p.bias, j + LANES);
        for (int i = first; i < end;) {
            int both = i + 32 <= end, at = both || i + 16 <= end ? i : end - 16; /* the last rows may be among those before */
            struct tiles rows = {p.x + (long)at * depth * PER_PACKED, 4L * depth, 64};
            if (both) amx_micro_kernel(32, tls_tile_sums[0], PANEL, OVERWRITE, rows, panel, depth / 16);
            else amx_micro_kernel(16, tls_tile_sums[0], PANEL, OVERWRITE, rows, panel, depth / 16);
            for (int r = 0; r < (both ? 32 : 16); r++) {
                elem *to = p.out + (long)(at + r) * p.columns + j;
                store(to, *(vf32 *)tls_tile_sums[r] + low);
                store(to + LANES, *(vf32 *)(tls_tile_sums[r] + LANES) + high);
            }
            i = at + (both ? 32 : 16);
        }
    }
}
#else
static void begin_tiles(void) {}
static void end_tiles(void) {}
#endif

/* `count` rows from `row` on, in the columns of the panel that begins at `column`. */
static inline __attribute__((always_inline)) void gemm_rows(int count, struct gemm p, const packed_elem *panel, int row,
                                                            int column) {
    const int depth = p.inner / PER_PACKED;
    vf32 sums[TILE][2];
    micro_kernel(count, sums, (const packed_elem *)(p.x + (long)row * p.inner), depth, 1, panel, depth);
    for (int r = 0; r < count; r++) {
        elem *to = p.out + (long)(row + r) * p.columns + column;
        store(to, sums[r][0] + load_bias(p.bias, column));
        if (column + LANES < p.columns) store(to + LANES, sums[r][1] + load_bias(p.bias, column + LANES));
    }
}

/* Units of LANES entries of one row and the next. */
static inline packed_vec pack_rows(const elem *first, const elem *second) {
#ifdef BFLOAT16
    return (packed_vec)widen(first) | (packed_vec)widen(second) << 16;
#else
    (void)second;
    return load_float(first);
#endif
}

/* Have a panel come to the cache while the one before it is multiplied with: what falls to `count` rows of `all`, from `row`
   on. */
static inline void prefetch_part(const packed_elem *panel, int depth, int row, int count, int all) {
    const long lines = 4L * PANEL * depth / 64;
    prefetch_lines(panel, lines * row / all, lines * (row + count) / all);
}

/* Rows from `first` to `end` of a product. */
static inline __attribute__((always_inline)) void gemm(struct gemm p, int first, int end) {
    const int depth = p.inner / PER_PACKED;
#ifdef MATRIX_TILES
    if (end - first >= 16) {
        gemm_amx(p, first, end);
        return;
    }
#endif
    for (int j = 0; j < p.columns; j += PANEL) {
        const packed_elem *panel = p.packed + (long)j * depth;
        int i = first;
        for (; i + TILE <= end; i += TILE) {
            prefetch_part(panel + (long)PANEL * depth, depth, i - first, TILE, end - first);
            gemm_rows(TILE, p, panel, i, j);
        }
        if (i < end && end - first >= TILE) {
            gemm_rows(TILE, p, panel, end - TILE, j); /* some rows are done again: that is sooner than one by one */
            i = end;
        }
        for (; i < end; i++) gemm_rows(1, p, panel, i, j);
    }
}

/* A function for each shape of product, so that inner and columns are constants in it. */
#define GEMM(name, inner, columns)                                                                                             \
    static __attribute__((noinline)) void name(elem *out, const elem *x, const packed_elem *packed, const float *bias,         \
                                               struct work work) {                                                             \
        gemm((struct gemm){out, x, packed, bias, inner, columns}, work.first, work.end);                                       \
    }
GEMM(gemm_c_c, WIDTH, WIDTH)
GEMM(gemm_c_3c, WIDTH, 3 * WIDTH)
GEMM(gemm_c_4c, WIDTH, 4 * WIDTH)
GEMM(gemm_3c_c, 3 * WIDTH, WIDTH)
GEMM(gemm_4c_c, 4 * WIDTH, WIDTH)

/* ---- Packing ---- */

/* A panel of the transpose of matrix (out, in), from its row `column` on, for rows of `in` entries: LANES x LANES units at a
   time. */
static void pack_transposed(const float *matrix, packed_elem *panel, int out, int in, int column) {
    for (int k = 0; k < in; k += LANES * PER_PACKED) {
        for (int c = 0; c < PANEL; c += LANES) {
            vi32 tile[LANES];
            for (int j = 0; j < LANES; j++) {
                elem row[LANES * PER_PACKED] __attribute__((aligned(64))) = {0};
                const float *from = matrix + (long)(column + c + j) * in + k;
                for (int p = 0; p < LANES * PER_PACKED && k + p < in && column + c < out; p += LANES)
                    store(row + p, load_float(from + p));
                tile[j] = *(vi32 *)row;
            }
            transpose_lanes(tile);
            for (int i = 0; i < LANES && k + i * PER_PACKED < in; i++)
                *(vi32 *)(panel + (long)(k / PER_PACKED + i) * PANEL + c) = tile[i];
        }
    }
}

/* A panel of matrix (out, in), from its column `column` on, for rows of `out` entries. */
static void pack_untransposed(const float *matrix, packed_elem *panel, int out, int in, int column) {
    for (int k = 0; k < out; k += PER_PACKED) {
        for (int c = 0; c < PANEL; c += LANES) {
            elem rows[PER_PACKED][LANES];
            for (int p = 0; p < PER_PACKED; p++) {
                store(rows[p], column + c < in ? load_float(matrix + (long)(k + p) * in + column + c) : (vf32){0});
            }
            *(packed_vec *)(panel + (long)(k / PER_PACKED) * PANEL + c) = pack_rows(rows[0], rows[PER_PACKED - 1]);
        }
    }
}
