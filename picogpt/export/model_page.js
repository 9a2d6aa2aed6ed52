"use strict";
// What a reader sees and does. The model itself runs in `engine`, behind the messages of `service`.
const header = JSON.parse(document.getElementById("header").textContent);
const $ = id => document.getElementById(id);
const model = { text: [], dists: [], at: 0, prompt: 0, busy: false, written: 0 };
// `dists[i]` holds the probabilities of character i; nothing predicts the first one, and the last entry is what comes next.

// ---- Small helpers ----

function element(tag, content, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...[content ?? ""].flat());
  return made;
}

const idOf = new Map(header.characters.map((character, id) => [character, id]).reverse()); // spare ids share a spelling
const NAMES = { " ": "space", "\n": "newline", "\t": "tab", "\r": "return", "\v": "vertical tab", "\f": "page break" };
const nameOf = id => NAMES[header.characters[id]] || header.characters[id];
const decode = ids => ids.map(id => header.characters[id]).join("");
const percent = p => p >= 0.0005 ? `${(100 * p).toFixed(1)}\u00a0%` : "<\u00a00.1\u00a0%";
const bits = p => (-Math.log2(Math.max(p, 1e-30))).toFixed(2);

const unifyLines = text => text.replace(/\r\n?/g, "\n");

/** Ids of a text: folded as in training, capitals as small letters if the alphabet has none; what remains is unknown. */
function encode(text) {
  const folded = Array.from(unifyLines(text), character => header.folding[character] ?? character).join("");
  return Array.from(folded, character => idOf.get(header.lowercase ? character.toLowerCase() : character) ?? 0);
}

function number(id) {
  const input = $(id), value = Number(input.value);
  if (input.value === "" || !Number.isFinite(value)) return Number(input.defaultValue);
  return Math.min(Number(input.max), Math.max(Number(input.min), value));
}

const whole = id => Math.round(number(id));

/** Ids by their probability. */
const ranked = dist => [...dist.keys()].sort((a, b) => dist[b] - dist[a] || a - b);

function say(sentence, id = "live") {
  $(id).textContent = sentence;
}

// ---- The service: a worker made of this page's own text, or this thread ----

let send = () => {};

function startService(buffer) {
  const message = { kind: "load", header, buffer };
  const source = `${$("engine").textContent}\n${$("service").textContent}
    const take = PicoService.serve(PicoEngine, message => postMessage(message));
    onmessage = event => take(event.data);
    postMessage("running");`;
  try {
    const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    worker.onerror = event => { event.preventDefault(); startHere(message); };
    worker.onmessage = () => startThere(worker, message);
  } catch {
    startHere(message);
  }
}

/** The weights move to a worker that runs: the page keeps no copy, so from here on there is no way back. */
function startThere(worker, message) {
  worker.onerror = fail;
  worker.onmessage = event => receive(event.data);
  send = request => worker.postMessage(request);
  worker.postMessage(message, [message.buffer]);
}

/** Nothing computes any more: say so where it is read out too, and leave no button that would do nothing. */
function fail() {
  setBusy(false);
  for (const id of ["go", "step", "roll-go", "roll-mine", "clear"]) $(id).disabled = true;
  for (const id of ["state", "live"]) say("The model has failed. Load the page again.", id);
}

function startHere(message) {
  addEventListener("error", fail);
  send = PicoService.serve(PicoEngine, receive);
  send(message);
}

/** The weights out of the page, element by element: each one's text is dropped before the next one is read. */
function unpack() {
  const bytes = new Uint8Array(header.size);
  let at = 0;
  for (const element of document.querySelectorAll(".weights")) {
    const part = atob(element.textContent);
    for (let i = 0; i < part.length; i++) bytes[at++] = part.charCodeAt(i);
    element.remove();
  }
  return bytes.buffer;
}

