/* Packed matrices of generation, and their products: GEMV for one row of activations (decode), GEMM for
   many (prefill and scoring), in float32, bfloat16 or int8 weights. Activations and sums are float32,
   but for int8 GEMV, whose activations are quantized too.

   Layout: a matrix W (out, in) is cut into panels of PANEL outputs, and a panel is stored input after
   input, as it is read. A line of a panel is 64 bytes, a cache line: PANEL floats of one input, PANEL
   pairs of bfloat16 of two inputs, or PANEL groups of four bytes of four inputs. GEMV is bound by memory
   and reads the packed lines from beginning to end. GEMM is bound by computation: it widens a panel to
   float32 once, for all rows. So one packed copy serves both.

   Int8 is symmetric quantization by the largest magnitude, with one scale for each
   output, and one for each GROUP inputs of the activations. A weight is stored as a byte, 128 more than
   its value, as the instructions multiply unsigned by signed bytes. Activations use seven bits, -63 to
   63: then the sum of two products that AVX2 makes in 16 bits never saturates, and all processors
   compute the same sums. */

#define PANEL 16                     /* outputs */
#define LINE_VECTORS (PANEL / LANES) /* vectors in a line of floats */
#define GROUP 64                     /* inputs that share a scale in a quantized row */
#define PREFETCH_LINES 32            /* lines of a panel from a load to its prefetch */
#define PREFETCH_ROWS 16             /* rows of a float32 panel, which may not fit in the L1 cache */

enum number_type { FLOAT32, BFLOAT16_PAIRS, INT8_FOURS };

/* Inputs of one output that share a 32-bit word. */
static inline int inputs_per_word(enum number_type type) { return type == INT8_FOURS ? 4 : type == BFLOAT16_PAIRS ? 2 : 1; }

/* A packed matrix. Outputs and inputs are padded to multiples of PANEL with zeros; a panel has `lines`
   lines. */
struct matrix {
    const void *packed;  /* (n_out / PANEL, lines, 64 bytes) */
    const float *scales; /* (n_out) int8: the value of one step */
    const float *bias;   /* (n_out) */
    int32_t type, n_out, n_in, lines;
};

/* A row of activations in int8, by groups of GROUP inputs. */
struct quantized {
    int32_t *words;   /* (in / 4) four signed bytes each */
    float *scales;    /* (groups) the value of one step */
    int32_t *offsets; /* (groups) 128 x the sum of the group: what the offset of the weights adds */
};

/* Epilogue of a product: out = y, out += y, or out = gelu(y). */
enum epilogue { STORE, ADD, GELU };

/* LANES 32-bit words, and LANES 16-bit halves at any even address. */
typedef uint32_t vu32 __attribute__((vector_size(4 * LANES), may_alias));

typedef uint16_t vu16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* LANES bfloat16 as floats: they are the upper halves of float32. */
static inline vf32 load_bfloat16(const uint16_t *from) {
#if LANES == 16 /* one instruction, of which the compiler makes several */
    return (vf32)((vi32)_mm512_cvtepu16_epi32((__m256i)(*(const vu16 *)from)) << 16);
#elif LANES == 8
    return (vf32)((vi32)_mm256_cvtepu16_epi32((__m128i)(*(const vu16 *)from)) << 16);
#else
    return (vf32)(__builtin_convertvector(*(const vu16 *)from, vi32) << 16);
#endif
}

/* Round a float to bfloat16: to nearest, ties to even. NaN is not handled: packed weights are finite. */
static inline uint32_t round_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Vector v of a line: of floats, or of packed words. */
static inline vf32 load_line(const void *line, int v) { return ((const vf32 *)line)[v]; }
static inline vu32 load_words(const void *line, int v) { return ((const vu32 *)line)[v]; }

/* gelu(x) = x P(x), with the CDF P of the normal distribution, exact rather than the tanh form. P(-|x|)
   = e^(-x^2 / 2) t q(t), t = 1 / (1 + 0.3 |x|), with a polynomial q that was fitted to a relative error
   of 1.5e-7 for |x| up to 13. The relative error of the tail matters, as it is multiplied with x. */
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
    /* Else a product with it may be denormal, which takes many times as long. */
    below = select_lanes(size > 12.0f, (vf32){0}, below);
    return x * select_lanes(x < 0.0f, below, 1.0f - below);
}

/* Write LANES results with their epilogue. */
static inline void store_result(float *out, vf32 sum, enum epilogue epilogue) {
    if (epilogue == GELU) sum = gelu(sum);
    if (epilogue == ADD) sum += load_float(out);
    store_float(out, sum);
}

/* ---- GEMV: one row of activations ---- */

/* Accumulators per output: several independent chains, as one chain would wait for the latency of each
   multiply-add. */
#define UNROLL (8 / LINE_VECTORS)

/* Add the chains up pairwise, in a fixed order: the result is in sums[0]. */
static inline void add_chains(vf32 sums[UNROLL][LINE_VECTORS]) {
    for (int width = UNROLL / 2; width; width /= 2) {
        for (int u = 0; u < width; u++) {
            for (int v = 0; v < LINE_VECTORS; v++) sums[u][v] += sums[u + width][v];
        }
    }
}

