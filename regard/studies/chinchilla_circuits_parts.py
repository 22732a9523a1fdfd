"""The symbolic model of the study of multiple choice: how it is trained, and what is looked for in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regard.lens.circuits.choice_roles import LastRow, _columns
from regard.lens.circuits.choosing import net_of
from regard.lens.circuits.compressing import aligned
from regard.lens.circuits.subspaces import Subspaces, fit_subspaces
from regard.models.tiny_llama import random_llama
from regard.runtime.attribution import LogitAttribution, attribute_logits
from regard.runtime.head_table import Head
from regard.runtime.row_patch import collect
from regard.runtime.session import Session
from regard.runtime.site import Point
from regard.runtime.verbs import steer
from regard.tasks.symbolic_choice import KINDS, SymbolicChoice, SymbolicQuestions

RATE, CLIP, RANK = 1.5e-3, 1.0, 3
EPS = 1e-6
TASK = SymbolicChoice()
Report = tuple[float, float]


def trained(seed: int, steps: int, batch: int, tick: Callable[[float], None]) -> nn.Module:
    """Return a model trained on both kinds of labels, half of each batch each."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    model = random_llama(TASK.vocabulary).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    for step in range(steps):
        halves = [TASK.batch(batch // 2, kind, draws) for kind in KINDS]
        ids, answers = (torch.cat(parts) for parts in ([h.ids for h in halves], [h.answers for h in halves]))
        loss = cross_entropy(model(ids, use_cache=False, logits_to_keep=1).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        tick(0.9 * (step + 1) / steps)
    return model.eval()


def looked_into(model: nn.Module, seed: int, size: Any, ranks: Sequence[int]) -> dict[str, Any]:
    """Return the measures of one model, and what the picture needs beside."""
    draws = torch.Generator().manual_seed(seed + 500)
    fitted = {kind: TASK.batch(size.fitted, kind, draws) for kind in KINDS}
    tested = {kind: TASK.batch(size.tested, kind, draws) for kind in KINDS}
    looks = right_label_weights(model, fitted["ordered"])
    alias = max(looks, key=lambda a: float(looks[a].sum()))
    heads = [(alias, head) for head in range(len(looks[alias]))]
    bases = {kind: fit(model, asked, heads) for kind, asked in fitted.items()}
    full = {kind: scored(model, asked) for kind, asked in tested.items()}
    curves = {
        kind: [scored(model, asked, bases["ordered"], rank) for rank in ranks]
        for kind, asked in tested.items()
    }
    crossed = scored(model, tested["ordered"], bases["random"], RANK)
    drawn = [scored(model, tested["ordered"], bases["ordered"].random(s), RANK) for s in range(size.draws)]
    best = heads[int(looks[alias].argmax())]
    alone = scored(model, tested["ordered"], bases["ordered"], 0, [best])
    same, other = aligned(bases["ordered"], bases["random"])
    parts = {kind: apart(model, asked) for kind, asked in tested.items()}
    halves = [apart(model, _half(tested["ordered"], number)) for number in (0, 1)]
    error, averaged = errors(model, tested["ordered"])
    diagonal, shuffled = diagonals(model, tested["ordered"], seed)
    at = list(ranks).index(RANK)
    measures = {
        **{f"{kind}_full": full[kind][0] for kind in KINDS},
        **{f"{kind}_{r}": curves[kind][i][0] for kind in KINDS for i, r in enumerate(ranks)},
        "crossed_3": crossed[0], "one_head_0": alone[0], "drawn_3": _mean([d[0] for d in drawn]),
        "net_full": full["ordered"][1], "net_3": curves["ordered"][at][1],
        "net_drawn": max(d[1] for d in drawn),
        "same": same, "other": other,
        "between": _jaccard(parts["ordered"], parts["random"]), "within": _jaccard(*halves),
        "diagonal": diagonal, "diagonal_shuffled": shuffled, "error": error, "averaged": averaged,
    }  # fmt: skip
    return {
        "measures": measures,
        "layer": alias,
        "looks": {a: [round(float(x), 4) for x in row] for a, row in looks.items()},
        "net": {kind: [net for _, net in curve] for kind, curve in curves.items()},
        "net_full": {kind: found[1] for kind, found in full.items()},
        "drawn": [list(d) for d in drawn],
        "nodes": {kind: _named(found) for kind, found in parts.items()},
        "spread": [[round(float(x), 4) for x in bases["ordered"].spread(h, "query")[:8]] for h in heads],
    }


def right_label_weights(model: nn.Module, asked: SymbolicQuestions) -> dict[str, Tensor]:
    """Return the mean weight of the last row on the right label, alias -> [H]."""
    at = TASK.places[asked.right][:, None]
    with torch.no_grad(), Session(model, [LastRow(keys={"right": at})]) as session:
        model(input_ids=asked.ids, use_cache=False)
    return {alias: found["right"][..., 0].mean(0) for alias, found in session[LastRow].items()}


def places(asked: SymbolicQuestions) -> tuple[Tensor, Tensor]:
    """Return where queries and keys are looked at: the last position [B], and the labels [B, options]."""
    count = len(asked.ids)
    return torch.full((count,), asked.ids.shape[1] - 1), TASK.places.expand(count, -1)


def fit(model: nn.Module, asked: SymbolicQuestions, heads: Sequence[Head]) -> Subspaces:
    """Return the directions of queries and keys over prompts."""
    ends, labels = places(asked)
    given = {"input_ids": asked.ids}
    return fit_subspaces(model, given, heads, queries=ends, keys=labels, components=("query", "key"))


def scored(
    model: nn.Module, asked: SymbolicQuestions, basis: Subspaces | None = None, rank: int | None = None,
    heads: Sequence[Head] | None = None,
) -> Report:  # fmt: skip
    """Return the accuracy among the labels, and the mean net logit; queries and keys kept to a rank."""
    ends, labels = places(asked)
    edits = [] if basis is None else [basis.edit(rank, queries=ends, keys=labels, heads=heads)]
    with torch.no_grad(), steer(model, *edits) if edits else Session(model, []):
        logits = model(input_ids=asked.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    said = logits.gather(1, asked.labels)
    net = net_of(said, asked.right)
    return float((said.argmax(1) == asked.right).float().mean()), float(net.mean())


def apart(model: nn.Module, asked: SymbolicQuestions) -> LogitAttribution:
    """Return the net effects of nodes: the right label's logit less the mean of the others."""
    count = asked.labels.shape[1]
    order = torch.stack(
        [torch.tensor([c, *(j for j in range(count) if j != c)]) for c in asked.right.tolist()]
    )
    return attribute_logits(model, {"input_ids": asked.ids}, asked.labels.gather(1, order)).net()


def errors(model: nn.Module, asked: SymbolicQuestions) -> Report:
    """Return the largest error of the sum of all parts; and with one scale of the norm for all."""
    found = attribute_logits(model, {"input_ids": asked.ids}, asked.labels)
    point = Point("residual", found.sites[-1], position=-1)
    stream = collect(model, {"input_ids": asked.ids}, [point])[point].double()
    scale = (stream.square().mean(-1, keepdim=True) + EPS).rsqrt()
    held = found.total * scale.mean() / scale
    return float((found.total - found.logits).abs().max()), float((held - found.logits).abs().max())


def diagonals(model: nn.Module, asked: SymbolicQuestions, seed: int) -> Report:
    """Return the largest mean diagonal of a head's effects, and that head's with places shuffled."""
    effects = attribute_logits(model, {"input_ids": asked.ids}, asked.labels).heads.flatten(0, 1)
    columns = _columns(effects, asked.right, seed)
    best = int(columns["diagonal"].argmax())
    return float(columns["diagonal"][best]), float(columns["shuffled"][best])


def _half(asked: SymbolicQuestions, number: int) -> SymbolicQuestions:
    return SymbolicQuestions(*(x[number::2] for x in asked))


def _nodes(found: LogitAttribution) -> set[tuple[str, int | None]]:
    return {(alias, head) for alias, head, _ in found.output_nodes()}


def _jaccard(first: LogitAttribution, second: LogitAttribution) -> float:
    one, two = _nodes(first), _nodes(second)
    return len(one & two) / len(one | two)


def _named(found: LogitAttribution) -> list[list[Any]]:
    """Every node's mean net effect, the output nodes' first."""
    rows: list[list[Any]] = []
    for alias, heads, mlp in zip(
        found.sites, found.heads[..., 0].mean(2), found.mlps[..., 0].mean(1), strict=True
    ):
        rows += [[alias, head, round(float(x), 4)] for head, x in enumerate(heads)]
        rows.append([alias, None, round(float(mlp), 4)])
    return sorted(rows, key=lambda row: -row[2])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
