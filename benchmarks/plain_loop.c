/* The obvious alternative to the engine, for benchmarks/generate.py: a float32 loop on one thread, as
   short as it can be, in the manner of llama2.c. It has a KV cache and windows that hop by their whole
   length, and always takes the likeliest character. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* layers, heads, n_embd, slots of a window, vocabulary */
struct shape {
    int layers, heads, width, slots, ids;
};

/* out (d) = w (d, n) x (n) + bias (d), bias null for none */
static void matmul(float *out, const float *x, const float *w, const float *bias, int n, int d) {
    for (int i = 0; i < d; i++) {
        /* compiled with -ffast-math, so that this loop becomes vectors */
        float sum = 0;
        for (int j = 0; j < n; j++) sum += w[(long)i * n + j] * x[j];
        out[i] = sum + (bias ? bias[i] : 0);
    }
}

/* LayerNorm of x (n) */
static void norm(float *out, const float *x, const float *gain, const float *bias, int n) {
    float mean = 0, square = 0;
    for (int i = 0; i < n; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean) / n;
    for (int i = 0; i < n; i++) out[i] = (x[i] - mean) / sqrtf(square + 1e-5f) * gain[i] + bias[i];
}

/* Attention of one slot: its key and value go to the cache, and each head attends to slots 0..slot. */
static void attend(float *out, const float *qkv, float *keys, float *values, int slot, struct shape s) {
    /* entries of a head */
    const int D = s.width / s.heads;
    memcpy(keys + slot * s.width, qkv + s.width, sizeof(float) * s.width);
    memcpy(values + slot * s.width, qkv + 2 * s.width, sizeof(float) * s.width);
    for (int h = 0; h < s.heads; h++) {
        /* softmax with the row max subtracted */
        float scores[s.slots], top = -1e30f, sum = 0;
        for (int t = 0; t <= slot; t++) {
            /* q k^T / sqrt(D) */
            scores[t] = 0;
            for (int d = 0; d < D; d++) scores[t] += qkv[h * D + d] * keys[t * s.width + h * D + d];
            scores[t] /= sqrtf(D);
            top = scores[t] > top ? scores[t] : top;
        }
        for (int t = 0; t <= slot; t++) sum += scores[t] = expf(scores[t] - top); /* softmax numerators and their sum */
        memset(out + h * D, 0, sizeof(float) * D);
        for (int t = 0; t <= slot; t++)
            for (int d = 0; d < D; d++) out[h * D + d] += scores[t] / sum * values[t * s.width + h * D + d];
    }
}

/* Write `count` ids that follow `id`. Weights w: tokens, positions, the final norm's weight and bias,
   then twelve arrays of each layer in the order of the module. */
void generate(const float **w, struct shape s, int id, int count, int *made) {
    const int C = s.width;
    float x[C], y[C], wide[4 * C], context[C], sum[C], logits[s.ids];
    float *cache = malloc(sizeof(float) * 2 * s.layers * s.slots * C); /* keys, then values, of each layer */
    memset(context, 0, sizeof context);
    /* slot 0 holds the context vector and makes no character */
    for (int i = 0, slot = 0; i < count; slot = (slot + 1) % s.slots) {
        const float *what = slot ? w[0] + id * C : context;
        if (!slot) memset(sum, 0, sizeof sum);
        for (int c = 0; c < C; c++) x[c] = what[c] + w[1][slot * C + c];
        /* x += proj attention(norm(x)), then x += out gelu(fc norm(x)) */
        for (int l = 0; l < s.layers; l++) {
            const float **p = w + 4 + 12 * l;
            float *keys = cache + (long)2 * l * s.slots * C;
            norm(y, x, p[0], p[1], C);
            matmul(wide, y, p[2], p[3], C, 3 * C);
            attend(y, wide, keys, keys + s.slots * C, slot, s);
            matmul(wide, y, p[4], p[5], C, C);
            for (int c = 0; c < C; c++) x[c] += wide[c];
            norm(y, x, p[6], p[7], C);
            matmul(wide, y, p[8], p[9], C, 4 * C);
            for (int c = 0; c < 4 * C; c++) wide[c] *= 0.5f * (1 + erff(wide[c] * 0.70710678f));
            matmul(y, wide, p[10], p[11], 4 * C, C);
            for (int c = 0; c < C; c++) x[c] += y[c];
        }
        norm(y, x, w[2], w[3], C);
        /* the mean of a window's outputs is the next one's context vector */
        for (int c = 0; c < C; c++) sum[c] += y[c];
        for (int c = 0; slot == s.slots - 1 && c < C; c++) context[c] = sum[c] / s.slots;
        if (!slot) continue;
        /* logits by the tied embedding, and their argmax */
        matmul(logits, y, w[0], 0, C, s.ids);
        for (int v = id = 0; v < s.ids; v++) id = logits[v] > logits[id] ? v : id;
        made[i++] = id;
    }
    free(cache);
}
