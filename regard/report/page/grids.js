// A map of anything over rows and columns: one quantity at a time on a canvas, with a readout.

function mapPanel(app, panel) {
  let q = panel.quantities[0];
  const [label, most] = [96, 720];
  const [rows, columns] = [panel.rows.length, panel.columns.length];
  const wide = Math.max(1, Math.min(26, (most - label) / columns));
  const high = Math.max(wide < 8 ? 3 : 10, Math.min(18, wide));
  const [width, height] = [label + wide * columns, 70 + high * rows];
  const [canvas, pen] = canvasOf(width, height, { class: "grid", tabindex: "0", role: "img",
    "aria-label": `${panel.title}: rows and columns; arrows move` });
  const readout = el("p", { class: "hint", role: "status" });
  const bar = el("span", { class: "ramp" });
  const ends = [el("span"), el("span")];
  let at = null;

  function draw() {
    const known = q.values.flat().filter((v) => v !== null);
    const top = Math.max(...known.map(Math.abs), 1e-12);
    const style = getComputedStyle(document.documentElement);
    pen.clearRect(0, 0, width, height);
    pen.font = "10px system-ui, sans-serif";
    pen.textBaseline = "middle";
    q.values.forEach((line, r) => line.forEach((value, c) => {
      pen.fillStyle = value === null ? style.getPropertyValue("--unknown") : css(colour(value / top, q.signed));
      pen.fillRect(label + c * wide, 70 + r * high, wide - (wide > 6 ? 0.5 : 0), high - (high > 6 ? 0.5 : 0));
    }));
    pen.fillStyle = style.getPropertyValue("--soft");
    const gap = Math.max(1, Math.ceil(12 / high));
    panel.rows.forEach((name, r) => {
      if (r % gap === 0) { pen.textAlign = "right"; pen.fillText(tokenText(name).slice(0, 16), label - 6, 70 + (r + 0.5) * high); }
    });
    const skip = Math.max(1, Math.ceil(12 / wide));
    panel.columns.forEach((name, c) => {
      if (c % skip) return;
      pen.save();
      pen.translate(label + (c + 0.5) * wide, 64);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "left";
      pen.fillText(tokenText(name).slice(0, 11), 0, 0);
      pen.restore();
    });
    if (at) {
      pen.strokeStyle = style.getPropertyValue("--accent");
      pen.lineWidth = 2;
      pen.strokeRect(label + at[1] * wide, 70 + at[0] * high, wide, high);
    }
    bar.style.background = gradient(q.signed);
    ends[0].textContent = q.signed ? shown(-top) : "0";
    ends[1].textContent = shown(top);
  }
  function tell(r, c) {
    if (r < 0 || c < 0 || r >= rows || c >= columns) return;
    at = [r, c];
    readout.replaceChildren(quoted(panel.rows[r]), " × ", quoted(panel.columns[c]), ` (${c}): `, el("b", {}, shown(q.values[r][c])));
    draw();
  }
  canvas.addEventListener("pointermove", (e) => {
    const [x, y] = pointIn(canvas, e, width, height);
    tell(Math.floor((y - 70) / high), Math.floor((x - label) / wide));
  });
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (!step) return;
    e.preventDefault();
    tell((at?.[0] ?? 0) + (at ? step[0] : 0), (at?.[1] ?? 0) + (at ? step[1] : 0));
  });
  document.addEventListener("themechange", draw);
  draw();
  const pick = panel.quantities.length < 2 ? null : choice("Quantity",
    panel.quantities.map((one, i) => [i, one.name]), 0, (i) => { q = panel.quantities[i]; draw(); });
  return [pick, el("p", { class: "legend" }, ends[0], bar, ends[1]), el("div", { class: "scroll" }, canvas), readout];
}
