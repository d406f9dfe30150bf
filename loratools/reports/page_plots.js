// What each plot shows. Every function reads the state of its controls and the theme, and hands traces to Plotly.

const SCALES = {
  // pale (none) to strong; in the dark, dark to bright
  change: {
    light: ["#eef2ee", "#a9cfc6", "#4c9aa0", "#1c5d74", "#0d2f4a"],
    dark: ["#1c2931", "#1f5160", "#2f8489", "#7cc4a8", "#eef6c9"],
  },
  overlap: {
    light: ["#f5efe8", "#e8b68f", "#cc7048", "#93392f", "#4a1520"],
    dark: ["#2a2122", "#6d3030", "#b8573c", "#e79a63", "#fdebc8"],
  },
  intruders: {
    light: ["#f1eef4", "#c5b4d8", "#9272b3", "#613d8c", "#331659"],
    dark: ["#231f2c", "#493568", "#775aa5", "#b092d8", "#f0e4ff"],
  },
  signed: {
    light: ["#8a4b12", "#d9a066", "#f3f0ea", "#79aeb4", "#12596a"],
    dark: ["#f0b775", "#9c6430", "#272d32", "#35818a", "#9be0e0"],
  },
};

// Axes of "what kind of change": column of a row, label.
const SHAPES = [
  ["effective_rank", "effective rank"],
  ["stable_rank", "stable rank"],
  ["energy_left", "energy in the base's output space"],
  ["energy_right", "energy in the base's input space"],
  ["relative_norm", "relative norm"],
  ["rank", "rank"],
];

const MEASURES = [
  ["relative_norm", "relative norm"],
  ["share", "share of the change"],
  ["effective_rank", "effective rank"],
  ["stable_rank", "stable rank"],
  ["energy_left", "energy in the base's output space"],
  ["energy_right", "energy in the base's input space"],
];

const ALIKE = [
  ["cosine", "cosine"],
  ["relative_distance", "relative distance"],
  ["output_overlap", "overlap of output spaces"],
  ["input_overlap", "overlap of input spaces"],
];

const NARROW = 600; // pixels, up to which colour bars lie above the plot

const scale = (name) => SCALES[name][theme()].map((colour, i, all) => [i / (all.length - 1), colour]);

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8, font: { size: 12.5, color: colour("--soft") } },
    gridcolor: colour("--grid"),
    linecolor: colour("--line"),
    tickfont: { size: 11.5, color: colour("--soft") },
    zeroline: false,
    automargin: true,
    ...more,
  };
}

const DECADES = 5; // shown below the largest value: what lies deeper is rounding

/** A logarithmic axis over `values`, with ticks between the powers of ten where there are few of these. */
function logarithmic(values) {
  const high = Math.log10(Math.max(...values));
  const low = Math.max(Math.log10(Math.min(...values)), high - DECADES);
  if (!values.length) return { type: "log" };
  return { type: "log", dtick: high - low > 1.5 ? 1 : "D2", tickformat: "~g", range: [low - 0.12, high + 0.12] };
}

/** Layers as the horizontal axis of a plot with points. */
const along = (holder) =>
  axis("layer", { ...ticks(layers, holder.clientWidth / 34, 14), showgrid: false, range: [-0.7, layers.length - 0.3] });

/** Draw into the figure of a section; `label` is for those who cannot see it. */
function show(holder, traces, layout, label) {
  const div = holder.querySelector(".plot");
  const stacked = div.clientWidth <= NARROW ? 19 * Math.max(0, traces.length - 2) : 0; // names in a column above the plot
  const height = layout.height ?? Number(div.dataset.height) + stacked;
  div.style.height = `${height}px`;
  const width = div.clientWidth;
  const form = width > NARROW ? "wide" : "narrow";
  if (div.dataset.form !== form) Plotly.purge(div); // it cannot turn a colour bar around
  div.dataset.form = form;
  div.setAttribute("role", "group");
  div.setAttribute("aria-label", `Plot: ${label}. The table at the end of the page has the numbers.`);
  const soft = colour("--soft");
  const base = {
    width, // given, because paper has no second measuring; a change of the window draws anew
    height,
    margin: { l: 56, r: 12, t: 12, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 12.5 },
    hoverlabel: {
      bgcolor: colour("--panel"),
      bordercolor: soft,
      font: { color: colour("--ink"), size: 12.5 },
      align: "left",
    },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", itemsizing: "constant", traceorder: "normal" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: colour("--accent") },
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
  };
  const config = {
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    toImageButtonOptions: { format: "png", scale: 2, filename: `loratools-${div.closest("section").id}` },
  };
  return Plotly.react(div, traces, { ...base, ...layout }, config);
}

