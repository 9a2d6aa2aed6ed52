/* Vectors of LANES floats, and the numbers that enter and leave products of matrices.

   The shape of the model is in macros: WIDTH is n_embd, HEAD the entries of a head, SLOTS those of a window; BFLOAT16 is
   defined where the products are in bfloat16. A `number` is what a product takes; residual paths, weights, biases and all sums
   are float. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && HEAD % 16 == 0
#define LANES 16
#define REGISTERS 24 /* that the sums of a tile may take, of 32 */
#elif defined(__AVX2__) && HEAD % 8 == 0
#define LANES 8
#define REGISTERS 12 /* of 16 */
#else
#define LANES 4
#define REGISTERS 12
#endif
#define UP(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

#define HEADS (WIDTH / HEAD)

typedef float vf32 __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t vi32 __attribute__((vector_size(4 * LANES), may_alias));

static inline vf32 select_lanes(vi32 where, vf32 yes, vf32 no) { return (vf32)(((vi32)yes & where) | ((vi32)no & ~where)); }

#ifdef BFLOAT16
typedef uint16_t elem;
typedef uint16_t elems __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline vi32 widen(const elem *from) {
#if LANES == 16 /* one instruction, of which the compiler makes five */
    return (vi32)_mm512_cvtepu16_epi32((__m256i)(*(const elems *)from));
#elif LANES == 8
    return (vi32)_mm256_cvtepu16_epi32((__m128i)(*(const elems *)from));
#else
    return __builtin_convertvector(*(const elems *)from, vi32);
#endif
}

static inline vf32 load(const elem *from) { return (vf32)(widen(from) << 16); }

/* Rounds to nearest, ties to even; what is not a number stays so. */
static inline void store(elem *to, vf32 x) {
#if LANES == 16 && defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    *(elems *)to = (elems)rounded;
#else
    vi32 bits = (vi32)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    rounded = ((x == x) & rounded) | (~(x == x) & 0x7fc0);
    *(elems *)to = __builtin_convertvector(rounded, elems);
#endif
}
#else
typedef float elem;
#define load load_float
#define store store_float
#endif

typedef float vf32u __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vf32 load_float(const float *from) { return *(const vf32u *)from; }

static inline void store_float(float *to, vf32 x) { *(vf32u *)to = x; }

/* To where it is not read again soon: past the cache, which need not fetch a line that is written as a whole. Rows begin where
   lines do; `finish_streams` comes before another thread reads them. */
#if defined(__AVX__) && LANES > 4 && WIDTH % 32 == 0
static inline void stream_float(float *to, vf32 x) {
#if LANES == 16
    _mm512_stream_ps(to, (__m512)x);
#else
    _mm256_stream_ps(to, (__m256)x);
#endif
}

static inline void stream(elem *to, vf32 x) {
#ifdef BFLOAT16
    elems rounded;
    store((elem *)&rounded, x);
#if LANES == 16
    _mm256_stream_si256((__m256i *)to, (__m256i)rounded);
#else
    _mm_stream_si128((__m128i *)to, (__m128i)rounded);
#endif
#else
    stream_float(to, x);
#endif
}

static inline void finish_streams(void) { _mm_sfence(); }
#else
#define stream_float store_float
#define stream store
static inline void finish_streams(void) {}
#endif

static inline void accumulate(float *to, vf32 x) { store_float(to, load_float(to) + x); }

#if LANES == 16
static inline float reduce_sum(vf32 x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float reduce_max(vf32 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
static inline float add_floats(float a, float b) { return a + b; }

static inline float max_float(float a, float b) { return b < a ? a : b; }

/* Half of the lanes with the other half, again and again. */
static inline __attribute__((always_inline)) float reduce_lanes(vf32 x, float (*combined)(float, float)) {
    float lanes[LANES];
    store_float(lanes, x);
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] = combined(lanes[i], lanes[i + width]);
    }
    return lanes[0];
}

static inline float reduce_sum(vf32 x) { return reduce_lanes(x, add_floats); }
static inline float reduce_max(vf32 x) { return reduce_lanes(x, max_float); }
#endif

