"""Attention by span, head outputs, next tokens, generated text: in words, drawn, on the page and as JSON."""

from __future__ import annotations

import itertools
import textwrap
from typing import Any

from regard.cli.effects import EFFECTS, Effects
from regard.cli.page import Page
from regard.lens.sentences import head
from regard.runtime.findings import Finding
from regard.runtime.panels import Panel, TablePanel, head_map
from regard.runtime.table import Table, finite

NAMED, BAR, WIDE = 3, 24, 100
BLOCKS, PLAIN_BLOCKS = ("█", "░"), ("#", ".")


def findings(found: Effects) -> list[Finding]:
    """Return in words whose output moved, and how the next token after the text changed."""
    said = []
    if found.heads is not None:
        moved = found.moved
        most = ", then ".join(f"{head(name)} by {size:.0%} of its size" for name, size in moved[:NAMED])
        count = f"The outputs of {len(moved)} of {len(found.heads)} heads moved"
        names = tuple(name for name, _ in moved)
        said.append(Finding(f"{count}: most {most}." if moved else "No head's output moved.", names, EFFECTS))
    if found.next_tokens is not None:
        rows = list(found.next_tokens.rows())
        first, second = (max(rows, key=lambda row: row[side]) for side in ("before", "after"))
        said.append(
            Finding(
                f"After the text the likeliest token is “{first['next token']}” ({first['before']:.0%}) "
                f"before and “{second['next token']}” ({second['after']:.0%}) after; the distributions "
                f"differ by {found.divergence:.3g} nats (KL)."
            )
        )
    return said


def print_effects(page: Page, found: Effects) -> None:
    """Print attention by span with bars, next tokens, turns, and the generated texts side by side."""
    if found.spans is not None:
        _print_spans(page, found.spans)
    for title, table in (
        ("next token after the text", found.next_tokens),
        ("positions where the next token changed most", found.turns),
    ):
        if table is not None:
            page.line()
            page.line(title, "bold")
            for line in str(table).splitlines():
                page.line(line)
    if found.generated is not None:
        page.line()
        page.line(f"generated ({_same(found.shared)})", "bold")
        for line in side_by_side(*found.generated, page.width or WIDE):
            page.line(line)


def _print_spans(page: Page, spans: Table) -> None:
    page.line()
    page.line("share of attention, mean over heads and rows", "bold")
    full, empty = BLOCKS if page.holds("".join(BLOCKS)) else PLAIN_BLOCKS
    largest = max(*spans["before"], *spans["after"], 1e-9)
    wide = max(len(name) for name in spans["span"])
    for row in spans.rows():
        tokens = "" if row["tokens"] is None else f"{row['tokens']} tok."
        for side in ("before", "after"):
            name = row["span"] if side == "before" else tokens
            length = round(BAR * row[side] / largest)
            change = "" if side == "before" else f"  {100 * row['change']:+.1f}"
            bar = full * length + empty * (BAR - length)
            page.line(f"  {name:{wide}}  {side:6} {bar} {row[side]:6.1%}{change}")


def side_by_side(before: str, after: str, width: int) -> list[str]:
    """Return two texts in two columns of lines, `width` characters across."""
    half = max(10, (width - 7) // 2)
    columns = [
        [title, *(line for part in text.splitlines() for line in textwrap.wrap(part, half) or [""])]
        for title, text in (("before", before), ("after", after))
    ]
    pairs = itertools.zip_longest(*columns, fillvalue="")
    return [f"  {left:{half}} | {right}".rstrip() for left, right in pairs]


def _same(shared: int) -> str:
    if not shared:
        return "they differ from the first token on"
    return f"the first {shared} tokens are the same" if shared > 1 else "the first token is the same"


def panels(found: Effects) -> list[Panel]:
    """Return the map of heads, and tables of spans, next tokens, turns and generated text."""
    out: list[Panel] = [] if found.heads is None else [head_map(found.heads)]
    if found.spans is not None:
        table = Table(
            {name: [_percent(v) if name != "tokens" else v for v in values] if name != "span" else values
             for name, values in found.spans.columns.items()}
        )  # fmt: skip
        note = (
            "Share of attention in per cent, the mean over heads and rows. A hidden sink is a key after the "
            "first that a head gives over 5/T of its attention before the change; it may be of a span too."
        )
        out.append(TablePanel(title="Attention by span", table=table, note=note))
    if found.next_tokens is not None:
        note = f"Probabilities after the text; the distributions differ by {found.divergence:.3g} nats (KL)."
        out.append(TablePanel(title="Next token", table=found.next_tokens, note=note))
    if found.turns is not None:
        out.append(TablePanel(title="Where the next token changed most", table=found.turns))
    if found.generated is not None:
        before, after = found.generated
        table = Table({"before": [before], "after": [after]})
        out.append(
            TablePanel(title="Generated text", table=table, note=_same(found.shared).capitalize() + ".")
        )
    return out


def _percent(share: Any) -> Any:
    return None if share is None else round(100 * share, 2)


def as_json(found: Effects) -> dict[str, Any]:
    """Return the entries `attention_by_span`, `head_effects`, `next_tokens`, `turns` and `generated`."""
    generated = None
    if found.generated is not None:
        before, after = found.generated
        generated = {"before": before, "after": after, "same_tokens": found.shared}
    return {
        "attention_by_span": _rows(found.spans),
        "head_effects": None if found.heads is None else _rows(found.heads.table),
        "next_tokens": {"divergence": found.divergence, "tokens": _rows(found.next_tokens)},
        "turns": _rows(found.turns),
        "generated": generated,
    }


def _rows(table: Table | None) -> list[dict[str, Any]] | None:
    if table is None:
        return None
    return [{key: finite(value) for key, value in row.items()} for row in table.rows()]
