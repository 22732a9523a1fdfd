// The text, token by token: point at one to see what it attends to, or who attends to it.

const PAGE = 2000;

function textView(app, pattern, tokens, view) {
  const { queries, keys } = tokens;
  const box = el("div", { class: "text", tabindex: "0", role: "group",
    "aria-label": "Tokens of the text; arrows move, Enter holds a token" });
  const pages = el("div", { class: "pages" });
  let spans = [];
  let tinted = [];
  let from = 0;

  function draw(start) {
    from = start;
    const stop = Math.min(keys.length, start + PAGE);
    spans = [];
    tinted = [];
    box.replaceChildren();
    for (let at = start; at < stop; at++) {
      const span = el("bdi", { class: "token" }, tokenNodes(keys[at]));
      span.dataset.at = at;
      spans.push(span);
      box.append(span);
      if (endsLine(keys[at])) box.append(el("br"));
    }
    pages.replaceChildren();
    if (keys.length > PAGE) {
      pages.append(`tokens ${start} to ${stop - 1} of ${keys.length.toLocaleString("en")} `);
      for (const [name, to] of [["earlier", start - PAGE], ["later", start + PAGE]]) {
        pages.append(el("button", { type: "button", class: "quiet", disabled: to < 0 || to >= keys.length,
          onclick: () => { draw(to); tint(); } }, name));
      }
    }
  }

  function tint() {
    const { at, direction } = view;
    tinted.forEach((span) => { span.style.backgroundColor = ""; span.style.color = ""; span.title = ""; });
    tinted = [];
    box.querySelector(".here")?.classList.remove("here");
    if (at === null) return;
    const pairs = direction === "to" ? (at < queries.length ? pattern.row(at) : []) : pattern.column(at);
    for (const [other, weight] of pairs) {
      const span = spans[other - from];
      if (!span || Math.abs(weight) < 0.0005 * pattern.scale) continue;
      const tone = weightColour(weight, pattern.scale, pattern.signed);
      span.style.backgroundColor = css(tone);
      span.style.color = ink(tone);
      span.title = shown(weight);
      tinted.push(span);
    }
    spans[at - from]?.classList.add("here");
  }

  const tokenAt = (event) => {
    const span = event.target.closest?.(".token");
    return span ? Number(span.dataset.at) : null;
  };
  box.addEventListener("mouseover", (e) => tokenAt(e) !== null && view.point(tokenAt(e), false));
  box.addEventListener("mouseleave", () => view.point(null, false));
  box.addEventListener("click", (e) => tokenAt(e) !== null && view.point(tokenAt(e), true));
  box.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[e.key];
    if (step === undefined) return;
    e.preventDefault();
    const next = Math.max(0, Math.min(keys.length - 1, (view.at ?? -1) + step));
    show(next);
    view.point(next, true);
  });

  function show(at) {
    if (at < from || at >= from + PAGE) draw(Math.floor(at / PAGE) * PAGE);
    const span = spans[at - from];
    if (!span) return;
    const [top, height] = [span.offsetTop, box.clientHeight];
    if (top < box.scrollTop || top > box.scrollTop + height - 30) box.scrollTop = top - height / 2;
  }

  draw(0);
  return { node: el("div", {}, box, pages), tint, show };
}
