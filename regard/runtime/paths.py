"""Path patching: what a head does to the logits, or to the queries, keys or values of chosen later heads.

For every sender head, at one position p, with z the head outputs before the output projection:

    1. the clean prompt, with z of the sender that of the corrupt prompt and z of every other head of every
       layer the clean one; MLPs follow, or are held too. What the receivers compute then is kept.
    2. the clean prompt, with only the receivers' query, key or value at p replaced by what was kept.
    effect = metric(2) - metric(clean)        normalised: over metric(corrupt) - metric(clean)

With the logits as receiver the first run is all. Nothing before p changes, and while heads are held nothing
but p changes, so that step 1 runs one token after a cached prefix, step 2 those from p on; blocks before the
sender, or the receivers, give what they gave, step 1 ends at the last receiver, and all heads of a layer
share a batch. With `exact=False` step 1 is a sum (see `path_closed`), and effects on the logits need no run.

Holding queries, keys and values of all heads instead of z, as Wang et al.'s own code does, gives the same: a
head's output is a function of them. For the same reason senders at one position reach receivers at another
only through heads that are held, so that both have one position.

Sources: Wang et al., 2023, arXiv 2211.00593, section 3.1; the algorithm, with MLPs that follow, of Merullo et
al., 2024, arXiv 2310.08744, appendix. Status: agrees with the definition written out, a forward a sender.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.head_statistics import rank_correlation
from regard.runtime.head_table import HeadTable
from regard.runtime.path_closed import Streams
from regard.runtime.path_runs import Patcher
from regard.runtime.path_stages import COMPONENTS, Component, Held, Outputs, Received, Sender
from regard.runtime.progress import bar
from regard.runtime.recorded import logits_of
from regard.runtime.resumable import Resumable
from regard.runtime.row_patch import Collected
from regard.runtime.session import Session
from regard.runtime.sides import Scored, aligned_sides, require_change, scored
from regard.runtime.site import Point, Site
from regard.runtime.table import finite

Receiver = tuple[int | str, int]


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What `path_patch` found.

    Attributes:
        heads: columns `effect`, the mean change of the metric, `normalised` by the whole change from clean to
            corrupt, and `spread`, the standard deviation over prompts; a head that no receiver comes after
            is NaN.
        mlps: alias of the layer -> the mean change where its MLP is the sender; empty unless asked for.
        each: change for every prompt, float32 [heads, N], in the order of the table.
        clean, corrupt: mean metric of the two sides.
    """

    heads: HeadTable
    mlps: Mapping[str, float]
    each: Tensor
    clean: float
    corrupt: float

    @property
    def stability(self) -> float:
        """Rank correlation of the heads' effects between two halves of the prompts; see `halves_agree`."""
        return halves_agree(self.each)


def halves_agree(each: Tensor) -> float:
    """Return Spearman's rank correlation of mean effects over two disjoint halves of the prompts.

    Args:
        each: of every head for every prompt, [heads, N]; a head that is NaN anywhere is left out. The halves
            are drawn at random, always alike.

    Returns:
        NaN for one prompt, or fewer than two heads.
    """
    known = each[~each.isnan().any(1)].double()
    order = torch.randperm(each.shape[1], generator=torch.Generator().manual_seed(0))
    if len(known) < 2 or len(order) < 2:
        return float("nan")
    first, second = (known[:, part].mean(1).numpy() for part in order.chunk(2))
    return rank_correlation(np.asarray(first), np.asarray(second))


