"""Facts hidden in filler, and questions for some of them at the end: what is recalled, and from how far back?

    f f K3 v7 f f f K1 v2 f ... f f  ? K1 v2  ? K3 v7          f filler, K a key, v its value

Filler is a Markov chain of second order (`markov`), so that nearly all tokens of a text can be learned
without looking at a fact. Keys of a sequence are distinct; a question names one of them, and its value must
follow. Source: our choice, after the needle tests of Zhuang et al., 2025, arXiv 2502.07490, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from regard.errors import RegardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from regard.tasks.corpus import Corpus

ASKED = 3
"""Tokens of a question: the mark, the key, the value."""


class Sequences(NamedTuple):
    """Sequences of one batch.

    Attributes:
        tokens: int64 [B, T + 1].
        answers: where the values that were asked for stand at the end, int64 [B, questions].
        places: where the same values stand in the filler, int64 [B, questions].
        depths: of the facts asked for, from 0, the beginning, to 1, float32 [B, questions].
    """

    tokens: Tensor
    answers: Tensor
    places: Tensor
    depths: Tensor


@dataclass(frozen=True, kw_only=True)
class FillerFacts:
    """What a sequence holds.

    Attributes:
        length: T, tokens that are read; the last that is predicted is one more.
        symbols: of the filler, the first of the vocabulary.
        facts: in a sequence.
        keys, values: how many there are, after the symbols.
        questions: at the end of a sequence.
        sharpness: of the filler; see `markov`.
        text: symbols of filler that sequences are cut from.
        seed: of the filler.

    Example:
        >>> import torch
        >>> task = FillerFacts(length=30, symbols=8, facts=2, keys=4, values=4, questions=1, text=200)
        >>> made = task.batch(2, torch.Generator().manual_seed(0))
        >>> bool((made.tokens.gather(1, made.answers) == made.tokens.gather(1, made.places)).all())
        True
    """

    length: int = 256
    symbols: int = 60
    facts: int = 6
    keys: int = 40
    values: int = 40
    questions: int = 2
    sharpness: float = 0.05
    text: int = 60_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "symbols", "facts", "keys", "values", "questions", "text"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if not self.questions <= self.facts <= self.keys:
            raise RegardError(
                f"questions is {self.questions}, facts {self.facts} and keys {self.keys}; none may be more "
                "than the next."
            )
        if self.body < 2 * self.facts or self.text < 2 * self.body:
            raise RegardError(
                f"length is {self.length} and text {self.text}; {self.facts} facts and {self.questions} "
                f"questions need a length of {2 * self.facts + ASKED * self.questions - 1}, and a text "
                "twice as long."
            )

    @property
    def body(self) -> int:
        """Tokens before the questions."""
        return self.length + 1 - ASKED * self.questions

    @property
    def mark(self) -> int:
        """The token that begins a question."""
        return self.symbols + self.keys + self.values

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.mark + 1

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values of a sequence."""
        return 1 / self.facts

    def batch(self, count: int, generator: torch.Generator, *, held_out: bool = False) -> Sequences:
        """Return random sequences.

        Args:
            count: B.
            generator: what they are drawn with.
            held_out: whether filler is cut from the tenth of the text that is not trained on.
        """
        import torch

        corpus = _filler(self.symbols, self.text, self.sharpness, self.seed)
        text = corpus.held_out if held_out else corpus.train
        rows = torch.arange(count)[:, None]
        keys = torch.rand(count, self.keys, generator=generator).argsort(1)[:, : self.facts]
        values = torch.randint(self.values, (count, self.facts), generator=generator)
        slots = torch.rand(count, self.body // 2, generator=generator).argsort(1)[:, : self.facts]
        places = 2 * slots + 1
        body = torch.full((count, self.body), -1)
        body[rows, places - 1] = self.symbols + keys
        body[rows, places] = self.symbols + self.keys + values
        begins = torch.randint(len(text) - self.body, (count, 1), generator=generator)
        filler = text[begins + (body < 0).cumsum(1) - 1]
        body = torch.where(body < 0, filler, body)
        asked = torch.full((count, self.questions, ASKED), self.mark)
        asked[..., 1] = self.symbols + keys[:, : self.questions]
        asked[..., 2] = self.symbols + self.keys + values[:, : self.questions]
        answers = self.body + ASKED * torch.arange(self.questions) + ASKED - 1
        found = places[:, : self.questions]
        return Sequences(
            torch.cat([body, asked.flatten(1)], 1), answers.expand(count, -1), found,
            found.float() / (self.body - 1),
        )  # fmt: skip

    def right(self, logits: Tensor, made: Sequences) -> Tensor:
        """Return which questions were answered rightly, bool [B, questions].

        Args:
            logits: of `made.tokens[:, :-1]`, [B, T, V]; the largest is the answer.
        """
        before = (made.answers - 1)[..., None].expand(-1, -1, logits.shape[-1])
        said = logits.gather(1, before.to(logits.device)).argmax(-1).cpu()
        return said == made.tokens.gather(1, made.answers)


@lru_cache(maxsize=4)
def _filler(symbols: int, text: int, sharpness: float, seed: int) -> Corpus:
    from regard.tasks.markov import markov

    return markov(
        symbols=symbols, length=text, held_out=max(2 * text // 10, 1), sharpness=sharpness, seed=seed
    )
