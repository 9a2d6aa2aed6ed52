/* GEMM for the blocks: out (rows, columns) = x (rows, inner) W + bias, for the few shapes that a block
   has.

   x and out are elems, row-major, in buffers of the caller; W was packed by `pack_transposed` or
   `pack_untransposed` below. Each thread computes rows of its own, so threads share nothing but W, which
   they only read.

   Layout: W is cut into panels of PANEL columns, and a panel is stored row after row, so that the
   micro-kernel reads memory from beginning to end (Goto and van de Geijn, Anatomy of High-Performance
   Matrix Multiplication, 2008). In bfloat16 a row of a panel holds pairs: elements 2 k and 2 k + 1 of
   the inner dimension share a 32-bit word, as the processor multiplies and adds both at once.
   `packed_elem` is such a word, or one float in float32.

   Where the processor has AMX the micro-kernel is its tile multiplication; else it is a register tile of
   vectors. */

#ifdef BFLOAT16
/* Two bfloat16, the first in the lower half; may_alias, as rows of elems are read as words. */
typedef uint32_t packed_elem __attribute__((may_alias));
typedef uint32_t packed_vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float float_elem __attribute__((may_alias));
#define PER_PACKED 2 /* elems of the inner dimension in one packed_elem */
#else
typedef float packed_elem __attribute__((may_alias));
typedef vf32 packed_vec;
#define PER_PACKED 1
#endif
#define PANEL (2 * LANES)    /* columns: two vectors, so each broadcast of x serves two multiply-adds */
#define PREFETCH_ROWS 16     /* rows of a panel from a load to its prefetch */
/* Rows of x in a register tile: TILE x 2 accumulators. Eleven instead of twelve for AVX-512, as 129 rows
   of a window are twelve tiles of eleven or ten, and half of them six of eleven, almost exactly. */
#define TILE (LANES == 16 ? 11 : REGISTERS / 2)

#if defined(AMX) && defined(BFLOAT16) && defined(__AMX_BF16__) && LANES == 16 && WIDTH % 32 == 0
#define MATRIX_TILES /* AMX: registers for tiles of 16 rows of 64 bytes */
#endif

/* Depth, in packed_elems, of a sum over `rows` rows. In bfloat16 it is a multiple of 16, the depth of an
   AMX tile; what goes beyond the rows is packed as zeros, which add nothing. */
#define DEPTH_OF(rows) UP(UP(rows, PER_PACKED) / PER_PACKED, PER_PACKED == 2 ? 16 : 1)

/* One packed_elem in all lanes. */
static inline packed_vec broadcast(const packed_elem *a) {
#if defined(BFLOAT16) && LANES == 16
    /* a float broadcast takes its operand straight from memory */
    return (packed_vec)_mm512_set1_ps(*(const float_elem *)a);
#else
    return (packed_vec){0} + *a;
#endif
}

/* sums + a b, lane by lane. In bfloat16 both products of a pair are added. */
static inline vf32 multiply_add(vf32 sums, packed_vec a, packed_vec b) {
#ifndef BFLOAT16
    return sums + a * b;
#elif LANES == 16 && defined(__AVX512BF16__)
    return (vf32)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    /* Without the instruction each half is widened to float32: the lower one by a shift, the upper one
       by a mask. */
    return sums + (vf32)(a << 16) * (vf32)(b << 16) + (vf32)(a & 0xffff0000u) * (vf32)(b & 0xffff0000u);
#endif
}

/* The micro-kernel: sums[r] (PANEL) = sum over k < depth of a[r][k] panel[k], for `count` rows r of x.
   Element k of row r is at a[r * row + k * step], so that `a` may be row-major (step 1) or packed in
   blocks of rows (row 1).

   `count` must be a constant where this is inlined: then the loops over r unroll, and the accumulators
   stay in registers. Per k it loads 2 vectors of the panel and `count` broadcasts, for 2 count
   multiply-adds. */
static inline __attribute__((always_inline)) void micro_kernel(int count, vf32 sums[TILE][2], const packed_elem *a, long row,
                                                               long step, const packed_elem *panel, int depth) {
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = (vf32){0};
    for (int k = 0; k < depth; k++) {
        __builtin_prefetch(panel + (long)(k + PREFETCH_ROWS) * PANEL); /* a panel can be longer than the L1 cache */
        packed_vec first = *(const packed_vec *)(panel + (long)k * PANEL),
                   second = *(const packed_vec *)(panel + (long)k * PANEL + LANES);
        for (int r = 0; r < count; r++) {
            packed_vec x = broadcast(a + r * row + k * step);
            sums[r][0] = multiply_add(sums[r][0], x, first);
            sums[r][1] = multiply_add(sums[r][1], x, second);
        }
    }
}

/* Whether a result is written, or added to what is there. */
enum result { OVERWRITE, ACCUMULATE };

