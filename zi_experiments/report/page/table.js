"use strict";
// The table of runs: filters, order, and how many of them are shown.

const STEP = 200;
const FILTERS = ["status", "model", "engine", "offload", "quant", "machine"];
const form = document.getElementById("filters");
const shownColumns = data.columns.filter((column) => column.isShown && runs.some((run) => value(column.name, run) !== null));
const order = { name: null, isDown: false };
let chosen = runs;
let most = STEP;

const texts = runs.map((run) =>
  [data.labels[run], ...data.columns.filter((column) => !column.unit).map((column) => shown(column.name, run))].join(" ").toLowerCase());

const choices = new Map(FILTERS.map((name) => [name, names(name)]));
for (const [name, all] of choices) {
  if (all.length < 2) continue;
  const select = make("select", { name }, make("option", { value: "" }, "all"),
    ...all.map((choice, index) => make("option", { value: index }, written(choice))));
  form.append(make("label", {}, columns.get(name).label, select));
}

function fits(run) {
  const text = form.elements.text.value.trim().toLowerCase();
  return (!text || texts[run].includes(text)) && FILTERS.every((name) => {
    const index = form.elements[name]?.value;
    return !index || value(name, run) === choices.get(name)[index];
  });
}

/** Runs without a value are last in both directions. */
function compareRuns(a, b) {
  const [first, second] = order.name === "label" ? [data.labels[a], data.labels[b]] : [value(order.name, a), value(order.name, b)];
  if (first === null || second === null) return (first === null) - (second === null);
  const ascending = typeof first === "number" && typeof second === "number"
    ? first - second : String(first).localeCompare(String(second), "en", { numeric: true });
  return order.isDown ? -ascending : ascending;
}

function header(name, label, kind) {
  const isSorted = order.name === name;
  const direction = order.isDown ? "descending" : "ascending";
  const button = make("button", { type: "button" }, `${label}${isSorted ? (order.isDown ? " ▼" : " ▲") : ""}`);
  button.addEventListener("click", () => {
    // numbers begin with the largest
    order.isDown = isSorted ? !order.isDown : kind === "number";
    order.name = name;
    update();
    document.querySelector(`#table th[data-name="${name}"] button`).focus();
  });
  return make("th", { scope: "col", class: kind, "data-name": name, "aria-sort": isSorted ? direction : "none" }, button);
}

function row(run) {
  const link = make("a", { href: `#run-${run}` }, data.labels[run]);
  return make("tr", {}, make("th", { scope: "row" }, link), ...shownColumns.map((column) => {
    if (column.name === "status") return make("td", {}, make("span", { class: `status ${shown("status", run)}` }, shown("status", run)));
    return cell(shown(column.name, run), column.unit ? "number" : "");
  }));
}

function showTable() {
  const head = [header("label", "run", ""), ...shownColumns.map((column) => header(column.name, column.label, column.unit ? "number" : ""))];
  document.getElementById("table").replaceChildren(
    make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...chosen.slice(0, most).map(row)));
  const hidden = Math.max(0, chosen.length - most);
  document.getElementById("count").textContent =
    `${chosen.length} of ${runs.length} runs${hidden ? `, the first ${most} shown` : ""}`;
  document.getElementById("more").hidden = !hidden;
  showEach(chosen.slice(0, most));
}

function update() {
  const found = runs.filter(fits);
  chosen = order.name ? found.sort(compareRuns) : found;
  showTable();
  showFailures(chosen);
  drawAgain(chosen);
}

let waiting;
onInput(form, () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { most = STEP; update(); }, 150);
});
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("more").addEventListener("click", () => { most += STEP; showTable(); });
addEventListener("DOMContentLoaded", update);
