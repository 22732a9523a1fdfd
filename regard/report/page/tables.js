// A table that sorts by the column whose head is pressed; a row may open a head.

function tablePanel(app, panel) {
  const body = el("tbody");
  let [by, descending] = [null, true];
  const heads = panel.columns.map((name, at) => el("th", { scope: "col", "aria-sort": "none" },
    el("button", { type: "button", onclick: () => {
      descending = by === at ? !descending : true;
      by = at;
      draw();
    } }, name)));

  function draw() {
    heads.forEach((th, at) =>
      th.setAttribute("aria-sort", at !== by ? "none" : descending ? "descending" : "ascending"));
    const order = panel.rows.map((_, i) => i);
    if (by !== null) {
      const key = (i) => panel.rows[i][by];
      order.sort((a, b) => {
        if (key(a) === null || key(b) === null) return (key(a) === null) - (key(b) === null);
        const up = typeof key(a) === "number" && typeof key(b) === "number"
          ? key(a) - key(b)
          : String(key(a)).localeCompare(String(key(b)), "en", { numeric: true });
        return descending ? -up : up;
      });
    }
    body.replaceChildren(...order.map((i) => el("tr", {}, panel.rows[i].map((value, at) => {
      const text = typeof value === "number" || value === null ? shown(value) : value;
      const head = at === 0 && panel.heads ? panel.heads[i] : null;
      return el("td", { class: typeof value === "number" ? "number" : null },
        head ? el("button", { type: "button", class: "link", onclick: () => app.open(...head) }, text) : text);
    }))));
  }
  draw();
  return [el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": panel.title },
    el("table", {}, el("thead", {}, el("tr", {}, heads)), body))];
}
