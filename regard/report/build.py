"""From a session to its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.report.recorder import Recorder
from regard.report.report import Report, Section, check_heads, of_results
from regard.runtime.session import Session


def build(
    seen: Session,
    *,
    tokens: Any = None,
    title: str | None = None,
    heads: Sequence[tuple[int | str, int]] = (),
    exact: int | None = None,
    sequence: int = 0,
) -> Report:
    """Build the report of what a session has seen.

    The last input is run once more, under the same edits, to keep the patterns of all heads.

    Args:
        seen: what `regard.watch` gave, after the model was run in it.
        tokens: the tokenizer, or one word a token; None writes ids.
        title: what stands at the top; default the model's class.
        heads: `(layer or alias, head)` of heads whose weights are all kept and of which the first is
            opened.
        exact: how many heads keep all their weights; default as many as fit into 3 MB, at most 16.
        sequence: which sequence of the batch.

    Returns:
        A report: `.save("page.html")` writes it, and a notebook cell that ends in it shows it.

    Raises:
        NothingObserved: where the session has seen nothing.
        NoSuchSite: for a head that the model does not have.
        RegardError: where a chosen head was not run.

    Example:
        >>> with regard.watch(model, Sinks(), Induction()) as seen:          # doctest: +SKIP
        ...     model(**inputs)
        >>> report.build(seen, tokens=tokenizer).save("page.html")           # doctest: +SKIP
    """
    chosen = [(seen.anatomy.check_head(layer, head).alias, int(head)) for layer, head in heads]
    results = of_results(seen.lenses)
    recorded = seen.again(Recorder(sequence=sequence)).result()
    check_heads(chosen, recorded)
    longest = max(max(kept.length) for kept in recorded)
    section = Section.of(f"On {longest:,} tokens", results, short="the text", recorded=recorded)
    sites = f"{len(recorded)} layers of attention, {sum(kept.heads for kept in recorded)} heads"
    name = type(seen.root).__name__
    return Report(
        title=title or name, facts=[name, sites, f"{longest:,} tokens"], sections=[section], tokens=tokens,
        heads=chosen, exact=exact,
    )  # fmt: skip
