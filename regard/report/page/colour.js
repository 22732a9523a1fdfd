// Colour scales, built in OKLCH with even steps of lightness, so that equal steps of a value look equal and
// order survives any colour blindness. More is darker on a light page and lighter on a dark one.

const SCALES = {
  light: {
    even: [[0.985, 0.012, 100], [0.81, 0.1, 130], [0.63, 0.105, 185], [0.455, 0.11, 245], [0.28, 0.12, 290]],
    below: [[0.97, 0.004, 62], [0.74, 0.11, 62], [0.5, 0.14, 42]],
    above: [[0.97, 0.004, 245], [0.72, 0.09, 245], [0.44, 0.14, 262]],
  },
  dark: {
    even: [[0.24, 0.025, 285], [0.41, 0.11, 280], [0.58, 0.105, 230], [0.75, 0.115, 172], [0.93, 0.14, 110]],
    below: [[0.27, 0.008, 50], [0.55, 0.11, 50], [0.82, 0.12, 68]],
    above: [[0.27, 0.008, 250], [0.55, 0.1, 250], [0.84, 0.09, 230]],
  },
};

function linear([l, c, h]) {
  const a = c * Math.cos((h * Math.PI) / 180);
  const b = c * Math.sin((h * Math.PI) / 180);
  const [x, y, z] = [
    (l + 0.3963377774 * a + 0.2158037573 * b) ** 3,
    (l - 0.1055613458 * a - 0.0638541728 * b) ** 3,
    (l - 0.0894841775 * a - 1.291485548 * b) ** 3,
  ];
  return [
    4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z,
    -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z,
    -0.0041960863 * x - 0.7034186147 * y + 1.707614701 * z,
  ];
}

function encoded(part) {
  const x = Math.min(1, Math.max(0, part));
  return Math.round(255 * (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055));
}

// 256 colours along a path of points.
function steps(points) {
  return Array.from({ length: 256 }, (_, at) => {
    const place = (at / 255) * (points.length - 1);
    const from = Math.min(Math.floor(place), points.length - 2);
    const mixed = points[from].map((v, i) => v + (points[from + 1][i] - v) * (place - from));
    return { rgb: linear(mixed).map(encoded), lightness: mixed[0] };
  });
}

const PALETTES = Object.fromEntries(
  Object.entries(SCALES).map(([theme, scale]) => [
    theme,
    { even: steps(scale.even), below: steps(scale.below), above: steps(scale.above) },
  ]),
);

function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

// The colour of a share in [0, 1], or in [-1, 1] where signed.
function colour(share, signed = false) {
  const palette = PALETTES[theme()];
  const name = !signed ? "even" : share < 0 ? "below" : "above";
  const at = Math.round(255 * Math.min(1, Math.abs(signed || share > 0 ? share : 0)));
  return palette[name][at];
}

function css({ rgb }) {
  return `rgb(${rgb.join(" ")})`;
}

function ink({ lightness }) {
  return lightness > 0.6 ? "#17181c" : "#ffffff";
}

// Attention is coloured by its square root, which shows small weights.
function weightColour(weight, scale, signed) {
  return colour(Math.sign(weight) * Math.sqrt(Math.min(1, Math.abs(weight) / scale)), signed);
}

function gradient(signed) {
  const shares = Array.from({ length: 17 }, (_, i) => (signed ? i / 8 - 1 : i / 16));
  return `linear-gradient(to right, ${shares.map((s) => css(colour(s, signed))).join(", ")})`;
}
