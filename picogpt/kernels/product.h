/* Products of matrices, for rows that are as long as those of the model and matrices that have been packed for it.

   A packed matrix stands in panels of PANEL columns, and in a panel row after row, as it is read (Goto and van de Geijn, 2008).
   In bfloat16 two numbers that follow each other in a sum are one `unit`, as the processor multiplies them together. */

#ifdef BFLOAT16
typedef uint32_t unit __attribute__((may_alias));
typedef uint32_t units __attribute__((vector_size(4 * LANES), may_alias));
typedef float float_unit __attribute__((may_alias));
#define PAIR 2 /* numbers of a unit */
#else
typedef float unit __attribute__((may_alias));
typedef vector units;
#define PAIR 1
#endif
#define PANEL (2 * LANES)
#define AHEAD 16             /* rows of a panel that are asked for before they are needed */
#define TILE (REGISTERS / 2) /* rows that are multiplied with a panel at once */

#if defined(AMX) && defined(BFLOAT16) && defined(__AMX_BF16__) && LANES == 16 && WIDTH % 32 == 0
#define MATRIX_TILES /* registers for tiles of 16 rows, and products of them */
#endif

/* Depth of a sum over `rows` in units; with zeros up to there where tiles are 16 units deep. */
#define DEPTH_OF(rows) UP(UP(rows, PAIR) / PAIR, PAIR == 2 ? 16 : 1)

/* A unit in all lanes. */
static inline units spread(const unit *a) {
#if defined(BFLOAT16) && LANES == 16
    return (units)_mm512_set1_ps(*(const float_unit *)a); /* as a float it comes straight from memory */
#else
    return (units){0} + *a;
#endif
}

