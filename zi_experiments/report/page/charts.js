"use strict";
// One function for each kind of chart: the numbers of runs → traces and layout of Plotly.

const MOST_BARS = 20;
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];
const DASHES = ["solid", "dash", "dot"];
const names = (name) => [...new Set(runs.map((run) => value(name, run)))].sort();
const engines = names("engine");
const quants = names("quant");

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const color = (index) => css(`series-${(index % 6) + 1}`);
const engineColor = (run) => color(engines.indexOf(value("engine", run)));
const joined = (run, ...keys) => keys.map((key) => value(key, run)).filter((part) => part !== null).join(" ");

const isNarrow = () => innerWidth < 600;

/** Text for Plotly, which reads markup. */
const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

/** A name in up to two lines, for Plotly. */
function folded(text) {
  const most = isNarrow() ? 18 : 32;
  if (text.length <= most) return safe(text);
  const end = Math.max(...[" ", "-", "/"].map((mark) => text.lastIndexOf(mark, most - 1))) + 1 || most;
  return `${safe(text.slice(0, end))}<br>${safe(short(text.slice(end), most))}`;
}

/** An axis of a column's unit. */
function axis(name) {
  const { label, unit } = columns.get(name);
  const title = { text: unit === "s" ? `${label}, s` : label };
  if (unit === "share") return { title, tickformat: ".0%", rangemode: "tozero" };
  if (unit === "B") return { title, tickformat: "~s", ticksuffix: "B", rangemode: "tozero" };
  return { title, rangemode: "tozero" };
}

const hover = (run) => `${safe(data.labels[run])}<br>${safe(shown("machine", run))}`;
const has = (...keys) => (run) => keys.every((key) => value(key, run) !== null);

/** Horizontal bars, the first row at the top; text at their ends has room. */
function barLayout(rows, horizontal, traces) {
  const longest = Math.max(...traces.flatMap((trace) => trace.x));
  return {
    height: 110 + rows.length * Math.max(30, 15 * traces.length),
    barmode: "group",
    xaxis: { ...horizontal, range: [0, (isNarrow() ? 1.4 : 1.2) * longest || 1] },
    yaxis: { autorange: "reversed", automargin: true, tickvals: rows.map((_, i) => i), ticktext: rows.map(folded), ticks: "outside", ticklen: 4, tickcolor: "transparent" },
    legend: { traceorder: "normal" },
  };
}

