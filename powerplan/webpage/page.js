(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const root = document.documentElement;
  const views = [];

  const options = {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    ast: true,  // Expressions are interpreted: the page's policy allows no eval.
    tooltip: { disableDefaultStyle: true },
  };

  // What the pointer shows: the curves that are drawn, by their names.
  const tipsOf = (meta, shown) => meta.tips.map((tip) => {
    const row = { title: tip.title };
    for (const [key, name] of Object.entries(meta.names)) {
      if (shown.includes(key) && key in tip.texts) row[name] = tip.texts[key];
    }
    return { x: tip.x, low: tip.low, high: tip.high, tip: row };
  });

  const boxes = [...document.querySelectorAll("input[data-curve]")];
  const toggled = ["chart-wsfr", "chart-state"];

  const draw = () => {
    const chosen = boxes.filter((box) => box.checked).map((box) => box.dataset.curve);
    for (const { id, view, spec } of views) {
      if (!spec.usermeta) continue;
      const shown = toggled.includes(id) ? chosen : Object.keys(spec.usermeta.names);
      view.signal("shown", shown).data("tips", tipsOf(spec.usermeta, shown)).runAsync();
    }
  };

  const waiting = Object.entries(specs).map(([id, spec]) =>
    vegaEmbed(`#${id}`, spec, options).then(({ view }) => views.push({ id, view, spec })));
  Promise.all(waiting).then(() => {
    for (const box of boxes) box.addEventListener("change", draw);
    draw();
    root.dataset.drawn = "true";
  });

  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  button.hidden = false;
  name();

  // Paper opens nothing: what is folded is printed, but for formulas and what charts show.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open]):not(.formulas):not(.data)")];
    for (const one of folded) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
})();
