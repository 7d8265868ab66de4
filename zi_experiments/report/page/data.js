"use strict";
// The data of the page, and how values are written.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.labels.map((_, number) => number);
const columns = new Map(data.columns.map((column) => [column.name, column]));
const ABSENT = "–";

/** The value of a run in a coded column; null where there is none. */
function at(coded, run) {
  if (coded.values.length === 1) return coded.values[0];
  return coded.values[coded.codes ? coded.codes[run] : run];
}

const value = (name, run) => at(data.rows[name], run);

const plain = (number, digits) => number.toLocaleString("en", { maximumSignificantDigits: digits }).replace("-", "−");

function scaled(number, unit) {
  const [prefix, size] = [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]].find(([, size]) => number >= size) ?? ["", 1];
  return `${plain(number / size, 3)} ${prefix}${unit}`;
}

/** A value with its unit, as text. */
function written(given, unit) {
  if (given === null || given === undefined) return ABSENT;
  if (typeof given === "boolean") return given ? "yes" : "no";
  if (typeof given !== "number") return given;
  if (unit === "s" || unit === "J") return given >= 1 || given <= 0 ? `${plain(given, 4)} ${unit}` : `${plain(1000 * given, 3)} m${unit}`;
  if (unit === "B" || unit === "B/s") return scaled(given, unit);
  if (unit === "share") return `${plain(100 * given, 3)} %`;
  return Number.isInteger(given) ? given.toLocaleString("en") : plain(given, 4);
}

const shown = (name, run) => written(value(name, run), columns.get(name).unit);

/** Plans, whose figures are not measured, and runs that have none. */
const isPlanned = (run) => ["predicted", "bound"].includes(value("status", run));
const isFailed = (run) => value("status", run) !== "ok" && !isPlanned(run);

/** An element with attributes and children; text stays text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, content] of Object.entries(attributes)) {
    if (content !== null && content !== false) element.setAttribute(name, content);
  }
  element.append(...children);
  return element;
}

/** A cell of a table. */
function cell(text, kind = "") {
  return make("td", { class: text === ABSENT ? `${kind} absent` : kind }, text);
}

/** A table in a box that scrolls. Rows are of texts, the first heads its row; `kind` is the class of the other cells. */
function tableOf(headers, rows, kind = "number") {
  const head = make("tr", {}, ...headers.map((text, i) => make("th", { scope: "col", class: i ? kind : "" }, text)));
  const body = rows.map(([name, ...texts]) =>
    make("tr", {}, make("th", { scope: "row" }, name), ...texts.map((text) => cell(text, kind))));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": headers.filter(Boolean).join(", ") }, table);
}

/** Runs by the text of some columns, in order of appearance. */
function grouped(numbers, key) {
  const groups = new Map();
  for (const run of numbers) {
    const name = key(run);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(run);
  }
  return groups;
}

/** Call when something in a form is typed or chosen: a program that chooses for a user only causes the second event. */
function onInput(form, call) {
  form.addEventListener("input", call);
  form.addEventListener("change", call);
}
