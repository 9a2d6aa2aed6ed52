/* Matrices in panels, and their products with one row of numbers or with many.

   A packed matrix (out, in) stands in panels of PANEL outputs, and in a panel input after input, as it is read. A line of a panel
   is 64 bytes, as a cache's: PANEL floats of one input, pairs of bfloat16 of two, or four bytes of four. So one packed copy serves
   one row, which reads it from memory in its order, and many rows, for which a panel is widened to float32 first.

   In int8 a weight is a byte, 128 more than it stands for, and the row that it multiplies has seven bits and a sign: the two
   products that AVX2 adds up in 16 bits then always fit, and every processor comes to the same sums. */

#define PANEL 16
#define LINE_VECTORS (PANEL / LANES)
#define GROUP 64 /* inputs of an int8 product that have one scale in the row */
#define PREFETCH_LINES 32
#define PREFETCH_ROWS 16 /* of a panel in float32, which may not fit in the first cache */

enum number_type { FLOAT32, BFLOAT16_PAIRS, INT8_FOURS };

/* Inputs of an output that share 32 bits. */
static inline int inputs_per_word(enum number_type type) { return type == INT8_FOURS ? 4 : type == BFLOAT16_PAIRS ? 2 : 1; }

/* Outputs and inputs are multiples of PANEL; what goes beyond the model's own is zero. A panel has `lines` lines. */
struct matrix {
    const void *packed;
    const float *scales; /* (n_out), in int8 */
    const float *bias;   /* (n_out) */
    int32_t type, n_out, n_in, lines;
};

/* A row in int8: units of four, the scale of each group, and 128 times the group's sum. */
struct quantized {
    int32_t *words;
    float *scales;
    int32_t *offsets;
};

/* What becomes of a product: it is written, added to what is there, or its GELU is written. */
enum epilogue { STORE, ADD, GELU };

typedef uint32_t vu32 __attribute__((vector_size(4 * LANES), may_alias));

typedef uint16_t vu16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Numbers in bfloat16, the upper halves of float32. */
static inline vf32 load_bfloat16(const uint16_t *from) {
#if LANES == 16 /* one instruction, of which the compiler makes several */
    return (vf32)((vi32)_mm512_cvtepu16_epi32((__m256i)(*(const vu16 *)from)) << 16);
#elif LANES == 8
    return (vf32)((vi32)_mm256_cvtepu16_epi32((__m128i)(*(const vu16 *)from)) << 16);
#else
    return (vf32)(__builtin_convertvector(*(const vu16 *)from, vi32) << 16);
#endif
}

/* Rounds to nearest, ties to even. */
static inline uint32_t round_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline vf32 load_line(const void *line, int v) { return ((const vf32 *)line)[v]; }
static inline vu32 load_words(const void *line, int v) { return ((const vu32 *)line)[v]; }

/* x times the chance that a normal variable is less than x. The chance of less than -|x| is e^(-x^2 / 2) t P(t), t = 1 / (1 +
   0.3 |x|), with a polynomial fitted to 1.5e-7 of the chance itself for |x| up to 13. */
static inline vf32 gelu(vf32 x) {
    const int32_t sign = INT32_MIN;
    vf32 size = (vf32)((vi32)x & ~sign), t = 1.0f / (size * 0.3f + 1.0f);
    vf32 p = t * 0.0356748769f - 0.157203499f;
    p = p * t + 0.206354196f;
    p = p * t - 0.0536842455f;
    p = p * t + 0.128561924f;
    p = p * t + 0.0999134088f;
    p = p * t + 0.120753968f;
    p = p * t + 0.119629298f;
    vf32 below = p * t * vexp2(x * x * -0.72134752f);
    below = select_lanes(size > 12.0f, (vf32){0},
                         below); /* else a product with it may be denormal, which takes a hundred times as long */
    return x * select_lanes(x < 0.0f, below, 1.0f - below);
}

static inline void store_result(float *out, vf32 sum, enum epilogue epilogue) {
    if (epilogue == GELU) sum = gelu(sum);
    if (epilogue == ADD) sum += load_float(out);
    store_float(out, sum);
}

/* ---- One row ---- */

/* Sums of a panel are kept eight times, or what of them depends on the one before would wait for it. */
#define UNROLL (8 / LINE_VECTORS)

static inline void add_chains(vf32 sums[UNROLL][LINE_VECTORS]) {
    for (int width = UNROLL / 2; width; width /= 2) {
        for (int u = 0; u < width; u++) {
            for (int v = 0; v < LINE_VECTORS; v++) sums[u][v] += sums[u + width][v];
        }
    }
}

static inline void add_line_float32(vf32 sums[LINE_VECTORS], const char *line, const float *x) {
    for (int v = 0; v < LINE_VECTORS; v++) sums[v] += load_line(line, v) * x[0];
}

