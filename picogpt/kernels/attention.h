/* Causal attention, a head at a time, all of it in the processor's cache. */

#define NEG_INF (-INFINITY)

/* Which of the scores from column j on belong to row i: those of slots up to its own. Entries are masked rather than overwritten one
   by one: a vector that is read right after parts of it were written waits for them. */
static inline vi32 causal_mask(int i, int j) {
    vi32 lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    return lane <= i - j;
}

static inline vf32 mask_and(vi32 mask, vf32 x) { return (vf32)((vi32)x & mask); }

/* The largest of row i's scores. */
static inline float causal_row_max(const float *scores, int i) {
    vf32 found = {0};
    int j = 0;
    for (found += NEG_INF; j + LANES <= i + 1; j += LANES) {
        vf32 next = load_float(scores + j);
        found = select_lanes(next < found, found, next);
    }
    if (j <= i) {
        vf32 next = load_float(scores + j);
        found = select_lanes(causal_mask(i, j) & ~(next < found), next, found);
    }
    return reduce_max(found);
}

/* One head of one roll, in one window. In a row of qkv, (slots, 3C), are q of all heads, then k, then v. */
struct head {
    elem *qkv;      /* its q in the first row; the backward pass writes the gradient over it */
    elem *out;      /* its output in the first row of (slots, C): written by the forward pass */
    float *row_max; /* (slots) of each row of scores: written by the forward pass */
    float *inv_sum; /* (slots) 1 / the sum of the exponentials of score - row_max; likewise */
    int slots;
};

/* A row's softmax is inv_sum x e^(scale x score - row_max). */
struct softmax_row {
    float scale, row_max, inv_sum;
};

#if defined(MATRIX_TILES) && HEAD % 32 == 0
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif

/* Head n, counted over all rolls, of qkv (R, 3C), out (R, C) and the softmax's statistics (2, rolls, H, slots). */
static struct head head_of(elem *qkv, elem *out, float *stats, const struct work *work, long n) {
    const long row = n / HEADS * work->slots * WIDTH, column = n % HEADS * HEAD;
    float *row_max = stats + n * work->slots, *inv_sum = row_max + work->rows * HEADS;
    return (struct head){qkv + 3 * row + column, out + row + column, row_max, inv_sum, work->slots};
}

/* A thread's heads, forward: qkv is read, the other two are written. */
static void attention(elem *qkv, elem *out, float *stats, struct work work) {
    for (long n = work.first_head; n < work.end_head; n++) attend(&tls_buffers, head_of(qkv, out, stats, &work, n));
}

/* Backward: d_out (R, C) is the gradient of `out`; that of qkv is written over it, and that of its bias is added to `bias_grad`, a
   row for each roll. */
static void attention_backward(const elem *d_out, const struct activations *a, float *bias_grad, struct work work) {
    for (long n = work.first_head; n < work.end_head; n++) {
        struct head head = head_of(a->qkv, a->att_out, a->softmax_stats, &work, n);
        attend_backward(&tls_buffers, head, d_out + (head.out - a->att_out),
                        bias_grad + n / HEADS * 3 * WIDTH + n % HEADS * HEAD);
    }
}
