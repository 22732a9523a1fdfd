// Elements, numbers and tokens. All text enters the page as text nodes, never as markup.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  set(node, attributes);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(node, attributes);
  node.append(...children.flat());
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 10) return value.toFixed(1);
  if (size >= 0.001) return value.toFixed(size >= 1 ? 2 : 3);
  return size >= 1e-6 || size === 0 ? String(Number(value.toPrecision(2))) : value.toExponential(1);
}

// A token comes as text, or as text and marks by turns.
function tokenNodes(token) {
  if (typeof token === "string") return [document.createTextNode(token)];
  return token
    .map((piece, at) => (at % 2 ? mark(piece) : piece))
    .filter((piece) => piece !== "");
}

// A space stays one, so that lines break there, and is dotted by the style.
function mark(piece) {
  return piece === "·" ? el("i", { class: "mark space" }, " ") : el("i", { class: "mark" }, piece);
}

function tokenText(token) {
  return typeof token === "string" ? token : token.join("");
}

function endsLine(token) {
  return typeof token !== "string" && token.includes("↵");
}

function quoted(token) {
  return el("bdi", { class: "token" }, tokenNodes(token));
}

// Buttons of which one is pressed.
function choice(label, options, chosen, pick) {
  const buttons = options.map(([value, name, hint]) =>
    el("button", {
      type: "button", title: hint || null, "aria-pressed": String(value === chosen),
      onclick: () => {
        buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button[value])));
        pick(value);
      },
    }, name));
  const button = Object.fromEntries(options.map(([value], at) => [value, buttons[at]]));
  return el("span", { class: "choice", role: "group", "aria-label": label }, buttons);
}

function plural(count, thing) {
  return `${count.toLocaleString("en")} ${thing}${count === 1 ? "" : "s"}`;
}
