/* Causal attention, a head at a time, all of it in the processor's cache. */

#define NEVER (-INFINITY)

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
    return largest_of(found);
}

#if defined(MATRIX_TILES) && HEAD % 32 == 0
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif

/* A share of the heads, of all rolls one after the other: what they read of qkv (R, 3C), in `out` (R, C), and of their
   scores 2 R H statistics: the largest of each slot, and then 1 over the sum of their exponentials, each less that largest. */
static void attention(const number *qkv, number *out, float *statistics, struct share share) {
    const long slots = share.slots;
    float *tops = statistics, *shares = statistics + share.rows * HEADS;
    for (long n = share.first_head; n < share.end_head; n++) {
        long first = n / HEADS * slots * WIDTH, column = n % HEADS * HEAD;
        attend(&own, qkv + 3 * first + column, out + first + column, tops + n * slots, shares + n * slots, slots);
    }
}

/* The gradient of qkv is written over it; that of its bias is added to `sums`, a row for each roll. */
static void attention_backward(const number *gradient, number *qkv, const number *out, const float *statistics, float *sums,
                               struct share share) {
    const long slots = share.slots;
    const float *tops = statistics, *shares = statistics + share.rows * HEADS;
    for (long n = share.first_head; n < share.end_head; n++) {
        long first = n / HEADS * slots * WIDTH, column = n % HEADS * HEAD;
        attend_backward(&own, gradient + first + column, qkv + 3 * first + column, out + first + column, tops + n * slots,
                        shares + n * slots, sums + n / HEADS * 3 * WIDTH + column, slots);
    }
}
