// The catalog of a hub: a table of any length, of which only the rows in view are in the document. All text of the catalog
// enters the document as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const table = data.columns; // column -> values, one for each adapter; texts that repeat are numbers into data.texts
const total = table.name.length;

const MARGIN = 12; // rows beyond both ends of the view, so that scrolling shows no gap

const size = (bytes) => {
  if (bytes === null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const unit = bytes < 1000 ? 0 : Math.min(Math.floor(Math.log10(bytes) / 3), units.length - 1);
  return unit ? `${(bytes / 1000 ** unit).toPrecision(3)} ${units[unit]}` : `${bytes} B`;
};

// key: heading, meaning, width in rem, how it is told (none: a text)
const COLUMNS = {
  name: ["Adapter", "Its name in the hub.", 19],
  status: ["Status", "Done by a run, found without a receipt of one, or failed.", 5.5],
  dialect: ["Dialect", "How its keys and its config are spelt.", 6.5],
  families: ["Families", "How its updates are parametrised.", 7],
  base: ["Base model", "As its config names it.", 11],
  rank: ["Rank", "The largest of all targets.", 4.5, fmt],
  targets: ["Targets", "Weights that it updates.", 5.5, fmt],
  bytes: ["Size", "Of its file now.", 6, size],
  before: ["Before", "Of the file that the run was given.", 6, size],
  error: ["Rel. error", "Of the run, over all updates; none where it is not known.", 6.5, fmt],
  norm: ["Norm", "Frobenius norm of all updates that could be measured, together.", 6, fmt],
  warnings: ["Warnings", "How many.", 6, fmt],
  reason: ["Reason", "Why it failed.", 14],
};
const KEYS = Object.keys(COLUMNS);
const isText = (key) => !COLUMNS[key][3];
const textOf = (key, row) => (data.texts[key] ? data.texts[key][table[key][row]] : table[key][row]);

const words = table.name.map((name, row) =>
  [name, ...["status", "dialect", "families", "base", "reason"].map((key) => textOf(key, row))].join(" ").toLowerCase(),
);

// What is asked for, and the rows that answer it, in order.
const asked = { words: "", status: "", dialect: "", family: "", base: "", from: NaN, to: NaN };
const sorting = { key: "name", descending: false };
let shown = [];

const orders = {}; // of texts: the place of every row, as the collator has it, found once
function placesOf(key) {
  if (!orders[key]) {
    const { compare } = new Intl.Collator("en", { numeric: true }); // a2 before a10
    const texts = [...new Set(Array.from({ length: total }, (_, row) => textOf(key, row)))].sort(compare);
    const places = new Map(texts.map((text, place) => [text, place]));
    orders[key] = Array.from({ length: total }, (_, row) => (textOf(key, row) ? places.get(textOf(key, row)) : null));
  }
  return orders[key];
}

function choose() {
  const parts = asked.words.toLowerCase().split(/\s+/).filter(Boolean);
  shown = [];
  for (let row = 0; row < total; row++) {
    if (asked.status !== "" && table.status[row] !== Number(asked.status)) continue;
    if (asked.dialect !== "" && table.dialect[row] !== Number(asked.dialect)) continue;
    if (asked.base !== "" && table.base[row] !== Number(asked.base)) continue;
    if (asked.family !== "" && !data.members[table.families[row]].includes(asked.family)) continue;
    if (table.rank[row] < asked.from || table.rank[row] > asked.to) continue; // false for NaN: no limit
    if (!parts.every((part) => words[row].includes(part))) continue;
    shown.push(row);
  }
  const { key, descending } = sorting;
  const values = isText(key) ? placesOf(key) : table[key];
  shown.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (x === y) return a - b;
    if (x === null || y === null) return (x === null) - (y === null); // gaps last, whichever way
    return descending ? y - x : x - y;
  });
}

// The table.

const body = el("tbody");
const gap = () => el("tr", { class: "gap", "aria-hidden": "true" }, el("td", { colspan: KEYS.length }));
const [above, below] = [gap(), gap()];
let height = 34; // of a row, until one is there to be measured
let drawnFrom = -1;

