"""From a session to its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.lens.image_maps import ImageMaps
from regard.lens.image_result import SeenMaps
from regard.report.recorder import Recorder
from regard.report.report import Report, Section, check_heads, of_results
from regard.runtime.protocol import Lens
from regard.runtime.session import Session

MOST_IMAGES = 4


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

    The last input is run once more, under the same edits, to keep the patterns of all heads. Of an image
    model the page shows maps over the images that an `ImageMaps` of the session has kept; where it has none,
    the last input is run once more for them.

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
    if _looks_at_images(seen):
        return _of_images(seen, title, chosen)
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


def _looks_at_images(seen: Session) -> bool:
    lenses: Sequence[Lens] = list(seen.lenses.values())
    blocks = any(site.route == "block" for site in seen.anatomy.sites)
    return blocks or any(isinstance(lens, ImageMaps) for lens in lenses)


def _of_images(seen: Session, title: str | None, heads: Sequence[tuple[str, int]]) -> Report:
    results = of_results(seen.lenses)
    if not any(isinstance(lens, ImageMaps) for lens, _ in results.values()):
        lens = seen.again(ImageMaps(images=MOST_IMAGES))
        results["image-maps"] = (lens, lens.result())
    maps = next(result for lens, result in results.values() if isinstance(lens, ImageMaps))
    for site, head in heads:
        maps.map(site, head)
    return image_report(title or type(seen.root).__name__, type(seen.root).__name__, results, maps, heads)


def image_report(
    title: str, kind: str, results: dict[str, tuple[Lens, Any]], maps: SeenMaps,
    heads: Sequence[tuple[str, int]] = (),
) -> Report:  # fmt: skip
    """Build the report of an image model.

    Args:
        title: what stands at the top.
        kind: class of the model.
        results: name -> lens and result, that of `ImageMaps` among them.
        maps: the result of `ImageMaps`.
        heads: those whose maps the page has first.
    """
    seen = max(site.seen for site in maps.sites.values())
    images = f"{seen:,} image{'s' * (seen != 1)}"
    size = [f"{x.shape[1]} x {x.shape[2]} pixels" for x in maps.pixels[:1]]
    layers = len(maps.sites)
    return Report(
        title=title, facts=[kind, f"{layers} layer{'s' * (layers != 1)} with maps", images, *size],
        heads=heads, sections=[Section.of(f"On {images}", results, short="the images")],
    )  # fmt: skip