const receivers = {
  ready() {
    $("state").textContent = "Ready.";
    for (const id of ["go", "step", "roll-go", "roll-mine", "clear"]) $(id).disabled = false;
    restore();
  },
  text: ({ at, ids, next }) => addText(at, ids, next),
  done({ written, seconds }) {
    setBusy(false);
    if (written === 1) say(`Wrote ${nameOf(model.text.at(-1))}.`);
    else if (written) say(`Wrote ${written} characters in ${seconds.toFixed(1)} seconds, ${Math.round(written / seconds)} a second.`);
    else say(`Read ${model.text.length} characters.`);
    select(pendingAt ?? (written > 1 ? model.at : model.text.length));
    pendingAt = null;
  },
  paused() {
    setBusy(false);
    say(`Paused after ${model.text.length} characters.`);
    pendingAt = null;
    select(model.text.length);
  },
  inspected: showInside,
  roll: showWindow,
  rolled: sumUpRoll,
};
const receive = message => receivers[message.kind](message);

// ---- Writing ----

let pendingAt = null; // the place that a link names, chosen once the text is there

const PANELS = ["expected-about", "expected", "attention-about", "attention", "attention-table", "lens-about", "lens"];

let cameFrom = null; // what had the focus when writing began

/** Buttons that make no sense now are off; the focus goes to the pause and then back, as it would be lost on one of them. */
function setBusy(busy) {
  const focused = document.activeElement;
  if (busy) cameFrom = focused;
  model.busy = busy;
  if (busy) $("pause").disabled = false;
  if (busy && focused.matches("#go, #step, #expected button")) $("pause").focus();
  for (const id of ["go", "step", "clear"]) $(id).disabled = busy;
  // The table of expected characters is made anew, with its buttons.
  if (!busy && focused === $("pause")) (cameFrom.matches("#go, #step") ? cameFrom : $("text")).focus();
  if (!busy) $("pause").disabled = true;
  $("text").setAttribute("aria-busy", busy);
  for (const id of PANELS) $(id).classList.toggle("stale", busy);
}

const settings = count => ({
  count, temperature: number("temperature"), topK: whole("top-k"), seed: whole("seed"), speed: Number($("speed").value),
});

/** The ids that a prompt stands for: an empty one is a newline, of a long one the last ten windows are read. */
function promptIds() {
  const ids = encode($("prompt").value).slice(-header.roll_windows * header.context_len);
  return ids.length ? ids : [idOf.get("\n")];
}

/** Say how the prompt is read, where that differs from what was typed. */
function describePrompt() {
  const typed = unifyLines($("prompt").value), ids = encode(typed), unknown = ids.filter(id => id === 0).length;
  const folded = keep(ids) === typed ? "" : `Read as: \u201c${decode(ids)}\u201d `;
  const lost = unknown ? `${unknown} ${unknown === 1 ? "character" : "characters"} became ${header.characters[0]}.` : "";
  $("prompt-about").textContent = `${folded}${lost}`.trim();
}

/** Write on, after reading the prompt anew if it is another one. */
function write(count) {
  const prompt = promptIds();
  const same = prompt.length === model.prompt && prompt.every((id, i) => model.text[i] === id);
  if (!same) clearText();
  if (!same && count > 1) pendingAt = prompt.length; // the first character that it writes
  ask(model.text.length, same ? [] : prompt, settings(count));
  if (!same) model.prompt = prompt.length;
}

function ask(keep, ids, write) {
  setBusy(true);
  say(write ? "Writing." : "Reading.");
  send({ kind: "text", keep, ids, write: write || null });
}

function clearText() {
  cut(0);
  model.prompt = 0;
  $("expected").hidden = true;
  $("expected-about").textContent = INVITATION;
  clearInside(INVITATION);
}

/** Keep the first `length` characters. */
function cut(length) {
  model.text.length = length;
  model.dists.length = Math.min(model.dists.length, length + 1);
  while ($("text").children.length > length) $("text").lastChild.remove();
  if (length) appendNext(); // a pause may come before the first new character, and chooses what comes next
  model.prompt = Math.min(model.prompt, length);
  model.at = Math.min(model.at, length);
}

function addText(at, ids, next) {
  if (at !== model.text.length) return; // of a text that has been cut meanwhile
  $("text").querySelector(".next")?.remove();
  ids.forEach((id, i) => {
    model.text.push(id);
    model.dists[model.text.length] = next[i];
    $("text").append(characterSpan(model.text.length - 1));
  });
  appendNext();
}

function appendNext() {
  $("text").append(element("span", "", { className: "next", id: `c${model.text.length}`, role: "option", ariaLabel: "what comes next" }));
  $("text").lastChild.setAttribute("aria-selected", "false");
}