/* 1 / x for x >= 1; in bfloat16 to 6e-5 of itself, in longest vectors. */
static inline vf32 vreciprocal(vf32 x) {
#if defined(BFLOAT16) && LANES == 16
    return (vf32)_mm512_rcp14_ps((__m512)x);
#else
    return 1.0f / x;
#endif
}

/* 2^f for f from -0.5 to 0.5, to 3e-6 of itself in bfloat16, and to 2e-7 in float. */
static inline vf32 exp2_fraction(vf32 f) {
#ifdef BFLOAT16
    vf32 p = f * 9.5701019e-3f + 5.5917862e-2f;
    p = p * f + 2.4024745e-1f;
    p = p * f + 6.9312182e-1f;
    return p * f + 9.9999926e-1f;
#else
    vf32 p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    return p * f + 1.0f;
#endif
}

/* 2^x for x <= 0; 1e-38 from -126 on. */
static inline vf32 vexp2(vf32 x) {
#if LANES == 16
    x = (vf32)_mm512_max_ps(_mm512_set1_ps(-126), (__m512)x); /* in this order what is not a number comes through */
    __m512 whole = _mm512_roundscale_ps((__m512)x, 0);
    return (vf32)_mm512_scalef_ps((__m512)exp2_fraction(x - (vf32)whole), whole);
#else
    x = select_lanes(x < -126.0f, (vf32){0} - 126.0f, x);
    vi32 whole = __builtin_convertvector(x - 0.5f, vi32);
    return exp2_fraction(x - __builtin_convertvector(whole, vf32)) * (vf32)((whole + 127) << 23);
#endif
}

static inline vf32 vexp(vf32 x) { return vexp2(x * 1.44269504f); }

/* A vector of entries of a and b by constant indices, those of b counted from the length of a on. `type` is a vector of integers. */
#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

/* Lanes whose number has bit d are exchanged with those of the other vector that have not: first `offset` 0, then d. */
#define EXCHANGED(k, d, offset) (((k) & (d) ? LANES + (k) - (d) : (k)) + (offset))
#define EXCHANGED_4(k, d, o) EXCHANGED(k, d, o), EXCHANGED(k + 1, d, o), EXCHANGED(k + 2, d, o), EXCHANGED(k + 3, d, o)
#if LANES == 16
#define EXCHANGED_ALL(d, o) EXCHANGED_4(0, d, o), EXCHANGED_4(4, d, o), EXCHANGED_4(8, d, o), EXCHANGED_4(12, d, o)
#elif LANES == 8
#define EXCHANGED_ALL(d, o) EXCHANGED_4(0, d, o), EXCHANGED_4(4, d, o)
#else
#define EXCHANGED_ALL(d, o) EXCHANGED_4(0, d, o)
#endif
#define EXCHANGE(x, d)                                                                                                         \
    for (int i = 0; i < LANES; i++) {                                                                                          \
        if (i & (d)) continue;                                                                                                 \
        vi32 a = (x)[i], b = (x)[i + (d)];                                                                                     \
        (x)[i] = SHUFFLE(vi32, a, b, EXCHANGED_ALL(d, 0));                                                                     \
        (x)[i + (d)] = SHUFFLE(vi32, a, b, EXCHANGED_ALL(d, d));                                                               \
    }

/* lanes[i] of vector j becomes lanes[j] of vector i. */
static inline __attribute__((always_inline)) void transpose_lanes(vi32 x[LANES]) {
#pragma GCC unroll 16
    EXCHANGE(x, 1)
#pragma GCC unroll 16
    EXCHANGE(x, 2)
#if LANES > 4
#pragma GCC unroll 16
    EXCHANGE(x, 4)
#endif
#if LANES > 8
#pragma GCC unroll 16
    EXCHANGE(x, 8)
#endif
}

/* Of `count` pieces the first one of a thread. */
static inline long first_of(long count, long thread, long threads) { return count * thread / threads; }

/* Ask for the 64-byte cache lines of `memory` from `first` to `end`. */
static inline void prefetch_lines(const void *memory, long first, long end) {
    for (long line = first; line < end; line++) __builtin_prefetch((const char *)memory + 64 * line);
}

/* The part of a window that one thread works on. */
struct work {
    int thread, threads;
    long rows, slots;          /* of the whole window: rolls x slots rows */
    long first, end;           /* its rows */
    long first_head, end_head; /* its heads, counted over all rolls */
};
