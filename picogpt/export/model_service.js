"use strict";
// Takes the page's wishes and works on them in short slices, so that a pause is heard at once. The same code runs in a
// worker and, where the browser allows none, on the page's own thread.
const PicoService = (() => {
  const SLICE = 40; // milliseconds of work before messages are heard
  const SHOWN_EVERY = 33; // milliseconds between two batches of text

  /** Start serving a model; `post` takes the answers. Returns what takes the messages. */
  function serve(engine, post) {
    const jobs = new Map(); // by name; a new job takes the place of the old one of its name
    let model, reader, known = {}, timer = null; // the timer of the next slice, if there is work

    function work() {
      const end = performance.now() + SLICE;
      let due = end;
      do {
        due = Infinity;
        for (const [name, job] of jobs) {
          if (job.due <= performance.now()) advance(name, job);
          due = Math.min(due, job.due);
        }
      } while (jobs.size && due <= performance.now() && performance.now() < end);
      timer = jobs.size ? setTimeout(work, Math.max(0, due - performance.now())) : null;
    }

    /** One step of a job; what it yields, if anything, are milliseconds that it wants to wait. */
    function advance(name, job) {
      const { done, value } = job.steps.next();
      job.due = performance.now() + (value || 0);
      if (done && jobs.get(name) === job) jobs.delete(name);
    }

    function begin(name, steps) {
      jobs.set(name, { steps, due: 0 });
      clearTimeout(timer); // it may wait for a slow job
      timer = setTimeout(work, 0);
    }

    /** Collects characters and posts them some times a second. */
    function outbox() {
      let at = reader.ids.length, ids = [], next = [], posted = performance.now();
      const flush = () => {
        if (!ids.length) return;
        post({ kind: "text", at, ids, next });
        at += ids.length;
        [ids, next, posted] = [[], [], performance.now()];
      };
      const put = (newIds, logits) => {
        ids.push(...newIds);
        next.push(...logits.map(engine.softmax));
        if (performance.now() - posted >= SHOWN_EVERY) flush();
      };
      return { put, flush };
    }

    function* readText(ids, out) {
      for (let at = 0; at < ids.length; at += 4) {
        const part = ids.slice(at, at + 4);
        out.put(part, reader.read(part));
        yield;
      }
      out.flush();
    }

    function* writeText({ count, temperature, topK, seed, speed }, out) {
      for (let i = 0; i < count; i++) {
        const began = performance.now();
        const number = engine.numberAt(seed, reader.ids.length);
        const id = engine.draw(reader.logits, { temperature, topK, never: model.never }, number);
        out.put([id], reader.read([id]));
        if (speed) out.flush();
        yield speed ? Math.max(0, 1000 / speed - (performance.now() - began)) : 0;
      }
      out.flush();
    }

    /** Keep so much of the text, read `ids`, and write on if that is asked for. */
    function* textJob({ keep, ids, write }) {
      if (keep < reader.ids.length) reader.rewind(keep);
      const out = outbox();
      yield* readText(ids, out);
      const began = performance.now();
      if (write) yield* writeText(write, out);
      post({ kind: "done", written: write ? write.count : 0, seconds: (performance.now() - began) / 1000 });
    }

    /** Losses of a text, window by window: with its own context vectors, and then in another mode. */
    function* rollJob({ ids, other, mode, reading }) {
      const postWindow = message => post({ kind: "roll", reading, ...message });
      yield* rollAs("as is", ids, (_, previous) => previous, postWindow);
      if (mode === "zeroed") yield* rollAs(mode, ids, () => new Float32Array(model.n_embd), postWindow);
      if (mode === "other") {
        const contexts = yield* rollAs("other's own", other, (_, previous) => previous, postWindow);
        yield* rollAs(mode, ids, index => contexts[(index - 1) % contexts.length], postWindow);
      }
      post({ kind: "rolled", mode, reading });
    }

    /** Returns the context vectors; what was computed before for the same text is posted from memory. */
    function* rollAs(mode, ids, contextOf, postWindow) {
      const key = `${ids}`;
      const windows = mode !== "other" && known[mode]?.key === key ? known[mode].windows : [];
      for (const window of windows) postWindow({ mode, ...window });
      if (windows.length) return windows.map(window => window.context);
      for (const window of engine.roll(model, ids, contextOf)) {
        if (window) postWindow({ mode, ...window });
        if (window) windows.push(window);
        yield;
      }
      known[mode] = { key, windows };
      return windows.map(window => window.context);
    }

    function* inspectJob({ length }) {
      if (length > 0 && length <= reader.ids.length) post({ kind: "inspected", length, ...reader.inspect(length) });
      yield;
    }

    const answers = {
      load({ header, buffer }) {
        model = engine.readModel(header, buffer);
        reader = new engine.Reader(model);
        post({ kind: "ready" });
      },
      text: message => begin("text", textJob(message)),
      pause() {
        if (jobs.delete("text")) post({ kind: "paused", at: reader.ids.length });
      },
      roll: message => begin("roll", rollJob(message)),
      inspect: message => begin("inspect", inspectJob(message)),
    };
    return message => answers[message.kind](message);
  }

  return { serve };
})();