/* sums (PANEL) += line (PANEL) x[0]: one input's weights. */
static inline void add_line_float32(vf32 sums[LINE_VECTORS], const char *line, const float *x) {
    for (int v = 0; v < LINE_VECTORS; v++) sums[v] += load_line(line, v) * x[0];
}

/* Two chains: inputs 0 of the pairs in the lower halves, inputs 1 in the upper ones. */
static inline void add_line_bfloat16(vf32 sums[2][LINE_VECTORS], const char *line, const float *x) {
    for (int v = 0; v < LINE_VECTORS; v++) {
        vu32 pair = load_words(line, v);
        sums[0][v] += (vf32)(pair << 16) * x[0];
        sums[1][v] += (vf32)(pair & 0xffff0000u) * x[1];
    }
}

/* out (PANEL) = panel (PANEL, in) x (in), in float32: UNROLL lines in flight. */
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

/* The same for bfloat16: a line feeds two chains, so half as many lines are in flight. */
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

/* sums + dot product of four bytes w (unsigned) and four bytes x (signed), lane by lane, exact in 32
   bits. AVX-512 VNNI has it in one instruction; AVX2 adds pairs in 16 bits first, then widens. */
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

/* The same for int8: integer sums for each group, then times the group's scale in float32. Sums begin at
   -offset, as a weight is stored with 128 added: sum (w + 128) x - 128 sum x = sum w x. */
static inline void gemv_panel_int8(const char *panel, int lines, struct quantized x, vf32 out[LINE_VECTORS]) {
    enum { CHAINS = UNROLL / 2 > 0 ? UNROLL / 2 : 1 };
    for (int v = 0; v < LINE_VECTORS; v++) out[v] = (vf32){0};
    for (int group = 0; group * (GROUP / 4) < lines; group++) {
        vi32 sums[CHAINS][LINE_VECTORS] = {0}; /* integer sums are exact in any order */
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

/* Quantize a row of activations x (in): each group is scaled so that its largest magnitude becomes 63,
   and rounded to nearest, ties away from zero. */
static void quantize(const float *x, int in, struct quantized out) {
    for (int group = 0; group * GROUP < in; group++) {
        const int first = group * GROUP, end = first + GROUP < in ? first + GROUP : in;
        vf32 largest = {0};
        for (int i = first; i < end; i += LANES) {
            vf32 size = (vf32)((vi32)load_float(x + i) & INT32_MAX); /* |x| */
            largest = select_lanes(size > largest, size, largest);
        }
        const float largest_abs = reduce_max(largest), by = largest_abs > 0 ? 63 / largest_abs : 0;
        int8_t *bytes = (int8_t *)(out.words + first / 4);
        vi32 sum = {0};
        memset(bytes, 0, GROUP); /* the last group may be short */
        for (int i = first; i < end; i += LANES) {
            vf32 scaled = load_float(x + i) * by;
            /* Conversion truncates, so half is added to the magnitude before it. */
            vi32 whole = __builtin_convertvector(scaled + select_lanes(scaled < 0.0f, (vf32){0} - 0.5f, (vf32){0} + 0.5f), vi32);
            sum += whole;
            for (int lane = 0; lane < LANES; lane++) bytes[i - first + lane] = (int8_t)whole[lane];
        }
        int32_t total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        out.scales[group] = largest_abs / 63;
        out.offsets[group] = 128 * total;
    }
}

/* GEMV: panels [first, end) of out = W x + bias with an epilogue. x (in) is the row in float32; int8_row
   is the same quantized, where the matrix is int8. */
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
            /* The outputs' scales come last: they are constants of the sum. */
            if (matrix->type == INT8_FOURS) sums[v] *= load_float(matrix->scales + at);
            store_result(out + at, sums[v] + load_float(matrix->bias + at), epilogue);
        }
    }
}

/* ---- GEMM: many rows of activations ---- */

/* A register tile: TILE_ROWS rows times one or two panels. With AVX-512 a panel is one vector wide, and two
   panels share each broadcast of x; with AVX2 one panel is two vectors already. */
#define TILE_PANELS (LANES == 16 ? 2 : 1)
#define TILE_VECTORS (TILE_PANELS * LINE_VECTORS)
#define TILE_ROWS (REGISTERS / TILE_VECTORS)

/* Rows of activations x, `x_stride` floats apart, and where the rows of the result go. */
struct rows {
    const float *x;
    float *out;
    long x_stride, out_stride;
    int count;
};

/* Widen panel p of a bfloat16 or int8 matrix to float32 (in, PANEL), with the scales of int8 multiplied
   in. */
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
            /* A pair of bfloat16: lower half, then upper half. */
            if (!is_int8) {
                store_float(to, (vf32)(line << 16));
                store_float(to + PANEL, (vf32)(line & 0xffff0000u));
            }
            /* Four bytes, each 128 more than its value. */
            for (int byte = 0; is_int8 && byte < 4; byte++) {
                vi32 weight = (vi32)(line >> 8 * byte & 255u) - 128;
                store_float(to + byte * PANEL, __builtin_convertvector(weight, vf32) * scales[v]);
            }
        }
    }
}

