// The page: what stands where, what is chosen, the keys, and light or dark.

const PANELS = { map: mapPanel, table: tablePanel, line: linePanel, graph: graphPanel };

function start(data) {
  const app = { data, shelves: shelf(data), quantities: quantities(data), chosen: null, byRank: false };
  const known = new Set(data.patterns.map((p) => (p.head === null ? `${p.row}` : `${p.row}.${p.head}`)));
  app.exists = (row, head) => known.has(`${row}.${head}`) || (known.has(`${row}`) && head < data.sites[row].heads);
  for (const { row } of data.images?.layers ?? []) known.add(`${row}`);
  app.labelOf = (row, head) => data.sites[row].labels?.[head] ?? `head ${head}`;
  app.numberOf = (row, head) => Number(/\d+$/.exec(app.labelOf(row, head))[0]);
  app.headName = (row, head) => `${data.sites[row].name} ${app.labelOf(row, head)}`;
  app.shortName = (row, head) => `${data.sites[row].short}.${app.numberOf(row, head)}`;
  app.tokens = (text, length) => (text === null || text === undefined
    ? Array.from({ length }, (_, i) => String(i)) : data.texts[text]);
  const root = document.querySelector("main");
  const status = el("p", { class: "status", role: "status" });
  const map = data.sites.length ? headMap(app) : null;
  const rank = ranking(app);
  const found = findingsView(app);
  const view = data.images ? imageHeadView(app) : headView(app);

  app.hover = (row, head) => {
    if (row === null || row === undefined) return rest();
    const q = app.chosen;
    const value = q?.values[row]?.[head] ?? null;
    status.replaceChildren(el("b", {}, app.headName(row, head)),
      value === null ? "" : ` · ${q.name.replaceAll("_", " ")} ${shown(value)} · ${rankOf(q, value)} of ${q.sorted.length}`);
  };
  const clicked = data.images ? "cell for its map" : `head for its ${data.patterns.length ? "pattern" : "numbers"}`;
  const rest = () => status.replaceChildren(el("span", { class: "hint" },
    `Click a ${clicked}. Keys: arrows, Enter, Esc; / finds a head.`));
  app.open = (row, head, focus = false, section = view.now()?.section ?? data.opens?.[2] ?? 0) => {
    map?.select(row, head);
    view.open(row, head, section).then(() => {
      if (!focus) return;
      view.node.scrollIntoView({ block: "nearest" });
      view.node.focus({ preventScroll: true });
    });
  };
  app.mark = (heads, lens, section) => {
    map?.mark(heads);
    const q = app.quantities.find((one) => one.lens === lens && one.section === section);
    if (q && app.chosen?.lens !== lens) app.colourBy(q);
  };

  const scale = { bar: el("span", { class: "ramp" }), low: el("span"), high: el("span") };
  const note = el("p", { class: "hint" });
  const pick = el("select", { "aria-label": "Quantity that colours the map",
    onchange: () => app.colourBy(app.quantities[Number(pick.value)]) });
  data.sections.forEach((section, s) => {
    const mine = app.quantities.map((q, i) => [q, i]).filter(([q]) => q.section === s);
    if (mine.length) {
      pick.append(el("optgroup", { label: section.short },
        mine.map(([q, i]) => el("option", { value: i }, quantityName(q)))));
    }
  });
  app.colourBy = (q) => {
    app.chosen = q ?? null;
    pick.value = String(app.quantities.indexOf(q));
    paint();
    rank.draw(app.chosen);
  };
  function paint() {
    const q = app.chosen;
    map?.paint(q, app.byRank);
    scale.bar.style.background = gradient(Boolean(q?.signed));
    if (!q) return;
    const [low, high] = [q.sorted[0], q.sorted[q.sorted.length - 1]];
    const most = Math.max(-low, high);
    const from = q.signed ? -most : low > 0.5 * high ? low : 0;
    scale.low.textContent = app.byRank ? `${shown(low)} (lowest)` : shown(from);
    scale.high.textContent = app.byRank ? `${shown(high)} (highest)` : shown(q.signed ? most : high);
    note.textContent = q.note;
  }

  const search = el("input", { type: "search", placeholder: "find a head: 17.5", "aria-label": "Find a head, such as 17.5",
    onkeydown: (e) => {
      if (e.key !== "Enter") return;
      const head = headNamed(app, search.value);
      status.replaceChildren(head ? "" : `There is no head ${search.value}.`);
      if (head) { map?.focus(...head); app.open(...head, true); }
    } });
  const kinds = [...new Set(data.sites.map((_, row) => `${app.labelOf(row, 0).replace(/ \d+$/, "")}s`))];
  const left = el("section", { class: "card maps" }, el("h2", {}, kinds.join(", ").replace(/^./, (letter) => letter.toUpperCase())),
    el("div", { class: "controls" }, pick, choice("Colour by", [[false, "value"], [true, "rank"]], false,
      (byRank) => { app.byRank = byRank; paint(); }), search),
    el("p", { class: "legend" }, scale.low, scale.bar, scale.high), map?.node, status, note,
    el("details", {}, el("summary", {}, "Ranking"), rank.node));
  const panels = data.panels.map((panel) => el("section", { class: "card panel" }, el("h2", {}, panel.title),
    panel.note ? el("p", { class: "hint" }, panel.note) : null,
    data.sections.length > 1 ? el("p", { class: "hint" }, data.sections[panel.section].title) : null,
    PANELS[panel.type](app, panel)));
  const spoken = data.sections.some((section) => section.findings.length);
  root.append(...[spoken ? found.node : null, map ? left : null, map ? view.node : null].filter(Boolean),
    el("div", { class: "wide panels" }, panels));
  rest();
  app.colourBy(app.quantities[data.colours] ?? app.quantities[0]);
  if (data.opens) app.open(data.opens[0], data.opens[1], false, data.opens[2]);

  document.addEventListener("keydown", (e) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName);
    if (e.key === "/" && !typing && map) {
      e.preventDefault();
      search.focus();
      search.select();
    } else if (e.key === "Escape") {
      found.clear();
      app.mark([]);
      const head = view.now();
      if (head && map) map.focus(head.row, head.head);
    }
  });
  document.addEventListener("themechange", () => { paint(); rank.draw(app.chosen); view.repaint(); });
}

// A head by what a person types: 17.5, 17 5, L17H5, layer 17 head 5, encoder.3.2.
function headNamed(app, typed) {
  const { data } = app;
  const found = /^\s*([a-z]*?)\W*(?:l|layer)?\W*(\d+)\D+(\d+)\s*$/i.exec(typed);
  if (!found) return null;
  const [, kind, layer, head] = found;
  const row = data.sites.findIndex((s) => s.alias.endsWith(`.${Number(layer)}`) &&
    (/^(layer|l)?$/i.test(kind) || s.alias.startsWith(kind.toLowerCase())));
  const places = row < 0 ? [] : Array.from({ length: data.sites[row].heads }, (_, place) => place);
  const place = places.find((at) => app.numberOf(row, at) === Number(head));
  return place === undefined ? null : [row, place];
}

function themes() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
    document.dispatchEvent(new Event("themechange"));
  };
  dark.addEventListener("change", apply);
  const button = document.querySelector("#theme");
  button.addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    apply();
  });
  apply();
}

themes();
start(JSON.parse(document.querySelector("#data").textContent));