function line(row, place) {
  const cells = KEYS.map((key) => {
    if (!isText(key)) return el("td", {}, COLUMNS[key][3](table[key][row]));
    const text = textOf(key, row);
    const attributes = { class: "text", title: text };
    return key === "name"
      ? el("th", { scope: "row", ...attributes }, el("bdi", {}, text))
      : el("td", attributes, el("bdi", {}, text));
  });
  const failed = textOf("status", row) === "failed" ? "failed" : "";
  const whole = el("tr", { class: failed, tabindex: "0", "aria-rowindex": place + 2 }, ...cells);
  whole.dataset.row = row;
  return whole;
}

function drawRows(again) {
  const view = byId("rows");
  const from = Math.max(0, Math.min(Math.floor(view.scrollTop / height), shown.length) - MARGIN);
  const to = Math.min(shown.length, from + Math.ceil(view.clientHeight / height) + 2 * MARGIN);
  if (!again && from === drawnFrom) return;
  drawnFrom = from;
  above.firstChild.style.height = `${from * height}px`;
  below.firstChild.style.height = `${(shown.length - to) * height}px`;
  above.hidden = !from;
  below.hidden = to === shown.length;
  const focused = document.activeElement?.dataset?.row;
  body.replaceChildren(above, ...shown.slice(from, to).map((row, i) => line(row, from + i)), below);
  if (focused !== undefined) body.querySelector(`tr[data-row="${focused}"]`)?.focus({ preventScroll: true });
}

function draw() {
  choose();
  hide();
  for (const heading of document.querySelectorAll("#rows thead th")) {
    if (heading.dataset.key === sorting.key) heading.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  }
  byId("rows").scrollTop = 0;
  byId("rows").firstChild.setAttribute("aria-rowcount", shown.length + 1);
  drawRows(true);
  const all = shown.length === total ? "" : ` of ${total.toLocaleString("en")}`;
  byId("count").textContent = `${shown.length.toLocaleString("en")}${all} ${total === 1 ? "adapter" : "adapters"}`;
}

function makeTable() {
  const titles = KEYS.map((key) => {
    const button = el("button", { type: "button", title: COLUMNS[key][1] }, COLUMNS[key][0]);
    button.addEventListener("click", () => {
      // Numbers from the largest, text from A, at first.
      sorting.descending = sorting.key === key ? !sorting.descending : !isText(key);
      sorting.key = key;
      draw();
    });
    const heading = el("th", { scope: "col", class: isText(key) ? "text" : "" }, button);
    heading.dataset.key = key;
    return heading;
  });
  const widths = KEYS.map((key) => {
    const column = el("col");
    column.style.width = `${COLUMNS[key][2]}rem`;
    return column;
  });
  const caption = el("caption", { class: "hidden-text" }, "All adapters");
  const view = byId("rows");
  view.append(el("table", {}, caption, el("colgroup", {}, ...widths), el("thead", {}, el("tr", {}, ...titles)), body));
  view.addEventListener("scroll", () => drawRows(false), { passive: true });
  addEventListener("resize", () => drawRows(true));
  draw();
  height = body.querySelector("tr[data-row]").getBoundingClientRect().height || height;
  drawRows(true);
}

// The controls.

function choice(key, label, options) {
  const select = el("select", {}, el("option", {}, "all"), ...options.map(([, text]) => el("option", {}, short(text || "none", 60))));
  select.options[0].value = "";
  options.forEach(([value], i) => (select.options[i + 1].value = value));
  select.addEventListener("change", () => {
    asked[key] = select.value;
    draw();
  });
  const whole = el("label", {}, label, select);
  whole.hidden = options.length < 2;
  byId("controls").append(whole);
}

function limit(key, label) {
  const input = el("input", { type: "number", min: "0", step: "1", inputmode: "numeric" });
  input.addEventListener("input", () => {
    asked[key] = input.valueAsNumber;
    draw();
  });
  byId("controls").append(el("label", {}, label, input));
}

function makeControls() {
  const search = el("input", { type: "search", id: "search", placeholder: "words in names", autocomplete: "off", spellcheck: "false" });
  search.addEventListener("input", () => {
    asked.words = search.value;
    draw();
  });
  byId("controls").append(el("label", {}, "Search", search));
  for (const [key, label] of [["status", "Status"], ["dialect", "Dialect"]]) choice(key, label, data.texts[key].map((text, i) => [String(i), text]));
  choice("family", "Family", [...new Set(data.members.flat())].sort().map((name) => [name, name]));
  choice("base", "Base model", data.texts.base.map((text, i) => [String(i), text]));
  limit("from", "Rank from");
  limit("to", "to");
}

