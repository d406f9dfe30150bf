// The page around plots and table: cards, controls, themes, paper. All text of the report enters the document as text nodes,
// never as markup.

const sections = {};

// Controls: each sets one word of its section's state and draws again.

const tuneOptions = () => tunes.map((tune, f) => [String(f), tune.name]);

function choice(holder, key, label, options, draw, first = options[0]?.[0]) {
  const select = el("select", {}, ...options.map(([value, text]) => el("option", { value }, short(text, 90))));
  options.forEach(([value], i) => (select.options[i].value = value)); // the empty one, too, which el leaves out
  select.value = holder.state[key] = first;
  select.addEventListener("change", () => {
    holder.state[key] = select.value;
    draw();
  });
  const whole = el("label", {}, label, select);
  whole.hidden = options.length < 2;
  holder.controls.append(whole);
  return select;
}

function check(holder, key, label, draw, first) {
  const box = el("input", { type: "checkbox" });
  box.checked = holder.state[key] = first;
  box.addEventListener("change", () => {
    holder.state[key] = box.checked;
    draw();
  });
  const whole = el("label", { class: "check" }, box, label);
  holder.controls.append(whole);
  return whole;
}

function prepare() {
  for (const holder of document.querySelectorAll("section, #alike")) {
    holder.state = {};
    holder.controls = holder.querySelector(".controls");
    sections[holder.id] = holder;
  }
}

const drawn = []; // the functions of the plots that the page has

function plot(name, draw) {
  drawn.push(draw);
  sections[name].hidden = false;
}

function spectra() {
  const holder = sections.spectra;
  const base = check(holder, "base", "show the base model", drawSpectra, true);
  const redraw = () => {
    base.hidden = Number(holder.state.target) < 0;
    drawSpectra();
  };
  const targets = data.targets.map((target, t) => [String(t), target.name]);
  choice(holder, "target", "Matrix", [["-1", "all matrices"], ...targets], redraw);
  holder.controls.append(base); // after the choice that it belongs to
  base.hidden = true;
  plot("spectra", drawSpectra);
}

function places() {
  choice(sections.where, "tune", "Fine-tune", tuneOptions(), drawWhere);
  choice(sections.where, "measure", "Number", MEASURES, drawWhere);
  check(sections.where, "same", "one scale for all fine-tunes", drawWhere, true).hidden = tunes.length < 2;
  plot("where", drawWhere);
  choice(sections.shape, "x", "Across", SHAPES, drawShape, "effective_rank");
  choice(sections.shape, "y", "Up", SHAPES, drawShape, "energy_left");
  plot("shape", drawShape);
  choice(sections.intruders, "tune", "Fine-tune", tuneOptions(), drawIntruders);
  const sides = [["left", "output"], ["right", "input"], ["both", "both, added up"]];
  choice(sections.intruders, "side", "Side", sides, drawIntruders);
  plot("intruders", drawIntruders);
}

function pairName({ a, b }) {
  return `${short(tunes[a].name, 40)} · ${short(tunes[b].name, 40)}`;
}

function pairOptions(pairs) {
  const found = new Map(pairs.map((pair) => [`${pair.a}|${pair.b}`, pairName(pair)]));
  return [...found];
}

function overlap() {
  const holder = sections.overlap;
  if (!data.pairs.length && !data.maps.length && !data.targetPairs.length) return;
  holder.hidden = false;
  if (data.pairs.length) {
    const titles = ["Pair", "Cosine", "Relative distance", "Overlap, output", "Overlap, input"];
    const head = el("tr", {}, ...titles.map((title, i) => el("th", { scope: "col", class: i ? "" : "text" }, title)));
    const lines = data.pairs.map((pair) => {
      const cells = [pair.cosine, pair.relative_distance, pair.output_overlap, pair.input_overlap].map((value) => el("td", {}, fmt(value)));
      return el("tr", {}, el("th", { scope: "row", class: "text" }, named(pair.a), " · ", named(pair.b)), ...cells);
    });
    byId("pairs").append(el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines)));
  } else byId("pairs").hidden = true;
  if (data.maps.length) {
    choice(holder, "pair", "Pair", pairOptions(data.maps), drawOverlap);
    const known = [...new Set(data.maps.map((map) => map.module))];
    choice(holder, "module", "Module", known.map((m) => [String(m), modules[m]]), drawOverlap);
    const sides = [...new Set(data.maps.map((map) => map.side))];
    choice(holder, "side", "Side", sides.map((side) => [side, side]), drawOverlap);
    drawn.push(drawOverlap);
  } else holder.querySelector("figure").hidden = true;
  sections.alike.hidden = !data.targetPairs.length;
  if (data.targetPairs.length) {
    choice(sections.alike, "pair", "Pair", pairOptions(data.targetPairs), drawAlike);
    choice(sections.alike, "measure", "Number", ALIKE, drawAlike);
    drawn.push(drawAlike);
  }
}

