"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLORS = 8, ROWS_AT_ONCE = 200;
// An axis is logarithmic if its values differ by more than this factor.
const LOGARITHMIC = 8;

function element(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

/* ---- charts ---- */

const SHAPES = ["circle", "triangle", "rect", "rectRot", "crossRot", "star"];

function dataset(series, index, form) {
  const own = color(`--s${index % COLORS}`);
  const bars = form.includes("bars");
  return {
    label: series.label, data: series.values, borderColor: own, backgroundColor: own,
    borderWidth: bars ? 0 : 2, maxBarThickness: 18, tension: 0, spanGaps: false,
    pointStyle: bars ? "rect" : SHAPES[index % SHAPES.length], pointRadius: form === "points" ? 5 : 2.5, pointHoverRadius: 6,
    borderDash: !bars && index >= COLORS ? [6, 4] : [], showLine: true,
  };
}

/* Settings of a logarithmic axis, with some room at its ends; nothing for values of one size. */
function logarithmic(chart) {
  const values = chart.series.flatMap((s) => s.values.map((v) => v?.y)).filter((v) => v > 0);
  const low = Math.min(...values), high = Math.max(...values);
  if (chart.form !== "points" || high < LOGARITHMIC * low) return {};
  return { type: "logarithmic", min: low / 1.3, max: high * 1.3 };
}

function drawn(chart, canvas) {
  const across = chart.form.endsWith("across"), stacked = chart.form.startsWith("stacked"), points = chart.form === "points";
  const axis = (title, more) => ({
    title: { display: Boolean(title), text: title, color: color("--quiet") },
    grid: { color: color("--line") }, border: { color: color("--line") },
    ticks: { color: color("--quiet"), maxRotation: 0, autoSkip: !across, autoSkipPadding: 12 }, stacked, ...more,
  });
  const value = { beginAtZero: !points, type: "linear", grace: points ? "5%" : 0, ...logarithmic(chart) };
  if (across) canvas.parentElement.style.minHeight = `${110 + chart.labels.length * (stacked ? 26 : 8 + 14 * chart.series.length)}px`;
  return new Chart(canvas, {
    type: chart.form.includes("bars") ? "bar" : "line",
    data: { labels: chart.labels ?? undefined, datasets: chart.series.map((s, i) => dataset(s, i, chart.form)) },
    options: {
      animation: false, responsive: true, maintainAspectRatio: false, indexAxis: across ? "y" : "x",
      interaction: { mode: points ? "nearest" : "index", axis: points ? "xy" : across ? "y" : "x", intersect: false },
      scales: {
        x: axis(chart.x, across ? value : points ? { type: "linear" } : {}),
        y: axis(chart.y, across ? {} : value),
      },
      plugins: {
        legend: { display: chart.series.length > 1, position: "bottom", labels: { color: color("--text"), usePointStyle: true, boxHeight: 7 } },
        tooltip: { callbacks: points ? { title: (items) => items[0].raw.run, label: (item) => `${item.raw.x} %: ${shown(item.raw.y)}` } : {} },
      },
    },
  });
}

function drawCharts() {
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  const all = DATA.charts.map((chart) => drawn(chart, $(`#chart-${chart.id} canvas`)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    all.splice(0).forEach((chart) => chart.destroy());
    all.push(...DATA.charts.map((chart) => drawn(chart, $(`#chart-${chart.id} canvas`))));
  });
}

/* ---- weights ---- */

const TITLES = {
  name: "weight", weights: "elements", sparsity: "sparsity", relative_error: "relative error",
  error: "error", tokens: "tokens", iterations: "iterations", dampening: "dampening",
  seconds: "seconds", fallback: "fallback", operation: "operation", backend: "backend",
};
const FORMATS = {
  weights: (v) => v.toLocaleString("en"), tokens: (v) => v.toLocaleString("en"), sparsity: (v) => v.toFixed(4),
  relative_error: (v) => v.toFixed(5), error: (v) => v.toExponential(2), seconds: (v) => v.toFixed(4),
};

function shown(value, attribute) {
  if (value === null || value === undefined) return "–";
  if (FORMATS[attribute]) return FORMATS[attribute](value);
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : value;
}

/* One run's weights: name(row) and value(row, attribute). */
class Weights {
  constructor(run) {
    Object.assign(this, run);
    this.attributes = Object.keys(run.values);
    this.names = run.block.map((_, row) => this.nameOf(row));
    const words = this.attributes.filter((attribute) => this.isWord(attribute));
    this.texts = this.names.map((name, row) => [name, ...words.map((word) => this.value(row, word) ?? "")].join(" ").toLowerCase());
  }
  nameOf(row) {
    let at = 0;
    const kind = this.kinds[this.kind[row]].split(".").map((part) => (part === "*" ? this.numbers[row][at++] : part));
    return [this.blocks[this.block[row]], kind.join(".")].filter(Boolean).join(".");
  }
  value(row, attribute) {
    if (attribute === "name") return this.names[row];
    const column = this.values[attribute];
    return column.words ? column.words[column.at[row]] ?? null : column[row];
  }
  isWord(attribute) { return attribute === "name" || Boolean(this.values[attribute].words); }
}

const state = { run: 0, key: null, down: false, rows: [], limit: ROWS_AT_ONCE };
let weights = null;

function kindOf(attribute) { return weights.isWord(attribute) ? "word" : ""; }

function drawTable() {
  const head = $("#rows-table thead tr"), columns = ["name", ...weights.attributes];
  head.replaceChildren(...columns.map((column) => {
    const cell = element("th", "", { className: kindOf(column) }), button = element("button", TITLES[column], { type: "button" });
    button.addEventListener("click", () => sortBy(column));
    if (state.key === column) cell.ariaSort = state.down ? "descending" : "ascending";
    cell.append(button);
    return cell;
  }));
  const rows = state.rows.slice(0, state.limit).map((row) => {
    const line = element("tr");
    line.append(element("th", weights.names[row]), ...weights.attributes.map((a) => element("td", shown(weights.value(row, a), a), { className: kindOf(a) })));
    return line;
  });
  $("#rows-table tbody").replaceChildren(...rows);
  const total = weights.names.length, found = state.rows.length, hidden = found - rows.length;
  $("#count").textContent = found === total ? `${total.toLocaleString("en")} weights` : `${found.toLocaleString("en")} of ${total.toLocaleString("en")} weights`;
  $("#more").hidden = hidden === 0;
  $("#more").textContent = `Show more: ${hidden.toLocaleString("en")} are left`;
}

/* The first click on figures shows the largest ones, a second click the smallest. */
function sortBy(column) {
  state.down = state.key === column ? !state.down : !weights.isWord(column);
  state.key = column;
  search();
}

function search() {
  const wanted = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
  state.rows = [...weights.names.keys()].filter((row) => wanted.every((word) => weights.texts[row].includes(word)));
  if (state.key) state.rows.sort(compare);
  state.limit = ROWS_AT_ONCE;
  drawTable();
}

function compare(one, other) {
  const [a, b] = [one, other].map((row) => weights.value(row, state.key));
  // Weights without a value are last in both directions.
  if (a === null || b === null) return (a === null) - (b === null) || one - other;
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return (state.down ? -order : order) || one - other;
}

/* ---- heat map: blocks from left to right, kinds of weights or experts from top to bottom ---- */

const MEASURES = ["relative_error", "sparsity", "tokens", "seconds"];

/* Cells by row and block: the rows of the table in each, and their mean. */
function heatMap(measure, kind) {
  const lines = new Map();
  if (kind === "") weights.kinds.forEach((name, at) => lines.set(at, { label: name || "weight", cells: [] }));
  weights.block.forEach((block, row) => {
    const own = weights.kind[row];
    if (kind !== "" && own !== Number(kind)) return;
    const key = kind === "" ? own : weights.numbers[row].join(".");
    if (!lines.has(key)) lines.set(key, { label: key, cells: [] });
    const value = weights.value(row, measure);
    if (value !== null) (lines.get(key).cells[block] ??= []).push(row);
  });
  return [...lines.values()];
}

function mean(rows, measure) { return rows.reduce((sum, row) => sum + weights.value(row, measure), 0) / rows.length; }

function drawMap() {
  const measure = $("#measure").value, lines = heatMap(measure, $("#rows").value), map = $("#map");
  const values = lines.flatMap((line) => line.cells.filter(Boolean).map((rows) => mean(rows, measure)));
  const low = Math.min(...values), high = Math.max(...values), blocks = weights.blocks.length;
  const tall = lines.length > 24;
  map.classList.toggle("tall-map", tall);
  map.style.gridTemplateColumns = `fit-content(38%) repeat(${blocks}, minmax(0, 1fr))`;
  map.style.setProperty("--cell", tall ? `${Math.max(4, Math.floor(640 / lines.length))}px` : "26px");
  const every = Math.ceil(blocks / (map.clientWidth > 700 ? 32 : 8)), skip = tall ? Math.ceil(lines.length / 32) : 1;
  const cells = lines.flatMap((line, at) => [
    element("span", at % skip ? "" : line.label, { className: "row", title: line.label }),
    ...weights.blocks.map((_, block) => cell(line.cells[block], measure, low, high)),
  ]);
  const axis = weights.labels.map((label, at) => element("b", at % every ? "" : label));
  map.replaceChildren(...cells, element("b", "block"), ...axis);
  $("#low").textContent = shown(low, measure);
  $("#high").textContent = shown(high, measure);
  say(null);
}

function cell(rows, measure, low, high) {
  if (!rows) return element("i", "", { className: "none" });
  const item = element("i"), value = mean(rows, measure);
  item.style.setProperty("--v", high > low ? (100 * (value - low)) / (high - low) : 50);
  item.rows = rows;
  return item;
}

function say(rows) {
  const measure = $("#measure").value;
  let text = "Point at a cell for its value; click it to find its weights in the table.";
  if (rows) {
    const many = rows.length > 1 ? `mean of ${rows.length} weights ` : "";
    text = `${pattern(rows)}: ${TITLES[measure]} ${many}${shown(mean(rows, measure), measure)}`;
  }
  $("#readout").textContent = text;
}

function pattern(rows) {
  if (rows.length === 1) return weights.names[rows[0]];
  return [weights.blocks[weights.block[rows[0]]], weights.kinds[weights.kind[rows[0]]]].filter(Boolean).join(".");
}

function find(rows) {
  const parts = pattern(rows).split("*");
  $("#search").value = rows.length === 1 ? parts[0] : parts.join(" ");
  search();
  $("#table").scrollIntoView({ block: "start" });
}

function showRun(index) {
  state.run = index;
  weights = new Weights(DATA.runs[index]);
  if (state.key && state.key !== "name" && !weights.values[state.key]) state.key = null;
  document.querySelectorAll("select.run").forEach((select) => { select.value = index; });
  const before = $("#measure").value, measures = MEASURES.filter((name) => weights.values[name]);
  $("#measure").replaceChildren(...measures.map((name) => element("option", TITLES[name], { value: name })));
  if (measures.includes(before)) $("#measure").value = before;
  const experts = weights.kinds.map((name, at) => [name, at]).filter(([name]) => name.includes("*"));
  $("#rows").replaceChildren(element("option", "kinds of weights", { value: "" }),
    ...experts.map(([name, at]) => element("option", name, { value: at })));
  $("#by-expert").hidden = experts.length === 0;
  drawMap();
  search();
}

function start() {
  drawCharts();
  if (!DATA.runs.length) return;
  $("#weights").hidden = false;
  document.querySelectorAll(".of-runs").forEach((label) => { label.hidden = DATA.runs.length < 2; });
  document.querySelectorAll("select.run").forEach((select) => {
    select.replaceChildren(...DATA.runs.map((run, at) => element("option", run.label, { value: at })));
    select.addEventListener("change", () => showRun(Number(select.value)));
  });
  // The axis has as many labels as fit.
  addEventListener("resize", drawMap);
  $("#measure").addEventListener("change", drawMap);
  $("#rows").addEventListener("change", drawMap);
  $("#search").addEventListener("input", search);
  $("#more").addEventListener("click", () => { state.limit += 5 * ROWS_AT_ONCE; drawTable(); });
  $("#map").addEventListener("mouseover", (event) => say(event.target.rows ?? null));
  $("#map").addEventListener("click", (event) => event.target.rows && find(event.target.rows));
  showRun(0);
}

start();
