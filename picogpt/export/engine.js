"use strict";
// The model in plain JavaScript: it reads ids and gives logits. Knows no page, no characters and no network, so that a
// worker, the page itself and node can all run it.
//
// Dimensions: L layers, H heads of D = C / H, C the width, S slots of a window (the context slot and its characters),
// V ids. Weights are int8 rows with one float32 scale each; activations and the KV cache are float32.
const PicoEngine = (() => {
  const EPSILON = 1e-5; // of LayerNorm, as in training
  const ROWS = 4; // slots that go through a layer together

  // ---- Weights ----

  /** Tensors of the page's weights: `header.tensors` says where each one stands in `buffer`, in little-endian bytes. */
  function readModel(header, buffer) {
    const { n_layer, n_embd: C, context_len } = header;
    const memory = reserve(header, buffer, ROWS * 12 * C);
    const get = name => readTensor(header.tensors[name], memory.buffer);
    const layers = Array.from({ length: n_layer }, (_, i) => readLayer(name => get(`h.${i}.${name}`)));
    const rows = size => Array.from({ length: ROWS }, () => memory.floats(size));
    return {
      ...header,
      layers,
      tokens: get("wte.weight"), // (V, C), which is the head too
      positions: get("wpe.weight"), // (S, C)
      finalNorm: { gain: get("ln_f.weight"), bias: get("ln_f.bias") },
      multiplyRow: memory.multiplyRow,
      // Of up to four slots: the residual stream, its norm, what the heads read, and what stands between.
      scratch: { stream: rows(C), normal: rows(C), mixed: rows(C), qkv: rows(3 * C), inner: rows(4 * C) },
      scores: new Float64Array(context_len + 4), // the last three for a whole number of four slots
    };
  }

  /** The weights, with room for `count` floats behind them, where WebAssembly can reach both; and the product for it. */
  function reserve(header, buffer, count) {
    let end = Math.ceil(buffer.byteLength / 16) * 16;
    const { buffer: all, multiplyRow } = loadProducts(header, end + 4 * count);
    new Uint8Array(all).set(new Uint8Array(buffer));
    const floats = size => new Float32Array(all, (end += 4 * size) - 4 * size, size);
    return { buffer: all, floats, multiplyRow };
  }

  /** WebAssembly's product, or the plain one where a browser has no such vectors or does not allow it. */
  function loadProducts(header, size) {
    try {
      if (header.n_embd % 8 === 0) return loadWebAssembly(header.products, size);
    } catch {
      // The plain product needs nothing.
    }
    return { buffer: new ArrayBuffer(size), multiplyRow: plainProduct(4 * header.n_embd) };
  }

  function loadWebAssembly(products, size) {
    const memory = new WebAssembly.Memory({ initial: Math.ceil(size / 65536) });
    const code = Uint8Array.from(atob(products), character => character.charCodeAt(0));
    const { multiply } = new WebAssembly.Instance(new WebAssembly.Module(code), { page: { memory } }).exports;
    const multiplyRow = ({ words, scales, bias, rows, columns }, x, out) =>
      multiply(words.byteOffset, scales.byteOffset, bias.byteOffset, x.byteOffset, out.byteOffset, rows, columns);
    return { buffer: memory.buffer, multiplyRow };
  }

  function readLayer(get) {
    const norm = name => ({ gain: get(`${name}.weight`), bias: get(`${name}.bias`) });
    const linear = name => ({ ...get(`${name}.weight`), bias: get(`${name}.bias`) });
    return {
      norm1: norm("ln_1"),
      qkv: linear("attn.c_attn"),
      project: linear("attn.c_proj"),
      norm2: norm("ln_2"),
      expand: linear("mlp.c_fc"),
      contract: linear("mlp.c_proj"),
    };
  }

  function readTensor({ kind, shape, at }, buffer) {
    const count = shape.reduce((product, n) => product * n, 1);
    if (kind === "float32") return new Float32Array(buffer, at, count);
    if (kind === "bfloat16") return widen(new Uint16Array(buffer, at, count));
    const [rows, columns] = shape;
    const values = new Int8Array(buffer, at + 4 * rows, count);
    return { rows, columns, scales: new Float32Array(buffer, at, rows), words: pack(values, rows, columns) };
  }

  /** int8 weights, four to a 32-bit word, the first one lowest; a row that ends within a word is filled up with zeros. */
  function pack(values, rows, columns) {
    const width = (columns + 3) & ~3;
    if (width === columns) return new Int32Array(values.buffer, values.byteOffset, values.length / 4);
    const padded = new Int8Array(rows * width);
    for (let row = 0; row < rows; row++) padded.set(values.subarray(row * columns, (row + 1) * columns), row * width);
    return new Int32Array(padded.buffer);
  }

  /** bfloat16 to float32, of which it is the upper half. */
  function widen(halves) {
    const words = new Uint32Array(halves.length);
    for (let i = 0; i < halves.length; i++) words[i] = halves[i] << 16;
    return new Float32Array(words.buffer);
  }

  // ---- Products ----

  /**
   * The product out = W x + bias for rows of up to `longest` weights. It reads four weights at a time, as a word, and x in
   * float64, as JavaScript would convert it at each use. Two rows share what is read of x, with two sums each, as one would
   * wait for each addition before the next.
   */
  function plainProduct(longest) {
    const wide = new Float64Array(longest + 3); // x, with zeros behind it for the last word of a row
    return ({ words, scales, bias, rows, columns }, x, out) => {
      const width = (columns + 3) >> 2; // of a row, in words
      wide.set(x);
      wide.fill(0, columns, columns + 3);
      for (let row = 0; row < rows; row += 2) {
        let a = 0, b = 0, c = 0, d = 0;
        for (let i = row * width, j = i + width, k = 0; k < columns; i++, j++, k += 4) {
          const upper = words[i], lower = words[j], x0 = wide[k], x1 = wide[k + 1], x2 = wide[k + 2], x3 = wide[k + 3];
          a += (upper << 24 >> 24) * x0 + (upper << 16 >> 24) * x1; // shifts keep the sign
          b += (upper << 8 >> 24) * x2 + (upper >> 24) * x3;
          c += (lower << 24 >> 24) * x0 + (lower << 16 >> 24) * x1;
          d += (lower << 8 >> 24) * x2 + (lower >> 24) * x3;
        }
        out[row] = (a + b) * scales[row] + bias[row];
        out[row + 1] = (c + d) * scales[row + 1] + bias[row + 1]; // nothing is written behind an odd last row
      }
    };
  }

  // ---- What stands between them ----

  function layerNorm(x, { gain, bias }, out) {
    const n = gain.length;
    let mean = 0, square = 0;
    for (let i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (let i = 0; i < n; i++) square += (x[i] - mean) ** 2;
    const factor = 1 / Math.sqrt(square / n + EPSILON);
    for (let i = 0; i < n; i++) out[i] = (x[i] - mean) * factor * gain[i] + bias[i];
  }

  /** The exact GELU: x times the normal distribution's P(x). P(-|x|) = e^(-x^2/2) t q(t), off by a relative 1.5e-7. */
  function gelu(x) {
    const size = Math.abs(x);
    if (size > 12) return x > 0 ? x : 0;
    const t = 1 / (1 + 0.3 * size);
    let q = 0.0356748769 * t - 0.157203499;
    q = q * t + 0.206354196;
    q = q * t - 0.0536842455;
    q = q * t + 0.128561924;
    q = q * t + 0.0999134088;
    q = q * t + 0.120753968;
    q = q * t + 0.119629298;
    const below = q * t * Math.exp(-0.5 * x * x);
    return x * (x < 0 ? below : 1 - below);
  }

  /** Probabilities of logits; the largest goes first, so that no exponential overflows. */
  function softmax(logits) {
    let largest = -Infinity, sum = 0;
    for (const logit of logits) largest = Math.max(largest, logit);
    const shares = Float32Array.from(logits, logit => Math.exp(logit - largest));
    for (const share of shares) sum += share;
    return shares.map(share => share / sum);
  }

  /** Loss of id `target` in nats: minus the logarithm of its probability. */
  function lossOf(logits, target) {
    let largest = -Infinity, sum = 0;
    for (const logit of logits) largest = Math.max(largest, logit);
    for (const logit of logits) sum += Math.exp(logit - largest);
    return Math.log(sum) + largest - logits[target];
  }

  // ---- A window ----

  /** A window that fills character by character, with its KV cache. */
  class Window {
    constructor(model) {
      const { n_layer, n_embd, context_len } = model;
      this.model = model;
      const cache = () => Array.from({ length: n_layer }, () => new Float32Array((context_len + 4) * n_embd));
      this.keys = cache(); // of each layer (S, C)
      this.values = cache();
      Object.assign(this, model.scratch); // shared, as nothing in it outlives a call
      this.reset(new Float32Array(n_embd));
    }

    /** Empty the window; it begins with this context vector. */
    reset(context) {
      this.first = context;
      this.slots = 0;
      this.sum = new Float64Array(this.model.n_embd); // of the outputs, for the mean
    }

    /** Characters in the window. */
    get length() {
      return Math.max(0, this.slots - 1);
    }

    get free() {
      return this.model.context_len - this.length;
    }

    /** The context vector for a window that begins where this one now ends: the mean over all its slots. */
    context() {
      return Float32Array.from(this.sum, total => total / this.slots);
    }

    /**
     * Read ids that follow in the window; return the logits after each of them, one array an id.
     * `trace`, an object, receives the last slot's attention weights and what each layer would predict.
     */
    read(ids, trace) {
      const vectorsIn = ids.map(id => this.model.tokens.subarray(id * this.model.n_embd, (id + 1) * this.model.n_embd));
      const all = this.slots === 0 ? [this.first, ...vectorsIn] : vectorsIn;
      const logits = [];
      for (let at = 0; at < all.length; at += ROWS) {
        const part = all.slice(at, at + ROWS);
        logits.push(...this.advance(part, at + ROWS >= all.length ? trace : undefined));
      }
      return logits.slice(all.length - ids.length);
    }

    /** Run up to four slots through all blocks; return their logits. */
    advance(part, trace) {
      const { model, stream, normal } = this, count = part.length;
      part.forEach((vector, r) => this.begin(stream[r], vector, this.slots + r));
      model.layers.forEach((layer, i) => {
        if (trace) this.look(trace, count);
        this.attend(layer, i, count, trace);
        this.feed(layer, count);
      });
      if (trace) this.look(trace, count);
      this.slots += count;
      return part.map((_, r) => {
        layerNorm(stream[r], model.finalNorm, normal[r]);
        for (let i = 0; i < this.sum.length; i++) this.sum[i] += normal[r][i];
        return this.predict(normal[r]);
      });
    }

    begin(stream, vector, slot) {
      const at = slot * vector.length;
      for (let i = 0; i < vector.length; i++) stream[i] = vector[i] + this.model.positions[at + i];
    }

    /** Logits of a normalised output: its product with each token's vector. */
    predict(output) {
      const { tokens, n_embd, vocab_size } = this.model;
      const logits = new Float32Array(vocab_size);
      for (let id = 0, at = 0; id < vocab_size; id++) {
        let sum = 0;
        for (let i = 0; i < n_embd; i++, at++) sum += output[i] * tokens[at];
        logits[id] = sum;
      }
      return logits;
    }

    /** Logit lens (nostalgebraist, 2020): what the last slot would predict if its blocks ended here. */
    look(trace, count) {
      layerNorm(this.stream[count - 1], this.model.finalNorm, this.normal[count - 1]);
      trace.lens.push(this.predict(this.normal[count - 1]));
    }

    /** out[r] = W x[r] + bias for the first `count` rows: the matrix stays in the processor's cache from one to the next. */
    multiply(matrix, x, out, count) {
      for (let r = 0; r < count; r++) this.model.multiplyRow(matrix, x[r], out[r]);
    }

    attend(layer, index, count, trace) {
      const { stream, normal, qkv, mixed, model: { n_embd: C } } = this;
      for (let r = 0; r < count; r++) layerNorm(stream[r], layer.norm1, normal[r]);
      this.multiply(layer.qkv, normal, qkv, count);
      for (let r = 0; r < count; r++) {
        this.keys[index].set(qkv[r].subarray(C, 2 * C), (this.slots + r) * C);
        this.values[index].set(qkv[r].subarray(2 * C), (this.slots + r) * C);
      }
      for (let r = 0; r < count; r++) this.attendRow(index, r, r === count - 1 ? trace : undefined);
      this.multiply(layer.project, mixed, normal, count);
      for (let r = 0; r < count; r++) add(stream[r], normal[r]);
    }

    attendRow(index, r, trace) {
      const { n_head: H, n_embd: C } = this.model, D = C / H, slots = this.slots + r + 1;
      for (let head = 0; head < H; head++) {
        const weights = this.weigh(this.keys[index], this.qkv[r], head * D, D, slots);
        mix(this.values[index], weights, this.mixed[r], head * D, D, slots, C);
        if (trace) trace.attention.push(Float32Array.from(weights.subarray(0, slots)));
      }
    }

    /** Attention weights of one head, whose entries begin at `from`, over the first `slots` slots. */
    weigh(keys, query, from, D, slots) {
      const { scores, n_embd: C } = this.model, scale = 1 / Math.sqrt(D);
      let largest = -Infinity, sum = 0;
      for (let s = 0; s < slots; s += 4) scoreFour(keys, query, scores, s, from, D, C); // up to three too many
      for (let s = 0; s < slots; s++) largest = Math.max(largest, scores[s] *= scale);
      for (let s = 0; s < slots; s++) sum += scores[s] = Math.exp(scores[s] - largest);
      for (let s = 0; s < slots; s++) scores[s] /= sum;
      return scores;
    }

    feed(layer, count) {
      const { stream, normal, inner, mixed } = this;
      for (let r = 0; r < count; r++) layerNorm(stream[r], layer.norm2, normal[r]);
      this.multiply(layer.expand, normal, inner, count);
      for (let r = 0; r < count; r++) for (let i = 0; i < inner[r].length; i++) inner[r][i] = gelu(inner[r][i]);
      this.multiply(layer.contract, inner, mixed, count);
      for (let r = 0; r < count; r++) add(stream[r], mixed[r]);
    }
  }

  function add(to, what) {
    for (let i = 0; i < to.length; i++) to[i] += what[i];
  }

  /** Products of a query with the keys of four slots: four sums, as one would wait for each addition before the next. */
  function scoreFour(keys, query, scores, s, from, D, C) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = from, at = s * C + from; i < from + D; i++, at++) {
      const q = query[i];
      a += q * keys[at];
      b += q * keys[at + C];
      c += q * keys[at + 2 * C];
      d += q * keys[at + 3 * C];
    }
    scores[s] = a, scores[s + 1] = b, scores[s + 2] = c, scores[s + 3] = d;
  }

  /** What a head reads: its values weighted, four slots at a time, so that `out` is written less often. */
  function mix(values, weights, out, from, D, slots, C) {
    weights.fill(0, slots, slots + 3); // so that the last four are whole
    out.fill(0, from, from + D);
    for (let s = 0; s < slots; s += 4) {
      const w0 = weights[s], w1 = weights[s + 1], w2 = weights[s + 2], w3 = weights[s + 3];
      for (let i = from, at = s * C + from; i < from + D; i++, at++) {
        out[i] += w0 * values[at] + w1 * values[at + C] + w2 * values[at + 2 * C] + w3 * values[at + 3 * C];
      }
    }
  }

  // ---- The rolling text ----

  /**
   * A text of any length: when a window is full the next one begins `hop` characters after it began. It starts from the
   * mean over the first `hop` characters of the window before, and reads again what both have in common. `hop` is more
   * than half of a window, so no more than one context vector waits.
   */
  class Reader {
    constructor(model) {
      this.model = model;
      this.window = new Window(model);
      this.probe = new Window(model); // for `inspect`, which must not disturb the text
      this.contexts = [new Float32Array(model.n_embd)]; // of each window so far, and of the next one once it is known
      this.ids = [];
      this.logits = null; // after the last character
    }

    /** Read ids behind those read before; return the logits after each of them. */
    read(ids) {
      const logits = [];
      for (let at = 0; at < ids.length;) {
        if (this.window.free === 0) this.beginNext();
        const part = ids.slice(at, at + this.untilNextStop());
        logits.push(...this.fill(part));
        this.ids.push(...part);
        at += part.length;
      }
      if (ids.length) this.logits = logits[logits.length - 1];
      return logits;
    }

    /** Characters until the window is full or its mean is to be kept. */
    untilNextStop() {
      const { length, free } = this.window, { hop } = this.model;
      return length < hop ? hop - length : free;
    }

    fill(part) {
      const logits = this.window.read(part);
      if (this.window.length === this.model.hop) this.contexts[this.windowIndex + 1] = this.window.context();
      return logits;
    }

    beginNext() {
      const { hop } = this.model, start = (this.windowIndex + 1) * hop;
      this.window.reset(this.contexts[this.windowIndex + 1]);
      const kept = this.ids.slice(start);
      this.windowIndex += 1;
      if (kept.length) this.fill(kept);
    }

    /** Forget all but the first `length` characters. */
    rewind(length) {
      const index = this.windowOf(length);
      this.ids.length = length;
      this.contexts.length = index + 1;
      this.windowIndex = index;
      this.window.reset(this.contexts[index]);
      this.logits = null;
      const again = this.ids.splice(index * this.model.hop);
      this.read(again);
    }

    /** The window that has read the first `length` characters of the text. */
    windowOf(length) {
      return Math.max(0, Math.ceil((length - this.model.context_len) / this.model.hop));
    }

    /** The window that has read so many characters: where it starts, its attention weights and what each layer predicts. */
    inspect(length) {
      const index = this.windowOf(length), start = index * this.model.hop;
      const trace = { attention: [], lens: [] };
      this.probe.reset(this.contexts[index]);
      this.probe.read(this.ids.slice(start, length), trace);
      return { start, attention: trace.attention, lens: trace.lens.map(softmax) };
    }
  }
  Reader.prototype.windowIndex = 0;

  // ---- The roll, as training does it ----

  /** Where each window of a text begins and ends; the first one takes the remainder. */
  function windowSpans(length, size) {
    const spans = [];
    for (let start = 0, end = (length - 1) % size + 1; end <= length; start = end, end += size) spans.push([start, end]);
    return spans;
  }

  /**
   * Read a text window by window and score each of its characters but the first. `contextOf(window, previous)` gives the
   * context vector that a window starts from, `previous` being the mean of the window before.
   * Yields nothing between parts of a window, so that others get their turn, and at its end what it came to.
   */
  function* roll(model, ids, contextOf) {
    const window = new Window(model);
    let previous = new Float32Array(model.n_embd);
    for (const [index, [start, end]] of windowSpans(ids.length, model.context_len).entries()) {
      window.reset(index === 0 ? previous : contextOf(index, previous));
      const losses = [];
      for (let at = start; at < end; at += ROWS) {
        const logits = window.read(ids.slice(at, Math.min(end, at + ROWS)));
        logits.forEach((row, i) => at + i + 1 < ids.length && losses.push(lossOf(row, ids[at + i + 1])));
        yield;
      }
      previous = window.context();
      yield { index, start, end, losses, context: previous };
    }
  }

  // ---- Sampling ----

  /** Number `index` of a seed's series, from 0 up to 1: mulberry32 (Tommy Ettinger), whose state only counts up. */
  function numberAt(seed, index) {
    let z = (seed + Math.imul(index + 1, 0x6d2b79f5)) | 0;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  }

  /** Draw an id with a number from 0 up to 1; temperature 0 takes the likeliest, and of equals the first. */
  function draw(logits, { temperature, topK, never }, number) {
    const ranked = [...logits.keys()].filter(id => !never.includes(id)).sort((a, b) => logits[b] - logits[a] || a - b);
    if (temperature === 0) return ranked[0];
    // In the order of ids, so that the same number gives neighbouring texts at neighbouring settings.
    const kept = ranked.slice(0, topK || ranked.length).sort((a, b) => a - b);
    const shares = kept.map(id => Math.exp((logits[id] - logits[ranked[0]]) / temperature));
    let left = number * shares.reduce((sum, share) => sum + share, 0);
    const drawn = shares.findIndex(share => (left -= share) < 0);
    return drawn < 0 ? kept[kept.length - 1] : kept[drawn]; // rounding can leave a little at the end
  }

  return { Reader, Window, draw, gelu, lossOf, numberAt, readModel, roll, softmax, windowSpans };
})();
if (typeof module !== "undefined") module.exports = PicoEngine; // in node, for the tests