/* Operands of one GEMM. inner and columns are constants where the struct is made, so the compiler knows
   the strides. */
struct gemm {
    elem *out;                 /* (rows, columns) */
    const elem *x;             /* (rows, inner) */
    const packed_elem *packed; /* (columns / PANEL, inner / PER_PACKED, PANEL): the panels of W */
    const float *bias;         /* (columns), or null */
    int inner, columns;
};

/* LANES entries of the bias, or zeros where there is none. */
static inline vf32 load_bias(const float *bias, int column) { return bias ? load_float(bias + column) : (vf32){0}; }

#ifdef MATRIX_TILES
/* The operand of LDTILECFG: rows and bytes per row of each tile register. */
struct tile_shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

/* Tile registers belong to a thread, and so does what is saved of them; `tls_tile_sums` holds the sums
   of 32 x PANEL results on their way to elems. */
static _Thread_local struct tile_shape saved_tile_config;
static _Thread_local float tls_tile_sums[32][PANEL] __attribute__((aligned(64)));

/* Set up eight tiles of 16 rows of 64 bytes. Other code of this thread, as torch's GEMMs, may have
   configured its tiles: that configuration is saved, and restored by `end_tiles`. */
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

/* Where the tiles of an operand are: rows are `stride` bytes apart, and the next tile of the inner
   dimension is `step` bytes further. */
struct tiles {
    const void *at;
    long stride, step;
};

/* The micro-kernel on AMX: sums (rows, 32) = or += a (rows, 32 steps) b (32 steps, 32), with 16 or 32
   `rows` of sums that are `row` floats apart. b has pairs of bfloat16 along the inner dimension.

   Tiles 0 to 3 hold the 2 x 2 blocks of sums, 4 and 5 the rows of a, 6 and 7 the columns of b: four
   multiplications for four loads, the best ratio that eight registers allow. */
static inline __attribute__((always_inline)) void amx_micro_kernel(int rows, float *sums, long row, enum result result,
                                                                   struct tiles a, struct tiles b, int steps) {
    const char *left = a.at, *right = b.at;
    const int both = rows == 32;       /* whether there are rows 16 to 31 */
    __asm__ volatile("" ::: "memory"); /* the intrinsics do not tell the compiler what memory they read */
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
        /* Each TDPBF16PS adds 16 x 16 x 32 products. */
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
    __asm__ volatile("" ::: "memory"); /* nor what they write */
}

/* The tiles of a packed panel: 16 rows of it are a tile's depth, and its 32 columns two tiles side by
   side. */
static inline struct tiles tiles_of_panel(const packed_elem *panel) { return (struct tiles){panel, 4 * PANEL, 64 * PANEL}; }

/* Rows [first, end) of a GEMM on AMX, at least 16 of them, 32 x PANEL results at a time. */
static inline __attribute__((always_inline)) void gemm_amx(struct gemm p, int first, int end) {
    const int depth = p.inner / PER_PACKED;
    for (int j = 0; j < p.columns; j += PANEL) {
        struct tiles panel = tiles_of_panel(p.packed + (long)j * depth);
        vf32 low = load_bias(p.bias, j), high = load_bias(p.bias, j + LANES);
        for (int i = first; i < end;) {
            /* The last block begins 16 rows before the end: rows of the block before may be computed
               again, to the same values. */
            int both = i + 32 <= end, at = both || i + 16 <= end ? i : end - 16;
            struct tiles rows = {p.x + (long)at * depth * PER_PACKED, 4L * depth, 64};
            if (both) amx_micro_kernel(32, tls_tile_sums[0], PANEL, OVERWRITE, rows, panel, depth / 16);
            else amx_micro_kernel(16, tls_tile_sums[0], PANEL, OVERWRITE, rows, panel, depth / 16);
            for (int r = 0; r < (both ? 32 : 16); r++) {
                elem *to = p.out + (long)(at + r) * p.columns + j;
                /* The sums leave the tiles as floats; bias and rounding come on the way to `out`. */
                store(to, *(vf32 *)tls_tile_sums[r] + low);
                store(to + LANES, *(vf32 *)(tls_tile_sums[r] + LANES) + high);
            }
            i = at + (both ? 32 : 16);
        }
    }
}
#else
/* Without AMX there is nothing to set up. */
static void begin_tiles(void) {}
static void end_tiles(void) {}
#endif

/* One register tile: `count` rows from `row` on, times the panel that begins at `column`. A row of elems
   is read as packed_elems: two neighbours are a pair already. */
static inline __attribute__((always_inline)) void gemm_rows(int count, struct gemm p, const packed_elem *panel, int row,
                                                            int column) {
    const int depth = p.inner / PER_PACKED;
    vf32 sums[TILE][2];
    micro_kernel(count, sums, (const packed_elem *)(p.x + (long)row * p.inner), depth, 1, panel, depth);
    for (int r = 0; r < count; r++) {
        elem *to = p.out + (long)(row + r) * p.columns + column;
        store(to, sums[r][0] + load_bias(p.bias, column));
        /* the last panel may be half padding */
        if (column + LANES < p.columns) store(to + LANES, sums[r][1] + load_bias(p.bias, column + LANES));
    }
}

