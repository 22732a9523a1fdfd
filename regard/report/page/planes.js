// Maps over images: unpacked when they are first looked at, and painted. How they are packed is told in
// regard/report/images.py.

// The maps of one layer for one image: `map(head)`, `mean()` and `row(head, which)` give numbers, H x W each.
async function planesOf(layer, image) {
  const [high, wide] = layer.grid;
  const cells = high * wide;
  const part = async (list) => {
    const found = list[Math.min(image, list.length - 1)];
    if (!found) return null;
    found.bytes ??= inflated(found.data);
    return { bytes: await found.bytes, scales: found.scales };
  };
  const [maps, mean, rows] = [await part(layer.maps), await part(layer.mean), await part(layer.rows)];
  const count = layer.others + layer.at.length;
  const numbers = (from, start, scale, signed) => Float32Array.from({ length: cells },
    (_, at) => weightOf(from.bytes[start + at], { scale, signed }));
  return {
    high, wide, hasRows: Boolean(rows),
    map: (head) => numbers(maps, head * cells, maps.scales[head], layer.signed),
    mean: () => numbers(mean, 0, mean.scales[0], false),
    row: (head, which) => numbers(rows, (head * count + which) * cells, rows.scales[head], false),
    most: (head) => maps.scales[head],
    mostOfRows: (head) => rows.scales[head],
    mostOfAll: Math.max(...maps.scales),
    mostOfAllRows: rows ? Math.max(...rows.scales) : 0,
  };
}

async function pictureOf(picture) {
  picture.bytes ??= inflated(picture.data);
  const bytes = await picture.bytes;
  const [high, wide] = picture.shape;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [wide, high];
  const found = new ImageData(wide, high);
  for (let at = 0; at < wide * high; at++) {
    found.data.set([bytes[3 * at], bytes[3 * at + 1], bytes[3 * at + 2], 255], 4 * at);
  }
  canvas.getContext("2d").putImageData(found, 0, 0);
  return canvas;
}

// Probabilities are coloured by their square root, which shows small ones; gates and factors evenly.
function planeColour(value, most, layer) {
  const share = most > 0 ? Math.max(-1, Math.min(1, value / most)) : 0;
  return layer.kind === "probability" ? colour(Math.sqrt(Math.abs(share))) : colour(share, layer.signed);
}

// A canvas with one pixel a position.
function painted(values, plane, most, layer) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [plane.wide, plane.high];
  const found = new ImageData(plane.wide, plane.high);
  values.forEach((value, at) => found.data.set([...planeColour(value, most, layer).rgb, 255], 4 * at));
  canvas.getContext("2d").putImageData(found, 0, 0);
  return canvas;
}

// Draw an image, or a map over its grey shadow, into a square field; returns where it lies.
function drawPlane(pen, side, picture, map, shine) {
  const [wide, high] = picture ? [picture.width, picture.height] : [map.width, map.height];
  const scale = side / Math.max(wide, high);
  const [w, h] = [wide * scale, high * scale];
  pen.clearRect(0, 0, side, side);
  pen.imageSmoothingEnabled = false;
  if (picture && (!map || shine > 0)) {
    pen.filter = map ? "grayscale(1)" : "none";
    pen.drawImage(picture, 0, 0, w, h);
    pen.filter = "none";
  }
  if (map) {
    pen.globalAlpha = picture ? 1 - shine : 1;
    pen.drawImage(map, 0, 0, w, h);
    pen.globalAlpha = 1;
  }
  return { wide: w, high: h };
}

function ringAt(pen, x, y, wide, high) {
  pen.lineWidth = 4;
  pen.strokeStyle = theme() === "dark" ? "#141519" : "#ffffff";
  pen.strokeRect(x, y, wide, high);
  pen.lineWidth = 2;
  pen.strokeStyle = theme() === "dark" ? "#ffb454" : "#c2410c";
  pen.strokeRect(x, y, wide, high);
}
