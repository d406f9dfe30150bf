// Drawings that are painted by styles: curves over steps, histograms one above the other, and spreads of lengths.

/** Round numbers that divide a range into about so many parts, and contain it. */
function ticks(low, high, parts = 4) {
  const span = high - low || Math.abs(high) || 1;
  const raw = 10 ** Math.floor(Math.log10(span / parts));
  const step = raw * ([1, 2, 5, 10].find((factor) => span / (factor * raw) <= parts) ?? 10);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const across = (value, [low, high], [from, to]) => from + ((value - low) / (high - low)) * (to - from);
const words = (x, y, text, anchor = "start", style = "") => mark("text", { x, y, "text-anchor": anchor, class: style }, text);
const stroke = (x1, y1, x2, y2, style) => mark("line", { x1, y1, x2, y2, class: style });

function symbol(style, x, y) {
  return style === "second" ? mark("rect", { x: x - 3, y: y - 3, width: 6, height: 6, class: style }) : mark("circle", { cx: x, cy: y, r: 3.2, class: style });
}

function key(lines) {
  return el(
    "ul",
    { class: "key" },
    ...lines.map(({ name, style, marked }) => {
      const sign = mark("svg", { viewBox: "0 0 30 10", class: "drawing", "aria-hidden": "true" }, mark("path", { d: "M0 5H30", class: style }));
      if (marked) sign.append(symbol(style, 15, 5));
      return el("li", {}, sign, name);
    }),
  );
}

function curves({ title, x, y, share, lines, kept }) {
  const [width, tall, left, right, top, bottom] = [540, 300, 58, 518, 14, 256];
  const points = lines.flatMap((line) => line.points);
  const down = ticks(share ? 0 : Math.min(0, ...points.map((p) => p[1])), share ? 1 : Math.max(...points.map((p) => p[1])), 5);
  const along = ticks(0, Math.max(1, ...points.map((p) => p[0])), 5);
  const most = Math.max(1, ...points.map((p) => p[0]));
  const [xs, ys] = [[0, most], [down[0], down[down.length - 1]]];
  const placeX = (value) => across(value, xs, [left, right]);
  const placeY = (value) => across(value, ys, [bottom, top]);
  const picture = mark("svg", { viewBox: `0 0 ${width} ${tall}`, class: "drawing", role: "img", "aria-label": `${title}: ${lines.map((line) => line.name).join(", ")}` });
  for (const value of down) {
    picture.append(stroke(left, placeY(value), right, placeY(value), "grid"));
    picture.append(words(left - 7, placeY(value) + 4, share ? `${Math.round(100 * value)}` : String(value), "end"));
  }
  for (const value of along.filter((value) => value <= most && Number.isInteger(value))) {
    picture.append(stroke(placeX(value), bottom, placeX(value), bottom + 5, "axis"));
    picture.append(words(placeX(value), bottom + 19, value.toLocaleString("en"), "middle"));
  }
  picture.append(stroke(left, bottom, right, bottom, "axis"), stroke(left, top, left, bottom, "axis"));
  picture.append(words((left + right) / 2, tall - 6, x, "middle"));
  picture.append(mark("text", { "text-anchor": "middle", transform: `translate(14 ${(top + bottom) / 2}) rotate(-90)` }, y));
  if (kept !== null && kept <= most) picture.append(stroke(placeX(kept), top, placeX(kept), bottom, "kept"));
  for (const { points: some, style, marked } of lines) {
    if (some.length > 1) picture.append(mark("path", { class: style, d: some.map(([a, b], i) => `${i ? "L" : "M"}${placeX(a).toFixed(1)} ${placeY(b).toFixed(1)}`).join("") }));
    if (marked || some.length === 1) picture.append(...some.map(([a, b]) => symbol(style, placeX(a), placeY(b))));
  }
  const caption = kept === null ? "" : `The state after step ${kept.toLocaleString("en")} was kept (dotted).`;
  return el("figure", { class: "curves" }, el("h3", {}, title), picture, key(lines), el("figcaption", {}, caption));
}

function histograms({ title, x, rows, threshold }) {
  const [width, left, right, each, room] = [900, 190, 880, 74, 52];
  const bottom = rows.length * each;
  const picture = mark("svg", { viewBox: `0 0 ${width} ${bottom + 44}`, class: "drawing", role: "img", "aria-label": `${title}: ${rows.map((row) => row.name).join(", ")}` });
  rows.forEach(({ name, counts }, i) => {
    const base = (i + 1) * each - 2;
    const [most, total] = [Math.max(1, ...counts), counts.reduce((a, b) => a + b, 0)];
    const step = (right - left) / counts.length;
    picture.append(words(left - 14, base - 24, name, "end", "name"), words(left - 14, base - 8, total.toLocaleString("en"), "end"));
    picture.append(stroke(left, base, right, base, "axis"));
    counts.forEach((count, place) => {
      const bar = (room * count) / most;
      if (count) picture.append(mark("rect", { x: (left + place * step + 1).toFixed(1), y: (base - Math.max(bar, 1)).toFixed(1), width: (step - 2).toFixed(1), height: Math.max(bar, 1).toFixed(1) }, mark("title", {}, `${(place / counts.length).toFixed(2)} to ${((place + 1) / counts.length).toFixed(2)}: ${count}`)));
    });
    if (total) picture.append(words(left + (counts.indexOf(Math.max(...counts)) + 0.5) * step, base - room - 4, most.toLocaleString("en"), "middle"));
  });
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    const place = across(value, [0, 1], [left, right]);
    picture.append(stroke(place, bottom - 2, place, bottom + 4, "axis"), words(place, bottom + 18, String(value), "middle"));
  }
  picture.append(words((left + right) / 2, bottom + 38, x, "middle"));
  if (threshold !== null) {
    const place = across(threshold, [0, 1], [left, right]);
    picture.append(stroke(place, 8, place, bottom - 2, "threshold"));
  }
  const caption = threshold === null ? "" : `What is right of the dashed line, at ${fmt(threshold)}, passes.`;
  return el("figure", { class: "histograms" }, el("h3", {}, title), el("div", { class: "scroll plain", tabindex: "0", role: "region", "aria-label": title }, picture), el("figcaption", {}, caption));
}

