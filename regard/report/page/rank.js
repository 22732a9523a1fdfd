// The heads in the order of the chosen quantity, and beside each its value as a bar.

const RANKED = 400;

function ranking(app) {
  const list = el("ol", { class: "ranking", "aria-label": "Heads in order" });
  let descending = true;
  let shownNow = null;
  const turn = el("button", { type: "button", class: "quiet", onclick: () => {
    descending = !descending;
    draw(shownNow);
  } });

  function draw(q) {
    shownNow = q;
    turn.textContent = descending ? "largest first ↓" : "smallest first ↑";
    list.replaceChildren();
    if (!q) return;
    const heads = q.values.flatMap((line, row) => line.map((value, head) => [value, row, head]))
      .filter(([value]) => value !== null)
      .sort((a, b) => (descending ? b[0] - a[0] : a[0] - b[0]));
    for (const [value, row, head] of heads.slice(0, RANKED)) {
      const share = shareOf(q, value, false);
      const bar = el("span", { class: "bar" });
      bar.style.width = `${Math.max(1, 100 * Math.min(1, Math.abs(share)))}%`;
      bar.style.backgroundColor = css(colour(share, q.signed));
      list.append(el("li", {}, el("button", { type: "button", onclick: () => app.open(row, head) },
        el("span", { class: "who" }, app.shortName(row, head)), el("span", { class: "track" }, bar),
        el("span", { class: "value" }, shown(value)))));
    }
    if (heads.length > RANKED) list.append(el("li", { class: "more" }, `and ${heads.length - RANKED} more`));
  }
  return { node: el("div", {}, turn, list), draw };
}
