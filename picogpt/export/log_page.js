"use strict";
// The page works without this script; it adds reading the curve, the slider and the shaded excerpt.
const data = JSON.parse(document.getElementById("data").textContent);

// The curve: the nearest epoch of the pointer, or the next one by arrow key.
const chart = document.querySelector("svg[data-left]");
const cursor = chart.querySelector(".cursor");
const reading = document.getElementById("reading");
let point = -1;
function readPoint(index) {
  if (!data.points.length) return;
  point = Math.max(0, Math.min(data.points.length - 1, index));
  const { x, text } = data.points[point];
  cursor.setAttribute("x1", x);
  cursor.setAttribute("x2", x);
  cursor.style.visibility = "visible";
  reading.textContent = text;
}
chart.addEventListener("pointermove", event => {
  const box = chart.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
  const distances = data.points.map(point => Math.abs(point.x - x));
  readPoint(distances.indexOf(Math.min(...distances)));
});
chart.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  // With a modifier the keys are the browser's, and a page of several runs has no points to read.
  if (!step || !data.points.length || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  readPoint(point < 0 ? data.points.length - 1 : point + step);
});

// The slider: sample and excerpt of an epoch. The hash keeps its place when the page reloads itself.
const slider = document.getElementById("epoch");
function showEpoch(index) {
  const epoch = data.epochs[index];
  document.getElementById("epoch-label").textContent = epoch.label;
  document.getElementById("sample").textContent = epoch.sample;
  const excerpt = document.getElementById("excerpt");
  if (!excerpt) return;
  const bytes = atob(epoch.probabilities);
  excerpt.replaceChildren(...data.excerpt.map((spelling, i) => {
    const span = document.createElement("span");
    span.textContent = spelling;
    if (i === 0 || i > bytes.length) return span; // nothing predicts the first character
    const probability = bytes.charCodeAt(i - 1) / 255;
    span.style.setProperty("--p", probability.toFixed(3));
    span.title = `${(100 * probability).toFixed(0)} %`;
    if (probability < 0.05) span.className = "rare";
    return span;
  }));
}
if (slider && data.epochs.length) {
  const wanted = Number(/^#epoch=(\d+)$/.exec(location.hash)?.[1] ?? data.epochs.length) - 1;
  slider.value = Math.max(0, Math.min(data.epochs.length - 1, wanted));
  slider.addEventListener("input", () => {
    const index = Number(slider.value);
    const last = index === data.epochs.length - 1;
    history.replaceState(null, "", last ? location.pathname + location.search : `#epoch=${index + 1}`);
    showEpoch(index);
  });
  showEpoch(Number(slider.value));
}

// A run in training: the page reloads itself until there has been no news for too long, as after the process was killed.
if (data.reload) {
  const age = Date.now() / 1000 - data.reload.written;
  if (age < data.reload.patience) {
    // Not while someone reads: a reload would close the table and lose the place on the curve.
    const isRead = () => document.activeElement === chart || document.querySelector("details[open]");
    const reload = () => isRead() ? setTimeout(reload, 1000 * data.reload.every) : location.reload();
    setTimeout(reload, 1000 * data.reload.every);
  } else {
    const time = age < 7200 ? `${Math.round(age / 60)} minutes` : `${Math.round(age / 3600)} hours`;
    document.getElementById("state").textContent =
      `No news for ${time}, so this page no longer reloads itself. Start the run again, or reload the page.`;
  }
}