// The spectrum of the row under the pointer, or of the one that has the focus.

/** The pooled singular values of a row: one byte each, on a logarithmic scale below the largest; 0 stands for zero. */
function valuesOf(row) {
  const top = table.top[row];
  const { levels, decades } = data;
  return [...atob(table.spectrum[row])].map((sign) => {
    const level = sign.charCodeAt(0);
    return level ? top * 10 ** ((decades * (level - levels)) / (levels - 1)) : 0;
  });
}

function drawing(values, top) {
  const [width, tall, left] = [320, 120, 34];
  const at = (value) => (value > 0 ? Math.max(0, 1 + Math.log10(value / top) / data.decades) : 0);
  const picture = mark("svg", { viewBox: `0 0 ${width} ${tall}`, role: "img", "aria-label": `${values.length} singular values` });
  for (let decade = 0; decade <= data.decades; decade += 2) {
    const y = 6 + ((tall - 20) * decade) / data.decades;
    picture.append(mark("line", { x1: left, x2: width, y1: y, y2: y }));
    picture.append(mark("text", { x: left - 4, y: y + 3, "text-anchor": "end" }, decade ? `10⁻${"⁰¹²³⁴"[decade]}` : "1"));
  }
  const step = (width - left) / Math.max(values.length, 8);
  values.forEach((value, i) => {
    const bar = (tall - 20) * at(value);
    picture.append(mark("rect", { x: left + i * step, y: tall - 14 - bar, width: Math.max(1, step - 1), height: bar }));
  });
  picture.append(mark("text", { x: left, y: tall - 2 }, "1"));
  picture.append(mark("text", { x: left + step * (values.length - 0.5), y: tall - 2, "text-anchor": "middle" }, String(values.length)));
  return picture;
}

function reveal(line) {
  const row = Number(line.dataset.row);
  const card = byId("spectrum");
  card.dataset.row = row;
  byId("of").replaceChildren(el("bdi", {}, short(textOf("name", row), 120)));
  const top = table.top[row];
  if (top === null || !table.spectrum[row]) {
    byId("drawing").replaceChildren();
    byId("numbers").textContent = textOf("reason", row) ? short(textOf("reason", row), 200) : "No spectrum: no update that could be measured.";
  } else {
    const values = valuesOf(row);
    byId("drawing").replaceChildren(top > 0 ? drawing(values, top) : "");
    byId("numbers").textContent = top > 0 ? `Root mean square over the targets; the largest is ${fmt(top)}.` : "All updates are zero.";
  }
  card.hidden = false;
  const box = line.getBoundingClientRect();
  const { width, height: tall } = card.getBoundingClientRect();
  const under = box.bottom + 6;
  card.style.left = `${Math.max(8, Math.min(innerWidth - width - 8, innerWidth / 2))}px`;
  card.style.top = `${under + tall < innerHeight ? under : Math.max(8, box.top - tall - 6)}px`;
}

function hide() {
  byId("spectrum").hidden = true;
}

function followPointer() {
  const over = (event) => {
    const line = event.target.closest?.("tr[data-row]");
    if (line) reveal(line);
    else hide();
  };
  body.addEventListener("pointerover", over);
  body.addEventListener("focusin", over);
  byId("rows").addEventListener("pointerleave", hide);
  byId("rows").addEventListener("focusout", hide);
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

function start() {
  followTheme();
  byId("title").textContent = total === 1 ? "One adapter" : `${total.toLocaleString("en")} adapters`;
  const sum = (key) => table[key].reduce((a, b) => a + (b ?? 0), 0);
  const from = sum("before") ? `, from ${size(sum("before"))} before the run` : "";
  byId("about").append(el("bdi", {}, data.source), `: ${size(sum("bytes"))}${from}.`);
  byId("columns").append(...KEYS.flatMap((key) => [el("dt", {}, COLUMNS[key][0]), el("dd", {}, COLUMNS[key][1])]));
  byId("columns").append(
    el("dt", {}, "Spectrum, beside a row"),
    el("dd", {}, `The root mean square over the targets of an adapter, singular value by singular value; the first ${data.most} at most, each in ${data.levels} steps over ${data.decades} decades. The exact values of every target are in the catalog file.`),
  );
  if (total) {
    makeControls();
    makeTable();
    followPointer();
  }
  document.documentElement.dataset.ready = "yes";
}

start();
