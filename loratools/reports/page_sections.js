// What each plot shows. Every function reads the state of its controls and the theme, and hands traces to Plotly.

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
  byPlace(holder, { cells, name: "intruders", colours: "intruders", range: [0, high], whole: true });
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
      hovertext: mine.map((row) => hover(row.target, [["fine-tune", tune.name], ["growth", `× ${told("logit_growth", row.logit_growth)}`]])),
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
