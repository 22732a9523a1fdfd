// Lines over labelled points, with a readout that follows the pointer or the arrows.

const STROKES = ["", "6 3", "2 3", "9 3 2 3", "1 4"];

function linePanel(app, panel) {
  const [width, height, left, bottom, top] = [640, 260, 58, 40, 12];
  const names = Object.keys(panel.lines);
  const values = names.flatMap((n) => panel.lines[n]).filter((v) => v !== null && (!panel.log || v > 0));
  const ticks = panel.log ? decades(values) : round(values);
  const scale = (v) => (panel.log ? Math.log10(v) : v);
  const [low, high] = [scale(ticks[0]), scale(ticks[ticks.length - 1])];
  const x = (i) => left + (i / Math.max(1, panel.x.length - 1)) * (width - left - 10);
  const y = (v) => height - bottom - ((scale(v) - low) / (high - low || 1)) * (height - bottom - top);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", tabindex: "0", role: "img",
    "aria-label": `${panel.title}: ${names.join(", ")}; arrows move` });
  for (const tick of ticks) {
    picture.append(svg("line", { class: "rule", x1: left, x2: width - 10, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, shown(tick)));
  }
  const every = Math.max(1, Math.ceil(panel.x.length / 10));
  panel.x.forEach((label, i) => {
    if (i % every === 0) picture.append(svg("text", { class: "tick", x: x(i), y: height - bottom + 16, "text-anchor": "middle" }, label));
  });
  picture.append(svg("text", { class: "tick", x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, panel.x_label));
  names.forEach((name, at) => {
    let path = "";
    panel.lines[name].forEach((v, i) => {
      const drawn = v !== null && (!panel.log || v > 0);
      const before = i > 0 && panel.lines[name][i - 1];
      if (drawn) path += `${before !== null && before !== false && (!panel.log || before > 0) && path ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
    });
    picture.append(svg("path", { d: path, class: `line l${at % 5}`, "stroke-dasharray": STROKES[at % 5] }));
  });
  const cross = svg("line", { class: "cross", y1: top, y2: height - bottom, x1: -9, x2: -9 });
  picture.append(cross);
  const readout = el("p", { class: "hint", role: "status" });
  let now = 0;
  const tell = (i) => {
    now = Math.max(0, Math.min(panel.x.length - 1, i));
    set(cross, { x1: x(now), x2: x(now) });
    readout.textContent = `${panel.x_label} ${panel.x[now]} · ` +
      names.map((n) => `${n} ${shown(panel.lines[n][now])}`).join(" · ");
  };
  picture.addEventListener("pointermove", (e) => {
    const box = picture.getBoundingClientRect();
    const at = ((e.clientX - box.left) / box.width) * width;
    tell(Math.round(((at - left) / (width - left - 10)) * (panel.x.length - 1)));
  });
  picture.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (step) { e.preventDefault(); tell(now + step); }
  });
  const key = el("ul", { class: "key" }, names.map((name, at) => el("li", {},
    svg("svg", { width: 30, height: 10, "aria-hidden": "true" },
      svg("path", { d: "M0 5H30", class: `line l${at % 5}`, "stroke-dasharray": STROKES[at % 5] })), name)));
  readout.textContent = panel.y_label;
  return [key, picture, readout];
}

function decades(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (!values.length) return [1, 10];
  const from = Math.floor(Math.log10(low));
  const to = Math.max(from + 1, Math.ceil(Math.log10(high)));
  return Array.from({ length: to - from + 1 }, (_, i) => 10 ** (from + i));
}

function round(values) {
  if (!values.length) return [0, 1];
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const raw = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const from = Math.floor(low / step) * step;
  const count = Math.ceil((high - from) / step) || 1;
  return Array.from({ length: count + 1 }, (_, i) => Number((from + i * step).toPrecision(10)));
}
