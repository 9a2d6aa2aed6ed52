/* What a block of the model does between its matrix products, forward and backward, in as few passes over memory as it takes.

   `picogpt.kernels.compiled` has this compiled for one shape of model, and describes every function. The shape is in macros:
   WIDTH is n_embd, HEAD the entries of a head, SLOTS those of a window; BFLOAT16 is defined where the products are in bfloat16.

   What enters and leaves a product is a `number`; residual paths, weights, biases and all sums are float. A bias is added where
   the product before it is read, as one pass more would cost as much as the reading. Gradients of weights and biases are added to
   `sums`, where each of `threads` shares of the rows has a row of its own: the sums do not depend on who computes them. */

#include <math.h>
#include <stdint.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && HEAD % 16 == 0
#define LANES 16
#define REGISTERS 16 /* that a tile's sums may take, of 32 */
#elif defined(__AVX2__) && HEAD % 8 == 0
#define LANES 8
#define REGISTERS 12 /* of 16 */
#else
#define LANES 4
#define REGISTERS 8
#endif
#define UP(n, unit) (((n) + (unit) - 1) / (unit) * (unit))
#define VECTORS (HEAD / LANES) /* that hold the entries of one slot in a head */
#define ROWS (REGISTERS / VECTORS > 1 ? REGISTERS / VECTORS : 1)
/* A tile of scores: so many rows, and vectors of columns. */
#define TILE_COLUMNS (LANES == 16 ? 3 : 2)
#define TILE_ROWS (REGISTERS / TILE_COLUMNS)
#define COLUMNS UP(SLOTS, TILE_COLUMNS * LANES)
#define PADDED UP(SLOTS, TILE_ROWS)
#define EPSILON 1e-5f
#define NEVER (-INFINITY)

typedef float vector __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

static inline vector choose(integers where, vector yes, vector no) {
    return (vector)(((integers)yes & where) | ((integers)no & ~where));
}

#ifdef BFLOAT16
typedef uint16_t number;
typedef uint16_t numbers __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline vector load(const number *from) {
    return (vector)(__builtin_convertvector(*(const numbers *)from, integers) << 16);
}

/* Rounds to nearest, ties to even; what is not a number stays so. */
static inline void store(number *to, vector x) {
#if LANES == 16 && defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    *(numbers *)to = (numbers)rounded;
#else
    integers bits = (integers)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    rounded = ((x == x) & rounded) | (~(x == x) & 0x7fc0);
    *(numbers *)to = __builtin_convertvector(rounded, numbers);
#endif
}
#else
typedef float number;
#define load load_float
#define store store_float
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vector load_float(const float *from) { return *(const floats *)from; }

static inline void store_float(float *to, vector x) { *(floats *)to = x; }

static inline void accumulate(float *to, vector x) { store_float(to, load_float(to) + x); }

static inline float plus(float a, float b) { return a + b; }

/* The larger one; what is not a number comes through. */
static inline float larger(float a, float b) { return b < a ? a : b; }

/* Half of the lanes with the other half, again and again. */
static inline __attribute__((always_inline)) float folded(vector x, float (*combined)(float, float)) {
    float lanes[LANES];
    store_float(lanes, x);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] = combined(lanes[i], lanes[i + width]);
    }
    return lanes[0];
}

static inline float sum_of(vector x) { return folded(x, plus); }

/* e^x for x <= 0, to 2e-7 of itself; 1e-38 from -87 on. */
static inline vector exponential(vector x) {
    vector t = x * 1.44269504f;
    t = choose(t < -126.0f, (vector){0} - 126.0f, t);
    integers whole = __builtin_convertvector(t - 0.5f, integers);
    vector f = t - __builtin_convertvector(whole, vector);
    vector p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (vector)((whole + 127) << 23);
}

/* ---- LayerNorm and the residual paths ---- */

static inline void add_row(const float *x, const number *branch, const float *bias, float *out) {
    for (int c = 0; c < WIDTH; c += LANES) store_float(out + c, load_float(x + c) + load(branch + c) + load_float(bias + c));
}

