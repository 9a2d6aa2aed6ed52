/* Sampling one id from logits (V), for one text: the same steps as `picogpt.inference.sampling.Sampler.draw`, in the
   same order and in float64, so that C and numpy draw the same ids from the same random numbers.
   Filtered ids have a score of -inf. */

#define NEG_INF (-INFINITY)

/* Settings of the filters; see `picogpt.config.SampleConfig`. */
struct sampling {
    double temperature, top_p, min_p;
    const double *allowed;   /* (V) 0 for ids that may be drawn, -inf for others */
    int32_t top_k, reserved; /* top_k 0: no limit */
};

/* Index of the largest score; of equal ones the first. */
static int argmax(const double *scores, int count) {
    int best = 0;
    for (int v = 1; v < count; v++) best = scores[v] > scores[best] ? v : best;
    return best;
}

/* Whether id `a` comes before id `b` by falling score; equal scores are in the order of ids. */
static int precedes(const double *scores, int a, int b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); }

/* Restore the heap below `at`, whose parent comes after its children; `order` has `count` ids. */
static void sift_down(const double *scores, int *order, int at, int count) {
    const int id = order[at];
    for (int child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && precedes(scores, order[child], order[child + 1])) child++;
        if (precedes(scores, order[child], id)) break;
        order[at] = order[child];
    }
    order[at] = id;
}

/* Ids by falling score, equal ones by id: heapsort, as an alphabet can have thousands of characters. */
static void argsort_descending(const double *scores, int *order, int count) {
    for (int v = 0; v < count; v++) order[v] = v;
    for (int at = count / 2 - 1; at >= 0; at--) sift_down(scores, order, at, count);
    for (int last = count - 1; last > 0; last--) {
        /* The root comes after all others: its place is the last one. */
        const int id = order[0];
        order[0] = order[last], order[last] = id;
        sift_down(scores, order, 0, last);
    }
}

/* Top-p (nucleus) filter (Holtzman et al., 2020): keep the most probable ids that together reach
   probability p. `before` is the probability of all ids before one in the order, so the id that crosses
   p stays. */
static void top_p_filter(double *scores, const int *order, int count, double p) {
    const double max_kept = scores[order[0]];
    double total = 0, before = 0;
    for (int v = 0; v < count; v++) total += exp(scores[v] - max_kept);
    for (int i = 0; i < count; i++) {
        const double prob = exp(scores[order[i]] - max_kept) / total;
        if (before >= p) scores[order[i]] = NEG_INF;
        before += prob;
    }
}

/* Draw an id from logits (V) with one random number `uniform` in [0, 1): temperature, top-k, top-p,
   min-p, then inverse transform sampling. `scores` and `order` (V) are scratch. */
static int draw(const struct sampling *sampling, const float *logits, int count, double uniform, double *scores, int *order) {
    for (int v = 0; v < count; v++) scores[v] = logits[v] + sampling->allowed[v];
    if (sampling->temperature == 0) return argmax(scores, count);
    /* The maximum is subtracted before the division: a tiny temperature would make inf - inf of large
       logits. */
    const double max_score = scores[argmax(scores, count)];
    for (int v = 0; v < count; v++) scores[v] = (scores[v] - max_score) / sampling->temperature;
    if (sampling->top_k || sampling->top_p < 1) argsort_descending(scores, order, count);
    /* Top-k: all ids behind the first k in the order are dropped. */
    for (int i = sampling->top_k; sampling->top_k && i < count; i++) scores[order[i]] = NEG_INF;
    if (sampling->top_p < 1) top_p_filter(scores, order, count, sampling->top_p);
    const double max_kept = scores[argmax(scores, count)];
    /* Min-p: ids below min_p times the largest probability are dropped. */
    if (sampling->min_p > 0) {
        for (int v = 0; v < count; v++) scores[v] = scores[v] >= max_kept + log(sampling->min_p) ? scores[v] : NEG_INF;
    }
    /* The scores become cumulative sums of exp(score); the first that exceeds uniform x total is drawn. */
    double sum = 0;
    for (int v = 0; v < count; v++) scores[v] = sum += exp(scores[v] - max_kept);
    for (int v = 0; v < count; v++) {
        if (scores[v] > uniform * sum) return v;
    }
    return count - 1; /* not reached, as uniform is below 1 */
}
