/* Causal attention of a window, forward and backward, head by head: with q, k, v (slots, D) of one head,
   D = HEAD,

      scores = q k^T / sqrt(D),   weights = softmax(scores, causal),   out = weights v

   A head's matrices fit in the cache of the core that computes it: one pass makes scores, softmax and
   output without writing weights to memory, and the backward pass recomputes the weights from the saved
   row max and denominator, as in FlashAttention (Dao et al., 2022).

   Reads qkv (R, 3C) and writes out (R, C) and the softmax statistics; the backward pass writes the
   gradient of qkv, which may be over qkv. Heads are independent, so threads divide them without waiting.
   attention_tiles.h has the computation on AMX, attention_vectors.h the one on vectors; both have the
   same functions. */

/* The score of a masked position: its exponential is 0. */
#define NEG_INF (-INFINITY)

/* The causal mask of LANES scores from column j on, in row i: ones where column <= i. Scores are masked
   in registers: to overwrite them in memory entry by entry, and load the vector right after, would stall
   on store forwarding. */
static inline vi32 causal_mask(int i, int j) {
    vi32 lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    return lane <= i - j;
}

/* x where the mask is set, else 0. */
static inline vf32 mask_and(vi32 mask, vf32 x) { return (vf32)((vi32)x & mask); }

/* Row max over columns 0..i: whole vectors first, then the masked rest. */
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

/* One head of one sequence in one window. A row of qkv (slots, 3C) holds q of all heads, then k, then v,
   as torch's c_attn gives them. */
struct head {
    const elem *qkv; /* its q in the first row */
    elem *d_qkv;     /* the place of that q's gradient; written by the backward pass, may be qkv */
    elem *out;       /* its output in the first row of (slots, C); written by the forward pass */
    float *row_max;  /* (slots) row max of the scores; written by the forward pass */
    float *inv_sum;  /* (slots) 1 / softmax denominator; written by the forward pass */
    int slots;
};

#if defined(MATRIX_TILES) && HEAD % 32 == 0
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif

/* Head n, counted over all sequences, of qkv and d_qkv (R, 3C), out (R, C) and stats (2, sequences, H,
   slots): row max, then 1 / denominator. */
static struct head head_of(const elem *qkv, elem *d_qkv, elem *out, float *stats, const struct work *work, long n) {
    /* first row of its sequence, first entry of its head */
    const long row = n / HEADS * work->slots * WIDTH, column = n % HEADS * HEAD;
    float *row_max = stats + n * work->slots, *inv_sum = row_max + work->rows * HEADS;
    const long at = 3 * row + column;
    return (struct head){qkv + at, d_qkv ? d_qkv + at : 0, out + row + column, row_max, inv_sum, work->slots};
}

/* Forward, for this thread's heads: reads qkv, writes out and stats. */
static void attention(const elem *qkv, elem *out, float *stats, struct work work) {
    for (long n = work.first_head; n < work.end_head; n++) attend(&tls_buffers, head_of(qkv, 0, out, stats, &work, n));
}

/* Backward, for this thread's heads: d_out (R, C) is the gradient of `out`. The gradient of qkv goes to
   d_qkv, which may be a->qkv. The gradient of its bias, the sum over rows, is added to `bias_grad`
   (sequences, 3C): a row for each sequence, as heads of one sequence may belong to several threads but
   have columns of their own. */
static void attention_backward(const elem *d_out, const struct activations *a, elem *d_qkv, float *bias_grad, struct work work) {
    for (long n = work.first_head; n < work.end_head; n++) {
        struct head head = head_of(a->qkv, d_qkv, a->att_out, a->softmax_stats, &work, n);
        attend_backward(&tls_buffers, head, d_out + (head.out - a->att_out),
                        bias_grad + n / HEADS * 3 * WIDTH + n % HEADS * HEAD);
    }
}