const say = (holder, text) => (holder.querySelector("figcaption").textContent = text);

/** Positions and labels of ticks for as many names as the width has room for. */
function ticks(names, room, limit) {
  const step = Math.max(1, Math.ceil(names.length / Math.max(2, room)));
  const shown = names.map((_, i) => i).filter((i) => i % step === 0);
  return { tickmode: "array", tickvals: shown, ticktext: shown.map((i) => esc(short(names[i], limit))) };
}

/** A heat map of layers (across) by modules (down); `cells` maps "layer|module" to a list of [value, hover text]. */
function byPlace(holder, { cells, name, colours, range, digits, form = fmt }) {
  const mean = (list) => list.reduce((sum, [value]) => sum + value, 0) / list.length;
  const at = (m, l) => cells.get(`${l}|${m}`) ?? [];
  const z = modules.map((_, m) => layers.map((_, l) => (at(m, l).length ? mean(at(m, l)) : null)));
  const hovertext = modules.map((_, m) =>
    layers.map((_, l) => {
      const list = at(m, l);
      const more = list.length > 3 ? [`and ${list.length - 3} more in this cell, which shows the mean`] : [];
      return [...list.slice(0, 3).map(([, text]) => text), ...more].join("<br>");
    }),
  );
  const width = holder.clientWidth;
  const long = layers.some((layer) => layer.length > 4);
  const values = z.flat().filter((value) => value !== null);
  const [low, high] = range ?? [Math.min(0, ...values), Math.max(...values)];
  const wide = width > NARROW;
  const trace = {
    type: "heatmap",
    z,
    hovertext,
    hoverinfo: "text",
    zmin: low,
    zmax: high > low ? high : low + 1,
    colorscale: scale(colours),
    xgap: wide ? 2 : 1,
    ygap: wide ? 2 : 1,
    hoverongaps: false,
    colorbar: {
      thickness: 10,
      outlinewidth: 0,
      tickfont: { size: 11, color: colour("--soft") },
      len: 1,
      nticks: 5,
      tickformat: digits,
      ...(wide ? {} : { orientation: "h", y: 1.02, yanchor: "bottom", thickness: 8 }),
    },
  };
  const layout = {
    height: Math.max(210, 31 * modules.length + (long ? 140 : 72) + (wide ? 0 : 44)),
    margin: { l: 12, r: 8, t: wide ? 8 : 44, b: 12 },
    plot_bgcolor: colour("--empty"),
    xaxis: axis("layer", {
      ...ticks(layers, width / (long ? 26 : 32), wide ? 22 : 12),
      tickangle: long ? -45 : 0,
      showgrid: false,
      ticks: "",
    }),
    yaxis: axis("", { ...ticks(modules, 60, wide ? 24 : 12), autorange: "reversed", showgrid: false, ticks: "" }),
  };
  show(holder, [trace], layout, `${name} by layer and module`);
  return { values, form };
}