void add(const float *x, const number *branch, const float *bias, float *out, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < rows; i++) {
        long at = (long)i * WIDTH;
        add_row(x + at, branch + at, bias, out + at);
    }
}

static inline void normalize(const float *x, const float *weight, const float *bias, number *out, float *mean, float *scale) {
    vector sum = {0}, squares = {0};
    for (int c = 0; c < WIDTH; c += LANES) sum += load_float(x + c);
    *mean = sum_of(sum) / WIDTH;
    for (int c = 0; c < WIDTH; c += LANES) {
        vector distance = load_float(x + c) - *mean;
        squares += distance * distance;
    }
    *scale = 1 / sqrtf(sum_of(squares) / WIDTH + EPSILON);
    for (int c = 0; c < WIDTH; c += LANES) {
        store(out + c, (load_float(x + c) - *mean) * *scale * load_float(weight + c) + load_float(bias + c));
    }
}

void layer_norm(const float *x, const float *weight, const float *bias, number *out, float *statistics, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < rows; i++) {
        normalize(x + (long)i * WIDTH, weight, bias, out + (long)i * WIDTH, statistics + i, statistics + rows + i);
    }
}

void add_layer_norm(const float *x, const number *branch, const float *branch_bias, const float *weight, const float *bias,
                    float *sum, number *out, float *statistics, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < rows; i++) {
        long at = (long)i * WIDTH;
        add_row(x + at, branch + at, branch_bias, sum + at);
        normalize(sum + at, weight, bias, out + at, statistics + i, statistics + rows + i);
    }
}

void layer_norm_backward(const number *gradient, const float *x, const float *weight, const float *bias, const float *statistics,
                         number *out, float *dx, number *branch, float *sums, int rows, int threads) {
    const float *means = statistics, *scales = statistics + rows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        vector d_weight[WIDTH / LANES] = {0}, d_bias[WIDTH / LANES] = {0}, d_branch[WIDTH / LANES] = {0};
        for (int i = (long)rows * t / threads; i < (long)rows * (t + 1) / threads; i++) {
            long at = (long)i * WIDTH;
            vector normal[WIDTH / LANES], d_normal[WIDTH / LANES], sum = {0}, products = {0};
            for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
                vector d = load(gradient + at + c), w = load_float(weight + c);
                normal[v] = (load_float(x + at + c) - means[i]) * scales[i];
                d_normal[v] = d * w;
                sum += d_normal[v];
                products += d_normal[v] * normal[v];
                d_weight[v] += d * normal[v];
                d_bias[v] += d;
                if (out) store(out + at + c, normal[v] * w + load_float(bias + c));
            }
            float mean = sum_of(sum) / WIDTH, mean_product = sum_of(products) / WIDTH;
            for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
                vector d = load_float(dx + at + c) + (d_normal[v] - mean - normal[v] * mean_product) * scales[i];
                store_float(dx + at + c, d);
                if (branch) store(branch + at + c, d);
                d_branch[v] += d;
            }
        }
        for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
            accumulate(sums + (3L * t + 0) * WIDTH + c, d_weight[v]);
            accumulate(sums + (3L * t + 1) * WIDTH + c, d_bias[v]);
            accumulate(sums + (3L * t + 2) * WIDTH + c, d_branch[v]);
        }
    }
}

void add_backward(const float *gradient, number *branch, float *sums, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        vector d_branch[WIDTH / LANES] = {0};
        for (int i = (long)rows * t / threads; i < (long)rows * (t + 1) / threads; i++) {
            for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) {
                vector d = load_float(gradient + (long)i * WIDTH + c);
                store(branch + (long)i * WIDTH + c, d);
                d_branch[v] += d;
            }
        }
        for (int v = 0, c = 0; c < WIDTH; v++, c += LANES) accumulate(sums + (long)t * WIDTH + c, d_branch[v]);
    }
}

/* ---- GELU: x times the chance that a normal variable is less than x ---- */

