"""The small models of the study of landmark attention: one that finds tagged blocks, and one of language."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention import Landmark, LandmarkMemory
from regard.attention.mechanism import Mechanism
from regard.attention.positions import Rotary
from regard.attention.registry import Spec
from regard.attention.select import top_k
from regard.tasks.tagged import QUESTION, Tagged, TaggedText

DIM, STD, NOISE = 64, 0.5, 0.02
AWAY = 3.0


class FinderLayer(nn.Module):
    """One head of landmark attention, without an MLP; projections start near multiples of the identity."""

    def __init__(self, block: int, rotary: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.queries, self.keys, self.values, self.output = (_near(x) for x in (1.0, 1.0, 1.0, 0.5))
        self.rotary = Rotary() if rotary else None
        self.mechanism: Mechanism = Landmark(block).build()
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h)[:, None] for f in (self.queries, self.keys, self.values))
        if self.rotary is not None:
            at = torch.arange(x.shape[1])[None]
            q, k = self.rotary(q, at), self.rotary(k, at)
        self.seen = q.detach(), k.detach()
        out: Tensor = x + self.output(self.mechanism(q, k, v)[:, 0])
        return out


class Finder(nn.Module):
    """Two layers of one head, without positions or with rotary ones, over sums of embeddings; 0 adds nothing.

    Queries start turned away from what marks a question, so that questions do not read each other.
    """

    def __init__(self, task: Tagged, rotary: bool = False) -> None:
        super().__init__()
        sizes = (task.tags + 1, task.block, task.symbols + 1, QUESTION + 1)
        tables = [nn.Embedding(n, DIM, padding_idx=0) for n in sizes]
        for table in tables:
            table.weight.data = STD * torch.randn_like(table.weight)
            table.weight.data[0] = 0
        self.embed = nn.ModuleList(tables)
        self.task = task
        layers = [FinderLayer(task.block, rotary) for _ in range(2)]
        question = F.normalize(tables[3].weight.data[QUESTION], dim=0)
        for layer in layers:
            layer.queries.weight.data -= AWAY * torch.outer(question, question)
        self.layers = nn.ModuleList(layers)
        self.read = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, task.symbols))

    def forward(self, text: TaggedText) -> Tensor:
        """Return logits [B, Q, symbols] of the questions."""
        x = torch.stack([e(n) for e, n in zip(self.embed, text[:4], strict=True)]).sum(0)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.read(x[:, -text.answers.shape[1] :])
        return logits

    def loss(self, text: TaggedText) -> Tensor:
        return F.cross_entropy(self(text).flatten(0, 1), text.answers.flatten() - 1)

    def accuracy(self, text: TaggedText) -> float:
        return float((self(text).argmax(-1) == text.answers - 1).float().mean())

    def found(self, text: TaggedText, count: int) -> float:
        """Return in how many questions of the last call the block asked for has one of the best landmarks."""
        q, k = self.layers[-1].seen  # type: ignore[misc]
        asked, block = text.answers.shape[1], self.task.block
        marks = k[:, 0, : k.shape[2] - asked].unflatten(1, (-1, block))[:, :, -1]
        chosen = top_k(q[:, 0, -asked:] @ marks.transpose(1, 2), count)
        return float((chosen == text.places[..., None]).any(-1).float().mean())


@contextmanager
def attending(model: nn.Module, spec: Spec) -> Iterator[None]:
    """Let all layers of a model attend by another mechanism for a while."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "mechanism", None), Mechanism)]
    before = [layer.mechanism for layer in layers]
    try:
        for layer in layers:
            layer.mechanism = spec.build()
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.mechanism = old


def memory(block: int, top: int, choose: str = "landmark", rotary: bool = False, **options: Any) -> Spec:
    """Return how a model reads few blocks: of rotary positions anew, else as they are."""
    places: dict[str, Any] = {"rotary": 10000.0} if rotary else {"positions": "true"}
    return LandmarkMemory(block=block, top_k=top, choose=choose, **places, **options)


def _near(scale: float) -> nn.Linear:
    made = nn.Linear(DIM, DIM, bias=False)
    made.weight.data = scale * torch.eye(DIM) + NOISE * torch.randn(DIM, DIM)
    return made
