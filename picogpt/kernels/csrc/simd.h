/* SIMD for all kernels: a vector type as wide as the processor has it, loads and stores of float32 and
   bfloat16, and the few functions (exp, reductions, transposes) that the model needs.

   The compiler's command line gives the model's shape as macros: WIDTH is n_embd, HEAD the entries of a
   head, SLOTS the positions of a window, and BFLOAT16 is defined where GEMMs take bfloat16. decode.c,
   whose shapes come at run time, sets WIDTH and HEAD only to choose the vectors.

   `elem` is the type of a GEMM's inputs and outputs: float, or bfloat16 in a uint16_t. Residual path,
   weights of norms, biases and all sums are float in either case. Vectors are GCC's vector extensions,
   so + and * work on them; intrinsics stand only where the compiler makes worse code. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && HEAD % 16 == 0
#define LANES 16     /* AVX-512: 16 floats of 32 bits */
#define REGISTERS 24 /* accumulators of a register tile, of 32 registers: the others hold its operands */
#elif defined(__AVX2__) && HEAD % 8 == 0
#define LANES 8      /* AVX2: 8 floats */
#define REGISTERS 12 /* of 16 */
#else
#define LANES 4 /* SSE or NEON, and where HEAD is no multiple of a longer vector */
#define REGISTERS 12
#endif
/* n rounded up to a multiple of unit. */
#define UP(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

#define HEADS (WIDTH / HEAD)

/* LANES floats and LANES 32-bit integers. may_alias, as buffers of other types are read through these
   types. */
typedef float vf32 __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t vi32 __attribute__((vector_size(4 * LANES), may_alias));

/* Lane by lane: where ? yes : no. A comparison of vectors gives such a mask, whose lanes are all ones or
   all zeros. */
static inline vf32 select_lanes(vi32 where, vf32 yes, vf32 no) { return (vf32)(((vi32)yes & where) | ((vi32)no & ~where)); }

#ifdef BFLOAT16
typedef uint16_t elem;
/* LANES elems; aligned(2), as rows may begin anywhere. */
typedef uint16_t elems __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* LANES 16-bit elems, zero-extended to 32 bits. */
static inline vi32 widen(const elem *from) {
#if LANES == 16 /* one instruction, of which the compiler makes five */
    return (vi32)_mm512_cvtepu16_epi32((__m256i)(*(const elems *)from));
#elif LANES == 8
    return (vi32)_mm256_cvtepu16_epi32((__m128i)(*(const elems *)from));
#else
    return __builtin_convertvector(*(const elems *)from, vi32);
#endif
}

/* LANES elems as floats: bfloat16 is the upper half of a float32, so a shift converts it. */
static inline vf32 load(const elem *from) { return (vf32)(widen(from) << 16); }

/* Round LANES floats to bfloat16: to nearest, ties to even. NaN stays NaN. */
static inline void store(elem *to, vf32 x) {
#if LANES == 16 && defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    *(elems *)to = (elems)rounded;
#else
    /* adds just under half an ulp, and the bit that makes ties even */
    vi32 bits = (vi32)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    /* x == x is false for NaN, which the addition may have made infinite */
    rounded = ((x == x) & rounded) | (~(x == x) & 0x7fc0);
    *(elems *)to = __builtin_convertvector(rounded, elems);
#endif
}
#else
typedef float elem;
#define load load_float
#define store store_float
#endif

/* LANES floats at any address: loads and stores through it are unaligned instructions. */
typedef float vf32u __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vf32 load_float(const float *from) { return *(const vf32u *)from; }

static inline void store_float(float *to, vf32 x) { *(vf32u *)to = x; }

/* Non-temporal stores: data that is not read again soon goes past the cache straight to memory. A line
   that is written as a whole need not be fetched first. The address must be aligned to the vector: rows
   begin at cache lines because WIDTH is a multiple of 32.

   Such stores are weakly ordered: `finish_streams` (a store fence) must come before another thread reads
   the data. */
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

/* to[0..LANES) += x */
static inline void accumulate(float *to, vf32 x) { store_float(to, load_float(to) + x); }

