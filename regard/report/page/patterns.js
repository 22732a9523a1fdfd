// Patterns: unpacked when they are first looked at. How they are packed is told in regard/report/pack.py.

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function weightOf(code, packed) {
  const scale = packed.scale ?? 1;
  if (!packed.signed) return scale * (code / 255) ** 2;
  const share = (code > 127 ? code - 256 : code) / 127;
  return scale * Math.sign(share) * share * share;
}

// All patterns of one section by `row.head`, and the pooled ones by row.
function shelf(data) {
  const shelves = data.sections.map(() => ({ heads: new Map(), pooled: new Map() }));
  for (const packed of data.patterns) {
    const place = shelves[packed.section];
    if (packed.head === null) place.pooled.set(packed.row, packed);
    else place.heads.set(`${packed.row}.${packed.head}`, packed);
  }
  return shelves;
}

function has(shelves, section, row, head) {
  return shelves[section].heads.has(`${row}.${head}`) || shelves[section].pooled.has(row);
}

async function pooledOf(packed, head) {
  const [heads, rows, keys] = packed.shape;
  if (head >= heads) return null;
  packed.codes ??= inflated(packed.data);
  const codes = (await packed.codes).subarray(head * rows * keys, (head + 1) * rows * keys);
  return {
    rows, keys, width: packed.width ?? 1, scale: packed.scale ?? 1, signed: Boolean(packed.signed),
    at: (a, b) => weightOf(codes[a * keys + b], packed),
  };
}

// What is known of one head's attention to one text.
async function opened(shelves, section, row, head) {
  const packed = shelves[section].heads.get(`${row}.${head}`);
  const bins = shelves[section].pooled.get(row);
  const pooled = bins ? await pooledOf(bins, head) : null;
  const known = packed || bins;
  if (!known) return null;
  const about = {
    queries: known.queries, keys: known.keys, scale: known.scale ?? 1, signed: Boolean(known.signed),
    rows: known.rows, columns: known.columns, pooled, k: known.k ?? 0, width: known.width ?? 1,
  };
  if (!packed) return { ...about, kind: "pooled", ...ofBins(pooled, known.rows, known.columns) };
  const bytes = await (packed.bytes ??= inflated(packed.data));
  if (packed.kind === "top") return { ...about, kind: "top", ...ofTop(bytes, packed) };
  const [rows, keys] = packed.shape;
  const width = packed.width ?? 1;
  const all = { rows, keys, width, scale: about.scale, signed: about.signed,
    at: (a, b) => weightOf(bytes[a * keys + b], packed) };
  if (width > 1) return { ...about, kind: "pooled", pooled: all, ...ofBins(all, known.rows, known.columns) };
  return { ...about, kind: "exact", ...ofAll(all) };
}

function ofAll({ rows, keys, at }) {
  return {
    at,
    row: (i) => Array.from({ length: keys }, (_, j) => [j, at(i, j)]).filter(([, w]) => w !== 0),
    column: (j) => Array.from({ length: rows }, (_, i) => [i, at(i, j)]).filter(([, w]) => w !== 0),
  };
}

// Where only bins are known, a pair's weight is the bin's mean weight a key.
function ofBins(pooled, rows, columns) {
  const { width } = pooled;
  const at = (i, j) => {
    const b = Math.floor(j / width);
    return pooled.at(Math.floor(i / width), b) / Math.min(width, columns - b * width);
  };
  return ofAll({ rows, keys: columns, at });
}

function ofTop(bytes, packed) {
  const [rows] = packed.shape;
  const { k } = packed;
  const size = packed.key_bytes ?? 2;
  const stride = (size + 1) * rows;
  const entry = (i, rank) => {
    let key = 0;
    for (let b = size - 1; b >= 0; b--) key = key * 256 + bytes[rank * stride + b * rows + i];
    return [key, weightOf(bytes[rank * stride + size * rows + i], packed)];
  };
  const row = (i) => Array.from({ length: k }, (_, rank) => entry(i, rank)).filter(([, w]) => w !== 0);
  let columns = null;
  return {
    row,
    at: (i, j) => (row(i).find(([key]) => key === j) ?? [j, null])[1],
    column: (j) => {
      if (!columns) {
        columns = new Map();
        for (let i = 0; i < rows; i++) {
          for (const [key, weight] of row(i)) {
            if (!columns.has(key)) columns.set(key, []);
            columns.get(key).push([i, weight]);
          }
        }
      }
      return columns.get(j) ?? [];
    },
  };
}