static inline void add_line_bfloat16(vf32 sums[2][LINE_VECTORS], const char *line, const float *x) {
    for (int v = 0; v < LINE_VECTORS; v++) {
        vu32 pair = load_words(line, v);
        sums[0][v] += (vf32)(pair << 16) * x[0];
        sums[1][v] += (vf32)(pair & 0xffff0000u) * x[1];
    }
}

static inline void gemv_panel_float32(const char *panel, int lines, const float *x, vf32 out[LINE_VECTORS]) {
    vf32 sums[UNROLL][LINE_VECTORS] = {0};
    for (int k = 0; k < lines; k += UNROLL) {
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; u++) {
            __builtin_prefetch(panel + 64L * (k + u + PREFETCH_LINES));
            add_line_float32(sums[u], panel + 64L * (k + u), x + k + u);
        }
    }
    add_chains(sums);
    for (int v = 0; v < LINE_VECTORS; v++) out[v] = sums[0][v];
}

static inline void gemv_panel_bfloat16(const char *panel, int lines, const float *x, vf32 out[LINE_VECTORS]) {
    vf32 sums[UNROLL][LINE_VECTORS] = {0};
    for (int k = 0; k < lines; k += UNROLL / 2) {
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL / 2; u++) {
            __builtin_prefetch(panel + 64L * (k + u + PREFETCH_LINES));
            add_line_bfloat16(sums + 2 * u, panel + 64L * (k + u), x + 2 * (k + u));
        }
    }
    add_chains(sums);
    for (int v = 0; v < LINE_VECTORS; v++) out[v] = sums[0][v];
}

/* sums + four bytes of w x four signed bytes of x, lane by lane. */
static inline vi32 dot_int8(vi32 sums, vu32 w, int32_t x) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (vi32)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#elif LANES == 16 && defined(__AVX512BW__)
    __m512i twos = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x));
    return sums + (vi32)_mm512_madd_epi16(twos, _mm512_set1_epi16(1));
#elif LANES == 8 && defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (vi32)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)w, _mm256_set1_epi32(x));
#elif LANES == 8
    __m256i twos = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    return sums + (vi32)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; byte++) sums += (vi32)(w >> 8 * byte & 255u) * (int32_t)(int8_t)(x >> 8 * byte);
    return sums;
#endif
}

static inline void gemv_panel_int8(const char *panel, int lines, struct quantized x, vf32 out[LINE_VECTORS]) {
    enum { CHAINS = UNROLL / 2 > 0 ? UNROLL / 2 : 1 };
    for (int v = 0; v < LINE_VECTORS; v++) out[v] = (vf32){0};
    for (int group = 0; group * (GROUP / 4) < lines; group++) {
        vi32 sums[CHAINS][LINE_VECTORS] = {0};
        for (int v = 0; v < LINE_VECTORS; v++) sums[0][v] -= x.offsets[group];
        const int first = group * (GROUP / 4);
        for (int k = first; k < first + GROUP / 4; k += CHAINS) {
#pragma GCC unroll 4
            for (int u = 0; u < CHAINS; u++) {
                const char *line = panel + 64L * (k + u);
                __builtin_prefetch(line + 64L * PREFETCH_LINES);
                for (int v = 0; v < LINE_VECTORS; v++) sums[u][v] = dot_int8(sums[u][v], load_words(line, v), x.words[k + u]);
            }
        }
        for (int v = 0; v < LINE_VECTORS; v++) {
            for (int u = 1; u < CHAINS; u++) sums[0][v] += sums[u][v];
            out[v] += __builtin_convertvector(sums[0][v], vf32) * x.scales[group];
        }
    }
}

/* x (in), in groups that are each scaled to at most 63. */
static void quantize(const float *x, int in, struct quantized out) {
    for (int group = 0; group * GROUP < in; group++) {
        const int first = group * GROUP, end = first + GROUP < in ? first + GROUP : in;
        vf32 largest = {0};
        for (int i = first; i < end; i += LANES) {
            vf32 size = (vf32)((vi32)load_float(x + i) & INT32_MAX);
            largest = select_lanes(size > largest, size, largest);
        }
        const float largest_abs = reduce_max(largest), by = largest_abs > 0 ? 63 / largest_abs : 0;
        int8_t *bytes = (int8_t *)(out.words + first / 4);
        vi32 sum = {0};
        memset(bytes, 0, GROUP);
        for (int i = first; i < end; i += LANES) {
            vf32 scaled = load_float(x + i) * by;
            vi32 whole =
                __builtin_convertvector(scaled + select_lanes(scaled < 0.0f, (vf32){0} - 0.5f, (vf32){0} + 0.5f), vi32);
            sum += whole;
            for (int lane = 0; lane < LANES; lane++) bytes[i - first + lane] = (int8_t)whole[lane];
        }
        int32_t total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        out.scales[group] = largest_abs / 63;
        out.offsets[group] = 128 * total;
    }
}