/** The least and the greatest as a line, the middle half as a box, the median as a stroke. */
function spreads({ title, x, rows }) {
  const [width, left, right, each] = [900, 190, 880, 40];
  const along = ticks(0, Math.max(1, ...rows.map(({ five }) => five[4])), 6);
  const placeX = (value) => across(value, [0, along[along.length - 1]], [left, right]);
  const bottom = rows.length * each + 4;
  const picture = mark("svg", { viewBox: `0 0 ${width} ${bottom + 40}`, class: "drawing", role: "img", "aria-label": `${title}: ${rows.map((row) => row.name).join(", ")}` });
  for (const value of along) picture.append(stroke(placeX(value), 0, placeX(value), bottom, "grid"), words(placeX(value), bottom + 16, value.toLocaleString("en"), "middle"));
  rows.forEach(({ name, five }, i) => {
    const middle = (i + 0.5) * each;
    const [least, low, median, high, most] = five.map(placeX);
    picture.append(words(left - 14, middle + 4, name, "end", "name"), stroke(least, middle, most, middle, "axis"));
    picture.append(mark("rect", { x: low, y: middle - 9, width: Math.max(high - low, 1), height: 18, class: "box" }), stroke(median, middle - 9, median, middle + 9, "median"));
  });
  picture.append(stroke(left, bottom, right, bottom, "axis"), words((left + right) / 2, bottom + 36, x, "middle"));
  return el("figure", { class: "spreads" }, el("h3", {}, title), el("div", { class: "scroll plain", tabindex: "0", role: "region", "aria-label": title }, picture), el("figcaption", {}, "A line from the least to the greatest, a box around the middle half, a stroke at the median."));
}
