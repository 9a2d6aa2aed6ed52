/* Drawing an id from logits: `picogpt.generate.sample_ids` for one text, in the same order and in float64. */

#define NEG_INF (-INFINITY)

struct sampling {
    double temperature, top_p, min_p;
    const double *allowed; /* (V), 0 for ids that may be drawn and -inf for others */
    int32_t top_k, reserved;
};

static int argmax(const double *scores, int count) {
    int best = 0;
    for (int v = 1; v < count; v++) best = scores[v] > scores[best] ? v : best;
    return best;
}

/* Ids by falling score, of equals the first one first. */
static void argsort_descending(const double *scores, int *order, int count) {
    for (int v = 0; v < count; v++) {
        int at = v;
        for (; at > 0 && scores[order[at - 1]] < scores[v]; at--) order[at] = order[at - 1];
        order[at] = v;
    }
}

/* Leave the likeliest ids that together reach probability p. */
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

/* An id by the logits (V) and one number from 0 to 1; `scores` and `order` (V) are overwritten. */
static int draw(const struct sampling *sampling, const float *logits, int count, double uniform, double *scores, int *order) {
    for (int v = 0; v < count; v++) scores[v] = logits[v] + sampling->allowed[v];
    if (sampling->temperature == 0) return argmax(scores, count);
    /* The maximum goes first, so that a tiny temperature makes no infinity less infinity. */
    const double max_score = scores[argmax(scores, count)];
    for (int v = 0; v < count; v++) scores[v] = (scores[v] - max_score) / sampling->temperature;
    if (sampling->top_k || sampling->top_p < 1) argsort_descending(scores, order, count);
    for (int i = sampling->top_k; sampling->top_k && i < count; i++) scores[order[i]] = NEG_INF;
    if (sampling->top_p < 1) top_p_filter(scores, order, count, sampling->top_p);
    const double max_kept = scores[argmax(scores, count)];
    if (sampling->min_p > 0) {
        for (int v = 0; v < count; v++) scores[v] = scores[v] >= max_kept + log(sampling->min_p) ? scores[v] : NEG_INF;
    }
    double sum = 0;
    for (int v = 0; v < count; v++) scores[v] = sum += exp(scores[v] - max_kept);
    for (int v = 0; v < count; v++) {
        if (scores[v] > uniform * sum) return v;
    }
    return count - 1; /* not reached, as the number is below 1 */
}
