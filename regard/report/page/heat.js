// The weights as a heat map: an overview of the whole text, and a window on single tokens.

const WHOLE = 40;

function canvasOf(width, height, attributes = {}) {
  const canvas = el("canvas", attributes);
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.aspectRatio = `${width} / ${height}`;
  canvas.style.maxWidth = `${width}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return [canvas, pen];
}

// Where on a canvas, in the units it is drawn in, an event happened.
function pointIn(canvas, event, width, height) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function overview(pattern, rows, keys, pick) {
  const side = 250;
  const height = Math.max(40, Math.min(side, Math.round((side * rows) / keys)));
  const source = pattern.pooled ?? { rows, keys, width: 1, at: pattern.at, scale: pattern.scale,
    signed: pattern.signed };
  const [canvas, pen] = canvasOf(side, height, { class: "overview", role: "img",
    "aria-label": "The whole pattern, queries down and keys across; click to look at a part" });
  const place = (event) => {
    const [x, y] = pointIn(canvas, event, side, height);
    const clamp = (v, most) => Math.max(0, Math.min(most - 1, Math.floor(v)));
    return [clamp((y / height) * rows, rows), clamp((x / side) * keys, keys)];
  };
  let dragging = false;
  canvas.addEventListener("pointerdown", (e) => { dragging = true; pick(...place(e)); });
  canvas.addEventListener("pointermove", (e) => dragging && pick(...place(e)));
  window.addEventListener("pointerup", () => { dragging = false; });

  return {
    node: canvas,
    draw(windowed) {
      const picture = new ImageData(source.keys, source.rows);
      for (let a = 0; a < source.rows; a++) {
        for (let b = 0; b < source.keys; b++) {
          const { rgb } = weightColour(source.at(a, b) ?? 0, source.scale, source.signed);
          picture.data.set([...rgb, 255], 4 * (a * source.keys + b));
        }
      }
      const small = document.createElement("canvas");
      small.width = source.keys;
      small.height = source.rows;
      small.getContext("2d").putImageData(picture, 0, 0);
      pen.imageSmoothingEnabled = false;
      const [x, y] = [side / keys, height / rows];
      pen.clearRect(0, 0, side, height);
      pen.drawImage(small, 0, 0, source.keys * source.width * x, source.rows * source.width * y);
      if (!windowed) return;
      const { row, key, tall, wide } = windowed;
      pen.strokeStyle = theme() === "dark" ? "#ffb454" : "#c2410c";
      pen.lineWidth = 1.5;
      pen.strokeRect(key * x + 0.5, row * y + 0.5, Math.max(4, wide * x), Math.max(4, tall * y));
    },
  };
}

function detail(pattern, tokens, view) {
  const { queries, keys } = tokens;
  const [label, side] = [92, 400];
  const full = label + side;
  const [canvas, pen] = canvasOf(full, full, { class: "detail", tabindex: "0", role: "img" });
  const span = () => ({ tall: Math.min(view.size, queries.length), wide: Math.min(view.size, keys.length) });
  const cell = () => side / Math.max(span().tall, span().wide);

  function place(event) {
    const [x, y] = pointIn(canvas, event, full, full);
    const { tall, wide } = span();
    const [across, down] = [Math.floor((x - label) / cell()), Math.floor((y - label) / cell())];
    if (across < 0 || down < 0 || across >= wide || down >= tall) return null;
    return [view.row + down, view.key + across];
  }
  canvas.addEventListener("pointermove", (e) => { const at = place(e); if (at) view.pair(...at, false); });
  canvas.addEventListener("pointerleave", () => view.pair(null, null, false));
  canvas.addEventListener("click", (e) => { const at = place(e); if (at) view.pair(...at, true); });
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (!step) return;
    e.preventDefault();
    const [q, k] = view.cursor ?? [view.row, view.key];
    view.pair(Math.max(0, Math.min(queries.length - 1, q + step[0])),
      Math.max(0, Math.min(keys.length - 1, k + step[1])), true, true);
  });

  function words(token, room) {
    const text = tokenText(token);
    let cut = text;
    while (cut.length > 1 && pen.measureText(cut).width > room) cut = cut.slice(0, -1);
    return cut === text ? text : `${cut.slice(0, -1)}…`;
  }

  return {
    node: canvas,
    draw() {
      const style = getComputedStyle(document.documentElement);
      const { tall, wide } = span();
      const step = cell();
      const font = Math.max(7, Math.min(11, step - 1.5));
      pen.clearRect(0, 0, full, full);
      pen.font = `${font}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace`;
      pen.textBaseline = "middle";
      for (let a = 0; a < tall; a++) {
        for (let b = 0; b < wide; b++) {
          const weight = pattern.at(view.row + a, view.key + b);
          pen.fillStyle = weight === null
            ? style.getPropertyValue("--unknown")
            : css(weightColour(weight, pattern.scale, pattern.signed));
          pen.fillRect(label + b * step, label + a * step, step - (step > 6 ? 0.5 : 0), step - (step > 6 ? 0.5 : 0));
        }
      }
      const [q, k] = view.cursor ?? [null, null];
      if (step >= 8) {
        for (let a = 0; a < tall; a++) {
          pen.fillStyle = style.getPropertyValue(view.row + a === q ? "--accent" : "--soft");
          pen.textAlign = "right";
          pen.fillText(words(queries[view.row + a], label - 8), label - 5, label + (a + 0.5) * step);
        }
        for (let b = 0; b < wide; b++) {
          pen.fillStyle = style.getPropertyValue(view.key + b === k ? "--accent" : "--soft");
          pen.save();
          pen.translate(label + (b + 0.5) * step, label - 5);
          pen.rotate(-Math.PI / 2);
          pen.textAlign = "left";
          pen.fillText(words(keys[view.key + b], label - 8), 0, 0);
          pen.restore();
        }
      }
      if (q !== null && q >= view.row && q < view.row + tall && k >= view.key && k < view.key + wide) {
        pen.strokeStyle = theme() === "dark" ? "#ffb454" : "#c2410c";
        pen.lineWidth = 2;
        pen.strokeRect(label + (k - view.key) * step, label + (q - view.row) * step, step, step);
      }
      canvas.setAttribute("aria-label", `Weights of queries ${view.row} to ${view.row + tall - 1} on keys ` +
        `${view.key} to ${view.key + wide - 1}; arrows move`);
    },
  };
}
