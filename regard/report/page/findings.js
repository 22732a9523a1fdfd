// The findings in words; the heads that a sentence names are buttons in it.

function findingsView(app) {
  const { data } = app;
  const buttons = [];
  const parts = data.sections.filter((s) => s.findings.length).map((section) => {
    const at = data.sections.indexOf(section);
    const items = section.findings.map((finding) => {
      const words = sentence(app, finding, at);
      const item = el("li", {}, el("p", {}, words));
      const linked = words.filter((part) => typeof part !== "string").length;
      if (finding.heads.length > Math.min(linked, 1)) {
        const button = el("button", { type: "button", class: "chip", "aria-pressed": "false", onclick: () => {
          const on = button.getAttribute("aria-pressed") === "false";
          buttons.forEach((b) => b.setAttribute("aria-pressed", "false"));
          button.setAttribute("aria-pressed", String(on));
          app.mark(on ? finding.heads : [], finding.lens, at);
          if (on) app.open(...finding.heads[0], false, at);
        } }, plural(finding.heads.length, app.labelOf(...finding.heads[0]).replace(/ \d+$/, "")));
        button.setAttribute("aria-label", `Show ${button.textContent} on the map`);
        buttons.push(button);
        item.firstChild.append(button);
      }
      return item;
    });
    return el("div", {}, el("h3", {}, section.title), el("ul", { class: "findings" }, items));
  });
  return {
    node: el("section", { class: "card found" }, el("h2", {}, "What was found"), parts),
    clear: () => buttons.forEach((b) => b.setAttribute("aria-pressed", "false")),
  };
}

function sentence(app, finding, section) {
  let rest = finding.text;
  const out = [];
  const names = finding.heads.slice(0, 12).map(([row, head]) => [app.headName(row, head).toLowerCase(), row, head]);
  while (rest) {
    const lower = rest.toLowerCase();
    const found = names.map(([name, row, head]) => [wholeWord(lower, name), name, row, head])
      .filter(([at]) => at >= 0).sort((a, b) => a[0] - b[0])[0];
    if (!found) break;
    const [at, name, row, head] = found;
    out.push(rest.slice(0, at), el("button", { type: "button", class: "link",
      onclick: () => app.open(row, head, false, section) }, rest.slice(at, at + name.length)));
    rest = rest.slice(at + name.length);
  }
  return [...out, rest];
}

// Where a name stands that does not go on in a further digit.
function wholeWord(text, name) {
  let at = text.indexOf(name);
  while (at >= 0 && /\d/.test(text[at + name.length] ?? "")) at = text.indexOf(name, at + 1);
  return at;
}
