"""Keep the attention of chosen heads: exactly for short text, pooled for long.

Exact, the pattern is A itself, [T, S]. Pooled with bins of w positions,

    P_ab = mean over rows i in bin a of  sum_{j in bin b} A_ij          rows still sum to what they did
    M_ab = max over i in bin a, j in bin b of A_ij

w is the smallest power of two for which no more than `max_tokens` bins are needed, and doubles while a
text grows. Positions count from the first real token; padding is in no bin. A sink logit's share is not
shown. Status: our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NoSuchSite, NothingObserved, RegardError
from regard.lens.base import Place, SequenceLens, first_real
from regard.lens.grid import Grid
from regard.lens.matches import tokens_of
from regard.lens.registry import lens
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.panels import OWN_TEXT, PatternPanel
from regard.runtime.protocol import Wanted
from regard.runtime.table import Table
from regard.runtime.tally import Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL_HEADS = 128


@dataclass(frozen=True)
class Pattern:
    """The kept attention of some heads of one site to one sequence.

    Attributes:
        heads: query heads, in the order of the first dimension below.
        weights: float32 [heads, rows, keys]; pooled where `width` is above 1. Rows that the lens did not see,
            as their tokens were in a cache before the session, are NaN. Where a cache was cropped, as by
            assisted decoding, rows of the old tokens are forgotten; a bin that held others too is NaN.
        peaks: the largest single weight in each bin, same shape; equal to `weights` where exact.
        width: positions in a bin.
        tokens: token ids of the keys, int64 [S], or None where the site sees no tokens.
    """

    heads: tuple[int, ...]
    weights: Tensor
    peaks: Tensor
    width: int
    tokens: Tensor | None


@dataclass(frozen=True)
class KeptPatterns:
    """What `Patterns` kept.

    Attributes:
        kept: alias -> one `Pattern` a sequence, in the order seen.
        skipped: how many sequences were too long to be kept for all heads.
    """

    kept: Mapping[str, Sequence[Pattern]]
    skipped: int = 0

    def pattern(self, site: str, sequence: int = 0) -> Pattern:
        """Return all that is kept of one site and sequence.

        Raises:
            NoSuchSite: where nothing of that site is kept.
            NothingObserved: where fewer sequences are.
        """
        if site not in self.kept:
            raise NoSuchSite(f"no pattern of {site} was kept; there are those of {', '.join(self.kept)}.")
        if not 0 <= sequence < len(self.kept[site]):
            raise NothingObserved(f"sequence {sequence} of {site}: {len(self.kept[site])} were kept.")
        return self.kept[site][sequence]

    def weights(self, site: str, head: int, sequence: int = 0) -> Tensor:
        """Return the pattern of one head, float32 [rows, keys]; pooled where `pattern().width` is above 1."""
        found = self.pattern(site, sequence)
        if head not in found.heads:
            raise NoSuchSite(f"head {head} of {site} was not kept; heads {found.heads} were.")
        return found.weights[found.heads.index(head)]

    def tokens(self, site: str, sequence: int = 0) -> Tensor | None:
        """Return the token ids of the keys, int64 [S], or None."""
        return self.pattern(site, sequence).tokens

    @property
    def table(self) -> Table:
        """One row a site and sequence: what was kept, and how wide its bins are."""
        rows = [(a, i, p) for a, patterns in self.kept.items() for i, p in enumerate(patterns)]
        return Table(
            {
                "site": [a for a, _, _ in rows],
                "sequence": [i for _, i, _ in rows],
                "heads": [len(p.heads) for _, _, p in rows],
                "rows": [p.weights.shape[1] for _, _, p in rows],
                "keys": [p.weights.shape[2] for _, _, p in rows],
                "width": [p.width for _, _, p in rows],
            }
        )

    def plot(
        self,
        site: str | None = None,
        head: int | None = None,
        sequence: int = 0,
        path: str | Path | None = None,
    ) -> Figure:
        """Draw one head's pattern, queries down and keys across; default the first head kept.

        Raises:
            RegardError: where matplotlib is not installed, or the path cannot be written.
        """
        try:
            from matplotlib import pyplot
        except ImportError as missing:
            raise RegardError('plot() needs matplotlib; run `pip install "regard[plot]"`.') from missing
        site = site or next(iter(self.kept))
        found = self.pattern(site, sequence)
        head = found.heads[0] if head is None else head
        figure, axis = pyplot.subplots(figsize=(4.6, 4), layout="constrained")
        pyplot.close(figure)
        end = (found.weights.shape[2] * found.width, found.weights.shape[1] * found.width)
        image = axis.imshow(
            self.weights(site, head, sequence).numpy(),
            cmap="Blues", vmin=0, interpolation="nearest", extent=(0, end[0], end[1], 0), aspect="auto",
        )  # fmt: skip
        axis.set(xlabel="key", ylabel="query", title=f"{site}, head {head}")
        figure.colorbar(image, shrink=0.9)
        if path is not None:
            try:
                figure.savefig(path, dpi=150)
            except (OSError, ValueError) as failure:
                raise RegardError(f"cannot write {path}: {failure}.") from failure
        return figure

    def panels(self) -> tuple[PatternPanel, ...]:
        """Return every pattern kept, one panel a head and sequence."""
        found = []
        for site, patterns in self.kept.items():
            for number, p in enumerate(patterns):
                ids = None if p.tokens is None else p.tokens.tolist()
                rows = p.weights.shape[1]
                square = ids is not None and -(-len(ids) // p.width) == rows
                name = OWN_TEXT if not number else f"sequence {number}"
                found += [
                    PatternPanel(
                        site=site, head=head, weights=p.weights[i].numpy(), queries=ids if square else None,
                        keys=ids, width=p.width, text=name,
                    )
                    for i, head in enumerate(p.heads)
                ]  # fmt: skip
        return tuple(found)

    def save(self, path: str | Path) -> None:
        """Write all patterns to a safetensors file: `SITE|SEQUENCE|weights`, `|peaks`, `|tokens`."""
        from safetensors.torch import save_file

        tensors, about = {}, {}
        for site, patterns in self.kept.items():
            for i, p in enumerate(patterns):
                tensors[f"{site}|{i}|weights"], tensors[f"{site}|{i}|peaks"] = p.weights, p.peaks.clone()
                about[f"{site}|{i}"] = f"heads {p.heads}, bins of {p.width}"
                if p.tokens is not None:
                    tensors[f"{site}|{i}|tokens"] = p.tokens.clone()
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial, about)
            partial.replace(target)
        except OSError as failure:
            raise RegardError(f"cannot write {path}: {failure.strerror or failure}.") from failure
        finally:
            partial.unlink(missing_ok=True)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def __str__(self) -> str:
        return str(self.table)


@lens("patterns")
@dataclass(frozen=True, kw_only=True, eq=False)
class Patterns(SequenceLens):
    """Keep attention patterns; the result is `KeptPatterns`.

    Attributes:
        heads: `(layer or alias, head)` pairs. Default: all heads of all sites, while a text is no longer
            than `max_tokens`; longer ones are then counted and not kept.
        max_tokens: texts up to this length are kept exactly, longer ones with at most so many bins.
            Default 512, or 128 for all heads. Memory is 8 bytes x heads x max_tokens^2 a sequence.
        sequences: keep so many sequences, the first seen. In beam search every beam is one, and all must
            be kept for any to be.
    """

    definition = "the attention weights themselves; beyond max_tokens, rows averaged and keys summed by bins"
    source = "our choice"

    heads: Sequence[tuple[int | str, int]] | None = None
    max_tokens: int | None = None
    sequences: int = 4
    chosen: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple((layer, int(head)) for layer, head in self.heads))
        most = self.max_tokens or (ALL_HEADS if self.heads is None else 512)
        object.__setattr__(self, "max_tokens", most)
        if most < 2 or self.sequences < 1:
            raise RegardError(
                f"max_tokens is {self.max_tokens} and sequences {self.sequences}; at least 2 and 1 are kept."
            )

    def check(self, anatomy: Anatomy) -> None:
        chosen: dict[str, set[int]] = {}
        for layer, head in self.heads or ():
            site = anatomy.check_head(layer, head)
            chosen.setdefault(site.alias, set()).add(head)
        object.__setattr__(self, "chosen", {alias: tuple(sorted(h)) for alias, h in chosen.items()})

    def wants(self, call: Call) -> Wanted | None:
        if self.heads is not None and call.site.alias not in self.chosen:
            return None
        state = call.run.state(self, call.site, call.part)
        if "skipped" in state or ("grid" not in state and self._kept(call) >= self.sequences):
            return None
        if self.heads is None and _longest(call) > (self.max_tokens or 0):
            state = self.state(call.run, call.site, call.part)
            state.pop("grid", None)
            state["skipped"] = call.q.shape[0]
            return None
        return Wanted(heads=self.chosen.get(call.site.alias))

    def _kept(self, call: Call) -> int:
        tally: Any = self.tally
        alias = call.site.alias
        opened = sum(len(r.state.get("grid", ())) for r in tally.records if r.place.alias == alias)
        return opened + len(Tally.get(tally, "weights").get(alias, ()))

    def weights(self, block: RowBlock) -> None:
        state = self.state(block.run, block.site, block.call.part)
        call = block.call
        weights = _selected(block, self.chosen.get(block.site.alias))
        if "grid" not in state:
            limit = min(len(weights), self.sequences - self._kept(call))
            state["grid"] = Grid(limit, weights.shape[1], self.max_tokens or 0, weights.device)
            state["pads"] = first_real(call).tolist()
            state["order"] = torch.arange(len(weights))
        grid = state["grid"]
        if not _follow(state):
            return
        for b in range(len(grid)):
            row = call.q_offset + block.start - (0 if call.site.cross else state["pads"][b])
            key = call.kv_offset + block.key_start - state["pads"][b]
            rows, keys = slice(max(0, -row), None), slice(max(0, -key), None)
            if block.valid_rows is not None:
                real = block.valid_rows[b].nonzero()[:, 0].tolist()
                rows = slice(real[0], real[-1] + 1) if real else slice(0, 0)
            if block.valid_keys is not None:
                real = block.valid_keys[b].nonzero()[:, 0].tolist()
                keys = slice(real[0], real[-1] + 1) if real else slice(0, 0)
            part = weights[b, :, rows, keys]
            if part.numel():
                if row + rows.start < grid.rows[b]:
                    grid.cut(b, row + rows.start)
                grid.add(b, part, row + rows.start, key + keys.start)

    def end_call(self, call: Call) -> None:
        state = call.run.state(self, call.site, call.part)
        ids = tokens_of(call)
        if "grid" in state and ids is not None:
            state["tokens"] = ids

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "skipped" in state:
            tally.append(place, "skipped", state["skipped"])
        if "grid" not in state or not _follow(state):
            return
        grid = state["grid"]
        for b in range(len(grid)):
            weights, peaks = grid.pattern(b)
            heads = self.chosen.get(place.alias, tuple(range(weights.shape[0])))
            tally.append(place, "weights", weights)
            tally.append(place, "peaks", peaks)
            tally.append(place, "about", {"width": grid.width, "heads": list(heads)})
            start, ids = state["pads"][b], state.get("tokens")
            kept = torch.zeros(0) if ids is None else ids[b, start : start + grid.keys[b]].cpu().clone()
            tally.append(place, "tokens", kept)

    def kept_weights(self, alias: str, head: int, sequence: int) -> Tensor | None:
        """Return the exact weights [T, S] of a head, or None where they were not kept."""
        found = self._patterns().get(alias, [])
        if sequence >= len(found) or found[sequence].width > 1 or head not in found[sequence].heads:
            return None
        return found[sequence].weights[found[sequence].heads.index(head)]

    def result(self) -> KeptPatterns:
        """Return everything kept.

        Raises:
            NothingObserved: where nothing was, for length or because no such head was run.
        """
        kept = self._patterns()
        skipped = max((sum(v) for v in self.tally.get("skipped").values()), default=0)
        if not kept:
            why = "no attention of the chosen heads was opened"
            if skipped:
                why = (
                    f"{skipped} sequences were longer than the {self.max_tokens} tokens up to which all "
                    "heads are kept; choose some with heads=[(layer, head), ...]"
                )
            raise NothingObserved(f"Patterns has kept nothing: {why}.")
        return KeptPatterns(kept, skipped)

    def _patterns(self) -> dict[str, list[Pattern]]:
        tally = self.tally.settled()  # type: ignore[attr-defined]
        lists = [tally.get(name) for name in ("weights", "peaks", "about", "tokens")]
        return {
            alias: [
                Pattern(tuple(a["heads"]), w, p, a["width"], t.long() if len(t) else None)
                for w, p, a, t in zip(*(found[alias] for found in lists), strict=True)
            ]
            for alias in lists[0]
        }


def _longest(call: Call) -> int:
    """Return the number of positions that the call's queries or keys reach, padding counted."""
    keys = call.kv_offset + call.key_length
    return call.q_offset + call.query_length if not call.site.cross else keys


def _selected(block: RowBlock, heads: tuple[int, ...] | None) -> Tensor:
    """Return the weights of some query heads of a block, [B, H', R, K]."""
    if heads is None:
        return block.weights
    opened = list(heads) if block.heads is None else [block.heads.tolist().index(h) for h in heads]
    if block.heads is not None and opened == list(range(block.weights.shape[1])):
        return block.weights
    return block.weights[:, opened]


def _follow(state: dict[str, Any]) -> bool:
    """Let the grid follow the beams, whose order since it was last asked stands in `state["order"]`.

    False, and the grid is given up, where a beam goes on from one that was not kept.
    """
    order, grid = state["order"], state["grid"]
    same = torch.arange(len(order))
    if len(grid) and not torch.equal(order.cpu(), same):
        state["order"] = same
        if not grid.follow(order):
            state["grid"], state["lost"] = Grid(0, 1, 2, grid.total.device), True
    return "lost" not in state
