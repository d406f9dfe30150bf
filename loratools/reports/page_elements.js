// What every page is made of: elements whose text is text, and numbers as they are told.

const byId = (id) => document.getElementById(id);
const theme = () => (document.documentElement.dataset.theme === "dark" ? "dark" : "light");
const colour = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== "") element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function short(text, most) {
  const letters = [...text];
  if (letters.length <= most) return text;
  const half = Math.floor((most - 1) / 2);
  return `${letters.slice(0, half).join("")}…${letters.slice(letters.length - (most - 1 - half)).join("")}`;
}

function fmt(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (value < 0) return `−${fmt(size)}`;
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return value >= 100 ? value.toFixed(1) : value.toPrecision(3);
}

const percent = (share) => (share === null ? "–" : `${(100 * share).toPrecision(3)}\u00a0%`);
