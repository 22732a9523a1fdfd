// One head of an image model opened: the image, its map over it, and the maps of the layer's other heads.

const SIDE = 420;
const MEANING = {
  probability: "weights of 0 and more, coloured by their square root",
  factor: "factors of 0 and more on the features; 1 leaves them as they are",
  gate: "factors of either sign, without bound, on the features: no probabilities",
};

function imageHeadView(app) {
  const { pictures } = app.data.images;
  const node = el("section", { class: "card head", id: "head", tabindex: "-1" });
  const layers = new Map(app.data.images.layers.map((layer) => [layer.row, layer]));
  const state = { row: null, head: 0, image: 0, shows: "map", at: null, shine: 0.2, shared: false };
  let redraw = () => {};
  let ticket = null;

  async function open(row, head) {
    const changed = row !== state.row;
    Object.assign(state, { row, head });
    const layer = layers.get(row);
    if (!layer) {
      node.replaceChildren(el("header", {}, el("h2", {}, app.headName(row, head))),
        el("p", { class: "hint" }, "No map of this head is in this file."), numbers(app, row, head));
      return;
    }
    const mine = ticket = {};
    const found = await Promise.all([planesOf(layer, state.image),
      pictures.length ? pictureOf(pictures[Math.min(state.image, pictures.length - 1)]) : null])
      .catch((error) => ({ broken: error.message }));
    if (mine !== ticket) return;
    if (found.broken) {
      node.replaceChildren(el("p", { class: "hint" }, `This browser cannot unpack the maps: ${found.broken}`));
      return;
    }
    const [plane, picture] = found;
    if (!plane.hasRows || (changed && state.shows === "other" && !layer.others)) state.shows = "map";
    draw(layer, plane, picture);
  }

  function draw(layer, plane, picture) {
    const view = imageBody(app, state, layer, plane, picture);
    const held = node.contains(document.activeElement) && document.activeElement.closest(".thumb, [aria-label=Image]");
    redraw = view.draw;
    const several = Math.max(pictures.length, layer.maps.length) > 1 && layer.maps.length > 1;
    node.replaceChildren(el("header", {}, el("h2", {}, app.headName(state.row, state.head)),
      several ? choice("Image", layer.maps.map((_, i) => [i, `image ${i + 1}`]), state.image,
        (i) => { state.image = i; open(state.row, state.head); }) : null),
    view.node, numbers(app, state.row, state.head));
    view.draw();
    if (held) node.querySelector(held.matches(".thumb") ? ".thumb[aria-pressed=true]" : "[aria-label=Image] [aria-pressed=true]")?.focus();
  }

  return { node, open, repaint: () => redraw(), now: () => (state.row === null ? null : { ...state, section: 0 }) };
}

