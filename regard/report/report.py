"""The report: findings, panels and patterns of one or more texts on one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from regard.errors import NothingObserved, RegardError
from regard.report import pack
from regard.report.data import Places, head_map_json, panel_json, pattern_json, safe, spread
from regard.report.images import kept_of, layers_json, pictures_json
from regard.report.page import render
from regard.report.recorder import Recorded
from regard.runtime.findings import Finding
from regard.runtime.image_panel import ImagePanel
from regard.runtime.panels import OWN_TEXT, Head, MapPanel, Panel, PatternPanel
from regard.runtime.protocol import Lens
from regard.runtime.table import write_text

BUDGET, ASIDE = 2_450_000, 250_000
EXACT = 16
HEIGHT = 900


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """What was seen of one text, or of one pair of models: a part of the report.

    Attributes:
        title: in a few words, such as "On the packaged passage (476 tokens)".
        short: in one or two, for a button; default the title.
        findings: in the order shown.
        panels: maps of heads join one map; patterns, and maps over images, are shown where their head is
            opened; the rest follow below.
        recorded: patterns of every head, from a `Recorder`.
    """

    title: str
    short: str = ""
    findings: Sequence[Finding] = ()
    panels: Sequence[Panel] = ()
    recorded: Sequence[Recorded] = ()

    @classmethod
    def of(
        cls,
        title: str,
        results: Mapping[str, tuple[type[Lens] | Lens, Any]],
        *,
        short: str = "",
        recorded: Sequence[Recorded] = (),
    ) -> Section:
        """Gather what lenses say of their results.

        Args:
            results: name -> the lens and its result; what has `panels()` gives panels.
        """
        findings: list[Finding] = []
        panels: list[Panel] = []
        for lens, result in results.values():
            findings += lens.findings(result)
            offered = getattr(result, "panels", None)
            panels += offered() if callable(offered) else ()
        return cls(title=title, short=short, findings=findings, panels=panels, recorded=recorded)


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """A page: save it, or let a notebook show it.

    Attributes:
        title: mostly the model's name.
        facts: a line under it, in parts.
        sections: one a text.
        tokens: the tokenizer, to write ids as words.
        heads: heads whose weights are all kept, before those that findings and rankings name.
        exact: how many heads keep all their weights; None for as many as fit. A number of one's own may
            take the page beyond 3 MB.
        colours: panel and quantity that the map of heads shows at first; default the first there is.

    Example:
        >>> page = Report(title="tiny", sections=[Section(title="one", findings=[Finding("All is well.")])])
        >>> "All is well." in page.html()
        True
    """

    title: str
    facts: Sequence[str] = ()
    sections: Sequence[Section] = ()
    tokens: Any = None
    heads: Sequence[Head] = ()
    exact: int | None = None
    colours: tuple[str, str] | None = None

    def html(self) -> str:
        """Return the page as one string of HTML."""
        return self._page

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Returns:
            The path.

        Raises:
            RegardError: where it cannot be written.
        """
        write_text(path, self._page)
        return Path(path)

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, which can neither reach nor leave the notebook."""
        frame = html.escape(self._page, quote=True)
        return (
            f'<iframe sandbox="allow-scripts" title="{html.escape(safe(self.title))}" srcdoc="{frame}" '
            f'style="width:100%;height:{HEIGHT}px;border:1px solid #8884;border-radius:8px"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self._page) / 1e6:.1f} MB; .save(path) writes it)"

    @cached_property
    def _page(self) -> str:
        plain = [finding.text for section in self.sections for finding in section.findings]
        title = safe(self.title)
        return render(self._data(), title, [safe(f) for f in self.facts], [safe(s) for s in plain])

    def _data(self) -> dict[str, Any]:
        places, views = Places(self.tokens), _Views(len(self.sections))
        images = self._images(places)
        maps, panels, patterns, sections = [], [], [], []
        for number, section in enumerate(self.sections):
            for kept in section.recorded:
                places.row(kept.site, kept.heads)
            for panel in section.panels:
                if isinstance(panel, ImagePanel):
                    continue
                if isinstance(panel, PatternPanel):
                    patterns.append(pattern_json(panel, views.of(number, panel.text), places))
                elif isinstance(panel, MapPanel) and panel.sites is not None:
                    maps.append(head_map_json(panel, number, places))
                else:
                    panels.append(panel_json(panel, number, places))
            patterns += self._patterns(section, number, places)
            found = [
                {"text": safe(f.text), "lens": safe(f.lens), "heads": [places.head(h) for h in f.heads]}
                for f in section.findings
            ]
            short = safe(section.short or section.title)
            sections.append({"title": safe(section.title), "short": short, "findings": found})
        for number, text in views.further:
            title = f"{sections[number]['title']}: {safe(text)}"
            sections.append({"title": title, "short": safe(text), "findings": []})
        return {
            "sections": sections, "sites": places.listed(), "across": max(places.heads, default=0),
            "maps": spread(maps, len(places.heads)), "panels": panels, "patterns": _finest(patterns),
            "texts": places.texts, "images": images, "opens": self._opens(places),
            "colours": self._colours(maps),
        }  # fmt: skip

    def _images(self, places: Places) -> dict[str, Any] | None:
        """Maps over images, of the first section that has some; None where none has."""
        for section in self.sections:
            shown = [panel for panel in section.panels if isinstance(panel, ImagePanel)]
            if shown:
                named = [*self.heads, *(head for s in self.sections for f in s.findings for head in f.heads)]
                kept = {panel.site: kept_of(panel, named) for panel in shown}
                rows = {site: places.keep(site, found) for site, found in kept.items()}
                return {"pictures": pictures_json(shown), "layers": layers_json(shown, kept, rows)}
        return None

    def _patterns(self, section: Section, number: int, places: Places) -> list[dict[str, Any]]:
        if not section.recorded:
            return []
        first = list(dict.fromkeys([*self.heads, *self._named()]))
        budget, exact = (BUDGET, EXACT) if not number else (ASIDE, 10**6)
        if self.exact is not None:
            budget, exact = 10**12, self.exact
        if number:
            kept = pack.named_only(section.recorded, first, budget)
        else:
            kept = pack.within(section.recorded, first, budget, exact)
        known = {r.site: r for r in section.recorded}
        out = []
        for packed in kept:
            source = known[packed.site]
            out.append(
                {
                    **packed.as_json(), "row": places.row(packed.site), "section": number,
                    "rows": source.length[0], "columns": source.length[1],
                    "queries": places.text(source.queries), "keys": places.text(source.keys),
                }
            )  # fmt: skip
        return out

    def _named(self) -> list[Head]:
        """Heads by how much they matter: first of each finding, then of each quantity, then the next."""
        ranks: list[list[Head]] = [list(f.heads[:3]) for s in self.sections for f in s.findings]
        for section in self.sections:
            for panel in section.panels:
                if isinstance(panel, MapPanel) and panel.sites is not None:
                    ranks += [_largest(panel, name) for name in panel.values]
        return [heads[at] for at in range(3) for heads in ranks if at < len(heads)]

    def _colours(self, maps: Sequence[dict[str, Any]]) -> int:
        names = [(m["title"], q["name"]) for m in maps for q in m["quantities"]]
        return names.index(self.colours) if self.colours in names else 0

    def _opens(self, places: Places) -> list[int] | None:
        """The head opened at first: one chosen, or the first of the last section that names one."""
        if self.heads:
            return [*places.head(self.heads[0]), 0]
        for section in reversed(self.sections):
            for finding in section.findings:
                if finding.heads:
                    return [*places.head(finding.heads[0]), 0]
        return None


class _Views:
    """Which texts beside their own the sections show patterns of."""

    def __init__(self, sections: int) -> None:
        self.sections = sections
        self.further: list[tuple[int, str]] = []

    def of(self, section: int, text: str) -> int:
        """Return the number of a section's own text, or of a further one, after all sections."""
        if text == OWN_TEXT:
            return section
        if (section, text) not in self.further:
            self.further.append((section, text))
        return self.sections + self.further.index((section, text))


