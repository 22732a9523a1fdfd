"""Bigram-backcopy over two packaged novels, as a text to train on; `bigram_backcopy` is the paper's own.

    after a trigger at i - 1:  token i = token i - 2
    after any other:           token i drawn as the packaged novels go on after token i - 1

A head that copies has nothing to do at most positions, and so needs somewhere to look: where every sequence
begins with the same token, an attention sink forms there within some hundred steps.

Source: Guo et al., 2024, arXiv 2410.13835, the bigram-backcopy task. Status: partly our choice (the text, its
48 most frequent characters and 3 triggers; theirs are Shakespeare's, see `regard.tasks.character_pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from regard.errors import RegardError

if TYPE_CHECKING:
    from torch import Tensor

    from regard.tasks.corpus import Corpus

SYMBOLS, TRIGGERS, ROWS = 48, 3, 256


@dataclass(frozen=True)
class Backcopy:
    """Sequences of one seed.

    Attributes:
        corpus: tokens to train on and held out; its vocabulary has one token more than the text.
        front: that token, never in the text, for the front of a sequence.
        triggers: the tokens that call for the one before them.
    """

    corpus: Corpus
    front: int
    triggers: tuple[int, ...]

    def opened(self, tokens: Tensor) -> Tensor:
        """Return tokens [B, T] with the first of each sequence replaced by `front`."""
        opened = tokens.clone()
        opened[:, 0] = self.front
        return opened


@lru_cache(maxsize=4)
def backcopy(length: int = 200_000, seed: int = 0) -> Backcopy:
    """Return text to train on and a tenth as much held out.

    Args:
        length: tokens to train on, from 10,240.
        seed: of what is drawn.

    Raises:
        RegardError: for a length under that.

    Example:
        >>> made = backcopy(20480)
        >>> made.corpus.vocabulary, made.front, len(made.corpus.train)
        (49, 48, 20480)
    """
    import torch

    from regard.tasks.corpus import Corpus, packaged

    if length < 40 * ROWS:
        raise RegardError(f"length is {length}; there must be {40 * ROWS} tokens to train on.")
    ids = packaged(256).train
    counts = torch.bincount(ids)
    kept = counts.topk(SYMBOLS).indices.sort().values
    place = torch.full((len(counts),), -1)
    place[kept] = torch.arange(SYMBOLS)
    pairs = torch.stack([place[ids[:-1]], place[ids[1:]]])
    pairs = pairs[:, (pairs >= 0).all(0)]
    following = torch.full((SYMBOLS, SYMBOLS), 0.01)
    following.index_put_((pairs[0], pairs[1]), torch.ones(pairs.shape[1]), accumulate=True)
    triggers = place[counts.topk(TRIGGERS + 1).indices[1:]]  # the first is the blank
    generator = torch.Generator().manual_seed(seed)
    columns = -(-length // ROWS), -(-length // 10 // ROWS)
    train, held_out = (_drawn(following, triggers, n, generator) for n in columns)
    corpus = Corpus(train[:length], held_out[: length // 10], SYMBOLS + 1)
    return Backcopy(corpus, SYMBOLS, tuple(triggers.tolist()))


def _drawn(following: Tensor, triggers: Tensor, columns: int, generator: object) -> Tensor:
    """Return ROWS texts of so many tokens, one after the other."""
    import torch

    calls = torch.zeros(SYMBOLS, dtype=torch.bool)
    calls[triggers] = True
    tokens = torch.randint(SYMBOLS, (ROWS, max(2, columns)), generator=generator)  # type: ignore[call-overload]
    for i in range(2, tokens.shape[1]):
        drawn = torch.multinomial(following[tokens[:, i - 1]], 1, generator=generator)[:, 0]  # type: ignore[arg-type]
        tokens[:, i] = torch.where(calls[tokens[:, i - 1]], tokens[:, i - 2], drawn)
    return tokens.flatten()
