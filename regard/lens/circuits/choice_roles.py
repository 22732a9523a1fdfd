"""What heads do in multiple choice: carry the right label, always say the same one, and others.

    E[c, j] = mean over prompts with right place c of (direct effect on label j - its mean over labels)

    correct letter    the diagonal of E is above a threshold and twice the mean size off it, and the last
                      position looks at the right label
    single letter     one column mean of E is above it, and twice the mean size of what the columns leave
    uniform           the mean effect on all labels is beyond it, and twice the mean size of E
    amplifier         looks mostly at itself, and has a net effect above it, and is none of these
    gatherer          looks at the right option; its total effect is beyond the threshold and twice the direct
                      one

Every diagonal stands beside the same with right places shuffled. Where a model does no better than chance,
heads that have to do with the right answer are withheld.

Source: Lieberum et al., 2023, arXiv 2307.09458, section 4. Status: partly our choice (all thresholds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from regard.engines.rows import RowBlock
from regard.errors import RegardError
from regard.lens.circuits.choosing import Answered, answer_choices
from regard.runtime.attribution import LogitAttribution, attribute_logits
from regard.runtime.call import Call
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.node_effects import node_effects
from regard.runtime.protocol import Lens, Wanted
from regard.runtime.session import Session
from regard.tasks.questions import Choices

WRITES, LOOKS, RATIO = 0.1, 0.3, 2.0
ROLES = ("correct letter", "single letter", "uniform", "amplifier", "gatherer")
NEED_ANSWERS = ("correct letter", "amplifier", "gatherer")


@dataclass(frozen=True, eq=False)
class ChoiceHeads:
    """What `categorise` found.

    Attributes:
        table: columns `diagonal`, `off`, `shuffled` (the diagonal under right places shuffled), `single` and
            `rest` (the largest column mean, and the mean size of what columns leave), `letter` (its place),
            `uniform`, `size` (mean size of E), `net`, weights `to_label`, `to_option`, `to_self` at the last
            position, and where asked for `total`, what of the net logit is lost where the head is patched.
        matrices: E of each head, float64 [heads, options, options].
        answered: how well the model answers.
        nodes: the output nodes, (alias, head or None for the MLP, mean net effect), largest first.
        total: mean net logit, of which the nodes' effects are parts.
    """

    table: HeadTable
    matrices: np.ndarray
    answered: Answered
    nodes: tuple[tuple[str, int | None, float], ...]
    total: float

    def roles(
        self, *, writes: float = WRITES, looks: float = LOOKS, ratio: float = RATIO
    ) -> dict[str, list[Head]]:
        """Return the heads of each role.

        Args:
            writes: least effect, in logits.
            looks: least mean weight.
            ratio: how many times larger an effect must be than what it is held against.

        Returns:
            Roles that have to do with the right answer are left out where the model does not do the task.
        """
        t = self.table
        correct = (t["diagonal"] > writes) & (t["diagonal"] > ratio * t["off"]) & (t["to_label"] >= looks)
        single = (t["single"] > writes) & (t["single"] > ratio * t["rest"])
        uniform = (np.abs(t["uniform"]) > writes) & (np.abs(t["uniform"]) > ratio * t["size"])
        others = ~(correct | single | uniform)
        found = {
            "correct letter": correct, "single letter": single, "uniform": uniform,
            "amplifier": (t["to_self"] >= 0.5) & (t["net"] > writes) & others,
        }  # fmt: skip
        if "total" in t.columns:
            far = np.abs(t["total"])
            feeds = (far > writes) & (far > ratio * np.abs(t["net"]))
            found["gatherer"] = (t["to_option"] >= looks) & feeds
        hidden = () if self.answered.does_task else NEED_ANSWERS
        return {
            role: [t.names[i] for i in np.flatnonzero(mask)]
            for role, mask in found.items()
            if role not in hidden
        }


def categorise(
    model: nn.Module,
    asked: Choices,
    *,
    totals: bool = False,
    share: float = 0.8,
    seed: int = 0,
    progress: bool = True,
) -> ChoiceHeads:
    """Take the labels' logits apart, and say what each head does to which label, and where it looks.

    Args:
        model: a causal language model in evaluation mode, whose logits can be taken apart.
        asked: of `regard.tasks.questions.choices`; every place must be right at least once.
        totals: patch every node too, from the next prompt with another right place.
        share: of all positive net effects that the output nodes make.
        seed: of the shuffled right places.

    Raises:
        RegardError: where a place is never right.
        UnsupportedModel: where logits cannot be taken apart.

    Example:
        >>> found = categorise(model, asked)                                # doctest: +SKIP
        >>> found.answered.said(), found.roles()                                # doctest: +SKIP
    """
    count = asked.label_ids.shape[1]
    missing = set(range(count)) - set(asked.right.tolist())
    if missing:
        raise RegardError(f"option {min(missing) + 1} is never the right one; balance the questions.")
    answered = answer_choices(model, asked)
    pieces, looked, order = [], [], []
    for rows in asked.by_length():
        ids = torch.stack([asked.ids[i] for i in rows])
        pieces.append(attribute_logits(model, {"input_ids": ids}, asked.label_ids[rows]))
        looked.append(_looks(model, ids, asked, rows))
        order += rows
    direct = torch.cat([piece.heads for piece in pieces], 2)  # [L, H, N, options]
    right = asked.right[order]
    present = ~direct[:, :, 0, 0].isnan().flatten()
    flat = direct.flatten(0, 1)[present]  # [heads, N, options]
    columns = _columns(flat, right, seed)
    weights = {name: np.concatenate([one[name] for one in looked], 0).mean(0) for name in looked[0]}
    columns.update({name: x.ravel() for name, x in weights.items()})
    if totals:
        columns["total"] = _totals(model, asked, progress)
    names = pieces[0].table()
    table = HeadTable(names.sites, names.heads, columns, {"prompts": len(asked), "main": names.kinds[0]})
    whole = _net(pieces, asked, order)
    nodes = tuple(whole.output_nodes(share))
    return ChoiceHeads(table, _matrices(flat, right).numpy(), answered, nodes, float(whole.logits.mean()))


def _net(pieces: list[LogitAttribution], asked: Choices, order: list[int]) -> LogitAttribution:
    """The net effects of all prompts together: right label first, then the others."""
    first = _right_first(asked, order)

    def sorted_(parts: list[Tensor]) -> Tensor:
        x = torch.cat(parts, -2)
        return x.gather(-1, first.expand(*x.shape[:-2], -1, -1))

    joined = LogitAttribution(
        sorted_([p.heads for p in pieces]), sorted_([p.mlps for p in pieces]),
        {name: sorted_([p.rest[name] for p in pieces]) for name in pieces[0].rest},
        sorted_([p.logits for p in pieces]), pieces[0].sites, pieces[0].blocks,
    )  # fmt: skip
    return joined.net()


def _matrices(effects: Tensor, right: Tensor) -> Tensor:
    """E of each head, [heads, options, options], of effects [heads, N, options]."""
    centred = effects - effects.mean(-1, keepdim=True)
    return torch.stack([centred[:, right == c].mean(1) for c in range(effects.shape[-1])], 1)


def _columns(effects: Tensor, right: Tensor, seed: int) -> dict[str, np.ndarray]:
    count = effects.shape[-1]
    matrices = _matrices(effects, right)
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
    other = _matrices(effects, right[order])
    apart = ~torch.eye(count, dtype=torch.bool)
    letters = matrices.mean(1)
    rest = (matrices - letters[:, None]).abs().mean((1, 2))
    own = effects.gather(2, right[None, :, None].expand(len(effects), -1, 1))[..., 0]
    net = (own - (effects.sum(2) - own) / (count - 1)).mean(1)
    found = {
        "diagonal": matrices.diagonal(dim1=1, dim2=2).mean(1),
        "off": matrices[:, apart].abs().mean(1),
        "shuffled": other.diagonal(dim1=1, dim2=2).mean(1),
        "single": letters.max(1).values, "letter": letters.argmax(1), "rest": rest,
        "uniform": effects.mean((1, 2)), "size": matrices.abs().mean((1, 2)), "net": net,
    }  # fmt: skip
    return {name: x.double().numpy() for name, x in found.items()}


def _totals(model: nn.Module, asked: Choices, progress: bool) -> np.ndarray:
    """What is lost of the net logit where each head is patched from another prompt, mean over prompts."""
    partners = _partners(asked)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, partner in enumerate(partners):
        groups.setdefault((len(asked.ids[i]), len(asked.ids[partner])), []).append(i)
    lost = np.zeros(1)
    for rows in groups.values():
        clean, corrupt = (
            torch.stack([asked.ids[i] for i in some]) for some in (rows, [partners[i] for i in rows])
        )
        answers = asked.label_ids[rows].gather(1, _right_first(asked, rows))
        found = node_effects(model, {"input_ids": clean}, {"input_ids": corrupt}, answers, progress=progress)
        lost = lost - found.heads["total"] * len(rows) / len(asked)
    return lost


def _partners(asked: Choices) -> list[int]:
    """For each prompt the next one with another right place, of its length where there is one."""
    found = asked.others()
    for rows in asked.by_length():
        for place, i in enumerate(rows):
            after = (rows[(place + step) % len(rows)] for step in range(1, len(rows)))
            found[i] = next((j for j in after if asked.right[j] != asked.right[i]), found[i])
    return found


def _right_first(asked: Choices, rows: list[int]) -> Tensor:
    """The places of each prompt's options, the right one first, int64 [n, options]."""
    count = asked.label_ids.shape[1]
    right = asked.right[rows].tolist()
    return torch.tensor([[c, *(j for j in range(count) if j != c)] for c in right])