#if LANES == 16
/* Sum, or maximum, over the lanes of a vector. */
static inline float reduce_sum(vf32 x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float reduce_max(vf32 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
static inline float add_floats(float a, float b) { return a + b; }

static inline float max_float(float a, float b) { return b < a ? a : b; }

/* Reduce by halving: the upper half of the lanes is combined with the lower one until one lane is left. */
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

/* 1 / x for x >= 1. In bfloat16 with AVX-512 it is the processor's approximation, to a relative error of
   6e-5: its result is rounded to 8 bits anyway, and it takes less time than a division. */
static inline vf32 vreciprocal(vf32 x) {
#if defined(BFLOAT16) && LANES == 16
    return (vf32)_mm512_rcp14_ps((__m512)x);
#else
    return 1.0f / x;
#endif
}

/* 2^f for f in [-0.5, 0.5], a polynomial in Horner's form. The relative error is 3e-6 in bfloat16
   (degree 4) and 2e-7 in float32 (degree 6): as exact as the results can hold. */
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

/* 2^x for x <= 0, as 2^round(x) 2^f with |f| <= 1/2; x below -126 counts as -126, where the result is
   about 1e-38, the smallest normal float, so that no denormal arises. */
static inline vf32 vexp2(vf32 x) {
#if LANES == 16
    x = (vf32)_mm512_max_ps(_mm512_set1_ps(-126), (__m512)x); /* the order of the operands lets NaN through */
    __m512 whole = _mm512_roundscale_ps((__m512)x, 0);
    return (vf32)_mm512_scalef_ps((__m512)exp2_fraction(x - (vf32)whole), whole); /* p * 2^whole in one instruction */
#else
    x = select_lanes(x < -126.0f, (vf32){0} - 126.0f, x);
    vi32 whole = __builtin_convertvector(x - 0.5f, vi32); /* truncation, of a number <= 0: rounds to nearest */
    /* 2^whole, written into a float's exponent bits */
    return exp2_fraction(x - __builtin_convertvector(whole, vf32)) * (vf32)((whole + 127) << 23);
#endif
}

/* e^x for x <= 0, with 1.44269504 = log2(e). */
static inline vf32 vexp(vf32 x) { return vexp2(x * 1.44269504f); }

/* A vector of entries of a and b by constant indices; those of b count from the length of a on. `type`
   is an integer vector. */
#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

/* One step of a transpose in registers, for vectors a and b whose indices differ in bit d: lanes of a
   with bit d set are exchanged with the lanes of b without it. EXCHANGED is the shuffle index of result
   lane k: offset 0 makes the new a, offset d the new b. */
#define EXCHANGED(k, d, offset) (((k) & (d) ? LANES + (k) - (d) : (k)) + (offset))
#define EXCHANGED_4(k, d, o) EXCHANGED(k, d, o), EXCHANGED(k + 1, d, o), EXCHANGED(k + 2, d, o), EXCHANGED(k + 3, d, o)
#if LANES == 16
#define EXCHANGED_ALL(d, o) EXCHANGED_4(0, d, o), EXCHANGED_4(4, d, o), EXCHANGED_4(8, d, o), EXCHANGED_4(12, d, o)
#elif LANES == 8
#define EXCHANGED_ALL(d, o) EXCHANGED_4(0, d, o), EXCHANGED_4(4, d, o)
#else
#define EXCHANGED_ALL(d, o) EXCHANGED_4(0, d, o)
#endif
/* That step for all LANES / 2 pairs of vectors. */
#define EXCHANGE(x, d)                                                                                                           \
    for (int i = 0; i < LANES; i++) {                                                                                            \
        if (i & (d)) continue;                                                                                                   \
        vi32 a = (x)[i], b = (x)[i + (d)];                                                                                       \
        (x)[i] = SHUFFLE(vi32, a, b, EXCHANGED_ALL(d, 0));                                                                       \
        (x)[i + (d)] = SHUFFLE(vi32, a, b, EXCHANGED_ALL(d, d));                                                                 \
    }

/* Transpose LANES x LANES 32-bit values in registers: lane i of vector j becomes lane j of vector i.
   log2(LANES) rounds of pairwise exchanges (Eklundh, 1972), so nothing goes through memory. The loops
   must be unrolled, as an array of vectors stays in registers only if its indices are constants. */
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

/* The first piece of a thread, when `count` pieces are dealt out evenly: thread t has [first_of(t),
   first_of(t + 1)). */
static inline long first_of(long count, long thread, long threads) { return count * thread / threads; }

/* Prefetch the 64-byte cache lines [first, end) of `memory`. It is a hint: addresses that do not exist
   do no harm. */
static inline void prefetch_lines(const void *memory, long first, long end) {
    for (long line = first; line < end; line++) __builtin_prefetch((const char *)memory + 64 * line);
}
