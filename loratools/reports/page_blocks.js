// A page of sections, each of blocks: facts, tables and drawings. All text enters the document as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);

const TELL = {
  text: (value) => el("bdi", {}, value ?? "–"),
  prose: (value) => el("bdi", {}, value ?? "–"),
  number: fmt,
  share: percent,
  seconds: (value) => (value === null ? "–" : `${value.toLocaleString("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 })}\u00a0s`),
};
const LEFT = new Set(["text", "prose", "bar"]);

function cell(kind, value, tag) {
  if (kind === "bar") {
    const bar = el("span");
    bar.style.width = `${100 * value}%`;
    return el("td", { class: "amount", "aria-hidden": "true" }, value ? bar : "");
  }
  const settings = { class: kind === "prose" ? "prose" : LEFT.has(kind) ? "text" : "" };
  if (kind === "text" && typeof value === "string") settings.title = value;
  return el(tag, tag === "th" ? { scope: "row", ...settings } : settings, TELL[kind](value));
}

function table({ title, columns, rows, strong, tall }) {
  const heads = columns.map(([name, kind]) => el("th", { scope: "col", class: LEFT.has(kind) ? "text" : "" }, name));
  const lines = rows.map((cells, i) => {
    const parts = cells.map((value, place) => cell(columns[place][1], value, place ? "td" : "th"));
    return el("tr", { class: strong.includes(i) ? "strong" : "" }, ...parts);
  });
  const whole = el("table", {}, el("caption", { class: "hidden-text" }, title), el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...lines));
  const view = el("div", { class: tall ? "scroll tall samples" : "scroll", tabindex: "0", role: "region", "aria-label": title }, whole);
  return el("div", {}, title === "" ? "" : el("h3", {}, title), view);
}

const facts = ({ rows }) => el("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, el("bdi", {}, value))]));
const hidden = ({ title, block }) => el("details", {}, el("summary", {}, title), DRAW[block.kind](block));
const paragraph = ({ text }) => el("p", {}, text);
const beside = ({ blocks }) => el("div", { class: "side-by-side" }, ...blocks.map((block) => DRAW[block.kind](block)));
const DRAW = { facts, table, hidden, paragraph, beside, curves, histograms, spreads };

function section({ id, title, blocks }) {
  const parts = blocks.map((block) => el("div", { class: "block" }, DRAW[block.kind](block)));
  return el("section", { id, "aria-labelledby": `h-${id}` }, el("h2", { id: `h-${id}` }, title), ...parts);
}

function start() {
  followTheme();
  byId("title").textContent = data.title;
  byId("about").append(el("bdi", {}, data.about));
  byId("tags").append(...data.tags.map((tag) => el("span", { class: "tag" }, tag)));
  byId("notes").append(...data.notes.map((note) => el("p", { class: "note" }, note)));
  byId("cards").append(
    ...data.cards.map(({ title, figure, more }) => el("div", { class: "card" }, el("h3", {}, title), el("p", { class: "figure" }, figure), el("p", { class: "kind" }, more))),
  );
  byId("sections").append(...data.sections.map(section));
  byId("nav").append(...data.sections.map(({ id, title }) => el("a", { href: `#${id}` }, title)));
  document.documentElement.dataset.ready = "yes";
}

start();
