// Elements of drawings, for pages that draw by themselves.

const NS = "http://www.w3.org/2000/svg";
function mark(tag, attributes, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