/* Panels from `first` to `end` of out = matrix x row + bias; `fours` is the row in int8, where the matrix is. */
static void gemv(const struct matrix *matrix, const float *x, struct quantized int8_row, float *out, enum epilogue epilogue,
                 int first, int end) {
    for (int p = first; p < end; p++) {
        const char *panel = (const char *)matrix->packed + 64L * p * matrix->lines;
        vf32 sums[LINE_VECTORS];
        if (matrix->type == INT8_FOURS) gemv_panel_int8(panel, matrix->lines, int8_row, sums);
        else if (matrix->type == BFLOAT16_PAIRS) gemv_panel_bfloat16(panel, matrix->lines, x, sums);
        else gemv_panel_float32(panel, matrix->lines, x, sums);
        for (int v = 0; v < LINE_VECTORS; v++) {
            const int at = p * PANEL + v * LANES;
            if (matrix->type == INT8_FOURS) sums[v] *= load_float(matrix->scales + at);
            store_result(out + at, sums[v] + load_float(matrix->bias + at), epilogue);
        }
    }
}

/* ---- Many rows ---- */

#define TILE_PANELS (LANES == 16 ? 2 : 1)
#define TILE_VECTORS (TILE_PANELS * LINE_VECTORS)
#define TILE_ROWS (REGISTERS / TILE_VECTORS)

/* Rows of numbers, `stride` apart, and where the rows of their product go. */
struct rows {
    const float *x;
    float *out;
    long x_stride, out_stride;
    int count;
};

/* A panel (in, PANEL) in float32. */
static void widen_panel(const struct matrix *matrix, int p, float *out) {
    const char *panel = (const char *)matrix->packed + 64L * p * matrix->lines;
    const int is_int8 = matrix->type == INT8_FOURS;
    const int per_word = inputs_per_word(matrix->type);
    vf32 scales[LINE_VECTORS];
    for (int v = 0; is_int8 && v < LINE_VECTORS; v++) scales[v] = load_float(matrix->scales + p * PANEL + v * LANES);
    for (int k = 0; k < matrix->n_in / per_word; k++) {
        for (int v = 0; v < LINE_VECTORS; v++) {
            vu32 line = load_words(panel + 64L * k, v);
            float *to = out + (long)k * per_word * PANEL + v * LANES;
            if (!is_int8) {
                store_float(to, (vf32)(line << 16));
                store_float(to + PANEL, (vf32)(line & 0xffff0000u));
            }
            for (int byte = 0; is_int8 && byte < 4; byte++) {
                vi32 weight = (vi32)(line >> 8 * byte & 255u) - 128;
                store_float(to + byte * PANEL, __builtin_convertvector(weight, vf32) * scales[v]);
            }
        }
    }
}

/* Rows and the panels that they are multiplied with at once. */
struct tile {
    const struct matrix *matrix;
    struct rows rows;
    const float *panels[TILE_PANELS];
    int column;
    enum epilogue epilogue;
};

/* `count` rows from `row` on x `panels` panels; called with constants, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void micro_kernel(int count, int panels, const struct tile *tile, int row) {
    const int vectors = panels * LINE_VECTORS, n_in = tile->matrix->n_in;
    const long stride = tile->rows.x_stride;
    const float *x = tile->rows.x + row * stride, *bias = tile->matrix->bias + tile->column;
    vf32 sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = load_float(bias + v * LANES);
    }
    for (int k = 0; k < n_in; k++) {
        vf32 line[TILE_VECTORS];
        for (int p = 0; p < panels; p++) __builtin_prefetch(tile->panels[p] + (long)(k + PREFETCH_ROWS) * PANEL);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            line[v] = load_line(tile->panels[v / LINE_VECTORS] + (long)k * PANEL, v % LINE_VECTORS);
#pragma GCC unroll 16
        for (int r = 0; r < count; r++) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += line[v] * x[r * stride + k];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
        float *out = tile->rows.out + (row + r) * tile->rows.out_stride + tile->column;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store_result(out + v * LANES, sums[r][v], tile->epilogue == ADD ? ADD : STORE);
    }
}

static void gelu_rows(const struct rows *rows, int row, int count, int column, int width) {
    for (int r = row; r < row + count; r++) {
        float *out = rows->out + r * rows->out_stride + column;
        for (int c = 0; c < width; c += LANES) store_float(out + c, gelu(load_float(out + c)));
    }
}

static __attribute__((noinline)) void micro_kernel_of_height(int count, int panels, const struct tile *tile, int row) {
#define ROWS_CASE(n)                                                                                                           \
    case n:                                                                                                                    \
        if (n > TILE_ROWS) break;                                                                                              \
        if (panels == TILE_PANELS) micro_kernel(n > TILE_ROWS ? 1 : n, TILE_PANELS, tile, row);                                \
        else micro_kernel(n > TILE_ROWS ? 1 : n, 1, tile, row);                                                                \
        break;
    switch (count) {
        ROWS_CASE(1)
        ROWS_CASE(2)
        ROWS_CASE(3)
        ROWS_CASE(4)
        ROWS_CASE(5)
        ROWS_CASE(6)
        ROWS_CASE(7)
        ROWS_CASE(8)
        ROWS_CASE(9)
        ROWS_CASE(10)
        ROWS_CASE(11)
        ROWS_CASE(12)
    }
    if (tile->epilogue == GELU) gelu_rows(&tile->rows, row, count, tile->column, panels * PANEL);
}

/* Part `part` of `parts` of the next panels comes to the cache while those before them are multiplied with. */
static void prefetch_part(const struct matrix *matrix, int p, int part, int parts) {
    const char *panels = (const char *)matrix->packed + 64L * p * matrix->lines;
    const long lines = (long)TILE_PANELS * matrix->lines;
    prefetch_lines(panels, first_of(lines, part, parts), first_of(lines, part + 1, parts));
}

