"""A pass key hidden in a novel, for language models: is a token far back still found?

    ... novel ... The pass key is 48213. Remember it: 48213 is the pass key. ... novel ...
    What is the pass key? The pass key is                                            -> 48213

Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 4.2, whose filler is three sentences said over
and over. Status: our choice of words and filler: real text, for repetition makes it easier.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError

NOVEL = "sherlock-holmes"
TELLS = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
ASKS = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """A prompt of some number of tokens, with a key of five digits in it.

    Attributes:
        length: tokens of the prompt.
        depth: where the key stands: 0 at the beginning, 1 at the end.
        seed: draws the key, and where in the novel the filler begins.

    Example:
        >>> Passkey(length=1000, depth=0.5, seed=0).key
        '60494'
    """

    length: int = 1000
    depth: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise RegardError(f"length is {self.length!r}; it must be a number of tokens.")
        if not 0 <= self.depth <= 1:
            raise RegardError(f"depth is {self.depth}; it must be from 0, the beginning, to 1, the end.")

    @property
    def key(self) -> str:
        return str(random.Random(self.seed).randrange(10_000, 100_000))

    def ids(self, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Return the prompt, int64 [1, length], and the key's tokens, int64 [1, A].

        Args:
            tokenizer: of transformers.

        Raises:
            RegardError: where the length is too small for key and question, or too great for the novel.
        """

        def read(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        told, asked = read(TELLS.format(key=self.key)), read(ASKS)
        room = self.length - len(told) - len(asked)
        if room < 0:
            raise RegardError(f"length is {self.length}; the key and the question take {self.length - room}.")
        filler = self._filler(room, read)
        cut = round(self.depth * room)
        prompt = [*filler[:cut], *told, *filler[cut:], *asked]
        return torch.tensor([prompt]), torch.tensor([read(f" {self.key}")])

    def _filler(self, count: int, read: Any) -> list[int]:
        words = resources.files("regard").joinpath(f"data/{NOVEL}.txt").read_text(encoding="utf-8").split()
        most = len(words) - count - 1
        if most < 0:
            raise RegardError(f"length is {self.length}; the novel has {len(words)} words.")
        start = random.Random(f"filler {self.seed}").randrange(most + 1)
        found: list[int] = read(" ".join(words[start : start + count + 1]))
        return found[:count]


def log_probability(model: Any, prompt: Tensor, answer: Tensor) -> tuple[float, bool]:
    """Return the mean log-probability of an answer's tokens, and whether each is the likeliest.

    Args:
        model: a causal language model of transformers.
        prompt: int64 [1, T].
        answer: int64 [1, A].
    """
    ids = torch.cat([prompt, answer[:, :-1]], 1).to(model.device)
    with torch.no_grad():
        logits = model(ids, logits_to_keep=answer.shape[1]).logits.float()
    wanted = answer.to(logits.device)
    found = logits.log_softmax(-1).gather(-1, wanted[..., None])
    return float(found.mean()), bool((logits.argmax(-1) == wanted).all())