function characterSpan(at) {
  const id = model.text[at], p = model.dists[at]?.[id];
  const span = element("span", header.characters[id], { id: `c${at}`, role: "option", ariaLabel: nameOf(id) });
  span.setAttribute("aria-selected", "false");
  if (at < model.prompt) span.classList.add("prompt");
  if (p === undefined) return span;
  span.style.setProperty("--p", p.toFixed(3));
  span.title = `${nameOf(id)}: ${percent(p)}, ${bits(p)} bits`;
  if (p < 0.05) span.classList.add("rare");
  return span;
}

/** Put another character at a place and write on from it. */
function goOnWith(at, id) {
  cut(at);
  ask(at, [id], settings(whole("count")));
}

// ---- Choosing a character ----

function select(at, { speak = false } = {}) {
  if (!model.text.length) return;
  $("text").querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  model.at = Math.max(0, Math.min(model.text.length, Math.round(at)));
  const span = $(`c${model.at}`);
  span.setAttribute("aria-selected", "true");
  $("text").setAttribute("aria-activedescendant", span.id);
  keepInView(span);
  showExpected();
  if (model.at > 0) send({ kind: "inspect", length: model.at });
  else clearInside(describeChosen());
  if (speak) say($("expected-about").textContent);
  remember();
}

/** Scroll the text's own box, and never the page. */
function keepInView(span) {
  const box = $("text"), top = span.offsetTop, bottom = top + span.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top - 8;
  if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight + 8;
}

function describeChosen() {
  const { at, text, dists } = model, id = text[at], p = dists[at]?.[id];
  if (at === text.length) return `What comes next, after ${text.length} characters.`;
  if (p === undefined) return `Character 1, ${nameOf(id)}: nothing stands before it, so nothing predicts it.`;
  return `Character ${at + 1}, ${nameOf(id)}: ${percent(p)}, ${bits(p)} bits.`;
}

function showExpected() {
  const { at, text, dists } = model, dist = dists[at];
  $("expected-about").textContent = describeChosen();
  $("expected").hidden = !dist;
  if (!dist) return;
  const top = ranked(dist).slice(0, 10);
  if (at < text.length && !top.includes(text[at])) top.push(text[at]);
  $("expected").tBodies[0].replaceChildren(...top.map(id => expectedRow(id, dist[id], at, dist[top[0]])));
}

function expectedRow(id, p, at, longest) {
  const taken = id === model.text[at];
  const bar = element("span", "", { className: "bar" });
  bar.style.width = `${100 * p / longest}%`;
  const button = element("button", `write on with ${nameOf(id)}`, { type: "button", className: "small", disabled: header.never.includes(id) });
  button.onclick = () => !model.busy && goOnWith(at, id);
  const name = element("th", [element("kbd", nameOf(id)), taken ? " (written here)" : ""], { scope: "row" });
  const cells = [name, element("td", percent(p)), element("td", bits(p)), element("td", bar, { className: "wide" }), element("td", button)];
  return element("tr", cells, { className: taken ? "taken" : "" });
}

