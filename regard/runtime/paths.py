"""Path patching: what a head does to the logits, or to the queries, keys or values of chosen later heads.

For every sender head, at one position p, with z the head outputs before the output projection:

    1. the clean prompt, with z of the sender that of the corrupt prompt and z of every other head of every
       layer the clean one; MLPs follow, or are held too. What the receivers compute then is kept.
    2. the clean prompt, with only the receivers' query, key or value at p replaced by what was kept.
    effect = metric(2) - metric(clean)        normalised: over metric(corrupt) - metric(clean)

With the logits as receiver the first run is all. Nothing before p changes, and while heads are held nothing
but p changes, so that step 1 runs one token after a cached prefix, step 2 those from p on; blocks before the
sender, or the receivers, give what they gave, and all heads of a layer share a batch.

Sources: Wang et al., 2023, arXiv 2211.00593, section 3.1; the algorithm, with MLPs that follow, of Merullo et
al., 2024, arXiv 2310.08744, appendix. Status: agrees with the definition written out, a forward a sender.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.head_table import HeadTable
from regard.runtime.path_stages import (
    COMPONENTS,
    Component,
    FrozenParts,
    GivenInputs,
    Held,
    KeptInputs,
    Outputs,
    Received,
)
from regard.runtime.prefix import check_unpadded, prefix_cache
from regard.runtime.progress import bar
from regard.runtime.recorded import logits_of
from regard.runtime.replay import Replay
from regard.runtime.row_patch import collect
from regard.runtime.session import Session
from regard.runtime.site import Point, Site

Receiver = tuple[int | str, int]
Scored = Callable[[Tensor], Tensor]
LEAST = 1e-3


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
    rows: int = 512,
    progress: bool = True,
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
        rows: prompts times senders in a batch, about.
        progress: whether a bar is shown, where stderr is a terminal.

    Raises:
        RegardError: for padded prompts, an unknown component, or where clean and corrupt score alike, so that
            there is nothing to explain.
        ShapeMismatch: for prompts of different lengths, or a metric of another shape.
        NoSuchSite: for a receiver that is not there.
        UnsupportedModel: for a model without a cache of keys and values, or whose blocks cannot be replayed.

    Example:
        >>> effects = path_patch(model, clean, corrupt, prompts.score)              # doctest: +SKIP
        >>> movers = [head[:2] for head in effects.heads.top("effect", 3, largest=False)]  # doctest: +SKIP
        >>> path_patch(model, clean, corrupt, prompts.score, receivers=movers)      # doctest: +SKIP
    """
    sides = _sides(clean, corrupt)
    length = sides[0].shape[1]
    at = position % length if -length <= position < length else -1
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    received = _receivers(anatomy, receivers, component)
    if at < 0 or (received is None and at != length - 1):
        raise RegardError(
            f"position is {position}; it must be one of the {length} tokens, and the last for the logits."
        )
    scores = [_scored(metric, _last_logits(root, side), len(side)) for side in sides]
    gap = require_change(scores)
    held = _held(root, sites, [side[:, : at + 1] for side in sides], freeze_mlps or mlps)
    patcher = _Patcher(root, sites, sides[0], at, held, received, freeze_mlps, metric, scores[0], rows)
    sending: list[tuple[str, int | None]] = [(s.alias, h) for s in sites for h in range(held.heads(s.alias))]
    if senders is not None:
        sending = _senders(anatomy, senders)
    sending += [(site.alias, None) for site in sites] if mlps else []
    with bar("Patching", len(sending), progress) as advance:
        changes = patcher.changes(sending, advance)
    return _found(sending, changes, scores, gap, anatomy)


def _senders(anatomy: Anatomy, senders: Sequence[Receiver]) -> list[tuple[str, int | None]]:
    if not senders:
        raise RegardError("senders is empty; give (layer, head) of one at least, or None for every head.")
    return list(dict.fromkeys((anatomy.check_head(*sender).alias, sender[1]) for sender in senders))


def _found(
    senders: list[tuple[str, int | None]], changes: Tensor, scores: list[Tensor], gap: float, anatomy: Anatomy
) -> PathEffects:
    heads = [i for i, (_, head) in enumerate(senders) if head is not None]
    each = changes[heads]
    mean = each.double().mean(1)
    columns = {"effect": mean, "normalised": mean / gap, "spread": each.double().std(1, correction=0)}
    clean, corrupt = (float(x.mean()) for x in scores)
    about = {"main": anatomy.main, "clean": clean, "corrupt": corrupt, "prompts": each.shape[1]}
    table = HeadTable(
        tuple(senders[i][0] for i in heads),
        [senders[i][1] for i in heads],  # type: ignore[arg-type]
        {name: x.numpy() for name, x in columns.items()},
        about,
    )
    others = {alias: float(changes[i].mean()) for i, (alias, head) in enumerate(senders) if head is None}
    return PathEffects(table, others, each, clean, corrupt)