function besideFull() {
  const known = tunes.flatMap((tune, f) => (rows.some((row) => row.fineTune === f && row.missed_error !== null) ? [f] : []));
  if (!known.length) return;
  const moduleOptions = modules.map((name, m) => [String(m), name]);
  choice(sections.missed, "tune", "Fine-tune", known.map((f) => [String(f), tunes[f].name]), drawMissed);
  choice(sections.missed, "module", "Module", [["-1", "all, the mean"], ...moduleOptions], drawMissed);
  plot("missed", drawMissed);
}

function growth() {
  const known = modules.flatMap((name, m) => (rows.some((row) => row.module === m && row.logit_growth !== null) ? [[String(m), name]] : []));
  if (!known.length) return;
  choice(sections.growth, "module", "Module", [...known, ["-1", "all"]], drawGrowth);
  plot("growth", drawGrowth);
}

function strip(tune, f) {
  const ns = "http://www.w3.org/2000/svg"; // a name, not an address
  const svg = document.createElementNS(ns, "svg");
  const shares = layers.map((_, l) => tune.layers.find(([index]) => index === l)?.[1] ?? 0);
  const top = Math.max(...shares, 1e-12);
  const width = 100 / shares.length;
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const peak = shares.indexOf(Math.max(...shares));
  svg.setAttribute("aria-label", `Share of the change by layer; the largest in layer ${layers[peak]}: ${percent(shares[peak])}`);
  shares.forEach((share, l) => {
    const bar = document.createElementNS(ns, "rect");
    const height = Math.max(0.7, (39 * share) / top);
    for (const [name, value] of Object.entries({ x: l * width, y: 40 - height, width: width * 0.78, height }))
      bar.setAttribute(name, value);
    bar.style.fill = "var(--own)";
    bar.style.opacity = 0.85;
    svg.append(bar);
  });
  return svg;
}

function card(tune, f) {
  const fact = (name, ...value) => el("div", {}, el("dt", {}, name), el("dd", {}, ...value));
  const small = (text) => el("small", {}, text);
  const ranks = tune.rank_min === tune.rank_max ? fmt(tune.rank_max) : `${fmt(tune.rank_min)}–${fmt(tune.rank_max)}`;
  const facts = [
    fact("Relative norm", fmt(tune.relative_norm)),
    fact("Effective rank", fmt(tune.mean_effective_rank), small(tune.rank_max && tune.mean_effective_rank <= tune.rank_max ? ` of ${ranks}` : "")),
    fact("In the base's space", percent(tune.mean_energy_left), small(` out, ${percent(tune.mean_energy_right)}\u00a0in`)),
    fact("Intruders", fmt(tune.left_intruders), small(` out, ${fmt(tune.right_intruders)} in`)),
  ];
  if (tune.missed) {
    const { of, error, best_error: best } = tune.missed;
    const alone = tune.untouched ? `; leaves ${percent(tune.untouched)} of it alone` : "";
    facts.push(fact("Misses", fmt(error), small(` of ${short(of, 60)}; best of its rank ${fmt(best)}${alone}`)));
    facts.at(-1).className = "whole";
  }
  const kind = tune.kind === "full" ? "full fine-tune" : "adapter";
  const families = tune.kind === "full" || !tune.families.length ? "" : `, ${tune.families.join(", ")}`;
  const whole = el(
    "article",
    { class: "card" },
    el("h3", {}, el("bdi", {}, tune.name)),
    el("p", { class: "kind" }, `${kind}${families} · ${fmt(tune.targets)} ${tune.targets === 1 ? "matrix" : "matrices"}`),
    el("dl", {}, ...facts),
  );
  whole.dataset.tune = f;
  if (layers.length > 1) whole.append(strip(tune, f), el("p", { class: "strip" }, "share of the change, first to last layer"));
  whole.append(el("p", { class: "path" }, el("bdi", {}, tune.path)));
  return whole;
}