const MOVES = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -20, ArrowDown: 20, Home: -Infinity, End: Infinity };
$("text").addEventListener("keydown", event => {
  // With a modifier the keys are the browser's.
  if (!(event.key in MOVES) || model.busy || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  select(model.at + MOVES[event.key], { speak: true });
});
$("text").addEventListener("click", event => {
  const place = /^c(\d+)$/.exec(event.target.id);
  if (place && !model.busy) select(Number(place[1]), { speak: true });
});

// ---- Inside the model: attention and the logit lens ----

const INVITATION = "Click a character of the text.";
let inside = null;
let wantsSpread = false; // the tour asks for a head that looks at the text

function clearInside(sentence) {
  inside = null;
  for (const id of ["attention-about", "lens-about"]) $(id).textContent = sentence;
  $("attention").replaceChildren();
  $("attention-table").tBodies[0].replaceChildren();
  $("lens").hidden = true;
}

function showInside(message) {
  if (message.length !== model.at) return;
  inside = message;
  if (wantsSpread) chooseSpread();
  wantsSpread = false;
  showAttention();
  showLens();
}

const looksMostAt = weights => weights.indexOf(Math.max(...weights));
const entropy = weights => -sum([...weights].map(weight => weight * Math.log2(weight || 1)));

/** If the head shown looks at the context slot, take the one that spreads most over the text. */
function chooseSpread() {
  const heads = [...inside.attention.keys()];
  if (looksMostAt(inside.attention[Number($("layer").value) * header.n_head + Number($("head").value)])) return;
  const atText = heads.filter(head => looksMostAt(inside.attention[head]));
  const [best] = (atText.length ? atText : heads).sort((a, b) => entropy(inside.attention[b]) - entropy(inside.attention[a]));
  $("layer").value = Math.floor(best / header.n_head);
  $("head").value = best % header.n_head;
  remember();
}

function showAttention() {
  if (!inside) return;
  const layer = Number($("layer").value), head = Number($("head").value);
  const weights = inside.attention[layer * header.n_head + head];
  const names = [...weights.keys()].map(s => s === 0 ? "context slot" : nameOf(model.text[inside.start + s - 1]));
  const largest = Math.max(...weights);
  $("attention").replaceChildren(...names.map((name, s) => attentionColumn(s, name, weights[s] / largest)));
  const best = looksMostAt(weights);
  const where = best ? `looked most at character ${inside.start + best} (${names[best]}), ${model.at + 1 - inside.start - best} back` : "looked most at the context slot";
  const empty = inside.start ? "" : " This is the first window: its context slot is empty.";
  $("attention-about").textContent = `${describeChosen()} Layer ${layer + 1}, head ${head + 1} ${where}: ${percent(largest)}.${empty}`;
  const rows = names.map((name, s) => element("tr", [element("th", s ? `${inside.start + s}` : "-", { scope: "row" }), element("td", name), element("td", percent(weights[s]))]));
  $("attention-table").tBodies[0].replaceChildren(...rows);
}

function attentionColumn(s, name, height) {
  const bar = element("i", "");
  bar.style.setProperty("--w", height.toFixed(3));
  const shown = { space: "\u2423", newline: "\u21b5" }[name] ?? (name === "context slot" ? "context" : name.slice(0, 1));
  return element("div", [bar, shown], { className: s ? "" : "slot" });
}

function showLens() {
  const id = model.text[model.at];
  $("lens-about").textContent = describeChosen();
  $("lens").hidden = false;
  const rows = inside.lens.map((dist, layer) => {
    const top = ranked(dist).slice(0, 3).map(best => element("td", `${nameOf(best)} ${percent(dist[best])}`));
    const name = element("th", layer ? `layer ${layer}` : "the input", { scope: "row" });
    return element("tr", [name, ...top, element("td", id === undefined ? "-" : percent(dist[id]))]);
  });
  $("lens").tBodies[0].replaceChildren(...rows);
}

// ---- The roll ----

let windows = {}; // of each mode, what its windows came to; kept until a text changes
let read = ""; // the texts that `windows` belong to
let reading = 0; // number of the latest reading; windows of earlier ones may still be on their way

const COLUMNS = { "as is": "own vector", zeroed: "no vector", other: "other text\u2019s" };
const AGAIN = { zeroed: ", without the vectors", other: ", with the other text\u2019s vectors", "other's own": " of the other text" };
const rollMode = () => document.querySelector("[name=mode]:checked").value;
const sum = values => values.reduce((total, value) => total + value, 0);
/** Bits per character over some windows. */
const mean = list => sum(list.flatMap(window => [...window.losses])) / sum(list.map(window => window.losses.length)) / Math.LN2;
const signed = change => `${change >= 0 ? "+" : "\u2212"}${Math.abs(change).toFixed(3)}`;
const rollIds = id => encode($(id).value).slice(0, header.roll_windows * header.context_len);

function startRoll() {
  const ids = rollIds("roll-text"), other = rollIds("roll-other");
  if (ids.length < 2 || !other.length) return say("Both texts need some characters.", "roll-live");
  if (read !== `${ids};${other}`) windows = {};
  read = `${ids};${other}`;
  const count = PicoEngine.windowSpans(ids.length, header.context_len).length;
  // A reading that was cut short is not kept.
  for (const mode of Object.keys(windows)) if (mode === rollMode() || windows[mode].length < count) delete windows[mode];
  $("strip").replaceChildren();
  showRollTable();
  say("Reading.", "roll-live");
  showProgress("as is", 0);
  reading += 1;
  send({ kind: "roll", ids, other, mode: rollMode(), reading });
}

/** Say which window is being read, not to a screen reader: there are too many of them. */
function showProgress(mode, index) {
  const spans = PicoEngine.windowSpans(rollIds(mode === "other's own" ? "roll-other" : "roll-text").length, header.context_len);
  say(index < spans.length ? `Reading window ${index + 1} of ${spans.length}${AGAIN[mode] ?? ""}` : "", "roll-progress");
}

function showWindow(message) {
  if (message.reading !== reading) return;
  const list = windows[message.mode] ??= [];
  if (message.index !== list.length) return; // kept from an earlier reading
  list.push(message);
  showProgress(message.mode, message.index + 1);
  showRollTable();
  if (message.mode === rollMode()) $("strip").append(stripCell(message));
}

/** The vector that a window starts from, as training and `rollAs` in the service have it. */
function startOf(index) {
  const mode = rollMode(), given = windows[mode === "other" ? "other's own" : "as is"];
  if (index === 0 || mode === "zeroed") return given[0].context.map(() => 0);
  return given[(index - 1) % given.length].context;
}

/** A window of the strip: its vector, its loss, and what the change of its vector did to it. */
function stripCell({ index, losses }) {
  const loss = mean([{ losses }]), plain = mean([windows["as is"][index]]);
  const change = rollMode() === "as is" ? [] : [element("b", signed(loss - plain))];
  const label = element("figcaption", [`window ${index + 1}`, element("br"), `${loss.toFixed(3)} bits`, ...change]);
  return element("figure", [picture(startOf(index), `Window ${index + 1} starts from a vector`), label]);
}

/** A vector as a square of coloured cells. */
function picture(vector, name) {
  const side = Math.ceil(Math.sqrt(vector.length)), largest = Math.max(...vector.map(Math.abs)) || 1;
  const canvas = element("canvas", "", { width: side, height: side, role: "img" });
  canvas.setAttribute("aria-label", `${name} of length ${Math.hypot(...vector).toFixed(1)}.`);
  const pen = canvas.getContext("2d");
  vector.forEach((value, i) => {
    pen.fillStyle = value < 0 ? `rgba(179, 84, 30, ${-value / largest})` : `rgba(31, 95, 168, ${value / largest})`;
    pen.fillRect(i % side, Math.floor(i / side), 1, 1);
  });
  return canvas;
}

/** One column for each reading so far, side by side. */
function showRollTable() {
  const own = windows["as is"] ?? [], modes = Object.keys(COLUMNS).filter(mode => windows[mode]);
  $("roll-table").hidden = !own.length;
  if (!own.length) return;
  const heads = ["window", "characters", ...modes.map(mode => COLUMNS[mode])].map(name => element("th", name, { scope: "col" }));
  $("roll-table").tHead.replaceChildren(element("tr", heads));
  const rows = own.map(({ index, start, end }) => rollRow(`${index + 1}`, end - start, modes.map(mode => cellOf(mode, index, index + 1))));
  $("roll-table").tBodies[0].replaceChildren(...rows);
  $("roll-table").tFoot.replaceChildren(rollRow("all", own.at(-1).end, modes.map(mode => cellOf(mode, 0, own.length))));
}

/** Bits of some windows in a mode, and how far they are from those with the windows' own vectors. */
function cellOf(mode, from, to) {
  const part = windows[mode].slice(from, to);
  if (!part.length) return "";
  // Both sides of a total hold the same windows, also while they are still coming in.
  const loss = mean(part), plain = mean(windows["as is"].slice(from, from + part.length));
  return [loss.toFixed(3), mode === "as is" ? "" : element("small", signed(loss - plain))];
}

const rollRow = (name, count, cells) => element("tr", [element("th", name, { scope: "row" }), ...[`${count}`, ...cells].map(cell => element("td", cell))]);

function sumUpRoll(message) {
  if (message.reading !== reading) return;
  const { mode } = message;
  say("", "roll-progress");
  const plain = mean(windows["as is"]);
  if (mode === "as is") return say(`With its own context vectors the text costs ${plain.toFixed(3)} bits per character.`, "roll-live");
  const change = mean(windows[mode]) - plain;
  const how = mode === "zeroed" ? "Without context vectors" : "With the other text\u2019s context vectors";
  const meaning = change >= 0 ? "The own vectors made the text easier to guess." : "The own vectors were no help here.";
  say(`${how} each character costs ${Math.abs(change).toFixed(3)} bits ${change >= 0 ? "more" : "less"}: ${(plain + change).toFixed(3)} instead of ${plain.toFixed(3)}. ${meaning}`, "roll-live");
}

// ---- The tour ----

/** Write something, unless there is a text already, and then move the focus. */
function withText(id) {
  if (!model.text.length) write(whole("count"));
  $(id).focus();
}

/** Show attention of a character that has something before it, by a head that looks at the text. */
function showSpread() {
  wantsSpread = true;
  if (!model.text.length) {
    write(whole("count"));
    pendingAt = model.prompt + whole("count") - 1; // the last one
  } else if (!model.busy) {
    select(model.at < model.text.length / 2 ? model.text.length - 1 : model.at);
  }
  $("layer").focus();
}

function rollWithOther() {
  document.querySelector("[name=mode][value=other]").checked = true;
  startRoll();
}

const STOPS = [
  ["Characters", `The model reads and writes single characters: ${header.knows}, ${header.characters.length} ids in all. It knows no words. Whatever it knows of spelling, names or grammar, it has found in sequences of characters.`, "write", () => $("prompt").focus()],
  ["What it expects", "After every character the model gives each possible next one a probability. Click a character of the text to see the ten that were most probable there. One bit of surprise is a coin's toss: 50 % is 1 bit, 25 % is 2 bits.", "text-label", () => withText("text")],
  ["Sampling", "The next character is drawn by chance, by these probabilities. A temperature below 1 favours the probable ones, and 0 always takes the first. Top-k leaves only the k most probable. The same seed draws the same text again.", "write", () => $("temperature").focus()],
  ["Another character", "Each draw decides all that follows. Click a character of the text, press \u201cwrite on with\u201d beside another one, and the model writes on from there.", "text-label", () => withText("text")],
  ["Attention", `To predict, each of the ${header.n_layer} layers looks back with ${header.n_head} heads. Each head spreads its attention over what stands before. Some look at the character just read, others at the beginning of the word or at the context slot.`, "attention-label", showSpread],
  ["Layer by layer", "The prediction is built up in steps. The first layers know little more than which characters are common. Read the table downwards to see where it settles.", "lens-label", () => withText("lens-label")],
  ["Windows and the roll", `The model sees ${header.context_len} characters at once, a window. What lies further back reaches it through a single vector: the mean of the window before. Take it away, or swap it for another text's, and the bits show what it was worth.`, "roll-label", rollWithOther],
  ["On your own", "Three small tasks, and what this model is and is not.", "after-label", () => $("after-label").focus()],
];
let stop = 0;

function showStop(index) {
  stop = Math.max(0, Math.min(STOPS.length - 1, index));
  const [title, text] = STOPS[stop];
  $("stop").replaceChildren(element("h3", `${stop + 1} of ${STOPS.length}: ${title}`), element("p", text));
  $("stop-back").disabled = stop === 0;
  $("stop-next").disabled = stop === STOPS.length - 1;
}

function moveStop(by) {
  showStop(stop + by);
  hideStop(false);
  $("stop").focus(); // so that it is read out, and a button that is now disabled keeps no focus
  remember();
}

function hideStop(hidden) {
  $("stop").hidden = hidden;
  $("stop-hide").textContent = hidden ? "Show text" : "Hide";
  $("stop-hide").setAttribute("aria-expanded", !hidden);
}

function showMe() {
  const [, , place, act] = STOPS[stop];
  if (!$("go").disabled) act();
  $(place).scrollIntoView();
}

// ---- The address keeps the moment ----

const KEPT = { n: "count", t: "temperature", k: "top-k", seed: "seed", speed: "speed", layer: "layer", head: "head" };

/** A text that `encode` gives the same ids: what was unknown is so again. */
const keep = ids => ids.map(id => id === 0 ? "\ufffd" : header.characters[id]).join("");

const ADDRESS_EVERY = 200; // milliseconds: browsers refuse more than a hundred changes in ten seconds
let restored = false; // until the address has been read, nothing may replace it
let changed = -Infinity, later = null; // when the address was changed, and the timer of a change that waits

/** Keep the state in the address, at once or a little later. */
function remember() {
  clearTimeout(later);
  later = setTimeout(changeAddress, Math.max(0, changed + ADDRESS_EVERY - performance.now()));
}

function changeAddress() {
  clearTimeout(later);
  if (!restored) return;
  changed = performance.now();
  const kept = new URLSearchParams(Object.entries(KEPT).map(([key, id]) => [key, $(id).value]));
  kept.set("prompt", $("prompt").value);
  if (model.text.length) kept.set("read", keep(model.text.slice(0, model.prompt)));
  if (model.text.length > model.prompt) kept.set("text", keep(model.text.slice(model.prompt)));
  if (model.text.length) kept.set("at", model.at);
  kept.set("roll", rollMode());
  for (const id of ["roll-text", "roll-other"]) if ($(id).value !== $(id).defaultValue) kept.set(id, $(id).value);
  kept.set("stop", stop + 1);
  history.replaceState(null, "", `#${kept}`);
}

/** Copy the address; where the browser forbids that, show it, chosen, so that a key copies it. */
async function copyLink() {
  changeAddress();
  try {
    await navigator.clipboard.writeText(location.href);
    $("link-field").hidden = true;
    say("The link is copied.");
  } catch {
    $("link-field").hidden = false;
    $("link").value = location.href;
    $("link").select();
    say("The browser does not let the page copy. The link is selected: copy it with Ctrl+C, or with Cmd+C on a Mac.");
  }
}

/** The text, or none if the model knows few of its letters: one with another alphabet would read unknown characters only. */
function ifKnown(text) {
  const ids = encode(text);
  return ids.filter(id => id === 0).length < ids.length / 10 ? text : "";
}

/** Take the state from the address. Nothing is written until a reader asks for it; a text in the address is only read. */
function restore() {
  restored = true;
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const [key, id] of Object.entries(KEPT)) if (kept.has(key)) setValue($(id), kept.get(key));
  $("prompt").value = kept.get("prompt") ?? ifKnown("the history of ");
  describePrompt();
  for (const id of ["roll-text", "roll-other"]) $(id).value = kept.get(id) ?? ifKnown($(id).defaultValue);
  const radios = [...document.querySelectorAll("[name=mode]")];
  (radios.find(radio => radio.value === kept.get("roll")) ?? radios[0]).checked = true;
  showStop(Math.round(Number(kept.get("stop") ?? 1)) - 1 || 0);
  const prompt = encode(kept.get("read") ?? ""), written = encode(kept.get("text") ?? "");
  if (!prompt.length) return;
  clearText();
  model.prompt = prompt.length;
  pendingAt = kept.has("at") ? Number(kept.get("at")) || 0 : null;
  ask(0, [...prompt, ...written], null);
}