/* That chance, and the density at x: Abramowitz and Stegun, 7.1.26, to 1e-7. */
static inline vector chance_below(vector x, vector *density) {
    vector size = choose(x < 0.0f, -x, x), e = exponential(x * x * -0.5f), t = 1.0f / (size * 0.23164189f + 1.0f);
    vector p = t * 0.5307027145f - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    p = p * t * e;
    *density = e * 0.39894228f;
    return choose(x < 0.0f, p, 1.0f - p);
}

void gelu(const number *x, const float *bias, number *out, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < rows; i++) {
        for (int c = 0; c < 4 * WIDTH; c += LANES) {
            long at = (long)i * 4 * WIDTH + c;
            vector density, y = load(x + at) + load_float(bias + c);
            store(out + at, y * chance_below(y, &density));
        }
    }
}

void gelu_backward(const number *gradient, number *x, const float *bias, number *out, float *sums, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        vector d_bias[4 * WIDTH / LANES] = {0};
        for (int i = (long)rows * t / threads; i < (long)rows * (t + 1) / threads; i++) {
            for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) {
                long at = (long)i * 4 * WIDTH + c;
                vector density, y = load(x + at) + load_float(bias + c), chance = chance_below(y, &density);
                vector d = load(gradient + at) * (chance + y * density);
                if (out) store(out + at, y * chance);
                store(x + at, d);
                d_bias[v] += d;
            }
        }
        for (int v = 0, c = 0; c < 4 * WIDTH; v++, c += LANES) accumulate(sums + 4L * t * WIDTH + c, d_bias[v]);
    }
}

/* ---- Causal attention, a head at a time, all of it in the processor's cache ---- */

struct head {
    vector q[PADDED][VECTORS], k[PADDED][VECTORS], v[PADDED][VECTORS], gradient[PADDED][VECTORS];
    vector columns[HEAD][COLUMNS / LANES];   /* keys or values, transposed */
    float weights[PADDED][COLUMNS] __attribute__((aligned(64))), scores[PADDED][COLUMNS] __attribute__((aligned(64)));
};

static _Thread_local struct head own;

/* Rows beyond the last slot are zero, as tiles reach beyond it. */
static void read_rows(vector to[PADDED][VECTORS], const number *from, long stride, const float *bias, float scale, int slots) {
    for (int v = 0; v < VECTORS; v++) {
        vector added = bias ? load_float(bias + v * LANES) : (vector){0};
        for (int i = 0; i < slots; i++) to[i][v] = (load(from + i * stride + v * LANES) + added) * scale;
        for (int i = slots; i < PADDED; i++) to[i][v] = (vector){0};
    }
}

static void transpose(vector to[HEAD][COLUMNS / LANES], vector from[PADDED][VECTORS], int slots) {
    float *out = (float *)to;
    const float *in = (const float *)from;
    for (int d = 0; d < HEAD; d++) {
#pragma GCC unroll 8
        for (int i = 0; i < slots; i++) out[d * COLUMNS + i] = in[i * HEAD + d];
        for (int i = slots; i < COLUMNS; i++) out[d * COLUMNS + i] = 0;
    }
}

/* scores = rows x columns, tile by tile, as far as some row of the tile may look. */
static void multiply_causal(float scores[PADDED][COLUMNS], vector rows[PADDED][VECTORS], vector columns[HEAD][COLUMNS / LANES],
                            int slots) {
    const float *entries = (const float *)rows;
    for (int i = 0; i < slots; i += TILE_ROWS) {
        for (int j = 0; j < i + TILE_ROWS && j < slots; j += TILE_COLUMNS * LANES) {
            vector sums[TILE_ROWS][TILE_COLUMNS] = {0};
            for (int d = 0; d < HEAD; d++) {
                for (int r = 0; r < TILE_ROWS; r++) {
                    for (int c = 0; c < TILE_COLUMNS; c++) {
                        sums[r][c] += entries[(i + r) * HEAD + d] * columns[d][j / LANES + c];
                    }
                }
            }
            for (int r = 0; r < TILE_ROWS; r++) {
                for (int c = 0; c < TILE_COLUMNS; c++) *(vector *)&scores[i + r][j + c * LANES] = sums[r][c];
            }
        }
    }
}