function overview() {
  const many = tunes.length === 1 ? "one fine-tune" : `${tunes.length} fine-tunes`;
  byId("title").textContent = `What ${many} changed`;
  const about = byId("about");
  about.append("Base model ", el("bdi", {}, data.base), `. ${fmt(data.targets.length)} matrices, ${fmt(layers.length)} layers. `);
  about.append(`The base's space: its first ${fmt(data.topK)} singular vectors. Overlaps: at most rank ${fmt(data.maxOverlapRank)}.`);
  for (const warning of data.warnings) byId("warnings").append(el("p", { class: "note" }, el("bdi", {}, warning)));
  byId("cards").append(...tunes.map(card));
  byId("intruder-rule").textContent =
    `One of the first ${data.topK} singular vectors of W₀ + Δ whose cosine with every singular vector of W₀ is below ${data.epsilon}.`;
  const list = byId("skipped").querySelector("ul");
  list.append(...data.skipped.map(([name, reason]) => el("li", {}, el("bdi", {}, name), ": ", el("bdi", {}, reason))));
  sections.skipped.hidden = !data.skipped.length;
}

const TITLES = { overview: "Overview", spectra: "Spectra", where: "Where", shape: "Shape", overlap: "Overlap" };
Object.assign(TITLES, { intruders: "Intruders", missed: "Missed", growth: "Growth", table: "Table", skipped: "Left out" });

function navigation() {
  const shown = Object.entries(TITLES).filter(([id]) => !byId(id).hidden);
  byId("nav").append(...shown.map(([id, title]) => el("a", { href: `#${id}` }, title)));
}

function paint(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").setAttribute("aria-pressed", String(name === "dark"));
  for (const thing of document.querySelectorAll("[data-tune]")) thing.style.setProperty("--own", own(Number(thing.dataset.tune)));
  for (const row of rows) row.line?.querySelector("[data-tune]").style.setProperty("--own", own(row.fineTune));
}

/** Draw one plot after another, so that the page answers in between; the promise is kept when all are there. */
async function drawAll() {
  for (const draw of drawn) {
    draw();
    await new Promise((done) => setTimeout(done));
  }
}

function start() {
  for (const id of ["spectra", "where", "shape", "overlap", "intruders", "missed", "growth"]) byId(id).hidden = true;
  for (const tune of tunes) tune.layers = tune.layers.map(([name, share]) => [layers.indexOf(name), share]);
  prepare();
  overview();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  paint(dark.matches ? "dark" : "light");
  if (rows.length) {
    spectra();
    places();
    overlap();
    besideFull();
    growth();
    makeTable();
  } else sections.table.hidden = true;
  navigation();
  const repaint = (name) => {
    paint(name);
    drawn.forEach((draw) => draw());
  };
  byId("theme").addEventListener("click", () => repaint(theme() === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => repaint(dark.matches ? "dark" : "light"));
  let before = theme();
  addEventListener("beforeprint", () => {
    before = theme();
    document.documentElement.dataset.printing = "yes"; // as wide as paper, before the plots measure it
    repaint("light");
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.printing;
    repaint(before);
  });
  let width = innerWidth;
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting); // the phone's address bar resizes the window, too: only the width matters
    waiting = setTimeout(() => innerWidth !== width && ((width = innerWidth), drawn.forEach((draw) => draw())), 150);
  });
  drawAll().then(() => (document.documentElement.dataset.ready = "yes"));
}

start();