function drawSpectra() {
  const holder = sections.spectra;
  const chosen = Number(holder.state.target);
  const all = chosen < 0;
  const lines = all
    ? tunes.map((tune, f) => [f, tune.spectrum])
    : rowsOf(chosen).map((row) => [row.fineTune, data.spectra[row.index]]);
  const positive = (values) => values.map((value) => (value > 0 ? value : null));
  const traces = lines
    .filter(([, values]) => values.length)
    .map(([f, values]) => ({
      type: "scatter",
      mode: values.length > 40 ? "lines" : "lines+markers",
      name: esc(short(tunes[f].name, 40)),
      x: values.map((_, i) => i + 1),
      y: positive(values),
      line: { color: own(f), width: 2, dash: dash(f) },
      marker: { size: 5, symbol: symbol(f) },
      hoverinfo: "text",
      hovertext: values.map((value, i) =>
        hover(all ? "all matrices" : data.targets[chosen].name, [["fine-tune", tunes[f].name], [`singular value ${i + 1}`, fmt(value)]]),
      ),
    }));
  if (!all && holder.state.base) {
    const values = data.targets[chosen].base;
    traces.push({
      type: "scatter",
      mode: "lines",
      name: "base model",
      x: values.map((_, i) => i + 1),
      y: positive(values),
      line: { color: colour("--soft"), width: 1.5, dash: "dot" },
      hoverinfo: "text",
      hovertext: values.map((value, i) => hover(data.targets[chosen].name, [[`base, singular value ${i + 1}`, fmt(value)]])),
    });
  }
  const longest = Math.max(1, ...traces.map((trace) => trace.x.length));
  const powers = Array.from({ length: 12 }, (_, i) => 2 ** i).filter((n) => n <= longest * 1.1);
  const layout = {
    margin: { l: 56, r: 12, t: 40, b: 48 },
    xaxis: axis("index of the singular value", {
      type: "log",
      tickmode: "array",
      tickvals: powers,
      ticktext: powers.map(String),
      range: [Math.log10(0.92), Math.log10(Math.max(2, longest) * 1.09)],
    }),
    yaxis: axis("singular value", logarithmic(traces.flatMap((trace) => trace.y.filter((value) => value !== null)))),
  };
  show(holder, traces, layout, "singular values of the changes");
  const place = all ? null : data.targets[chosen];
  say(holder, all ? "Root mean square over the matrices that each one changes." : `${place.name}, ${place.shape.join(" × ")}`);
}

function drawWhere() {
  const holder = sections.where;
  const f = Number(holder.state.tune);
  const [key, name] = MEASURES.find(([measure]) => measure === holder.state.measure);
  const cells = new Map();
  let peak = null;
  let high = 0;
  for (const row of rows) {
    const value = row[key];
    if (value === null) continue;
    if (row.fineTune === f || holder.state.same) high = Math.max(high, value);
    if (row.fineTune !== f) continue;
    if (!peak || value > peak[key]) peak = row;
    put(cells, row, value, hover(row.target, [["fine-tune", tunes[f].name], [name, fmt(value)], ["rank", fmt(row.rank)]]));
  }
  byPlace(holder, { cells, name, colours: "change", range: [0, high] });
  say(holder, peak ? `Largest: ${peak.target}, with ${fmt(peak[key])}.` : "Nothing was measured here.");
}

function drawShape() {
  const holder = sections.shape;
  const [x, y] = [holder.state.x, holder.state.y].map((key) => SHAPES.find(([shape]) => shape === key));
  const traces = tunes.map((tune, f) => {
    const mine = rows.filter((row) => row.fineTune === f && row[x[0]] !== null && row[y[0]] !== null);
    return {
      type: "scatter",
      mode: "markers",
      name: esc(short(tune.name, 40)),
      x: mine.map((row) => row[x[0]]),
      y: mine.map((row) => row[y[0]]),
      marker: { color: own(f), size: 8, opacity: 0.72, symbol: symbol(f), line: { width: 0.6, color: colour("--panel") } },
      hoverinfo: "text",
      hovertext: mine.map((row) =>
        hover(row.target, [["fine-tune", tune.name], [x[1], fmt(row[x[0]])], [y[1], fmt(row[y[0]])], ["rank", fmt(row.rank)]]),
      ),
    };
  });
  const bounds = (key) => (key.startsWith("energy") ? { tickformat: ".0%", rangemode: "tozero" } : { rangemode: "tozero" });
  const layout = {
    margin: { l: 56, r: 12, t: 40, b: 48 },
    xaxis: axis(x[1], bounds(x[0])),
    yaxis: axis(y[1], bounds(y[0])),
  };
  show(holder, traces, layout, `${y[1]} against ${x[1]}`);
  say(holder, `${traces.reduce((sum, trace) => sum + trace.x.length, 0)} points. A click on a name in the legend hides it.`);
}