/* Pack LANES columns of two neighbouring rows of W: in bfloat16 the first row goes to the lower halves
   of the words, the second to the upper ones. In float32 there is only the first. */
static inline packed_vec pack_rows(const elem *first, const elem *second) {
#ifdef BFLOAT16
    return (packed_vec)widen(first) | (packed_vec)widen(second) << 16;
#else
    (void)second;
    return load_float(first);
#endif
}

/* Prefetch a part of the next panel while this one is multiplied: `count` rows of `all`, from `row` on,
   fetch the same share of its cache lines. So the fetches are spread over the computation instead of
   stalling it at once. */
static inline void prefetch_part(const packed_elem *panel, int depth, int row, int count, int all) {
    const long lines = 4L * PANEL * depth / 64;
    prefetch_lines(panel, lines * row / all, lines * (row + count) / all);
}

/* Rows [first, end) of a GEMM. The outer loop goes over panels, the inner one over rows: a panel stays
   in the cache for all rows, while x streams by. */
static inline __attribute__((always_inline)) void gemm(struct gemm p, int first, int end) {
    const int depth = p.inner / PER_PACKED;
#ifdef MATRIX_TILES
    /* Fewer rows than an AMX tile has go through the vectors below. */
    if (end - first >= 16) {
        gemm_amx(p, first, end);
        return;
    }
#endif
    /* As few tiles as there can be, and `low` of them one row less high, so that they end with the last
       row: 129 rows are 19 tiles of 6 and 3 of 5. */
    const int rows = end - first, tiles = UP(rows, TILE) / TILE, low = tiles * TILE - rows;
    for (int j = 0; j < p.columns; j += PANEL) {
        const packed_elem *panel = p.packed + (long)j * depth;
        for (int t = 0, i = first; rows >= TILE && t < tiles; t++) {
            const int count = t < tiles - low ? TILE : TILE - 1;
            if (i + count > end) i = end - count; /* of few rows, some are computed twice */
            prefetch_part(panel + (long)PANEL * depth, depth, i - first, count, rows);
            if (count == TILE) gemm_rows(TILE, p, panel, i, j);
            else gemm_rows(TILE - 1, p, panel, i, j);
            i += count;
        }
        for (int i = first; rows < TILE && i < end; i++) gemm_rows(1, p, panel, i, j); /* fewer rows than a tile */
    }
}

/* One thread's part of a window. R = sequences x slots rows stand sequence after sequence. */
struct work {
    int thread, threads;
    long rows, slots;          /* of the whole window: R, and slots of a sequence */
    long first, end;           /* rows of this thread */
    long first_head, end_head; /* heads of this thread, counted over all sequences */
};

/* One function for each shape, so that inner and columns are constants in it. c is WIDTH: gemm_c_3c maps
   rows of C entries to rows of 3 C. noinline keeps one copy of each, which rounds alike wherever it is
   called. */
#define GEMM(name, inner, columns)                                                                                               \
    static __attribute__((noinline)) void name(elem *out, const elem *x, const packed_elem *packed, const float *bias,           \
                                               struct work work) {                                                               \
        gemm((struct gemm){out, x, packed, bias, inner, columns}, work.first, work.end);                                         \
    }
GEMM(gemm_c_c, WIDTH, WIDTH)
GEMM(gemm_c_3c, WIDTH, 3 * WIDTH)
GEMM(gemm_c_4c, WIDTH, 4 * WIDTH)
GEMM(gemm_3c_c, 3 * WIDTH, WIDTH)
GEMM(gemm_4c_c, 4 * WIDTH, WIDTH)

/* ---- Packing ---- */

/* Pack a panel for the forward pass, where out = x W^T: matrix (out, in) is torch's nn.Linear weight,
   and the panel (in, PANEL) holds its rows column .. column + PANEL as columns.

   LANES x LANES packed_elems at a time are rounded to elems, row by row, and transposed in registers:
   reading down columns would touch a cache line per element. */
static void pack_transposed(const float *matrix, packed_elem *panel, int out, int in, int column) {
    for (int k = 0; k < in; k += LANES * PER_PACKED) {
        for (int c = 0; c < PANEL; c += LANES) {
            vi32 tile[LANES];
            for (int j = 0; j < LANES; j++) {
                /* Zeros stay where the matrix ends: rows beyond `out`, and the end of an odd inner
                   dimension. */
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

/* Pack a panel for the backward pass, where dx = dout W: the panel (out, PANEL) holds columns column ..
   column + PANEL of matrix (out, in), in the order that they have. */
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