/* Operands of the micro-kernel. */
struct tile {
    const struct matrix *matrix;
    struct rows rows;
    const float *panels[TILE_PANELS]; /* (in, PANEL) each, float32 */
    int column;                       /* of the result, where the first panel begins */
    enum epilogue epilogue;
};

/* Micro-kernel: out (count, panels PANEL) = rows x panels + bias, `count` rows from `row` on. count and
   panels must be constants where this is inlined: then all loops over the tile unroll, and the sums stay
   in registers. Sums run over inputs in order, so a row's result does not depend on the tile that it is
   in. */
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
        /* One prefetch per panel and input: a row of a float32 panel is a cache line. */
        for (int p = 0; p < panels; p++) __builtin_prefetch(tile->panels[p] + (long)(k + PREFETCH_ROWS) * PANEL);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) line[v] = load_line(tile->panels[v / LINE_VECTORS] + (long)k * PANEL, v % LINE_VECTORS);
#pragma GCC unroll 16
        /* gelu is left to `gelu_rows`: here it would take the registers of the sums. */
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

/* gelu in place on a tile (count, width) of the result, which is still in the L1 cache. */
static void gelu_rows(const struct rows *rows, int row, int count, int column, int width) {
    for (int r = row; r < row + count; r++) {
        float *out = rows->out + r * rows->out_stride + column;
        for (int c = 0; c < width; c += LANES) store_float(out + c, gelu(load_float(out + c)));
    }
}

/* Call the micro-kernel with constants: one copy of it for each height of a tile. */
static __attribute__((noinline)) void micro_kernel_of_height(int count, int panels, const struct tile *tile, int row) {
#define ROWS_CASE(n)                                                                                                             \
    case n:                                                                                                                      \
        if (n > TILE_ROWS) break;                                                                                                \
        if (panels == TILE_PANELS) micro_kernel(n > TILE_ROWS ? 1 : n, TILE_PANELS, tile, row);                                  \
        else micro_kernel(n > TILE_ROWS ? 1 : n, 1, tile, row);                                                                  \
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

/* Prefetch part `part` of `parts` of the next panels while these are multiplied. GEMM reads packed
   panels in a burst when it widens them, and this spreads the fetches over the computation. */
static void prefetch_part(const struct matrix *matrix, int p, int part, int parts) {
    const char *panels = (const char *)matrix->packed + 64L * p * matrix->lines;
    const long lines = (long)TILE_PANELS * matrix->lines;
    prefetch_lines(panels, first_of(lines, part, parts), first_of(lines, part + 1, parts));
}

/* GEMM: panels [first, end) of out = rows W^T + bias with an epilogue. scratch (TILE_PANELS, in, PANEL)
   is this thread's buffer of widened panels. Panels are the outer loop: each is widened once and stays
   in the cache for all rows. */
static void gemm(const struct matrix *matrix, struct rows rows, enum epilogue epilogue, int first, int end, float *scratch) {
    struct tile tile = {.matrix = matrix, .rows = rows, .epilogue = epilogue};
    const int tiles = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
    for (int p = first, panels; p < end; p += panels) {
        panels = p + TILE_PANELS <= end ? TILE_PANELS : 1;
        tile.column = p * PANEL;
        for (int i = 0; i < panels; i++) {
            float *wide = scratch + (long)i * matrix->n_in * PANEL;
            if (matrix->type != FLOAT32) widen_panel(matrix, p + i, wide);
            else wide = (float *)matrix->packed + (long)(p + i) * matrix->n_in * PANEL; /* float32 needs no widening */
            tile.panels[i] = wide;
        }
        /* Tiles are as equal in height as they can be: a low one takes nearly as long as a high one. */
        for (int t = 0; t < tiles; t++) {
            const int row = (int)first_of(rows.count, t, tiles), next = (int)first_of(rows.count, t + 1, tiles);
            if (p + panels < end) prefetch_part(matrix, p + panels, t, tiles);
            micro_kernel_of_height(next - row, panels, &tile, row);
        }
    }
}

/* ---- Packing ---- */

/* The word of a line that holds inputs k, k + 1, ... of one output x (in), with zeros beyond the last;
   for int8 the inputs are multiplied by `by` first. `type` must be a constant where this is inlined. */
static inline __attribute__((always_inline)) uint32_t pack_word(enum number_type type, const float *x, int k, int in, float by) {
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

/* All words of one output: they are PANEL words apart, one in each line. */
static inline __attribute__((always_inline)) void pack_output(enum number_type type, uint32_t *line, int lines, const float *x,
                                                              int in, float by) {
    const int per_word = inputs_per_word(type);
    for (int k = 0; k < lines; k++) line[k * PANEL] = pack_word(type, x, k * per_word, in, by);
}

/* Pack output `o`, x (in) of finite floats, into its panel. For int8 the scale makes its largest
   magnitude 127. */
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
