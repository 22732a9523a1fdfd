// The map of heads: a cell a head, coloured by one quantity, walked with the arrows.

function quantities(data) {
  return data.maps.flatMap((map) =>
    map.quantities.map((q) => ({ ...q, section: map.section, lens: map.title, note: map.note,
      sorted: q.values.flat().filter((v) => v !== null).sort((a, b) => a - b) })));
}

function quantityName(q) {
  return `${q.lens}: ${q.name.replaceAll("_", " ")}`;
}

// The share of the colour scale that a value takes, by its size or by its rank.
function shareOf(q, value, byRank) {
  if (byRank && !q.signed) return q.sorted.length > 1 ? placeOf(q, value) / (q.sorted.length - 1) : 1;
  const low = q.sorted[0];
  const high = q.sorted[q.sorted.length - 1];
  if (q.signed) return value / Math.max(-low, high);
  const from = low > 0.5 * high ? low : 0;
  return high > from ? (value - from) / (high - from) : 1;
}

function placeOf(q, value) {
  let low = 0;
  let high = q.sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (q.sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

function rankOf(q, value) {
  const after = q.sorted.length - placeOf(q, value) - q.sorted.filter((v) => v === value).length;
  return after + 1;
}

function headMap(app) {
  const { data } = app;
  const rows = data.sites.length;
  const cells = new Map();
  const grid = el("div", { class: "map", role: "grid", "aria-label": "Layers and heads",
    "aria-rowcount": rows, "aria-colcount": data.across });
  grid.style.setProperty("--across", data.across);
  const header = el("div", { role: "row", class: "row" }, el("span", { role: "columnheader", class: "label" }));
  const step = data.across > 24 ? 8 : data.across > 12 ? 4 : 1;
  for (let head = 0; head < data.across; head++) {
    const numbered = head % step === 0 && !data.sites.some((site) => site.labels);
    header.append(el("span", { role: "columnheader", class: "label top" }, numbered ? String(head) : ""));
  }
  grid.append(header);
  data.sites.forEach((site, row) => {
    const line = el("div", { role: "row", class: "row" },
      el("span", { role: "rowheader", class: "label", title: site.alias }, site.short));
    for (let head = 0; head < data.across; head++) {
      const cell = el("div", { role: "gridcell", class: "cell", tabindex: "-1" });
      cell.dataset.row = row;
      cell.dataset.head = head;
      cells.set(`${row}.${head}`, cell);
      line.append(cell);
    }
    grid.append(line);
  });

  let focus = null;
  const placed = (event) => event.target.closest?.(".cell.known");
  const place = (cell) => [Number(cell.dataset.row), Number(cell.dataset.head)];
  function rove(row, head) {
    const cell = cells.get(`${row}.${head}`);
    if (!cell || !cell.classList.contains("known")) return false;
    if (focus) focus.tabIndex = -1;
    focus = cell;
    cell.tabIndex = 0;
    return true;
  }
  grid.addEventListener("mouseover", (e) => placed(e) && app.hover(...place(placed(e))));
  grid.addEventListener("mouseleave", () => app.hover(null));
  grid.addEventListener("focusin", (e) => placed(e) && app.hover(...place(placed(e))));
  grid.addEventListener("click", (e) => {
    if (!placed(e)) return;
    rove(...place(placed(e)));
    app.open(...place(placed(e)));
  });
  grid.addEventListener("keydown", (e) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!focus) return;
    const [row, head] = place(focus);
    if (e.key in moves) {
      e.preventDefault();
      const [down, across] = moves[e.key];
      for (let r = row + down, h = head + across; cells.has(`${r}.${h}`); r += down, h += across) {
        if (rove(r, h)) break;
      }
      focus.focus();
    } else if (e.key === "Enter" || e.key === " ") {
      e.preventDefault();
      app.open(row, head, true);
    }
  });

  return {
    node: grid,
    focus: (row, head) => rove(row, head) && focus.focus(),
    paint(q, byRank) {
      let first = null;
      for (const [key, cell] of cells) {
        const [row, head] = place(cell);
        const value = q ? q.values[row]?.[head] ?? null : null;
        const known = value !== null || app.exists(row, head);
        cell.classList.toggle("known", known);
        cell.style.backgroundColor = value === null ? "" : css(colour(shareOf(q, value, byRank), q.signed));
        cell.setAttribute("aria-label",
          `${app.headName(row, head)}: ${value === null ? "not measured" : shown(value)}`);
        if (known && !first) first = key;
      }
      if (!focus && first) rove(...first.split(".").map(Number));
    },
    select(row, head) {
      grid.querySelector("[aria-selected=true]")?.removeAttribute("aria-selected");
      cells.get(`${row}.${head}`)?.setAttribute("aria-selected", "true");
      rove(row, head);
    },
    mark(heads) {
      grid.classList.toggle("marking", heads.length > 0);
      for (const cell of cells.values()) cell.classList.remove("marked");
      for (const [row, head] of heads) cells.get(`${row}.${head}`)?.classList.add("marked");
    },
  };
}
