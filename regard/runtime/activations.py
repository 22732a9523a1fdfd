"""Activation patching: what one run had, put into another, by layer and position, and by head.

    denoise   the corrupt prompt, with one thing as the clean one has it
              effect = (metric(patched) - metric(corrupt)) / (metric(clean) - metric(corrupt))
    noise     the clean prompt, with one thing as the corrupt one has it
              effect = (metric(patched) - metric(clean)) / (metric(corrupt) - metric(clean))

An effect of 0 is nothing, and 1 as much as the whole prompt. Denoising says what is enough to bring the
answer back, noising what cannot be spared. Patched are the residual stream entering a block, what attention
or the MLP adds to it, at one position, or one head's output at all positions.

A patch at position p leaves everything before p as it was, and all blocks before its layer: only the later
blocks of the later tokens are run, from a cached prefix, and all patches of a layer and position share a
batch. Where prompts do not differ up to p, and behind the last block but at the end, the effect is 0 without
a run.

Sources: Vig et al., 2020, arXiv 2004.12265; Meng et al., 2022, arXiv 2202.05262 (by layer and position); the
two directions, Heimersheim and Nanda, 2024, arXiv 2404.15255. Status: agrees with the plain loop of a forward
a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.activation_parts import STREAM, GivenNodes, Node, Source
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.head_table import HeadTable
from regard.runtime.prefix import prefix_cache
from regard.runtime.progress import bar
from regard.runtime.replay import Replay
from regard.runtime.resumable import Resumable
from regard.runtime.sides import Scored, after_prefix, aligned_sides, last_logits_of, require_change, scored
from regard.runtime.site import Site

Direction = Literal["denoise", "noise"]
Kind = Literal["residual", "attention", "mlp", "head"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, eq=False)
class ActivationEffects:
    """What `activation_patch` found.

    Attributes:
        direction: `denoise` or `noise`.
        sites: aliases of the layers, in order.
        positions: what the columns are: positions of the tokens.
        layers: `residual`, `attention` and `mlp`, as asked for -> effect, float64 [L, P].
        heads: one row a head, columns `effect`, over the whole change between the two sides, and `spread`,
            the standard deviation over prompts of the same; None unless asked for.
        head_positions: alias of the layer -> effect of each head by position, [H, P]; empty unless asked.
        clean, corrupt: mean metric of the two sides.
        prompts: how many.
    """

    direction: str
    sites: tuple[str, ...]
    positions: tuple[int | str, ...]
    layers: Mapping[str, npt.NDArray[np.float64]]
    heads: HeadTable | None
    head_positions: Mapping[str, npt.NDArray[np.float64]]
    clean: float
    corrupt: float
    prompts: int


def activation_patch(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupt: Mapping[str, Tensor],
    metric: Scored,
    *,
    kinds: Sequence[Kind] = ("residual", "attention", "mlp"),
    direction: Direction = "denoise",
    positions: Sequence[int] | None = None,
    heads_by_position: bool = False,
    rows: int = 256,
    progress: bool = True,
    save: str | Path | None = None,
) -> ActivationEffects:
    """Patch every layer at every position, and every head, from one side into the other.

    Args:
        model: a causal language model in evaluation mode.
        clean, corrupt: `input_ids` [N, T] of unpadded prompts, of one length.
        metric: takes logits [N, V] at the last position; returns [N], such as `Prompts.score`.
        kinds: `residual` (entering a block), `attention`, `mlp` (what they add), each by position, and
            `head`, at all `positions` at once.
        direction: `denoise` puts the clean side into the corrupt one, `noise` the other way round.
        positions: array indices of tokens; default all.
        heads_by_position: whether each head is patched at each position too: T times as many patches.
        rows: prompts times patches in a batch, about.
        progress: whether a bar is shown, where stderr is a terminal.
        save: a file that keeps what is finished. The same search, started again after Ctrl-C or later, goes
            on from there; other searches may share the file.

    Raises:
        RegardError: for padded prompts, an unknown kind, direction or position, where clean and corrupt score
            alike, and a file of `save` that holds something else.
        ShapeMismatch: for prompts of different lengths, or a metric of another shape.
        UnsupportedModel: for a model without a cache of keys and values, or whose blocks cannot be replayed.

    Example:
        >>> found = activation_patch(model, clean, corrupt, prompts.score)      # doctest: +SKIP
        >>> found.layers["residual"].shape                                      # doctest: +SKIP
        (30, 18)
        >>> activation_patch(model, clean, corrupt, prompts.score, kinds=["head"]).heads  # doctest: +SKIP
    """
    sides = aligned_sides(clean, corrupt)
    chosen = _positions(positions, sides[0].shape[1])
    _check(kinds, direction)
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    scores = [scored(metric, last_logits_of(root, side), len(side)) for side in sides]
    require_change(scores)
    base, other = (1, 0) if direction == "denoise" else (0, 1)
    source = Source.of(root, sites, sides[other], kinds)
    nodes = [Node(kind, site.alias) for site in sites for kind in kinds if kind in STREAM]
    if heads_by_position:
        nodes += [Node("head", s.alias, h) for s in sites for h in range(source.heads[s.alias].shape[1])]
    together = [
        Node("head", s.alias, h)
        for s in sites
        if "head" in kinds
        for h in range(source.heads[s.alias].shape[1])
    ]
    same = sides[0] == sides[1]
    runner = _Runner(root, sites, sides[base], same.all(0), source, metric, scores[base], rows)
    asked = {
        "search": "activations", "direction": direction, "model": type(root).__name__,
        "clean": sides[0].tolist(), "corrupt": sides[1].tolist(), "positions": chosen,
    }  # fmt: skip
    total = len(nodes) * len(chosen) + len(together)
    with Resumable(save, asked, torch.stack(scores)) as kept, bar("Patching", total, progress) as advance:
        by_place = {p: runner.changes(nodes, [p], kept, advance) for p in chosen if nodes}
        at_once = runner.changes(together, chosen, kept, advance) if together else {}
    gap = float((scores[other] - scores[base]).mean())
    return _found(direction, sites, chosen, by_place, at_once, scores, gap)


def _found(
    direction: str, sites: list[Site], chosen: list[int], by_place: dict[int, dict[Node, Tensor]],
    at_once: dict[Node, Tensor], scores: list[Tensor], gap: float,
) -> ActivationEffects:  # fmt: skip
    aliases = tuple(site.alias for site in sites)
    clean, corrupt = (float(x.mean()) for x in scores)
    mean = {p: {n: float(x.double().mean()) / gap for n, x in found.items()} for p, found in by_place.items()}
    nodes = list(next(iter(by_place.values()), {}))
    layers = {
        kind: np.array([[mean[p][Node(kind, alias)] for p in chosen] for alias in aliases])
        for kind in dict.fromkeys(n.kind for n in nodes if n.head is None)
    }
    heads: dict[str, list[list[float]]] = {}
    for node in nodes:
        if node.head is not None:
            heads.setdefault(node.alias, []).append([mean[p][node] for p in chosen])
    about = {"direction": direction, "clean": clean, "corrupt": corrupt, "prompts": len(scores[0])}
    return ActivationEffects(
        direction, aliases, tuple(chosen), layers, _head_table(at_once, gap, sites[0].kind, about),
        {alias: np.array(rows) for alias, rows in heads.items()}, clean, corrupt, len(scores[0]),
    )  # fmt: skip


def _head_table(
    found: dict[Node, Tensor], gap: float, main: str, about: dict[str, object]
) -> HeadTable | None:
    if not found:
        return None
    each = torch.stack(list(found.values())).double() / gap
    columns = {"effect": each.mean(1).numpy(), "spread": each.std(1, correction=0).numpy()}
    sites, heads = tuple(n.alias for n in found), np.array([n.head for n in found])
    return HeadTable(sites, heads, columns, {"main": main, **about})


class _Runner:
    """Runs patches of one side, by layer and position, and scores them."""

    def __init__(
        self, root: nn.Module, sites: list[Site], ids: Tensor, same: Tensor, source: Source,
        metric: Scored, unpatched: Tensor, rows: int,
    ) -> None:  # fmt: skip
        self.root, self.sites, self.ids, self.source = root, sites, ids, source
        self.metric, self.unpatched = metric, unpatched
        self.many = max(1, rows // len(ids))
        self.first = int(same.int().cumprod(0).sum())  # the first position where the sides differ
        with torch.no_grad():
            self.output = root(input_ids=ids, use_cache=True)

    def changes(
        self, nodes: list[Node], positions: list[int], kept: Resumable, advance: Callable[[int], None]
    ) -> dict[Node, Tensor]:
        """Return the change of the metric, [N], where each node is given at all of some positions."""
        found: dict[Node, Tensor] = {}
        where = ",".join(map(str, positions))
        moving = [p for p in positions if p >= self.first]
        for node in nodes:
            known = kept.get(f"{where} {tuple(node)}")
            if known is not None:
                found[node] = known
            elif not moving or self._unheard(node, moving):
                found[node] = torch.zeros_like(self.unpatched)
        advance(len(found))
        replay = None
        for members in self._batches([node for node in nodes if node not in found]):
            replay = replay or self._replay(min(moving))
            edit = GivenNodes(members, self.source, moving, min(moving))
            logits = replay.run(members[0].alias, edit, batch=len(members))[:, -1]
            for node, part in zip(members, logits.chunk(len(members)), strict=True):
                found[node] = scored(self.metric, part, len(self.ids)) - self.unpatched
                kept.put(f"{where} {tuple(node)}", found[node])
            advance(len(members))
        return {node: found[node] for node in nodes}

    def _unheard(self, node: Node, positions: list[int]) -> bool:
        """Whether nothing after a node looks at its positions: in the last block, but for its input."""
        last = node.alias == self.sites[-1].alias and node.kind != "residual"
        return last and max(positions) < self.ids.shape[1] - 1

    def _batches(self, nodes: list[Node]) -> Iterator[list[Node]]:
        by_layer: dict[str, list[Node]] = {}
        for node in nodes:
            by_layer.setdefault(node.alias, []).append(node)
        for members in by_layer.values():
            for start in range(0, len(members), self.many):
                yield members[start : start + self.many]

    def _replay(self, start: int) -> Replay:
        prefix = prefix_cache(self.root, self.output, start)
        return Replay(self.root, after_prefix(self.root, self.ids[:, start:], prefix))


def _positions(positions: Sequence[int] | None, length: int) -> list[int]:
    if positions is None:
        return list(range(length))
    found = [p + length if p < 0 else p for p in positions]
    if not found or len(set(found)) < len(found) or not all(0 <= p < length for p in found):
        raise RegardError(
            f"positions is {list(positions)}; it must name some of the {length} tokens, each once."
        )
    return sorted(found)


def _check(kinds: Sequence[Kind], direction: str) -> None:
    if direction not in get_args(Direction):
        raise RegardError(f"direction is {direction!r}; it must be one of {', '.join(get_args(Direction))}.")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise RegardError(f"kinds is {kinds!r}; it must name some of {', '.join(KINDS)}, each once.")