const kinds = {
  answer({ y: [name], bars }, numbers) {
    const chosen = new Set(numbers);
    const there = bars.filter(({ run }) => run === null || (chosen.has(run) && value(name, run) !== null));
    const trace = (label, index, wanted) => {
      const places = there.map((_, i) => i).filter((i) => wanted(there[i].run));
      const x = places.map((i) => there[i].value ?? value(name, there[i].run));
      return {
        type: "bar", orientation: "h", width: 0.75, name: label, y: places, x, marker: { color: color(index) },
        text: x.map((each) => written(each, columns.get(name).unit)), textposition: "outside", cliponaxis: false,
        hovertext: places.map((i) => (there[i].run === null ? safe(there[i].name) : hover(there[i].run))), hovertemplate: "%{hovertext}<br>%{text}<extra></extra>",
      };
    };
    const traces = [
      trace("measured", 0, (run) => run !== null && !isPlanned(run)),
      trace("planned", 2, (run) => run !== null && isPlanned(run)),
      trace("published", 1, (run) => run === null),
    ].filter((each) => each.y.length);
    const layout = barLayout(there.map((bar) => bar.name), axis(name), [{ x: traces.flatMap((each) => each.x) }]);
    return { traces: there.some(({ run }) => run !== null) ? traces : [], layout: { ...layout, barmode: "overlay", showlegend: traces.length > 1 } };
  },

  fastest({ y: [name], by }, numbers) {
    const measured = numbers.filter(has(name));
    const several = new Set(measured.map((run) => value("model", run))).size > 1;
    const groups = grouped(measured, (run) => joined(run, ...by.slice(several ? 0 : 1, -1)));
    const rows = [...groups.keys()].sort().slice(0, MOST_BARS);
    const used = quants.filter((quant) => rows.some((row) => groups.get(row).some((run) => value("quant", run) === quant)));
    const traces = used.map((quant) => {
      const best = rows.map((row) => groups.get(row).filter((run) => value("quant", run) === quant)
        .reduce((a, b) => (a === null || value(name, b) > value(name, a) ? b : a), null));
      const there = rows.map((_, i) => i).filter((i) => best[i] !== null);
      return {
        type: "bar", orientation: "h", name: safe(quant ?? "unknown"), y: there, marker: { color: color(quants.indexOf(quant)) },
        x: there.map((i) => value(name, best[i])), text: there.map((i) => shown(name, best[i])), textposition: "outside", cliponaxis: false,
        hovertext: there.map((i) => hover(best[i])), hovertemplate: "%{hovertext}<br>%{text} tok/s<extra></extra>",
      };
    });
    return { traces, layout: barLayout(rows, axis(name), traces), note: leftOut(groups.size, rows.length, "groups", "filters choose others") };
  },

  points({ x, y: [y] }, numbers) {
    const measured = numbers.filter(has(x, y));
    const same = ["model", "engine", "offload", "quant", "kv_cache", "prompt_len", "machine"];
    const series = grouped(measured, (run) => JSON.stringify(same.map((key) => value(key, run))));
    const lines = [...series.values()].map((members) => fastest(members, x, y))
      .filter((members) => value(x, members[0]) < value(x, members.at(-1)))
      .map((members) => ({
        type: "scatter", mode: "lines", line: { color: engineColor(members[0]), width: 1 }, hoverinfo: "skip", showlegend: false,
        x: members.map((run) => value(x, run)), y: members.map((run) => value(y, run)),
      }));
    const batches = measured.map((run) => value(x, run));
    const ticks = Array.from({ length: 24 }, (_, power) => 2 ** power);
    const range = [Math.min(...batches) / 1.5, Math.max(...batches) * 1.5].map(Math.log10);
    const horizontal = { type: "log", title: { text: "sequences of a pass" }, tickvals: ticks, range };
    const layout = { xaxis: horizontal, yaxis: { ...axis(y), type: "log", dtick: "D2" } };
    return { traces: [...lines, ...dots(x, y, measured)], layout };
  },

  frontier({ x, y: [y] }, numbers) {
    const measured = numbers.filter(has(x, y));
    const lines = [...grouped(measured, (run) => value("model", run))].map(([model, members]) => {
      let most = -Infinity;
      const front = [...members].sort((a, b) => value(x, b) - value(x, a) || value(y, b) - value(y, a))
        .filter((run) => value(y, run) > most && ((most = value(y, run)), true));
      return {
        type: "scatter", mode: "lines", line: { color: css("soft"), width: 1, dash: "dash" }, showlegend: false,
        x: front.map((run) => value(x, run)), y: front.map((run) => value(y, run)),
        hovertemplate: `frontier of ${safe(model)}<extra></extra>`,
      };
    });
    const layout = { xaxis: { ...axis(x), type: "log", dtick: "D2" }, yaxis: { ...axis(y), type: "log", dtick: "D2" } };
    return { traces: [...lines, ...dots(x, y, measured)], layout };
  },

  timelines(_, numbers) {
    const members = numbers.filter((run) => data.timelines[run]);
    const traces = members.map((run, index) => ({
      type: "scatter", mode: data.timelines[run].length > 60 ? "lines" : "lines+markers", name: safe(short(data.labels[run], 32)),
      line: { color: color(index), width: 1.5, dash: DASHES[Math.floor(index / 6) % DASHES.length] }, marker: { size: 4 },
      x: data.timelines[run].map(([step]) => step), y: data.timelines[run].map(([, time]) => time),
      hovertemplate: `${safe(data.labels[run])}<br>step %{x}: %{y:.4g} s<extra></extra>`,
    }));
    const layout = { showlegend: traces.length <= (isNarrow() ? 4 : 12), xaxis: stepAxis(traces), yaxis: { title: { text: "step time, s" }, type: "log", dtick: "D2" } };
    return { traces, layout, note: leftOut(numbers.length, members.length, "runs", "the others have no steps here") };
  },

  bars({ y }, numbers) {
    const used = y.filter((name) => numbers.some((run) => value(name, run)));
    const measured = numbers.filter((run) => used.some((name) => value(name, run) !== null));
    const members = measured.slice(0, MOST_BARS);
    const traces = used.map((name, index) => {
      const there = members.map((_, i) => i).filter((i) => value(name, members[i]) !== null);
      return {
        type: "bar", orientation: "h", name: columns.get(name).label, y: there, marker: { color: color(index) },
        x: there.map((i) => value(name, members[i])), text: there.map((i) => shown(name, members[i])), textposition: "outside", cliponaxis: false,
        hovertext: there.map((i) => hover(members[i])), hovertemplate: "%{hovertext}<br>%{text}<extra></extra>",
      };
    });
    const rows = members.map((run) => data.labels[run]);
    const horizontal = { ...axis(y[0]), ...(used.length > 1 ? { title: { text: "" } } : {}) };
    const layout = barLayout(rows, horizontal, traces);
    layout.showlegend = true;
    if (columns.get(y[0]).unit === "share") {
      layout.shapes = [{ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", line: { color: css("soft"), dash: "dot", width: 1 } }];
    }
    return { traces, layout, note: leftOut(measured.length, members.length, "runs", "filters and the order of the table choose others") };
  },

  failures(_, numbers) {
    const kind = (run) => [value("status", run), value("error_type", run)].filter(Boolean).join(": ");
    const groups = grouped(numbers.filter(isFailed), kind);
    const rows = [...groups.keys()].sort();
    const counts = rows.map((row) => groups.get(row).length);
    const traces = rows.length ? [{ type: "bar", orientation: "h", y: rows.map((_, i) => i), x: counts, text: counts.map(String), textposition: "outside", marker: { color: css("bad") }, hoverinfo: "x" }] : [];
    const horizontal = { title: { text: "runs" }, ...whole(counts) };
    return { traces, layout: barLayout(rows, horizontal, traces), nothing: "Every run shown is ok." };
  },
};

/** Ticks at whole numbers, also where there is room for more. */
const whole = (numbers) => (Math.max(...numbers) < 10 ? { dtick: 1 } : {});

const stepAxis = (traces) => ({ title: { text: "decode step" }, ...whole(traces.flatMap((trace) => trace.x)) });

/** The fastest run at each x, in the order of x. */
function fastest(members, x, y) {
  const descending = [...members].sort((a, b) => value(y, b) - value(y, a));
  return [...grouped(descending, (run) => value(x, run)).values()].map(([run]) => run).sort((a, b) => value(x, a) - value(x, b));
}

function dots(x, y, measured) {
  const groups = grouped(measured, (run) => joined(run, "engine", "quant"));
  return [...groups].sort().map(([name, members]) => ({
    type: "scatter", mode: "markers", name: safe(name),
    marker: { size: 9, color: engineColor(members[0]), symbol: SYMBOLS[quants.indexOf(value("quant", members[0])) % SYMBOLS.length] },
    x: members.map((run) => value(x, run)), y: members.map((run) => value(y, run)),
    hovertext: members.map((run) => `${hover(run)}<br>${shown(x, run)}, ${shown(y, run)} ${columns.get(y).unit}`), hovertemplate: "%{hovertext}<extra></extra>",
  }));
}

function leftOut(all, kept, what, why) {
  return kept < all ? `${kept} of ${all} ${what}: ${why}.` : "";
}

/** Draw one chart into its figure, or say that nothing shown has its figures. */
function draw(figure, chart, numbers) {
  const { traces, layout, note = "", nothing = "No run shown has these figures." } = kinds[chart.kind](chart, numbers);
  const plot = figure.querySelector(".plot");
  const text = traces.length ? note : nothing;
  figure.querySelector(".note").textContent = text;
  figure.querySelector(".note").hidden = !text;
  plot.hidden = !traces.length;
  if (traces.length) plotInto(plot, traces, layout);
  else Plotly.purge(plot);
}

function plotInto(plot, traces, layout) {
  const { height = 340, ...others } = layout;
  plot.style.height = `${height}px`;
  const common = { gridcolor: css("line"), zerolinecolor: css("line"), automargin: true };
  Plotly.react(plot, traces, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: css("ink"), size: 12 },
    margin: { l: 10, r: 10, t: 10, b: 40 }, hovermode: "closest", hoverlabel: { align: "left" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...others, height,
    legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0, ...others.legend },
    xaxis: { ...common, ...others.xaxis }, yaxis: { ...common, ...others.yaxis },
  }, { responsive: true, displayModeBar: false });
}

// A chart is drawn when it comes into view, and again when the runs have changed.
const figures = new Map(data.charts.map((chart) => [document.getElementById(chart.id), { chart, isSeen: false, isDrawn: false }]));
let drawnRuns = runs;

function drawSeen() {
  for (const [figure, state] of figures) {
    if (!state.isSeen || state.isDrawn) continue;
    state.isDrawn = true;
    const measured = drawnRuns.filter((run) => !isPlanned(run));
    draw(figure, state.chart, state.chart.kind === "answer" || !measured.length ? drawnRuns : measured);
  }
}

function drawAgain(numbers = drawnRuns) {
  drawnRuns = numbers;
  for (const state of figures.values()) state.isDrawn = false;
  drawSeen();
}

const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) figures.get(entry.target).isSeen = entry.isIntersecting;
  drawSeen();
}, { rootMargin: "300px" });
for (const figure of figures.keys()) observer.observe(figure);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAgain());
