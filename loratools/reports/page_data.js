// The report as the page knows it, and how numbers and names are told.

const data = JSON.parse(document.getElementById("data").textContent);
const tunes = data.fineTunes;

const COLUMNS = {
  target: ["Matrix", "Name of the weight in the base model."],
  fine_tune: ["Fine-tune", "What changed it."],
  layer: ["Layer", "The layer it belongs to."],
  module: ["Module", "Its kind within the layer."],
  outputs: ["Outputs", "Rows of the matrix."],
  inputs: ["Inputs", "Columns of the matrix."],
  base_norm: ["Base norm", "‖W₀‖, the Frobenius norm of the base weight."],
  family: ["Family", "How the change is parametrised."],
  rank: ["Rank", "The stored rank of the change; none where its family has none."],
  norm: ["Norm", "‖Δ‖, the Frobenius norm of the change."],
  relative_norm: ["Relative norm", "‖Δ‖ / ‖W₀‖."],
  effective_rank: ["Effective rank", "exp(entropy) of the singular values as shares of their sum."],
  stable_rank: ["Stable rank", "‖Δ‖² / the square of the largest singular value."],
  energy_left: ["Energy, out", "Share of ‖Δ‖² in the span of the base's first left singular vectors."],
  energy_right: ["Energy, in", "Share of ‖Δ‖² in the span of the base's first right singular vectors."],
  share: ["Share", "‖Δ‖² as a share of that of the whole fine-tune."],
  left_intruders: ["Intruders, out", "Leading left singular vectors that are like none of the base's."],
  right_intruders: ["Intruders, in", "Leading right singular vectors that are like none of the base's."],
  gain_least: ["Gain, least", "The least factor that DoRA's magnitudes put on an output."],
  gain_mean: ["Gain, mean", "The mean of these factors."],
  gain_greatest: ["Gain, greatest", "The greatest of these factors."],
  logit_growth: ["Growth", "Growth of the data-free bound on outputs of query, key and value projections: a heuristic."],
  missed_of: ["Beside", "The full fine-tune that the next columns compare with."],
  missed_rank: ["Rank beside", "The rank of the best approximation that the error is compared with."],
  missed_error: ["Misses", "‖full − adapter‖ / ‖full‖."],
  missed_best_error: ["Best of its rank", "The same for the nearest matrix of that rank."],
  missed_space_error: ["Best in its spaces", "The same for the nearest matrix in the adapter's own spaces."],
};

const OWN = {
  light: ["#2f6db3", "#c2542f", "#1f8577", "#8a5aa3", "#a67a0a", "#b8437a", "#5d7a1f", "#50667a"],
  dark: ["#78aef0", "#f08f68", "#56c7b4", "#c59be3", "#e2b64a", "#f08cbc", "#a9cf62", "#a9bccc"],
};
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "pentagon", "star", "cross"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

const own = (f) => OWN[theme()][f % OWN.light.length];
// Shifted with each round of colours, so that no two look the same for long.
const round = (f) => f + Math.floor(f / OWN.light.length);
const symbol = (f) => SYMBOLS[round(f) % SYMBOLS.length];
const dash = (f) => DASHES[round(f) % DASHES.length];
/** Plotly reads tags, entities and formulas in its texts: `<b>`, `<a href>`, `&lt;`, `$x$`. */
const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" };
const esc = (text) => text.replace(/[&<>$]/g, (sign) => ENTITIES[sign]);

const hover = (target, lines) =>
  [`<b>${esc(short(target, 80))}</b>`, ...lines.map(([name, value]) => `${esc(short(name, 40))}: ${esc(short(value, 60))}`)].join("<br>");

/** A number of a column; factors differ from 1 in later digits. */
const told = (key, value) =>
  value !== null && (key === "logit_growth" || key.startsWith("gain")) ? value.toPrecision(5) : fmt(value);

function named(f) {
  const dot = el("span", { class: "dot", "aria-hidden": "true" });
  dot.style.setProperty("--own", own(f));
  dot.dataset.tune = f;
  return el("span", { title: tunes[f].name }, dot, el("bdi", {}, short(tunes[f].name, 48)));
}

// Rows as objects: places by number, names as text.
const numbered = (names) => [...new Set(names)].sort(new Intl.Collator("en", { numeric: true }).compare);
const layers = numbered(data.targets.map((target) => target.layer));
const modules = [...new Set(data.targets.map((target) => target.module))];
for (const target of data.targets) {
  target.layer = layers.indexOf(target.layer);
  target.module = modules.indexOf(target.module);
}
data.columns.forEach((column, index) => (column.index = index));
const { index: rankAt } = data.columns.find(({ key }) => key === "rank");
const rows = data.rows.map((cells, index) => {
  cells[rankAt] ||= null; // 0 says that there is none
  const [t, fineTune] = data.at[index];
  const row = Object.fromEntries(data.columns.map(({ key }, i) => [key, cells[i]]));
  const { layer, module } = data.targets[t];
  const words = `${row.target} ${row.fine_tune} ${row.family}`.toLowerCase();
  return { ...row, index, cells, fineTune, targetIndex: t, layer, module, words };
});
data.modules = modules;
for (const map of data.maps) map.module = modules.indexOf(map.module);
const rowsOf = (t) => rows.filter((row) => row.targetIndex === t);

function put(cells, { layer, module }, value, text) {
  const place = `${layer}|${module}`;
  if (!cells.has(place)) cells.set(place, []);
  cells.get(place).push([value, text]);
}