/** Take a value that the field knows; others leave it as it is. */
function setValue(field, value) {
  const known = field.options ? [...field.options].some(option => option.value === value) : value !== "" && Number.isFinite(Number(value));
  if (known) field.value = value;
}

// ---- Beginning ----

function fill(select, count) {
  select.append(...Array.from({ length: count }, (_, i) => element("option", `${i + 1}`, { value: i })));
}

function listen() {
  $("go").onclick = () => write(whole("count"));
  $("step").onclick = () => write(1);
  $("pause").onclick = () => send({ kind: "pause" });
  $("clear").onclick = () => { clearText(); say("The text is empty."); remember(); };
  $("layer").onchange = $("head").onchange = showAttention;
  $("roll-go").onclick = startRoll;
  $("roll-mode").onchange = () => { remember(); if (windows["as is"]) startRoll(); };
  $("roll-mine").onclick = () => { $("roll-text").value = keep(model.text); remember(); };
  $("prompt").addEventListener("input", describePrompt);
  for (const id of ["prompt", "roll-text", "roll-other", ...Object.values(KEPT)]) $(id).addEventListener("change", remember);
  $("stop-back").onclick = () => moveStop(-1);
  $("stop-next").onclick = () => moveStop(1);
  $("stop-show").onclick = showMe;
  $("stop-hide").onclick = () => hideStop(!$("stop").hidden);
  $("copy").onclick = copyLink;
  addEventListener("hashchange", () => location.hash.includes("prompt=") && !model.busy && restore());
}

fill($("layer"), header.n_layer);
fill($("head"), header.n_head);
showStop(0);
listen();
startService(unpack());