/* sums + a x b, lane by lane; in bfloat16 of both numbers of a unit. */
static inline vector plus_product(vector sums, units a, units b) {
#ifndef BFLOAT16
    return sums + a * b;
#elif LANES == 16 && defined(__AVX512BF16__)
    return (vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    return sums + (vector)(a << 16) * (vector)(b << 16) + (vector)(a & 0xffff0000u) * (vector)(b & 0xffff0000u);
#endif
}

/* sums[r] = row r of a x panel, over `depth` units, for `count` rows; called with a constant there, so that the sums stay in
   registers. Unit k of row r is a[r * row + k * step]. */
static inline __attribute__((always_inline)) void multiply_tile(int count, vector sums[TILE][2], const unit *a, long row,
                                                                long step, const unit *panel, int depth) {
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = (vector){0};
    for (int k = 0; k < depth; k++) {
        __builtin_prefetch(panel + (long)(k + AHEAD) * PANEL); /* a long panel does not fit in the first cache */
        units first = *(const units *)(panel + (long)k * PANEL), second = *(const units *)(panel + (long)k * PANEL + LANES);
        for (int r = 0; r < count; r++) {
            units x = spread(a + r * row + k * step);
            sums[r][0] = plus_product(sums[r][0], x, first);
            sums[r][1] = plus_product(sums[r][1], x, second);
        }
    }
}

static inline vector bias_of(const float *bias, int column) { return bias ? load_float(bias + column) : (vector){0}; }

#ifdef MATRIX_TILES
struct tile_shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

static _Thread_local struct tile_shape others;
static _Thread_local float tile_sums[32][PANEL] __attribute__((aligned(64)));

/* Eight tiles of 16 rows of 64 bytes. What other code of this thread has set is put back by `end_tiles`. */
static void begin_tiles(void) {
    static const struct tile_shape shape = {
        .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_storeconfig(&others);
    _tile_loadconfig(&shape);
}

static void end_tiles(void) {
    if (others.palette) _tile_loadconfig(&others);
    else _tile_release();
}

/* Where tiles of a matrix are: their rows are `stride` bytes apart, and what follows in the sum is `step` bytes further. */
struct tiles {
    const void *at;
    long stride, step;
};

/* 16 rows of a, or 32 for `both`, x 32 columns of b, over 32 `steps` numbers, to rows of `sums` that are `row` apart; with
   `add` to what is there. b has units of two numbers that follow each other in the sum. */
static inline __attribute__((always_inline)) void multiply_tiles(int both, float *sums, long row, int add, struct tiles a,
                                                                 struct tiles b, int steps) {
    const char *left = a.at, *right = b.at;
    __asm__ volatile("" ::: "memory"); /* the loads below do not tell the compiler what they read */
    if (add) {
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
static inline struct tiles tiles_of_panel(const unit *panel) { return (struct tiles){panel, 4 * PANEL, 64 * PANEL}; }

static inline __attribute__((always_inline)) void multiply_by_tiles(number *out, const number *x, const unit *packed,
                                                                    const float *bias, int depth, int columns, int first,
                                                                    int end) {
    for (int j = 0; j < columns; j += PANEL) {
        struct tiles panel = tiles_of_panel(packed + (long)j * depth);
        vector low = bias_of(bias, j), high = bias_of(bias, j + LANES);
        for (int i = first; i < end;) {
            int both = i + 32 <= end, at = both || i + 16 <= end ? i : end - 16; /* the last rows may be among those before */
            struct tiles rows = {x + (long)at * depth * PAIR, 4L * depth, 64};
            if (both) multiply_tiles(1, tile_sums[0], PANEL, 0, rows, panel, depth / 16);
            else multiply_tiles(0, tile_sums[0], PANEL, 0, rows, panel, depth / 16);
            for (int r = 0; r < (both ? 32 : 16); r++) {
                number *to = out + (long)(at + r) * columns + j;
                store(to, *(vector *)tile_sums[r] + low);
                store(to + LANES, *(vector *)(tile_sums[r] + LANES) + high);
            }
            i = at + (both ? 32 : 16);
        }
    }
}
#else
static void begin_tiles(void) {}
static void end_tiles(void) {}
#endif

static inline __attribute__((always_inline)) void multiply_rows(int count, number *out, const number *x, const unit *panel,
                                                                const float *bias, int depth, int columns, int column) {
    vector sums[TILE][2];
    multiply_tile(count, sums, (const unit *)x, depth, 1, panel, depth);
    for (int r = 0; r < count; r++) {
        number *to = out + (long)r * columns + column;
        store(to, sums[r][0] + bias_of(bias, column));
        if (column + LANES < columns) store(to + LANES, sums[r][1] + bias_of(bias, column + LANES));
    }
}

/* Units of LANES entries of one row and the next. */
static inline units units_of(const number *first, const number *second) {
#ifdef BFLOAT16
    return (units)widen(first) | (units)widen(second) << 16;
#else
    (void)second;
    return load_float(first);
#endif
}

/* Have a panel come to the cache while the one before it is multiplied with: what falls to `count` rows of `all`, from `row`
   on. */
static inline void prefetch_part(const unit *panel, int depth, int row, int count, int all) {
    const long lines = 4L * PANEL * depth / 64;
    for (long line = lines * row / all; line < lines * (row + count) / all; line++) {
        __builtin_prefetch((const char *)panel + 64 * line);
    }
}

/* Rows from `first` to `end` of out (rows, columns) = x (rows, inner) x packed (inner, columns) + bias, if there is one. */
static inline __attribute__((always_inline)) void multiply(number *out, const number *x, const unit *packed, const float *bias,
                                                           int inner, int columns, int first, int end) {
    const int depth = inner / PAIR;
#ifdef MATRIX_TILES
    if (end - first >= 16) {
        multiply_by_tiles(out, x, packed, bias, depth, columns, first, end);
        return;
    }
#endif
    for (int j = 0; j < columns; j += PANEL) {
        const unit *panel = packed + (long)j * depth;
        int i = first;
        for (; i + TILE <= end; i += TILE) {
            prefetch_part(panel + (long)PANEL * depth, depth, i - first, TILE, end - first);
            multiply_rows(TILE, out + (long)i * columns, x + (long)i * inner, panel, bias, depth, columns, j);
        }
        if (i < end && end - first >= TILE) {
            i = end - TILE; /* some rows are done again: that is sooner than one by one */
            multiply_rows(TILE, out + (long)i * columns, x + (long)i * inner, panel, bias, depth, columns, j);
            i = end;
        }
        for (; i < end; i++) multiply_rows(1, out + (long)i * columns, x + (long)i * inner, panel, bias, depth, columns, j);
    }
}

/* A function for each shape of product, as what is known of it when it is compiled need not be computed. */
#define PRODUCT(name, inner, columns)                                                                                            \
    static __attribute__((noinline)) void name(number *out, const number *x, const unit *packed, const float *bias,              \
                                               struct share share) {                                                             \
        multiply(out, x, packed, bias, inner, columns, share.first, share.end);                                                  \
    }
PRODUCT(multiply_1_to_1, WIDTH, WIDTH)
PRODUCT(multiply_1_to_3, WIDTH, 3 * WIDTH)
PRODUCT(multiply_1_to_4, WIDTH, 4 * WIDTH)
PRODUCT(multiply_3_to_1, 3 * WIDTH, WIDTH)
PRODUCT(multiply_4_to_1, 4 * WIDTH, WIDTH)

/* ---- Packing ---- */

/* A panel of the transpose of matrix (out, in), from its row `column` on, for rows of `in` entries: LANES x LANES units at a
   time. */
static void pack_transposed(const float *matrix, unit *panel, int out, int in, int column) {
    for (int k = 0; k < in; k += LANES * PAIR) {
        for (int c = 0; c < PANEL; c += LANES) {
            integers tile[LANES];
            for (int j = 0; j < LANES; j++) {
                number row[LANES * PAIR] __attribute__((aligned(64))) = {0};
                const float *from = matrix + (long)(column + c + j) * in + k;
                for (int p = 0; p < LANES * PAIR && k + p < in && column + c < out; p += LANES)
                    store(row + p, load_float(from + p));
                tile[j] = *(integers *)row;
            }
            transpose_lanes(tile);
            for (int i = 0; i < LANES && k + i * PAIR < in; i++)
                *(integers *)(panel + (long)(k / PAIR + i) * PANEL + c) = tile[i];
        }
    }
}

/* A panel of matrix (out, in), from its column `column` on, for rows of `out` entries. */
static void pack_as_it_is(const float *matrix, unit *panel, int out, int in, int column) {
    for (int k = 0; k < out; k += PAIR) {
        for (int c = 0; c < PANEL; c += LANES) {
            number rows[PAIR][LANES];
            for (int p = 0; p < PAIR; p++) {
                store(rows[p], column + c < in ? load_float(matrix + (long)(k + p) * in + column + c) : (vector){0});
            }
            *(units *)(panel + (long)(k / PAIR) * PANEL + c) = units_of(rows[0], rows[PAIR - 1]);
        }
    }
}
