// A graph in columns: nodes left to right by their column, edges as broad as their weight.

function graphPanel(app, panel) {
  const columns = [...new Set(panel.nodes.map((n) => n.column))].sort((a, b) => a - b);
  const lanes = columns.map((c) => panel.nodes.filter((n) => n.column === c));
  const tall = Math.max(...lanes.map((lane) => lane.length), 1);
  const [wide, high] = [Math.max(110, Math.min(170, 900 / columns.length)), 44];
  const [width, height] = [columns.length * wide, tall * high + 20];
  const places = new Map();
  lanes.forEach((lane, c) => lane.forEach((node, i) => places.set(node.name,
    [c * wide + wide / 2, 10 + (i + 0.5 + (tall - lane.length) / 2) * high])));
  const most = Math.max(...panel.links.map((l) => Math.abs(l.weight)), 1e-12);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "graph", role: "group", "aria-label": panel.title });
  picture.style.minWidth = `${Math.min(width, columns.length * 90)}px`;
  const readout = el("p", { class: "hint", role: "status" }, "Point at a node or an edge.");
  const half = wide / 2 - 16;
  const links = panel.links.map((link) => {
    const [[x1, y1], [x2, y2]] = [places.get(link.source), places.get(link.target)];
    const bend = (x2 - x1) / 2;
    const path = svg("path", {
      class: `edge ${link.weight < 0 ? "below" : "above"}`, "stroke-width": 1 + 6 * (Math.abs(link.weight) / most),
      d: `M${x1 + half} ${y1}C${x1 + half + bend / 2} ${y1} ${x2 - half - bend / 2} ${y2} ${x2 - half} ${y2}`,
      onmouseenter: () => { readout.textContent = `${link.source} → ${link.target}: ${shown(link.weight)}`; },
    }, svg("title", {}, `${link.source} → ${link.target}: ${shown(link.weight)}`));
    picture.append(path);
    return { ...link, path };
  });
  for (const node of panel.nodes) {
    const [x, y] = places.get(node.name);
    const light = () => {
      const near = links.filter((l) => l.source === node.name || l.target === node.name);
      links.forEach((l) => l.path.classList.toggle("faint", !near.includes(l)));
      readout.textContent = `${node.label}: ` + (near.map((l) => `${l.source} → ${l.target} ${shown(l.weight)}`).join(" · ") || "no edges");
    };
    const open = () => node.head && app.open(...node.head, true);
    picture.append(svg("g", {
      class: node.head ? "node opens" : "node", tabindex: "0", role: node.head ? "button" : "img", "aria-label": node.label,
      onmouseenter: light, onfocus: light, onclick: open,
      onkeydown: (e) => (e.key === "Enter" || e.key === " ") && (e.preventDefault(), open()),
    }, svg("rect", { x: x - half, y: y - 14, width: 2 * half, height: 28, rx: 7 }),
      svg("text", { x, y: y + 4, "text-anchor": "middle" }, node.label)));
  }
  picture.addEventListener("mouseleave", () => links.forEach((l) => l.path.classList.remove("faint")));
  return [el("div", { class: "scroll" }, picture), readout];
}