function drawOverlap() {
  const holder = sections.overlap;
  const { pair, module, side } = holder.state;
  const map = data.maps.find((m) => `${m.a}|${m.b}` === pair && m.module === Number(module) && m.side === side);
  if (!map) {
    show(holder, [], { height: 140, xaxis: { visible: false }, yaxis: { visible: false } }, "no such map");
    return say(holder, "These two have no such map: choose another module or side.");
  }
  const [a, b] = [tunes[map.a].name, tunes[map.b].name];
  const width = holder.clientWidth;
  const long = map.layers.some((layer) => layer.length > 4);
  const trace = {
    type: "heatmap",
    z: map.values,
    hovertext: map.values.map((line, i) =>
      line.map((value, j) =>
        hover(data.modules[map.module], [[a, `layer ${map.layers[i]}`], [b, `layer ${map.layers[j]}`], ["overlap", fmt(value)]]),
      ),
    ),
    hoverinfo: "text",
    hoverongaps: false,
    zmin: 0,
    zmax: Math.max(0.05, ...map.values.flat().filter((value) => value !== null)),
    colorscale: scale("overlap"),
    xgap: 1,
    ygap: 1,
    colorbar: {
      thickness: 10,
      outlinewidth: 0,
      tickfont: { size: 11, color: colour("--soft") },
      ...(width > NARROW ? {} : { orientation: "h", y: 1.02, yanchor: "bottom", thickness: 8 }),
    },
  };
  const tall = Math.min(19 * map.layers.length + 90, Math.max(320, width), 640);
  const line = (name) => esc(short(`layer of ${name}`, width > NARROW ? 60 : 30));
  const layout = {
    height: tall,
    margin: { l: 12, r: 8, t: width > NARROW ? 8 : 44, b: 12 },
    plot_bgcolor: colour("--empty"),
    xaxis: axis(line(b), {
      ...ticks(map.layers, width / (long ? 26 : 32), 14),
      showgrid: false,
      tickangle: long ? -45 : 0,
      ticks: "",
    }),
    yaxis: axis(line(a), {
      ...ticks(map.layers, tall / 24, 14),
      autorange: "reversed",
      showgrid: false,
      ticks: "",
    }),
  };
  show(holder, [trace], layout, `overlap of ${a} and ${b} by layers`);
  const split = { same: [], other: [] };
  map.values.forEach((values, i) =>
    values.forEach((value, j) => value !== null && split[i === j ? "same" : "other"].push(value)),
  );
  const mean = (list) => (list.length ? fmt(list.reduce((x, y) => x + y, 0) / list.length) : "–");
  say(holder, `Mean overlap in the same layer: ${mean(split.same)}; in different layers: ${mean(split.other)}.`);
}

function drawAlike() {
  const holder = sections.alike;
  const [key, name] = ALIKE.find(([measure]) => measure === holder.state.measure);
  const cells = new Map();
  const chosen = data.targetPairs.filter((p) => `${p.a}|${p.b}` === holder.state.pair && p[key] !== null);
  for (const p of chosen) {
    const { name: target } = data.targets[p.target];
    const names = [["from", tunes[p.a].name], ["to", tunes[p.b].name]];
    put(cells, data.targets[p.target], p[key], hover(target, [...names, [name, fmt(p[key])]]));
  }
  const far = Math.max(0.05, ...chosen.map((p) => Math.abs(p[key])));
  byPlace(holder, { cells, name, colours: key === "cosine" ? "signed" : "overlap", range: [key === "cosine" ? -far : 0, far] });
  const peak = chosen.reduce((best, p) => (!best || p[key] > best[key] ? p : best), null);
  say(holder, peak ? `Largest: ${data.targets[peak.target].name}, with ${fmt(peak[key])}.` : "Nothing was measured here.");
}

