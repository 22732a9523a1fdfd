"""The Bigram-Backcopy task: characters of which three call for the one before them.

    x_0 = <s>;   x_1 ~ unigram of characters that are no triggers
    x_{t+1} = x_{t-1}                    where x_t is a trigger
    x_{t+1} ~ bigram( . | x_t)           otherwise

Triggers are the 3 most frequent characters. Tables are counts of the characters of a text: packaged are
those of tiny Shakespeare (65 characters, triggers `t`, `e` and the blank), or any text can be given. The
vocabulary is the characters in order, then <s>, then <d>, which is never drawn.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo
et al., 2024, arXiv 2410.13835). Status: agrees with the official code (`BBM/data.py`, class `bbm`): one
numpy generator gives the same sequences.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError

if TYPE_CHECKING:
    from torch import Tensor

FRONT, UNUSED = "<s>", "<d>"


class Losses(NamedTuple):
    """Mean losses in nats: at triggers, and at the other positions."""

    trigger: float
    other: float


@dataclass(frozen=True, eq=False)
class BigramBackcopy:
    """Tables to draw sequences from.

    Attributes: symbols: what each token id stands for: the characters, then <s> and <d>. unigram: how often
    each occurs, float64 [V], sums to 1. following: what stands after each, float64 [V, V], rows sum to 1;
    after <s> the unigram, after <d> too. triggers: ids of the triggers, the most frequent last. length:
    tokens that are predicted in a sequence, which has one more.
    """

    symbols: tuple[str, ...]
    unigram: npt.NDArray[np.float64]
    following: npt.NDArray[np.float64]
    triggers: tuple[int, ...]
    length: int

    @property
    def vocabulary(self) -> int:
        return len(self.symbols)

    @property
    def front(self) -> int:
        """The id of <s>, which every sequence begins with."""
        return self.vocabulary - 2

    def draw(self, count: int, generator: np.random.Generator | int = 0) -> Tensor:
        """Return sequences, int64 [count, length + 1].

        Args:
            count: how many.
            generator: of numpy, which goes on where it was; or a seed.

        Raises:
            RegardError: for fewer than one.
        """
        import torch

        if count < 1:
            raise RegardError(f"count is {count}; draw one sequence at least.")
        rng = np.random.default_rng(generator) if isinstance(generator, int) else generator
        chance = rng.random((count, self.length))
        steps = self.following.cumsum(1)
        steps /= steps[:, -1:]
        calls = np.zeros(self.vocabulary, dtype=bool)
        calls[list(self.triggers)] = True
        tokens = np.full((count, self.length + 1), self.front)
        tokens[:, 1] = self._begun(chance[:, 0])
        for i in range(2, self.length + 1):
            last = tokens[:, i - 1]
            drawn = (steps[last] <= chance[:, i - 1, None]).sum(1)
            tokens[:, i] = np.where(calls[last], tokens[:, i - 2], drawn)
        return torch.from_numpy(tokens.astype(np.int64))

    def is_trigger(self, tokens: Tensor) -> Tensor:
        """Return which tokens are triggers, bool of the same shape."""
        import torch

        return torch.isin(tokens, torch.tensor(self.triggers, device=tokens.device))

    def oracle(self, tokens: Tensor) -> Losses:
        """Return the expected losses of who knows the tables, at the positions of tokens [B, T + 1].

        0 at triggers; elsewhere the entropy of what follows the token, in nats.
        """
        import torch

        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(self.following > 0, np.log(self.following), 0.0)
        entropy = -(self.following * logs).sum(1)
        entropy[self.front] = self._entropy_of_begun()
        given = tokens[:, :-1]
        return Losses(0.0, float(torch.from_numpy(entropy)[given][~self.is_trigger(given)].mean()))

    def losses(self, logits: Tensor, tokens: Tensor) -> Losses:
        """Return the losses of logits [B, T, V] on tokens [B, T + 1]; NaN where there is no such position."""
        import torch

        each = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
        )
        calls = self.is_trigger(tokens[:, :-1]).to(logits.device)
        return Losses(float(each[calls].mean()), float(each[~calls].mean()))

    def _no_triggers(self) -> npt.NDArray[np.float64]:
        left = self.unigram.copy()
        left[list(self.triggers)] = 0
        return left / left.sum()

    def _begun(self, chance: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        steps = self._no_triggers().cumsum()
        return np.searchsorted(steps / steps[-1], chance, side="right").astype(np.int64)

    def _entropy_of_begun(self) -> float:
        left = self._no_triggers()
        return float(-(left[left > 0] * np.log(left[left > 0])).sum())


@lru_cache(maxsize=8)
def bigram_backcopy(text: str | None = None, *, triggers: int = 3, length: int = 256) -> BigramBackcopy:
    """Return the Bigram-Backcopy task of a text's characters.

    Args:
        text: default tiny Shakespeare, whose table of pairs is packaged.
        triggers: how many of the most frequent characters are triggers.
        length: tokens predicted in a sequence, from 2.

    Raises:
        RegardError: where a text has no more characters than triggers, or an option is out of range.

    Example:
        >>> task = bigram_backcopy()
        >>> task.vocabulary, [task.symbols[i] for i in task.triggers]
        (67, ['t', 'e', ' '])
        >>> task.draw(2, 0).shape
        torch.Size([2, 257])
    """
    first, pairs = _packaged() if text is None else _counted(text)
    characters = sorted({first, *(c for pair in pairs for c in pair)})
    if not 1 <= triggers < len(characters):
        raise RegardError(
            f"triggers is {triggers}, and the text has {len(characters)} different characters; there must be "
            "one trigger at least, and one character that is none."
        )
    if length < 2:
        raise RegardError(f"length is {length}; it must be at least 2.")
    size, place = len(characters) + 2, {c: i for i, c in enumerate(characters)}
    following = np.zeros((size, size))
    for (before, after), count in pairs.items():
        following[place[before], place[after]] = count
    unigram = following.sum(0)
    unigram[place[first]] += 1
    following[following.sum(1) == 0] = unigram
    most = unigram[:-2].argsort()[len(characters) - triggers :]
    return BigramBackcopy(
        (*characters, FRONT, UNUSED), unigram / unigram.sum(), following / following.sum(1, keepdims=True),
        tuple(int(i) for i in most), length,
    )  # fmt: skip


def _counted(text: str) -> tuple[str, dict[tuple[str, str], int]]:
    """Return the first character of a text, and how often each pair stands in it."""
    if len(text) < 2:
        raise RegardError(f"the text has {len(text)} characters; pairs take two at least.")
    return text[0], dict(Counter(pairwise(text)))


def _packaged() -> tuple[str, dict[tuple[str, str], int]]:
    told = json.loads((resources.files("regard") / "data" / "shakespeare-pairs.json").read_text("utf-8"))
    return told["first"], {(a, b): n for a, row in told["following"].items() for b, n in row.items()}
