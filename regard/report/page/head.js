// One head opened: its numbers, the text as it sees it, and its weights.

const KINDS = {
  exact: () => "All weights of this head are in this file, to within 0.004.",
  top: (p) => `The ${p.k > 1 ? `${p.k} strongest keys of every token are` : "strongest key of every token is"} ` +
    "in this file, to within 0.004; " +
    `the overview is pooled in bins of ${p.pooled ? p.pooled.width : 1}.`,
  pooled: (p) => `Only pooled weights are in this file: means over bins of ${p.width} tokens.`,
};

function headView(app) {
  const { data, shelves } = app;
  const node = el("section", { class: "card head", id: "head", tabindex: "-1", "aria-live": "off" });
  let now = null;

  async function open(row, head, section) {
    const there = data.sections.map((_, s) => s).filter((s) => has(shelves, s, row, head));
    if (!there.includes(section)) section = there[0];
    const ticket = {};
    now = ticket;
    const pattern = section === undefined ? null
      : await opened(shelves, section, row, head).catch((error) => ({ broken: error.message }));
    if (now !== ticket) return;
    now = { row, head, section, pattern };
    draw(there);
  }

  function draw(there) {
    const { row, head, section, pattern } = now;
    node.replaceChildren(el("header", {},
      el("h2", {}, app.headName(row, head)),
      there.length > 1 ? choice("Text", there.map((s) => [s, data.sections[s].short]), section,
        (s) => app.open(row, head, false, s)) : null));
    if (!pattern || pattern.broken) {
      node.append(el("p", { class: "hint" }, pattern
        ? `This browser cannot unpack the pattern: ${pattern.broken}`
        : "No pattern of this head is in this file."), numbers(app, row, head));
      return;
    }
    const tokens = { queries: app.tokens(pattern.queries, pattern.rows), keys: app.tokens(pattern.keys, pattern.columns) };
    node.append(body(pattern, tokens), numbers(app, row, head));
  }

  function body(pattern, tokens) {
    const small = Math.max(tokens.queries.length, tokens.keys.length) <= WHOLE;
    const readout = el("div", { class: "readout" });
    const same = pattern.queries === pattern.keys;
    const view = {
      at: null, held: null, cursor: null, direction: "to", row: 0, key: 0,
      size: small ? WHOLE : 24,
      point(at, hold) {
        if (hold) view.held = at;
        view.at = at ?? view.held;
        if (hold && at !== null) centre(pattern, view, tokens);
        refresh(hold);
      },
      pair(q, k, hold, follow) {
        view.cursor = q === null ? view.heldPair : [q, k];
        if (hold) {
          view.heldPair = [q, k];
          view.held = view.direction === "to" ? q : k;
        }
        view.at = q === null ? view.held : view.direction === "to" ? q : k;
        if (follow) reach(view, q, k);
        refresh(hold);
      },
    };
    const text = textView(app, pattern, tokens, view);
    const whole = small ? null : overview(pattern, tokens.queries.length, tokens.keys.length, (q, k) => {
      move(view, tokens, q - view.size / 2, k - view.size / 2);
      view.cursor = null;
      refresh(true);
    });
    const close = detail(pattern, tokens, view);

    function refresh(heavy) {
      text.tint();
      close.draw();
      if (heavy && whole) whole.draw(windowOf(view, tokens));
      describe(readout, pattern, tokens, view);
    }

    const zoom = (factor) => () => {
      view.size = Math.max(8, Math.min(128, Math.round(view.size * factor)));
      move(view, tokens, view.row, view.key);
      refresh(true);
    };
    const direction = choice("Colour shows", [
      ["to", "what it attends to", "Colour the keys of the token pointed at"],
      ["from", "who attends to it", "Colour the queries that attend to the token pointed at"],
    ], "to", (way) => {
      view.direction = way;
      refresh(false);
    });
    const first = striking(pattern, tokens);
    view.held = view.at = first;
    if (first !== null) {
      centre(pattern, view, tokens);
      view.heldPair = view.cursor;
    }
    app.repaint = () => refresh(true);
    requestAnimationFrame(() => {
      text.show(first ?? 0);
      refresh(true);
    });
    return el("div", { class: "split" },
      el("div", { class: "reading" },
        el("div", { class: "controls" }, el("span", { class: "hint" }, same ? "Point at a token:" : "Point at a key:"), direction),
        text.node, readout),
      el("div", { class: "heat" },
        el("div", { class: "whole" }, whole ? whole.node : null, el("div", {},
          el("p", { class: "hint" }, "Queries down, keys across", whole ? "; drag the frame." : "."),
          legend(pattern), small ? null : el("p", {}, el("span", { class: "choice" },
            el("button", { type: "button", onclick: zoom(0.5) }, "closer"),
            el("button", { type: "button", onclick: zoom(2) }, "wider"))),
          el("p", { class: "hint" }, KINDS[pattern.kind](pattern)))),
        close.node));
  }

  return { node, open, repaint: () => app.repaint && app.repaint(), now: () => now };
}