function imageBody(app, state, layer, plane, picture) {
  const size = app.data.images.pictures[0] ?? { height: plane.high, width: plane.wide };
  const scale = SIDE / Math.max(size.height, size.width);
  const field = [size.width * scale, size.height * scale];
  const readout = el("p", { class: "hint plane-readout", role: "status" });
  const bar = el("span", { class: "ramp" });
  const ends = [el("span"), el("span")];
  const canvases = [];
  let cursor = null;

  const values = () => {
    if (state.shows === "map") return plane.map(state.head);
    return plane.row(state.head, state.shows === "other" ? 0 : layer.others + nearest(layer, state.at));
  };
  const most = () => {
    if (state.shows === "map") return state.shared ? plane.mostOfAll : plane.most(state.head);
    if (state.shared) return plane.mostOfAllRows;
    return Math.max(...values(), 1e-12);
  };

  function canvas(label, over) {
    const [made, pen] = canvasOf(field[0], field[1], { class: "plane", tabindex: "0", role: "img", "aria-label": label });
    const place = (event) => {
      const [x, y] = pointIn(made, event, field[0], field[1]);
      const inside = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
      return [inside(y / field[1], plane.high), inside(x / field[0], plane.wide)];
    };
    made.addEventListener("pointermove", (e) => { cursor = place(e); draw(); });
    made.addEventListener("pointerleave", () => { cursor = null; draw(); });
    made.addEventListener("click", (e) => {
      const [x, y] = pointIn(made, e, field[0], field[1]);
      if (plane.hasRows) choose([y / field[1], x / field[0]]);
    });
    made.addEventListener("keydown", (e) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
      if (step) {
        e.preventDefault();
        const own = cursor ?? [Math.floor(plane.high / 2), Math.floor(plane.wide / 2)];
        cursor = [Math.max(0, Math.min(plane.high - 1, own[0] + step[0])),
          Math.max(0, Math.min(plane.wide - 1, own[1] + step[1]))];
        draw();
      } else if ((e.key === "Enter" || e.key === " ") && plane.hasRows && cursor) {
        e.preventDefault();
        choose([(cursor[0] + 0.5) / plane.high, (cursor[1] + 0.5) / plane.wide]);
      }
    });
    canvases.push({ pen, over });
    return made;
  }

  function choose(at) {
    Object.assign(state, { at, shows: "row" });
    [...modes.children].forEach((button, i) => button.setAttribute("aria-pressed", String(shows[i][0] === "row")));
    draw();
  }

  function draw() {
    const [numbersNow, top] = [values(), most()];
    const map = painted(numbersNow, plane, top, layer);
    for (const { pen, over } of canvases) {
      drawPlane(pen, SIDE, picture, over ? map : null, state.shine);
      const [w, h] = [field[0] / plane.wide, field[1] / plane.high];
      if (state.shows === "row") {
        const [qh, qw] = layer.queries;
        const at = layer.at[nearest(layer, state.at)];
        const [cw, ch] = [field[0] / qw, field[1] / qh];
        ringAt(pen, (at % qw) * cw, Math.floor(at / qw) * ch, cw, ch);
      }
      if (cursor) {
        pen.lineWidth = 1.5;
        pen.strokeStyle = theme() === "dark" ? "#ffffff" : "#1d1e22";
        pen.strokeRect(cursor[1] * w, cursor[0] * h, w, h);
      }
    }
    bar.style.background = gradient(layer.signed && state.shows === "map");
    ends[0].textContent = layer.signed && state.shows === "map" ? shown(-top) : "0";
    ends[1].textContent = shown(top);
    readout.replaceChildren(...told(state, layer, plane, size, numbersNow, cursor));
    strip.draw();
  }

  const strip = layerStrip(app, state, layer, plane, picture);
  const shows = [["map", layer.queries && plane.hasRows ? "received by each position" : layer.kind]];
  if (plane.hasRows && layer.at.length) shows.push(["row", "from a position", "Click the image to choose it"]);
  if (plane.hasRows && layer.others) shows.push(["other", "from the class token"]);
  const modes = shows.length < 2 ? null
    : choice("Show", shows, state.shows, (value) => { state.shows = value; draw(); });
  state.at ??= [0.5, 0.5];
  const shine = el("input", { type: "range", min: 0, max: 100, value: Math.round(100 * state.shine),
    "aria-label": "How much of the image shines through", oninput: () => { state.shine = Number(shine.value) / 100; draw(); } });
  const body = el("div", {},
    el("div", { class: "controls" },
      modes,
      choice("Scale", [[false, "this " + layer.word], [true, "whole layer"]], state.shared,
        (shared) => { state.shared = shared; draw(); }),
      el("label", { class: "shine" }, "image", shine)),
    el("div", { class: "planes" },
      picture ? el("figure", {}, canvas(plane.hasRows
        ? "The image; arrows move, Enter or a click chooses the position that is looked from"
        : "The image; arrows move", false), el("figcaption", { class: "hint" },
        plane.hasRows ? "The image: click a position to see what it attends to." : "The image.")) : null,
      el("figure", {}, canvas("The map over the image; arrows move", true),
        el("figcaption", { class: "legend" }, ends[0], bar, ends[1],
          el("span", { class: "hint" }, MEANING[layer.kind])))),
    readout, strip.node);
  return { node: body, draw };
}