def _finest(patterns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep one pattern a head and text, the one that tells most."""
    order = sorted(patterns, key=lambda p: ("exact", "top", "pooled").index(p["kind"]))
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for pattern in order:
        found.setdefault((pattern["section"], pattern["row"], pattern["head"]), pattern)
    return list(found.values())


def _largest(panel: MapPanel, name: str, count: int = 2) -> list[Head]:
    grid = panel.values[name]
    assert panel.sites is not None
    cells = [(abs(v), -r, -h) for r, line in enumerate(grid) for h, v in enumerate(line) if v == v]
    return [(panel.sites[-r], -h) for _, r, h in sorted(cells, reverse=True)[:count]]


def of_results(lenses: Mapping[str, Lens]) -> dict[str, tuple[Lens, Any]]:
    """Return each lens with its result; those that have seen nothing are left out.

    Raises:
        NothingObserved: where none has seen anything, though there are some.
    """
    found: dict[str, tuple[Lens, Any]] = {}
    nothing: list[NothingObserved] = []
    for name, lens in lenses.items():
        try:
            found[name] = (lens, lens.result())
        except NothingObserved as error:
            nothing.append(error)
    if lenses and not found:
        raise nothing[0]
    return found


def check_heads(heads: Sequence[Head], recorded: Sequence[Recorded]) -> None:
    """Refuse heads that were not recorded.

    Raises:
        RegardError: naming the first such.
    """
    known = {kept.site: kept.heads for kept in recorded}
    for site, head in heads:
        if not 0 <= head < known.get(site, 0):
            raise RegardError(f"heads names {(site, head)}, which was not run; sites are {', '.join(known)}.")