def _held(root: nn.Module, sites: list[Site], sides: list[Tensor], mlps: bool) -> Held:
    heads, others = [], []
    for ids in sides:
        with torch.no_grad(), Session(root, [Outputs(kind=sites[0].kind)]) as session:
            root(input_ids=ids, use_cache=False)
        heads.append(session[Outputs])
        points = [Point("mlp", site.alias, position=-1) for site in sites]
        found = collect(root, {"input_ids": ids}, points) if mlps else {}
        others.append({str(point.layer): x for point, x in found.items()})
    return Held(*heads, *others)


class _Patcher:
    """Runs the senders, by layer, and scores them."""

    def __init__(
        self, root: nn.Module, sites: list[Site], ids: Tensor, at: int, held: Held,
        received: Received | None, freeze_mlps: bool, metric: Scored, clean: Tensor, rows: int,
    ) -> None:  # fmt: skip
        self.sites, self.held, self.received, self.clean = sites, held, received, clean
        self.freeze_mlps, self.metric = freeze_mlps, metric
        self.many = max(1, rows // len(ids))
        with torch.no_grad():
            output = root(input_ids=ids, use_cache=True)
        prefix = prefix_cache(root, output, at)
        self.one = Replay(root, _after(root, ids[:, at : at + 1], prefix))
        self.rest = None if received is None else Replay(root, _after(root, ids[:, at:], prefix))
        numbers = {site.alias: n for n, site in enumerate(sites)}
        self.numbers = numbers
        self.first = None if received is None else min(numbers[alias] for alias in received.heads)
        self.last = None if received is None else max(numbers[alias] for alias in received.heads)

    def changes(self, senders: list[tuple[str, int | None]], advance: Callable[[int], None]) -> Tensor:
        """Return the change of the metric, [senders, N]; NaN where no receiver comes after."""
        found = torch.full((len(senders), len(self.clean)), torch.nan)
        for members in self._batches(senders):
            if self._reaches(senders[members[0]]):
                scores = self._run([senders[i] for i in members])
                found[members] = scores.view(len(members), -1) - self.clean
            advance(len(members))
        return found

    def _batches(self, senders: list[tuple[str, int | None]]) -> Iterable[list[int]]:
        by_layer: dict[str, list[int]] = {}
        for i, (alias, _) in enumerate(senders):
            by_layer.setdefault(alias, []).append(i)
        for members in by_layer.values():
            for start in range(0, len(members), self.many):
                yield members[start : start + self.many]

    def _reaches(self, sender: tuple[str, int | None]) -> bool:
        return self.last is None or self.numbers[sender[0]] < self.last

    def _run(self, senders: list[tuple[str, int | None]]) -> Tensor:
        first = self.numbers[senders[0][0]]
        layers = frozenset(site.alias for site in self.sites[first:])
        frozen = FrozenParts(self.held, layers, senders, self.freeze_mlps)
        if self.received is None or self.rest is None:
            logits = self.one.run(self.sites[first].alias, frozen, batch=len(senders))
            return self._scores(logits, len(senders))
        self.one.run(self.sites[first].alias, [frozen, KeptInputs(self.received)], batch=len(senders))
        assert self.one.session is not None and self.first is not None
        given = GivenInputs(self.received, self.one.session[KeptInputs])
        logits = self.rest.run(self.sites[self.first].alias, given, batch=len(senders))
        return self._scores(logits, len(senders))

    def _scores(self, logits: Tensor, count: int) -> Tensor:
        parts = logits[:, -1].chunk(count)
        return torch.cat([_scored(self.metric, part, len(self.clean)) for part in parts])


def _after(root: nn.Module, ids: Tensor, prefix: Any) -> dict[str, Any]:
    """The inputs of a forward of tokens after a prefix."""
    import inspect

    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": prefix}
    if "logits_to_keep" in inspect.signature(root.forward).parameters:
        inputs["logits_to_keep"] = 1
    return inputs


def _last_logits(root: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(root, root(input_ids=ids, use_cache=False))[:, -1]


def _scored(metric: Scored, logits: Tensor, count: int) -> Tensor:
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape != (count,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeMismatch(f"the metric gave {found} for {count} prompts; it must give a tensor, one each.")
    return value.float().cpu()


def require_change(scores: Sequence[Tensor]) -> float:
    """Return the mean change of the metric from the clean to the corrupt prompts.

    Args:
        scores: [N] of either.

    Raises:
        RegardError: where it is less than 0.001, so that there is nothing to explain.
    """
    gap = float((scores[1] - scores[0]).mean())
    if not abs(gap) >= LEAST:
        raise RegardError(
            f"the metric is {float(scores[0].mean()):.4f} on the clean and {float(scores[1].mean()):.4f} on "
            "the corrupt prompts, so there is nothing to explain."
        )
    return gap


def _sides(clean: Mapping[str, Tensor], corrupt: Mapping[str, Tensor]) -> list[Tensor]:
    sides = [check_unpadded(clean, "clean"), check_unpadded(corrupt, "corrupt")]
    if sides[0].shape != sides[1].shape:
        raise ShapeMismatch(
            f"clean is {list(sides[0].shape)} and corrupt {list(sides[1].shape)}; their positions must "
            "answer to each other."
        )
    return sides


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