def path_patch(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupt: Mapping[str, Tensor],
    metric: Scored,
    *,
    receivers: Sequence[Receiver] | None = None,
    senders: Sequence[Receiver] | None = None,
    component: Component = "query",
    position: int = -1,
    freeze_mlps: bool = False,
    mlps: bool = False,
    exact: bool = True,
    tokens: Tensor | None = None,
    rows: int = 512,
    progress: bool = True,
    save: str | Path | None = None,
) -> PathEffects:
    """Patch the path from every head to the logits, or to chosen heads.

    Args:
        model: a causal language model in evaluation mode.
        clean, corrupt: `input_ids` [N, T] of unpadded prompts, of one length.
        metric: takes logits [N, V] at the last position; returns [N], such as `Prompts.score`.
        receivers: (layer, query head) each; None for the logits.
        senders: (layer, query head) each, the rows of the result; default every head.
        component: which of the receivers' inputs; a key or value is that of the whole group of query heads
            that share it.
        position: p, where senders and receivers are; array index. The logits are of the last position, so
            without receivers it must be the last.
        freeze_mlps: whether MLPs give what they gave in the clean run, so that only the direct path counts.
        mlps: whether MLPs are senders too.
        exact: False takes the closed form, in seconds: the same as with `freeze_mlps`, which it implies.
        tokens: ids [K] of the only tokens whose logits the metric reads, such as `Prompts.answers()`. The
            closed form of effects on the logits computes no others, and gives them as NaN.
        rows: prompts times senders in a batch, about.
        progress: whether a bar is shown, where stderr is a terminal.
        save: a file that keeps what is finished. The same search, started again after Ctrl-C or later, goes
            on from there; other searches may share the file.

    Raises:
        RegardError: for padded prompts, an unknown component, where clean and corrupt score alike, so that
            there is nothing to explain, and a file of `save` that holds something else.
        ShapeMismatch: for prompts of different lengths, or a metric of another shape.
        NoSuchSite: for a receiver that is not there.
        UnsupportedModel: for a model without a cache of keys and values, or whose blocks cannot be replayed;
            with `exact=False` where the norm or unembedding cannot be found, or effects have no closed form.

    Example:
        >>> effects = path_patch(model, clean, corrupt, prompts.score)              # doctest: +SKIP
        >>> movers = [head[:2] for head in effects.heads.top("effect", 3, largest=False)]  # doctest: +SKIP
        >>> path_patch(model, clean, corrupt, prompts.score, receivers=movers)      # doctest: +SKIP
    """
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    received = _receivers(anatomy, receivers, component)
    sending = None if senders is None else _senders(anatomy, senders)
    sides = aligned_sides(clean, corrupt)
    at = _place(position, sides[0].shape[1], received)
    ready = PathRuns.of(root, sides, metric, at, freeze_mlps or not exact, mlps, rows)
    return ready.effects(
        received, sending, mlps=mlps, exact=exact, tokens=tokens, progress=progress, save=save
    )


@dataclass(frozen=True, eq=False)
class PathRuns:
    """Both sides run once, for any receivers and senders at one position; see `path_patch` for the fields."""

    root: nn.Module
    anatomy: Anatomy
    sites: list[Site]
    sides: Sequence[Tensor]
    at: int
    metric: Scored
    scores: list[Tensor]
    held: Held
    freeze_mlps: bool
    rows: int
    output: Any
    points: Mapping[Point, Tensor]

    @classmethod
    def of(
        cls, root: nn.Module, sides: Sequence[Tensor], metric: Scored, at: int, freeze_mlps: bool,
        mlps: bool, rows: int,
    ) -> PathRuns:  # fmt: skip
        """Run both sides."""
        anatomy = anatomy_of(root)
        sites = [site for site in anatomy.sites if site.kind == anatomy.main]
        mlp = [Point("mlp", site.alias, position=at) for site in sites] if freeze_mlps or mlps else []
        streams = [Point("residual_pre", site.alias, position=at) for site in sites] if freeze_mlps else []
        streams += [Point("residual", sites[-1].alias, position=at)] if freeze_mlps else []
        clean = _Side.of(root, sites, sides[0], at, [*mlp, *streams])
        corrupt = _Side.of(root, sites, sides[1], at, mlp)
        scores = [scored(metric, side.logits, len(side.logits)) for side in (clean, corrupt)]
        require_change(scores)
        others = ({str(point.layer): side.points[point] for point in mlp} for side in (clean, corrupt))
        held = Held(clean.heads, corrupt.heads, *others)
        return cls(
            root,
            anatomy,
            sites,
            sides,
            at,
            metric,
            scores,
            held,
            freeze_mlps,
            rows,
            clean.output,
            clean.points,
        )

    def effects(
        self, received: Received | None, senders: list[Sender] | None = None, *, mlps: bool = False,
        exact: bool = True, tokens: Tensor | None = None, progress: bool = True,
        save: str | Path | None = None,
    ) -> PathEffects:  # fmt: skip
        """Patch the paths from senders, all heads by default, to the receivers."""
        clean = self.sides[0]
        patcher = Patcher(
            self.root, self.sites, clean, self.at, self.held, received, self.freeze_mlps, self.metric,
            self.scores[0], self.rows, self.output,
        )  # fmt: skip
        if not exact:
            patcher.close(Streams(self.anatomy, self.sites, self.held, self.points), tokens)
        sending = senders or [(s.alias, h) for s in self.sites for h in range(self.held.heads(s.alias))]
        sending = sending + ([(site.alias, None) for site in self.sites] if mlps else [])
        asked = {
            "search": "paths", "model": type(self.root).__name__,
            "clean": clean.tolist(), "corrupt": self.sides[1].tolist(),
            "receivers": received and [received.heads, received.component], "position": self.at,
            "freeze_mlps": self.freeze_mlps, "exact": exact,
        }  # fmt: skip
        with (
            Resumable(save, asked, torch.stack(self.scores)) as kept,
            bar("Patching", len(sending), progress) as advance,
        ):
            changes = patcher.changes(sending, kept, advance)
        gap = float((self.scores[1] - self.scores[0]).mean())
        return _found(sending, changes, self.scores, gap, self.anatomy)