/* out[r] = shares[r] x sum over k of factors[r * row_step + k * step] x rows[k], for `count` rows r, and added to `total`; it
   is called with a constant there, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void combine(int count, number *out, long stride, vector total[VECTORS],
                                                          const float *shares, const float *factors, int row_step, int step,
                                                          vector rows[PADDED][VECTORS], int first, int end) {
    vector sums[ROWS][VECTORS] = {0};
    for (int k = first; k < end; k++) {
        for (int r = 0; r < count; r++) {
            for (int v = 0; v < VECTORS; v++) sums[r][v] += factors[r * row_step + k * step] * rows[k][v];
        }
    }
    for (int r = 0; r < count; r++) {
        for (int v = 0; v < VECTORS; v++) {
            if (shares) sums[r][v] *= shares[r];
            store(out + r * stride + v * LANES, sums[r][v]);
            total[v] += sums[r][v];
        }
    }
}

/* Each row i of `factors` times those `rows` that it sees, up to its own; the sum of all that in `sums`, if there is one. */
static inline void combine_seen(number *out, long stride, float *sums, const float *shares, float factors[PADDED][COLUMNS],
                                vector rows[PADDED][VECTORS], int slots) {
    vector total[VECTORS] = {0};
    int i = 0;
    for (; i + ROWS <= slots; i += ROWS) {
        combine(ROWS, out + i * stride, stride, total, shares ? shares + i : 0, factors[i], COLUMNS, 1, rows, 0, i + ROWS);
    }
    for (; i < slots; i++) {
        combine(1, out + i * stride, stride, total, shares ? shares + i : 0, factors[i], COLUMNS, 1, rows, 0, i + 1);
    }
    for (int v = 0; sums && v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* Each column j of `factors` times those `rows` that see it, from its own on; the sum of all that in `sums`. */
static void combine_seeing(number *out, long stride, float *sums, float factors[PADDED][COLUMNS], vector rows[PADDED][VECTORS],
                           int slots) {
    vector total[VECTORS] = {0};
    int j = 0;
    for (; j + ROWS <= slots; j += ROWS) {
        combine(ROWS, out + j * stride, stride, total, 0, &factors[0][j], 1, COLUMNS, rows, j, slots);
    }
    for (; j < slots; j++) combine(1, out + j * stride, stride, total, 0, &factors[0][j], 1, COLUMNS, rows, j, slots);
    for (int v = 0; v < VECTORS; v++) accumulate(sums + v * LANES, total[v]);
}

/* Columns that a row has to have for the tiles of `combine`, beyond those that it sees. */
static inline int end_of(int row) {
    int end = UP(row + ROWS, LANES);
    return end < COLUMNS ? end : COLUMNS;
}

/* Which of the entries from j on row i sees. Entries are masked rather than overwritten one by one: a vector that is read
   right after parts of it were written waits for them. */
static inline integers seen(int i, int j) {
    integers lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    return lane <= i - j;
}

static inline vector only(integers where, vector x) { return (vector)((integers)x & where); }

static inline float largest(const float *x, int i) {
    vector found = {0};
    int j = 0;
    for (found += NEVER; j + LANES <= i + 1; j += LANES) {
        vector next = load_float(x + j);
        found = choose(next < found, found, next);
    }
    if (j <= i) {
        vector next = load_float(x + j);
        found = choose(seen(i, j) & ~(next < found), next, found);
    }
    return folded(found, larger);
}

/* Scores of row i to share x e^(score - top), and to zero beyond what it sees; returns their sum. */
static inline float weigh(float *scores, int i, float top, float share) {
    vector sum = {0};
    for (int j = 0; j < end_of(i); j += LANES) {
        vector weights = exponential(load_float(scores + j) - top) * share;
        if (j + LANES > i + 1) weights = only(seen(i, j), weights);
        store_float(scores + j, weights);
        sum += weights;
    }
    return sum_of(sum);
}

static void attend(struct head *head, const number *qkv, const float *bias, number *out, float *tops, float *shares, int slots) {
    const long row = 3 * WIDTH;
    read_rows(head->q, qkv, row, bias, 1 / sqrtf(HEAD), slots);
    read_rows(head->k, qkv + WIDTH, row, bias + WIDTH, 1, slots);
    read_rows(head->v, qkv + 2 * WIDTH, row, bias + 2 * WIDTH, 1, slots);
    transpose(head->columns, head->k, slots);
    multiply_causal(head->scores, head->q, head->columns, slots);
    for (int i = 0; i < slots; i++) {
        tops[i] = largest(head->scores[i], i);
        shares[i] = 1 / weigh(head->scores[i], i, tops[i], 1);
    }
    combine_seen(out, WIDTH, 0, shares, head->scores, head->v, slots);
}

void attention(const number *qkv, const float *bias, number *out, float *statistics, int rolls, int heads, int slots, int threads) {
    float *tops = statistics, *shares = statistics + (long)rolls * heads * slots;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < rolls * heads; n++) {
        long first = (long)(n / heads) * slots * WIDTH, column = n % heads * HEAD;
        attend(&own, qkv + 3 * first + column, bias + column, out + first + column, tops + n * slots, shares + n * slots, slots);
    }
}

static void attend_backward(struct head *head, const number *gradient, number *qkv, const float *bias, const number *out,
                            const float *tops, const float *shares, float *sums, int slots) {
    const long row = 3 * WIDTH;
    const float scale = 1 / sqrtf(HEAD);
    read_rows(head->q, qkv, row, bias, scale, slots);
    read_rows(head->k, qkv + WIDTH, row, bias + WIDTH, 1, slots);
    read_rows(head->v, qkv + 2 * WIDTH, row, bias + 2 * WIDTH, 1, slots);
    read_rows(head->gradient, gradient, WIDTH, 0, 1, slots);
    transpose(head->columns, head->k, slots);
    multiply_causal(head->weights, head->q, head->columns, slots);
    transpose(head->columns, head->v, slots);
    multiply_causal(head->scores, head->gradient, head->columns, slots);
    for (int i = 0; i < slots; i++) {
        float *weights = head->weights[i], *scores = head->scores[i];
        vector products = {0};
        for (int v = 0; v < VECTORS; v++) products += load(out + (long)i * WIDTH + v * LANES) * head->gradient[i][v];
        float mean = sum_of(products);
        weigh(weights, i, tops[i], shares[i]);
        for (int j = 0; j < end_of(i); j += LANES) {
            vector difference = load_float(scores + j) - mean;
            if (j + LANES > i + 1) difference = only(seen(i, j), difference);
            store_float(scores + j, load_float(weights + j) * difference);
        }
    }
    for (int i = 0; i < slots; i++) {
        for (int v = 0; v < VECTORS; v++) head->k[i][v] *= scale;
    }
    combine_seen(qkv, row, sums, 0, head->scores, head->k, slots);
    combine_seeing(qkv + WIDTH, row, sums + WIDTH, head->scores, head->q, slots);
    combine_seeing(qkv + 2 * WIDTH, row, sums + 2 * WIDTH, head->weights, head->gradient, slots);
}

void attention_backward(const number *gradient, number *qkv, const float *bias, const number *out, const float *statistics,
                        float *sums, int rolls, int heads, int slots, int threads) {
    const float *tops = statistics, *shares = statistics + (long)rolls * heads * slots;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < rolls * heads; n++) {
        long first = (long)(n / heads) * slots * WIDTH, column = n % heads * HEAD;
        attend_backward(&own, gradient + first + column, qkv + 3 * first + column, bias + column, out + first + column,
                        tops + n * slots, shares + n * slots, sums + (long)(n / heads) * 3 * WIDTH + column, slots);
    }
}