/* Panels from `first` to `end` of out = rows x matrix + bias; `scratch` (TILE_PANELS, in, PANEL) is the thread's own. */
static void gemm(const struct matrix *matrix, struct rows rows, enum epilogue epilogue, int first, int end, float *scratch) {
    struct tile tile = {.matrix = matrix, .rows = rows, .epilogue = epilogue};
    const int tiles = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
    for (int p = first, panels; p < end; p += panels) {
        panels = p + TILE_PANELS <= end ? TILE_PANELS : 1;
        tile.column = p * PANEL;
        for (int i = 0; i < panels; i++) {
            float *wide = scratch + (long)i * matrix->n_in * PANEL;
            if (matrix->type != FLOAT32) widen_panel(matrix, p + i, wide);
            else wide = (float *)matrix->packed + (long)(p + i) * matrix->n_in * PANEL;
            tile.panels[i] = wide;
        }
        /* Tiles of as equal a height as can be: a low one takes nearly as long as a high one. */
        for (int t = 0; t < tiles; t++) {
            const int row = (int)first_of(rows.count, t, tiles), next = (int)first_of(rows.count, t + 1, tiles);
            if (p + panels < end) prefetch_part(matrix, p + panels, t, tiles);
            micro_kernel_of_height(next - row, panels, &tile, row);
        }
    }
}

/* ---- Packing ---- */

/* The 32 bits of a line that hold the inputs from k on of one output, x (in); `type` is a constant where this is called. In int8
   they are multiplied by `by` first. */
static inline __attribute__((always_inline)) uint32_t pack_word(enum number_type type, const float *x, int k, int in,
                                                                float by) {
    const int per_word = inputs_per_word(type);
    uint32_t word = 0, bits;
    for (int i = 0; i < per_word; i++) {
        const float value = k + i < in ? x[k + i] : 0;
        if (type == INT8_FOURS) bits = (uint32_t)(128 + (int)lrintf(value * by)) << 8 * i;
        else if (type == BFLOAT16_PAIRS) bits = round_bfloat16(value) << 16 * i;
        else memcpy(&bits, &value, 4);
        word |= bits;
    }
    return word;
}

static inline __attribute__((always_inline)) void pack_output(enum number_type type, uint32_t *line, int lines, const float *x,
                                                              int in, float by) {
    const int per_word = inputs_per_word(type);
    for (int k = 0; k < lines; k++) line[k * PANEL] = pack_word(type, x, k * per_word, in, by);
}

/* Output `o` of a matrix, x (in) of finite floats, into its panel; in int8 also its scale. */
static void pack_row(const struct matrix *to, int o, const float *x, int in) {
    uint32_t *line = (uint32_t *)to->packed + (long)(o / PANEL) * to->lines * PANEL + o % PANEL;
    if (to->type == FLOAT32) pack_output(FLOAT32, line, to->lines, x, in, 1);
    else if (to->type == BFLOAT16_PAIRS) pack_output(BFLOAT16_PAIRS, line, to->lines, x, in, 1);
    else {
        float largest_abs = 0;
        for (int k = 0; k < in; k++) largest_abs = fabsf(x[k]) > largest_abs ? fabsf(x[k]) : largest_abs;
        ((float *)to->scales)[o] = largest_abs / 127;
        pack_output(INT8_FOURS, line, to->lines, x, in, largest_abs > 0 ? 127 / largest_abs : 0);
    }
}