def _place(position: int, length: int, received: Received | None) -> int:
    at = position % length if -length <= position < length else -1
    if at < 0 or (received is None and at != length - 1):
        raise RegardError(
            f"position is {position}; it must be one of the {length} tokens, and the last for the logits."
        )
    return at


def _senders(anatomy: Anatomy, senders: Sequence[Receiver]) -> list[Sender]:
    if not senders:
        raise RegardError("senders is empty; give (layer, head) of one at least, or None for every head.")
    return list(dict.fromkeys((anatomy.check_head(*sender).alias, sender[1]) for sender in senders))


def _found(
    senders: list[Sender], changes: Tensor, scores: list[Tensor], gap: float, anatomy: Anatomy
) -> PathEffects:
    heads = [i for i, (_, head) in enumerate(senders) if head is not None]
    each = changes[heads]
    mean = each.double().mean(1)
    columns = {"effect": mean, "normalised": mean / gap, "spread": each.double().std(1, correction=0)}
    clean, corrupt = (float(x.mean()) for x in scores)
    about = {
        "main": anatomy.main, "clean": clean, "corrupt": corrupt, "prompts": each.shape[1],
        "stability": finite(halves_agree(each)),
    }  # fmt: skip
    table = HeadTable(
        tuple(senders[i][0] for i in heads),
        [senders[i][1] for i in heads],  # type: ignore[arg-type]
        {name: x.numpy() for name, x in columns.items()},
        about,
    )
    others = {alias: float(changes[i].mean()) for i, (alias, head) in enumerate(senders) if head is None}
    return PathEffects(table, others, each, clean, corrupt)


class _Side(NamedTuple):
    """What a side of the prompts is: last logits, heads at the position, points, and the whole output."""

    logits: Tensor
    heads: Mapping[str, Tensor]
    points: Mapping[Point, Tensor]
    output: Any

    @classmethod
    def of(cls, root: nn.Module, sites: list[Site], ids: Tensor, at: int, points: list[Point]) -> _Side:
        """Run a side once."""
        lenses = [Outputs(kind=sites[0].kind, at=at), Collected(wanted=tuple(points))]
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(root.forward).parameters else {}
        with torch.no_grad(), Session(root, lenses) as session:
            output = root(input_ids=ids, use_cache=True, **keep)
        return cls(logits_of(root, output)[:, -1], session[Outputs], session[Collected], output)


def _receivers(
    anatomy: Anatomy, receivers: Sequence[Receiver] | None, component: Component
) -> Received | None:
    if component not in COMPONENTS:
        raise RegardError(f"component is {component!r}; it must be one of {', '.join(COMPONENTS)}.")
    if receivers is None:
        return None
    if not receivers:
        raise RegardError("receivers is empty; give (layer, head) of one at least, or None for the logits.")
    heads: dict[str, list[int]] = {}
    for layer, head in receivers:
        heads.setdefault(anatomy.check_head(layer, head).alias, []).append(head)
    return Received(heads, component)
