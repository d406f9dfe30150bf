// Light and dark, as the system has it until somebody chooses; paper is light. For pages that styles alone paint.

function paint(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").setAttribute("aria-pressed", String(name === "dark"));
}

function followTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  paint(dark.matches ? "dark" : "light");
  byId("theme").addEventListener("click", () => paint(theme() === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
  let before = theme();
  addEventListener("beforeprint", () => {
    before = theme();
    paint("light");
  });
  addEventListener("afterprint", () => paint(before));
}
