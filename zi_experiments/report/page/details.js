"use strict";
// What is said of single runs: plan against measurement, two runs against each other, failures, environments.

const MOST_FAILURES = 200;

function planned(run) {
  const found = (name) => (isPlanned(run) ? ABSENT : shown(name, run));
  const load = ["load", ABSENT, shown("predicted_load_s", run), found("load_s"), ABSENT, ABSENT, ABSENT, ABSENT];
  const prefill = ["prefill", shown("bound_prefill_s", run), shown("predicted_prefill_s", run), found("ttft_s"),
    shown("prefill_prediction_error", run), shown("prefill_fraction_of_bound", run),
    shown("bound_prefill_limited_by", run), shown("predicted_prefill_limited_by", run)];
  const decode = ["decode step", shown("bound_decode_step_s", run), shown("predicted_decode_step_s", run), found("tpot_p50_s"),
    shown("decode_prediction_error", run), shown("fraction_of_bound", run), shown("bound_limited_by", run), shown("predicted_limited_by", run)];
  return tableOf(["", "at least", "predicted", "measured", "predicted / measured − 1", "of bound", "limited by", "mostly spent on"], [load, prefill, decode]);
}

function memory(run) {
  const places = [["GPU", "gpu", "gpu"], ["host", "cpu", "host"], ["disk", "nvme", "disk"]];
  return tableOf(["", "weights, plan", "weights, found", "everything, plan", "peak, measured"], places.map(([name, weights, all]) =>
    [name, shown(`planned_${weights}_bytes`, run), shown(`stored_${weights}_bytes`, run),
      shown(`planned_${all}_total_bytes`, run), shown(`${all}_peak_bytes`, run)]));
}

function facts(run) {
  const list = make("dl");
  for (const name of ["status", "error_type", "error", "hint", "machine", "verified", "rates_source", "started_at", "command", "source"]) {
    if (value(name, run) === null) continue;
    list.append(make("dt", {}, columns.get(name).label), make("dd", { class: name === "command" ? "command" : "" }, shown(name, run)));
  }
  return list;
}

function drawTimeline(plot, run) {
  const points = data.timelines[run];
  const x = points.map(([step]) => step);
  const line = (index, name, width) =>
    ({ type: "scatter", mode: "lines", name, x, y: points.map((point) => point[index]), line: { width, color: css("series-1") } });
  const ends = value("passes", run) > 1 ? [line(2, "smallest", 0.5), line(3, "largest", 0.5)] : [];
  const traces = [...ends, line(1, "median of the passes", 2)];
  plotInto(plot, traces, { xaxis: stepAxis(traces), yaxis: { title: { text: "step time, s" }, rangemode: "tozero" } });
}

function settings(run) {
  const rows = Object.entries(data.settings).map(([key, coded]) => [key, written(at(coded, run))]).filter(([, text]) => text !== ABSENT);
  return make("details", {}, make("summary", {}, "Settings"), tableOf(["setting", "value"], rows.sort(), "wrap"));
}

function fill(details, run) {
  if (details.childElementCount > 1) return;
  details.append(facts(run));
  if (value("weight_bytes", run) !== null || value("planned_cpu_bytes", run) !== null) {
    details.append(make("h3", {}, "Time"), planned(run), make("h3", {}, "Where bytes lived"), memory(run));
  }
  details.append(settings(run));
  if (data.timelines[run]) {
    const plot = make("div", { class: "plot", role: "img", "aria-label": "Step times" });
    details.append(make("h3", {}, "Steps"), plot);
    drawTimeline(plot, run);
  }
}

/** A section for each of these runs, which is filled when it is opened. */
function showEach(numbers) {
  document.getElementById("each").replaceChildren(...numbers.map((run) => {
    const decode = value("decode_tok_per_s", run) === null ? shown("status", run) : `${shown("decode_tok_per_s", run)} tok/s${isPlanned(run) ? `, ${shown("status", run)}` : ""}`;
    const details = make("details", { id: `run-${run}` }, make("summary", {}, `${data.labels[run]}: ${decode}`));
    details.addEventListener("toggle", () => details.open && fill(details, run));
    return details;
  }));
}

function openLinked() {
  const linked = document.getElementById(location.hash.slice(1));
  if (linked?.tagName === "DETAILS") {
    linked.open = true;
    linked.scrollIntoView();
  }
}
addEventListener("hashchange", openLinked);

function showFailures(numbers) {
  const failed = numbers.filter(isFailed);
  const rows = failed.slice(0, MOST_FAILURES).map((run) => [data.labels[run], ...["status", "error_type", "error", "hint"].map((name) => shown(name, run))]);
  const note = failed.length > rows.length ? `The first ${rows.length} of ${failed.length}.` : "";
  document.getElementById("failed").replaceChildren(
    ...(rows.length ? [tableOf(["run", "status", "kind", "reason", "hint"], rows, "wrap"), note] : ["Every run shown is ok."]));
}

const pair = document.getElementById("pair");

function ratio(a, b) {
  return typeof a === "number" && typeof b === "number" && a > 0 && b > 0 ? plain(b / a, 4) : ABSENT;
}

function differing(dictionary, a, b) {
  const rows = Object.entries(dictionary).map(([key, coded]) => [key, at(coded, a), at(coded, b)]).filter(([, first, second]) => first !== second);
  return rows.sort().map(([key, ...both]) => [key, ...both.map((each) => written(each))]);
}

function showPair() {
  const [a, b] = [Number(pair.elements.a.value), Number(pair.elements.b.value)];
  const numeric = data.columns.filter(({ name, unit }) => unit && (value(name, a) !== null || value(name, b) !== null));
  const all = numeric.map(({ name, label }) => [label, shown(name, a), shown(name, b),
    name.endsWith("_error") ? ABSENT : ratio(value(name, a), value(name, b))]);
  const parts = [make("h3", {}, "Figures"), tableOf(["", "A", "B", "B / A"], all)];
  for (const [title, dictionary] of [["Settings that differ", data.settings], ["Environment that differs", data.environment]]) {
    const rows = differing(dictionary, a, b);
    parts.push(make("h3", {}, title), rows.length ? tableOf(["", "A", "B"], rows, "wrap") : make("p", {}, "nothing"));
  }
  document.getElementById("differences").replaceChildren(...parts);
}

for (const [index, select] of [pair.elements.a, pair.elements.b].entries()) {
  select.append(...runs.map((run) => make("option", { value: run }, data.labels[run])));
  select.value = Math.min(index, runs.length - 1);
}
onInput(pair, showPair);
showPair();

/** Environments that differ, each with the number of its runs. */
function showEnvironments() {
  const keys = Object.keys(data.environment).sort();
  const groups = grouped(runs, (run) => JSON.stringify(keys.map((key) => at(data.environment[key], run))));
  document.getElementById("machines").replaceChildren(...[...groups.values()].map((members) => {
    const rows = keys.map((key) => [key, written(at(data.environment[key], members[0]))]).filter(([, text]) => text !== ABSENT);
    const summary = make("summary", {}, `${shown("machine", members[0])}: ${members.length} run${members.length > 1 ? "s" : ""}`);
    return make("details", {}, summary, rows.length ? tableOf(["", "value"], rows, "wrap") : "nothing is known");
  }));
}
showEnvironments();