def _looks(model: nn.Module, ids: Tensor, asked: Choices, rows: list[int]) -> dict[str, np.ndarray]:
    labels, options = (
        places[rows].gather(1, asked.right[rows][:, None])
        for places in (asked.label_places, asked.option_places)
    )
    last = torch.full_like(labels, ids.shape[1] - 1)
    lens = LastRow(keys={"to_label": labels, "to_option": options, "to_self": last})
    with torch.no_grad(), Session(model, [lens]) as session:
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    seen: dict[str, dict[str, Tensor]] = session[LastRow]
    return {name: torch.cat([x[name] for x in seen.values()], 1)[..., 0].numpy() for name in lens.keys}


@dataclass(frozen=True, eq=False, kw_only=True)
class LastRow(Lens):
    """Keeps the weights of the last row on some keys, of every head, without padding.

    Attributes:
        keys: name -> array indices, int64 [B, n].
    """

    keys: Mapping[str, Tensor]
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False)

    def fresh(self) -> Lens:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        return twin

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else Wanted(rows=(call.q.shape[2] - 1, call.q.shape[2]))

    def weights(self, block: RowBlock) -> None:
        row = block.weights[:, :, -1]
        for name, keys in self.keys.items():
            at = (keys.to(row.device) - block.key_start)[:, None].expand(-1, row.shape[1], -1)
            inside = (at >= 0) & (at < row.shape[2])
            picked = row.gather(2, at.clamp(0, row.shape[2] - 1)) * inside
            self.found.setdefault(block.site.alias, {})[name] = picked.detach().float().cpu()

    def result(self) -> dict[str, dict[str, Tensor]]:
        """Return alias -> name -> float32 [B, H, n]."""
        return dict(self.found)
