/* Drawing an id from logits: `picogpt.generate.sample_ids` for one text, in the same order and in float64. */

#define NOTHING (-INFINITY)

struct sampling {
    double temperature, top_p, min_p;
    const double *allowed; /* (V), 0 for ids that may be drawn and -inf for others */
    int32_t top_k, reserved;
};

static int likeliest(const double *scores, int count) {
    int best = 0;
    for (int v = 1; v < count; v++) best = scores[v] > scores[best] ? v : best;
    return best;
}

/* Ids by falling score, of equals the first one first. */
static void sort_ids(const double *scores, int *order, int count) {
    for (int v = 0; v < count; v++) {
        int at = v;
        for (; at > 0 && scores[order[at - 1]] < scores[v]; at--) order[at] = order[at - 1];
        order[at] = v;
    }
}

/* Leave the likeliest ids that together reach probability p. */
static void keep_top_p(double *scores, const int *order, int count, double p) {
    const double most = scores[order[0]];
    double total = 0, before = 0;
    for (int v = 0; v < count; v++) total += exp(scores[v] - most);
    for (int i = 0; i < count; i++) {
        const double share = exp(scores[order[i]] - most) / total;
        if (before >= p) scores[order[i]] = NOTHING;
        before += share;
    }
}

/* An id by the logits (V) and one number from 0 to 1; `scores` and `order` (V) are overwritten. */
static int draw(const struct sampling *sampling, const float *logits, int count, double number, double *scores, int *order) {
    for (int v = 0; v < count; v++) scores[v] = logits[v] + sampling->allowed[v];
    if (sampling->temperature == 0) return likeliest(scores, count);
    /* The maximum goes first, so that a tiny temperature makes no infinity less infinity. */
    const double top = scores[likeliest(scores, count)];
    for (int v = 0; v < count; v++) scores[v] = (scores[v] - top) / sampling->temperature;
    if (sampling->top_k || sampling->top_p < 1) sort_ids(scores, order, count);
    for (int i = sampling->top_k; sampling->top_k && i < count; i++) scores[order[i]] = NOTHING;
    if (sampling->top_p < 1) keep_top_p(scores, order, count, sampling->top_p);
    const double most = scores[likeliest(scores, count)];
    if (sampling->min_p > 0) {
        for (int v = 0; v < count; v++) scores[v] = scores[v] >= most + log(sampling->min_p) ? scores[v] : NOTHING;
    }
    double sum = 0;
    for (int v = 0; v < count; v++) scores[v] = sum += exp(scores[v] - most);
    for (int v = 0; v < count; v++) {
        if (scores[v] > number * sum) return v;
    }
    return count - 1; /* not reached, as the number is below 1 */
}
