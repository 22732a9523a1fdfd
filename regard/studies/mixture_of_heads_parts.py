"""The small model of the study of mixture of heads: one layer whose positions look back different ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention import MultiHeadAttention
from regard.attention.head_router import HeadRouter
from regard.attention.moh import MoHAttention, balance_loss
from regard.attention.select import top_mask
from regard.tasks.look_back import LookBack, LookBackText

DIM, HEADS, WIDTH, STD = 128, 8, 4, 0.5
BATCH, RATE, BETA = 32, 2e-3, 0.01
TASK = LookBack()


class ChanceRouter(HeadRouter):
    """Weights heads as it has learned, and chooses the routed ones by chance."""

    def _chosen(self, scores: Tensor) -> Tensor:
        return top_mask(torch.rand_like(scores), self.active).to(scores.dtype)


class Looker(nn.Module):
    """Symbol, place and task are embedded and summed; one layer of attention and an MLP."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(n, DIM) for n in (TASK.symbols, TASK.tasks, TASK.length))
        for table in self.embed:
            nn.init.normal_(table.weight, std=STD)  # type: ignore[arg-type]
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.read = nn.Linear(DIM, TASK.symbols)

    def forward(self, text: LookBackText) -> Tensor:
        """Return logits [B, T, symbols]."""
        x = self.attended(text)
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        logits: Tensor = self.read(self.norms[2](x))
        return logits

    def attended(self, text: LookBackText) -> Tensor:
        """Return what goes into the layer, [B, T, DIM]."""
        places = torch.arange(text.symbols.shape[1]).expand_as(text.symbols)
        given = (text.symbols, text.tasks, places)
        found: Tensor = torch.stack([e(n) for e, n in zip(self.embed, given, strict=True)]).sum(0)
        return found


def dense(heads: int = HEADS) -> MultiHeadAttention:
    return MultiHeadAttention(DIM, heads, head_dim=WIDTH, positions=None)


def routed(shared: int, active: int, chance: bool = False) -> MoHAttention:
    """A layer of 8 heads, whose routed ones are chosen by what was learned or by chance."""
    layer = MoHAttention(DIM, HEADS, shared, active, head_dim=WIDTH, sparse=False)
    if chance:
        layer.router = ChanceRouter(DIM, HEADS, shared, active)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense8": dense,
    "dense4": lambda: dense(4),
    "moh": lambda: routed(1, 3),
    "unbalanced": lambda: routed(1, 3),
    "chance": lambda: routed(1, 3, chance=True),
    "all_on": lambda: routed(1, 7),
}


def train_looker(
    model: Looker, steps: int, generator: torch.Generator, tick: Callable[[float], None], beta: float = BETA
) -> None:
    """Train a model; one with a router has its load balanced."""
    routers = [m for m in model.modules() if isinstance(m, HeadRouter)]
    balances = beta > 0 and any(m.kind != "random" for m in routers)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    model.train()
    for step in range(steps):
        text = TASK.batch(BATCH, generator)
        loss = F.cross_entropy(model(text).flatten(0, 1), text.answers.flatten())
        if balances:
            loss = loss + beta * balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick((step + 1) / steps)
    model.eval()


@torch.no_grad()
def accuracy(model: Looker, text: LookBackText) -> float:
    """Return the share of right answers, of positions that have one."""
    asked = text.answers >= 0
    return float((model(text).argmax(-1) == text.answers)[asked].float().mean())


@torch.no_grad()
def choices(model: Looker, text: LookBackText) -> dict[str, float]:
    """Return what the choice of heads tells of the task, in nats, and how evenly routed heads are used."""
    layer: Any = model.attention
    gates = layer.router(model.norms[0](model.attended(text)))
    on = (gates[..., layer.router.shared :] > 0).double()
    joint = torch.zeros(TASK.tasks, on.shape[-1], dtype=torch.float64)
    joint.index_add_(0, text.tasks.flatten(), on.flatten(0, 1))
    joint = joint / joint.sum()
    alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    seen = joint > 0
    use = joint.sum(0)
    return {
        "information": float((joint[seen] * (joint[seen] / alone[seen]).log()).sum()),
        "entropy": float(torch.special.entr(use).sum()) / math.log(len(use)),
    }


def convert(model: Looker, kind: Any, shared: int, active: int) -> Looker:
    """Return a trained dense model with routed heads; what it was trained to is copied."""
    made = Looker(MoHAttention.of(model.attention, shared, active, kind=kind, sparse=False))  # type: ignore[arg-type]
    told = {**made.state_dict(), **model.state_dict()}
    made.load_state_dict({name: told[name].clone() for name in made.state_dict()})
    return made.eval()
