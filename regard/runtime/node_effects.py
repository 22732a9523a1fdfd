"""What patching the last position of one head or MLP does to an answer: in all, and by the direct path alone.

    total    the clean prompt, node n at the last position that of the corrupt prompt, all that follows
             recomputed
    direct   the final residual stream less n's clean and plus its corrupt contribution, through the final
             norm and the unembedding as they are: later blocks do not see it
    effect = net (patched) - net (clean),       net = logit of the right token - mean logit of the others

A head with a large total and a small direct effect feeds other heads. Totals run one token after a cached
prefix, the nodes of a layer side by side.

Source: Lieberum et al., 2023, arXiv 2307.09458, sections 3 and 4. Status: agrees with the definition written
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.attribution import ends_of, node_points
from regard.runtime.head_table import HeadTable
from regard.runtime.prefix import check_unpadded, prefix_cache
from regard.runtime.progress import bar
from regard.runtime.replay import Replay
from regard.runtime.row_patch import RowPatch, collect
from regard.runtime.sides import after_prefix
from regard.runtime.site import Point, Site


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """What `node_effects` found, means over prompts of the change of the net logit.

    Attributes:
        heads: columns `total` and `direct`.
        mlps: alias of the layer -> (total, direct).
        clean, corrupt: mean net logit of the two sides, for the tokens that are right on the clean one.
    """

    heads: HeadTable
    mlps: Mapping[str, tuple[float, float]]
    clean: float
    corrupt: float


def node_effects(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupt: Mapping[str, Tensor],
    answers: Tensor,
    *,
    rows: int = 512,
    progress: bool = True,
) -> NodeEffects:
    """Patch every head and MLP at the last position, one at a time, and measure the net logit.

    Args:
        model: a causal language model in evaluation mode.
        clean, corrupt: `input_ids` [N, T] and [N, T'] of unpadded prompts; T and T' may differ.
        answers: tokens of the clean side, the right one first, int64 [N, K].
        rows: prompts times nodes in a batch, about.
        progress: whether a bar is shown, where stderr is a terminal.

    Raises:
        ShapeMismatch: for other numbers of prompts, or answers of another shape.
        RegardError: for padded prompts, or fewer than two answers.
        UnsupportedModel: where the final norm or unembedding cannot be found, or nothing can be replayed.
    """
    sides = [check_unpadded(clean, "clean"), check_unpadded(corrupt, "corrupt")]
    if len(sides[0]) != len(sides[1]) or answers.ndim != 2 or len(answers) != len(sides[0]):
        raise ShapeMismatch(
            f"there are {len(sides[0])} clean and {len(sides[1])} corrupt prompts, and answers are "
            f"{list(answers.shape)}; they must be [{len(sides[0])}, tokens]."
        )
    if answers.shape[1] < 2:
        raise RegardError("a net logit needs two answers at least: the right one and what it beats.")
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    points = node_points(anatomy, sites, -1)
    found = [collect(root, {"input_ids": ids}, points) for ids in sides]
    nets = [net_logit(values[Point("logits", position=-1)], answers) for values in found]
    nodes = [p for p in points if p.kind in ("head", "mlp")]
    direct = _direct(anatomy, sites, nodes, found, answers)
    total = _total(root, sites, nodes, sides[0], found[1], answers, nets[0], rows, progress)
    heads = [i for i, node in enumerate(nodes) if node.kind == "head"]
    table = HeadTable(
        tuple(str(nodes[i].layer) for i in heads),
        [nodes[i].head for i in heads],  # type: ignore[arg-type]
        {"total": total[heads].numpy(), "direct": direct[heads].numpy()},
        {"main": anatomy.main, "prompts": len(answers)},
    )
    mlps = {
        str(node.layer): (float(total[i]), float(direct[i]))
        for i, node in enumerate(nodes)
        if node.kind == "mlp"
    }
    return NodeEffects(table, mlps, float(nets[0].mean()), float(nets[1].mean()))


def net_logit(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the logit of the first answer less the mean of the others, [N], of logits [N, V]."""
    chosen = logits.float().gather(1, answers.to(logits.device))
    return chosen[:, 0] - chosen[:, 1:].mean(1)


def _direct(
    anatomy: Anatomy, sites: list[Site], nodes: list[Point], found: list[dict[Point, Tensor]], answers: Tensor
) -> Tensor:
    norm, unembedding = ends_of(anatomy)
    stream = found[0][Point("residual", sites[-1].alias, position=-1)]
    weights = {site.alias: anatomy.output_weight(site).detach() for site in sites}
    effects = []
    with torch.no_grad():
        before = net_logit(unembedding(norm(stream)), answers)
        for node in nodes:
            change = found[1][node] - found[0][node]
            if node.kind == "head":
                change = change @ weights[str(node.layer)][:, node.head].T.to(change)
            effects.append((net_logit(unembedding(norm(stream + change)), answers) - before).mean())
    return torch.stack(effects).double().cpu()


def _total(
    root: nn.Module, sites: list[Site], nodes: list[Point], ids: Tensor, corrupt: Mapping[Point, Tensor],
    answers: Tensor, clean: Tensor, rows: int, progress: bool,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        output = root(input_ids=ids, use_cache=True)
    replay = Replay(root, after_prefix(root, ids[:, -1:], prefix_cache(root, output, ids.shape[1] - 1)))
    many, effects = max(1, rows // len(ids)), torch.zeros(len(nodes), dtype=torch.float64)
    with bar("Patching", len(nodes), progress) as advance:
        for site in sites:
            members = [i for i, node in enumerate(nodes) if node.layer == site.alias]
            for start in range(0, len(members), many):
                part = members[start : start + many]
                patch: list[tuple[Point, Any]] = [
                    (Point(nodes[i].kind, site.alias, nodes[i].head), corrupt[nodes[i]][:, None])
                    for i in part
                ]
                logits = replay.run(site.alias, RowPatch(patch), batch=len(part))[:, -1]
                for i, each in zip(part, logits.chunk(len(part)), strict=True):
                    effects[i] = float((net_logit(each, answers) - clean).mean())
                advance(len(part))
    return effects
