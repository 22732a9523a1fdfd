"""The state of neural memories: weights, momentum, and the weights at which gradients are taken now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.memory.network import Weights
from regard.errors import RegardError, ShapeMismatch

LIMIT = 1e6


@dataclass(frozen=True, eq=False)
class Memory:
    """A batch of memories somewhere in their sequences.

    Attributes:
        seen: how many positions each has been written by, int64 [B].
        start: the weights at the start of the present chunk, one tensor a layer, [B, H, in, out].
        weights: the weights now.
        surprise: the momentum, as `weights`; empty where there is none.
    """

    seen: Tensor
    start: Weights
    weights: Weights
    surprise: Weights

    @classmethod
    def fresh(cls, weights: Weights, batch: int, momentum: bool) -> Memory:
        """Return memories that have seen nothing.

        Args:
            weights: one tensor a layer, [H, in, out].
        """
        own = tuple(w.expand(batch, *w.shape) for w in weights)
        seen = torch.zeros(batch, dtype=torch.int64, device=own[0].device)
        return cls(seen, own, own, tuple(torch.zeros_like(w) for w in own) if momentum else ())

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], layers: int) -> Memory:
        """Return what `tensors()` took apart."""
        seen, *rest = tensors
        start, weights, surprise = (tuple(rest[i : i + layers]) for i in (0, layers, 2 * layers))
        return cls(seen, start, weights, surprise)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, batch first: seen, start, weights, surprise."""
        return (self.seen, *self.start, *self.weights, *self.surprise)

    def check(self, batch: int, heads: int) -> None:
        """Refuse memories of another batch or number of heads."""
        found = [list(w.shape[:2]) for w in self.weights]
        if any(shape != [batch, heads] for shape in found) or self.seen.shape != (batch,):
            raise ShapeMismatch(
                f"the state is of [batch, heads] {found[0]}, and the input of {[batch, heads]}; a state goes "
                "on with the sequences that it came from."
            )


def refuse_diverged(peaks: list[Tensor], positions: list[int]) -> None:
    """Raise where a weight is not finite or above `LIMIT`.

    Args:
        peaks: the largest weight of every layer [L], one tensor for each of `positions`.
        positions: after how many positions of this call.
    """
    if not peaks:
        return
    found = torch.stack(peaks)
    bad = ~(found <= LIMIT)
    if bool(bad.any()):
        place, layer = (int(i) for i in bad.nonzero()[0])
        raise RegardError(
            f"the memory diverged: a weight of its layer {layer} reached {float(found[place, layer]):.3g} "
            f"after {positions[place]} positions of this call. With gradients taken at the start of a chunk "
            "of b positions, steps theta above 1/b are not safe; take smaller steps or a smaller chunk."
        )
