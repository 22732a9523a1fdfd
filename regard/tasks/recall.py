"""Associative recall: pairs of a key and a value are shown, then keys are asked for.

    k1 v1 k2 v2 ... kP vP  ..  k7 v7  ..  k2 v2  ..          a key that is asked, and what must follow it

Every pair is asked once, after all have been shown. What stands between is a filler token. Early places are
likelier, by a power law over the distance, as in the data of Zoology.

Source: Arora et al., 2023, arXiv 2312.04927, section 3 (multi-query associative recall), with the choices of
Sieber et al., 2024, arXiv 2405.15731, section 5: keys from the lower half of the vocabulary, values from the
upper, power 0.01. Status: partly our choice; official code fills gaps with random tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regard.errors import RegardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100
FILLER = 0


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What recall is asked for.

    Attributes:
        pairs: number of keys, each with a value, from 1.
        length: tokens in a sequence; at least 4 times `pairs`.
        symbols: size of the vocabulary, the filler included; half of the others are keys.
        power: how places of questions are drawn: 1 is uniform, less puts them early.

    Example:
        >>> import torch
        >>> task = Recall(pairs=2, length=12, symbols=9)
        >>> tokens, targets = task.batch(1, torch.Generator().manual_seed(0))
        >>> tokens.tolist()
        [[3, 6, 2, 8, 3, 6, 2, 8, 0, 0, 0, 0]]
        >>> targets.tolist()
        [[-100, -100, -100, -100, 6, -100, 8, -100, -100, -100, -100, -100]]
    """

    pairs: int
    length: int
    symbols: int
    power: float = 0.01

    def __post_init__(self) -> None:
        for name in ("pairs", "length", "symbols"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.length < 4 * self.pairs:
            raise RegardError(
                f"length is {self.length}; {self.pairs} pairs, shown and asked, need {4 * self.pairs}."
            )
        if self.keys < self.pairs:
            raise RegardError(
                f"symbols is {self.symbols}, which makes {self.keys} keys; {self.pairs} pairs need as many."
            )
        if not 0 < self.power <= 1:
            raise RegardError(f"power is {self.power}; it must be above 0 and at most 1.")

    @property
    def keys(self) -> int:
        """How many symbols are keys: 1 to this."""
        return (self.symbols - 1) // 2

    @property
    def values(self) -> int:
        """How many symbols are values, those after the keys."""
        return self.symbols - 1 - self.keys

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all values."""
        return 1 / self.values

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random sequences.

        Args:
            count: number of sequences, B.
            generator: what they are drawn with.

        Returns:
            tokens int64 [B, length], and targets int64 [B, length]: the value at every key that is asked,
            `IGNORE` elsewhere.
        """
        import torch

        pairs, slots = self.pairs, (self.length - 2 * self.pairs) // 2
        keys = 1 + _distinct(torch.ones(self.keys), count, pairs, generator)
        values = torch.randint(1 + self.keys, self.symbols, (count, pairs), generator=generator)
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        order = torch.rand(count, pairs, generator=generator).argsort(1)
        places = 2 * pairs + 2 * _distinct(weights, count, pairs, generator).gather(1, order)
        tokens = torch.full((count, self.length), FILLER)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
        return tokens, torch.full_like(tokens, IGNORE).scatter_(1, places, values)

    def accuracy(self, logits: Tensor, targets: Tensor) -> float:
        """Return the share of asked keys whose value has the largest logit.

        Args:
            logits: [B, length, symbols].
            targets: as `batch` returned them.
        """
        asked = targets != IGNORE
        return float((logits.argmax(-1) == targets)[asked].float().mean())


def _distinct(weights: Tensor, count: int, number: int, generator: torch.Generator) -> Tensor:
    """Indices drawn without replacement, [count, number]."""
    import torch

    return torch.multinomial(weights.expand(count, -1), number, generator=generator)