// What the pointer is on, and what the map is, in words.
function told(state, layer, plane, size, values, cursor) {
  const [high, wide] = [size.height / plane.high, size.width / plane.wide];
  const from = state.shows === "row" ? ` from position ${positionName(layer, layer.at[nearest(layer, state.at)])}` : "";
  if (!cursor) {
    return [`${plane.high} × ${plane.wide} positions, each of ${shown(high)} × ${shown(wide)} pixels; point at one.${from ? ` Shown${from}.` : ""}`];
  }
  const value = values[cursor[0] * plane.wide + cursor[1]];
  const even = layer.kind === "probability" ? `, ${shown(value * values.length)} times an even share` : "";
  return [`row ${cursor[0]}, column ${cursor[1]} (pixel ${Math.round((cursor[0] + 0.5) * high)}, ` +
    `${Math.round((cursor[1] + 0.5) * wide)})${from}: `, el("b", {}, shown(value)), even];
}

function positionName(layer, at) {
  return `${Math.floor(at / layer.queries[1])}, ${at % layer.queries[1]}`;
}

// The kept position whose middle is nearest to a place given in shares of the image's height and width.
function nearest(layer, [y, x]) {
  const [high, wide] = layer.queries;
  let [best, least] = [0, Infinity];
  layer.at.forEach((at, i) => {
    const apart = ((Math.floor(at / wide) + 0.5) / high - y) ** 2 + (((at % wide) + 0.5) / wide - x) ** 2;
    if (apart < least) [best, least] = [i, apart];
  });
  return best;
}

// Small maps of all heads of the layer, as buttons.
function layerStrip(app, state, layer, plane, picture) {
  const side = 64;
  const [tall, broad] = [plane.high, plane.wide].map((n) => (side * n) / Math.max(plane.high, plane.wide));
  const count = app.data.sites[layer.row].heads;
  const items = Array.from({ length: count }, (_, head) => {
    const [canvas, pen] = canvasOf(broad, tall, { "aria-hidden": "true" });
    const button = el("button", { type: "button", class: "thumb", title: app.headName(layer.row, head),
      "aria-label": app.headName(layer.row, head), onclick: () => app.open(layer.row, head) },
    canvas, el("span", {}, app.labelOf(layer.row, head)));
    return { button, pen, head };
  });
  const [whole, wholePen] = canvasOf(broad, tall, { "aria-hidden": "true" });
  const name = layer.signed ? "mean size" : "mean";
  const wholeTitle = `${name} over all ${layer.of} ${layer.word}s`;
  const heading = count < layer.of
    ? `${count} of the layer's ${layer.of} ${layer.word}s: those named above, and those that vary most over positions`
    : `All ${plural(count, layer.word)} of the layer`;
  const node = el("div", {}, el("h3", {}, heading), el("div", { class: "strip" },
    items.map(({ button }) => button),
    el("div", { class: "thumb whole-layer", title: wholeTitle }, whole, el("span", {}, name))));
  return {
    node,
    draw() {
      const row = state.shows === "row" ? layer.others + nearest(layer, state.at) : 0;
      const mean = state.shows === "map" ? plane.mean() : new Float32Array(plane.high * plane.wide);
      for (const { button, pen, head } of items) {
        const values = state.shows === "map" ? plane.map(head) : plane.row(head, row);
        const shared = state.shows === "map" ? plane.mostOfAll : plane.mostOfAllRows;
        const own = state.shows === "map" ? plane.most(head) : Math.max(...values, 1e-12);
        if (state.shows !== "map") values.forEach((value, at) => { mean[at] += value / count; });
        drawPlane(pen, side, null, painted(values, plane, state.shared ? shared : own, layer), 0);
        button.setAttribute("aria-pressed", String(head === state.head));
      }
      drawPlane(wholePen, side, null, painted(mean, plane, Math.max(...mean, 1e-12),
        { kind: layer.kind, signed: false }), 0);
    },
  };
}