function drawIntruders() {
  const holder = sections.intruders;
  const f = Number(holder.state.tune);
  const { side } = holder.state;
  const count = (row) =>
    side === "left" ? row.left_intruders : side === "right" ? row.right_intruders : row.left_intruders + row.right_intruders;
  const cells = new Map();
  let high = 1;
  let total = 0;
  let matrices = 0;
  for (const row of rows) {
    high = Math.max(high, count(row)); // one scale for all fine-tunes
    if (row.fineTune !== f) continue;
    total += count(row);
    matrices += count(row) > 0;
    const lines = [["fine-tune", tunes[f].name], ["output side", fmt(row.left_intruders)], ["input side", fmt(row.right_intruders)]];
    put(cells, row, count(row), hover(row.target, lines));
  }
  byPlace(holder, { cells, name: "intruders", colours: "intruders", range: [0, high], digits: ",d" });
  say(holder, `${total.toLocaleString("en")} intruders, in ${matrices} of ${cells.size} cells.`);
}

// Column, label, dash. The room between the first two is filled: what training left on the table.
const LINES = [
  ["missed_error", "the adapter", "solid"],
  ["missed_best_error", "best of its rank", "dot"],
  ["missed_space_error", "best in its spaces", "dash"],
];

function drawMissed() {
  const holder = sections.missed;
  const f = Number(holder.state.tune);
  const module = Number(holder.state.module);
  const mine = rows.filter((row) => row.fineTune === f && row.missed_error !== null && (module < 0 || row.module === module));
  const traces = LINES.map(([key, name, dashes]) => {
    const found = layers.map((_, l) => mine.filter((row) => row.layer === l && row[key] !== null)).map((list, l) => ({
      l,
      list,
      value: list.length ? list.reduce((sum, row) => sum + row[key], 0) / list.length : null,
    }));
    return {
      type: "scatter",
      mode: "lines+markers",
      name,
      x: found.map((point) => point.l),
      y: found.map((point) => point.value),
      line: { color: key === "missed_best_error" ? colour("--soft") : own(f), width: 2, dash: dashes },
      marker: { size: 5 },
      fill: key === "missed_best_error" ? "tonexty" : "none",
      fillcolor: `${own(f)}1f`,
      hoverinfo: "text",
      hovertext: found.map(({ l, list, value }) =>
        hover(list.length === 1 ? list[0].target : `layer ${layers[l]}: mean of ${list.length} matrices`, [["fine-tune", tunes[f].name], [name, fmt(value)]]),
      ),
    };
  });
  const layout = {
    margin: { l: 56, r: 12, t: 40, b: 48 },
    xaxis: along(holder),
    yaxis: axis("relative error", { rangemode: "tozero" }),
  };
  show(holder, traces, layout, "what the adapter misses by layer");
  const m = tunes[f].missed;
  say(
    holder,
    m
      ? `Over all matrices, beside ${m.of}: ${fmt(m.error)}; best in its spaces ${fmt(m.space_error)}; best of its rank ${fmt(m.best_error)}.`
      : "",
  );
}

function drawGrowth() {
  const holder = sections.growth;
  const module = Number(holder.state.module);
  const traces = tunes.map((tune, f) => {
    const mine = rows.filter((row) => row.fineTune === f && row.logit_growth !== null && (module < 0 || row.module === module));
    mine.sort((a, b) => a.layer - b.layer);
    return {
      type: "scatter",
      mode: module < 0 ? "markers" : "lines+markers",
      name: esc(short(tune.name, 40)),
      x: mine.map((row) => row.layer),
      y: mine.map((row) => row.logit_growth),
      line: { color: own(f), width: 1.8, dash: dash(f) },
      marker: { color: own(f), size: 7, opacity: 0.8, symbol: symbol(f) },
      hoverinfo: "text",
      hovertext: mine.map((row) => hover(row.target, [["fine-tune", tune.name], ["growth", `× ${fmt(row.logit_growth)}`]])),
    };
  });
  const layout = {
    margin: { l: 56, r: 12, t: 40, b: 48 },
    xaxis: along(holder),
    yaxis: axis("factor", {}),
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: colour("--soft"), width: 1, dash: "dot" } }],
  };
  show(holder, traces, layout, "growth of the bound on attention logits");
  say(holder, "The dotted line is the base model.");
}