function windowOf(view, { queries, keys }) {
  return { row: view.row, key: view.key, tall: Math.min(view.size, queries.length),
    wide: Math.min(view.size, keys.length) };
}

function move(view, { queries, keys }, row, key) {
  const clamp = (v, most) => Math.max(0, Math.min(Math.round(v), most - view.size));
  view.row = Math.max(0, clamp(row, queries.length));
  view.key = Math.max(0, clamp(key, keys.length));
}

function reach(view, q, k) {
  if (q < view.row) view.row = q;
  if (q >= view.row + view.size) view.row = q - view.size + 1;
  if (k < view.key) view.key = k;
  if (k >= view.key + view.size) view.key = k - view.size + 1;
}

// Bring the token pointed at, and its strongest partner, into the window.
function centre(pattern, view, tokens) {
  const to = view.direction === "to";
  if (to && view.at >= tokens.queries.length) return;
  const best = strongest(to ? pattern.row(view.at) : pattern.column(view.at), 1)[0];
  const other = best ? best[0] : view.at;
  view.cursor = view.heldPair = to ? [view.at, other] : [other, view.at];
  move(view, tokens, view.cursor[0] - view.size / 2, view.cursor[1] - view.size / 2);
}

function strongest(pairs, count) {
  return [...pairs].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, count);
}

// The query with the largest weight on a token that is neither the first nor itself.
function striking(pattern, { queries }) {
  if (pattern.kind === "pooled") return queries.length ? queries.length - 1 : null;
  let [best, most] = [queries.length ? queries.length - 1 : null, -1];
  for (let i = 2; i < Math.min(queries.length, 1500); i++) {
    for (const [j, weight] of pattern.row(i)) {
      if (j > 0 && i - j > 1 && Math.abs(weight) > most) [best, most] = [i, Math.abs(weight)];
    }
  }
  return best;
}

function describe(node, pattern, { queries, keys }, view) {
  node.replaceChildren();
  const { at } = view;
  const line = (words, pairs, other) => {
    const best = strongest(pairs, 5).filter(([, w]) => Math.abs(w) >= 0.0005 * pattern.scale);
    const items = best.map(([to, weight]) => el("li", {}, quoted(other[to]),
      el("sub", {}, String(to)), " ", el("b", {}, shown(weight))));
    node.append(el("p", {}, words), el("ol", { class: "pairs" }, items.length ? items : el("li", {}, "nothing")));
  };
  if (at === null) return;
  const known = pattern.kind === "top" ? " (as far as kept)" : "";
  if (at < queries.length) {
    line([quoted(queries[at]), el("sub", {}, String(at)), " attends to"], pattern.row(at), keys);
  }
  if (at < keys.length) {
    line([quoted(keys[at]), el("sub", {}, String(at)), ` is attended to by${known}`], pattern.column(at), queries);
  }
  if (view.cursor) {
    const [q, k] = view.cursor;
    const weight = pattern.at(q, k);
    node.append(el("p", { class: "pair" }, quoted(queries[q]), el("sub", {}, String(q)), " → ", quoted(keys[k]),
      el("sub", {}, String(k)), ": ", el("b", {}, weight === null ? "not kept" : shown(weight))));
  }
}

function legend(pattern) {
  const bar = el("span", { class: "ramp" });
  const paint = () => { bar.style.background = gradient(pattern.signed); };
  paint();
  document.addEventListener("themechange", paint);
  const ends = pattern.signed ? [shown(-pattern.scale), shown(pattern.scale)] : ["0", shown(pattern.scale)];
  return el("p", { class: "legend" }, ends[0], bar, ends[1],
    el("span", { class: "hint" }, "weight, coloured by its square root"));
}

// Every number known of the head, with its rank, but those that are the same for all.
function numbers(app, row, head) {
  const items = app.quantities.map((q) => [q, q.values[row]?.[head] ?? null])
    .filter(([q, value]) => value !== null && q.sorted[0] < q.sorted[q.sorted.length - 1]);
  return el("ul", { class: "numbers", "aria-label": "Numbers of this head" }, items.map(([q, value]) => {
    const rank = rankOf(q, value);
    return el("li", {}, el("button", { type: "button", title: `${rank} of ${q.sorted.length}; ${q.note}`, onclick: () => app.colourBy(q) },
      el("span", {}, quantityName(q), q.section ? el("i", {}, ` ${app.data.sections[q.section].short}`) : null),
      el("b", {}, shown(value)), el("small", {}, `#${rank}`)));
  }));
}
