// The table of all rows: sorted by any column, filtered by text and fine-tune. Only as many rows as are looked at are built.

const FIRST_ROWS = 200;

// Columns for which paper has room.
const ON_PAPER = new Set(["target", "fine_tune", "rank", "relative_norm", "effective_rank", "energy_left", "energy_right"]);
for (const key of ["left_intruders", "right_intruders", "missed_error"]) ON_PAPER.add(key);

const LAST = new Set(["outputs", "inputs", "base_norm", "norm"]); // what one looks at least
const shownColumns = [...data.columns].sort((a, b) => LAST.has(a.key) - LAST.has(b.key));

const sorting = { column: null, descending: false };
let limit = FIRST_ROWS;

function compareBy(column) {
  const { key, kind } = column;
  const text = kind === "text";
  const collator = new Intl.Collator("en", { numeric: true }); // layer 2 before layer 10
  const value = (row) => (key === "fine_tune" ? row.fineTune : text ? row.cells[column.index] : row[key]);
  return (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // gaps last, whichever way
    const order = typeof x === "string" ? collator.compare(x, y) : x - y;
    return sorting.descending ? -order : order;
  };
}

function matching() {
  const { tune, words } = sections.table.state;
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter(
    (row) => (tune === "" || row.fineTune === Number(tune)) && wanted.every((word) => row.words.includes(word)),
  );
}

function headings() {
  const titles = shownColumns.map((column) => {
    const button = el("button", { type: "button", title: COLUMNS[column.key][1] }, COLUMNS[column.key][0]);
    column.class = [column.kind === "text" ? "text" : "", ON_PAPER.has(column.key) ? "" : "screen"].join(" ").trim();
    const heading = el("th", { scope: "col", class: column.class }, button);
    button.addEventListener("click", () => {
      // Numbers from the largest, text from A, at first.
      sorting.descending = sorting.column === column ? !sorting.descending : column.kind !== "text";
      sorting.column = column;
      drawTable();
    });
    column.heading = heading;
    return heading;
  });
  return el("thead", {}, el("tr", {}, ...titles));
}

function line(row) {
  row.line ??= el(
    "tr",
    {},
    ...shownColumns.map((column) => {
      const value = row.cells[column.index];
      if (column.key === "target") return el("th", { scope: "row", class: "text", title: value }, el("bdi", {}, value));
      if (column.key === "fine_tune") return el("td", { class: "text" }, named(row.fineTune));
      if (column.kind === "text") return el("td", { class: column.class, title: value ?? "" }, el("bdi", {}, value ?? "–"));
      return el("td", { class: column.class }, told(column.key, value));
    }),
  );
  return row.line;
}

function drawTable() {
  const holder = sections.table;
  const found = matching();
  if (sorting.column) found.sort(compareBy(sorting.column)); // stable: ties stay in the order of the model
  for (const column of data.columns) {
    if (column === sorting.column) column.heading.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    else column.heading.removeAttribute("aria-sort");
  }
  const shown = found.slice(0, limit);
  holder.querySelector("tbody").replaceChildren(...shown.map(line));
  const all = found.length === rows.length ? "" : ` of ${rows.length.toLocaleString("en")}`;
  const part = shown.length < found.length ? `; the first ${shown.length} are shown` : "";
  byId("count").textContent = `${found.length.toLocaleString("en")}${all} ${rows.length === 1 ? "row" : "rows"}${part}`;
  byId("more").hidden = shown.length === found.length;
}

function makeTable() {
  const holder = sections.table;
  byId("rows").append(el("table", {}, el("caption", { class: "hidden-text" }, "All numbers"), headings(), el("tbody")));
  const search = el("input", { type: "search", placeholder: "such as 3 q_proj", autocomplete: "off", spellcheck: "false" });
  holder.state.words = "";
  search.addEventListener("input", () => {
    holder.state.words = search.value;
    drawTable();
  });
  const controls = holder.querySelector(".controls");
  controls.append(el("label", {}, "Filter by words in names", search));
  if (tunes.length > 1) choice(holder, "tune", "Fine-tune", [["", "all"], ...tuneOptions()], drawTable);
  else holder.state.tune = "";
  byId("more").addEventListener("click", () => {
    limit = Infinity;
    drawTable();
    byId("rows").focus();
  });
  byId("columns").append(...shownColumns.flatMap(({ key }) => [el("dt", {}, COLUMNS[key][0]), el("dd", {}, COLUMNS[key][1])]));
  drawTable();
}
