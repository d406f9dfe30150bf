// What plots share: colours, axes, heat maps, and the way to Plotly.

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
function byPlace(holder, { cells, name, colours, range, whole = false }) {
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
      ...(whole ? { tick0: 0, dtick: Math.ceil(high / 4) } : { nticks: 5 }),
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
}
