"""Pairs of prompts that differ in one thing, with the tokens that tell whether a model noticed it.

A task of this kind is a function `task(tokenizer, count, seed=...)` that returns `Prompts`. Words that the
tokenizer splits cannot stand where one token is needed: they are left out, and `Prompts.left_out` names them.

    logit         mean logit of the correct tokens - mean logit of the wrong ones
    probability   their summed probabilities instead

Status: our choice of form; each task names its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from regard.errors import RegardError, ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("logit", "probability")
NAMED = 5


class Written(NamedTuple):
    """A prompt before it is tokenized.

    Attributes:
        clean, corrupt: the two texts.
        correct, wrong: token ids that may follow the clean one.
        places: name -> how many characters of the clean text there are up to the end of what is named.
    """

    clean: str
    corrupt: str
    correct: tuple[int, ...]
    wrong: tuple[int, ...]
    places: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class PromptPair:
    """A clean prompt and its corrupt counterpart.

    Attributes:
        clean, corrupt: the texts.
        clean_ids, corrupt_ids: their tokens, int64 [T]; T may differ between the two.
        correct, wrong: token ids that may follow the clean one.
        places: name -> position in the clean tokens.
    """

    clean: str
    corrupt: str
    clean_ids: Tensor
    corrupt_ids: Tensor
    correct: tuple[int, ...]
    wrong: tuple[int, ...]
    places: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a task made.

    Attributes:
        task: its name.
        pairs: the prompts.
        metric: how an answer is scored, `logit` or `probability`.
        left_out: words that the tokenizer splits, so that no prompt has them.
    """

    task: str
    pairs: tuple[PromptPair, ...]
    metric: str = "logit"
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"<Prompts {self.task}: {self.said()}>"

    def said(self) -> str:
        """Return in words how many prompts there are, and what was left out."""
        if not self.left_out:
            return f"{len(self)} prompts"
        some = ", ".join(self.left_out[:NAMED]) + (", ..." if len(self.left_out) > NAMED else "")
        return f"{len(self)} prompts; {len(self.left_out)} words are not one token and were left out ({some})"

    def ids(self, side: str = "clean") -> Tensor:
        """Return the tokens of one side, int64 [N, T].

        Args:
            side: `clean` or `corrupt`.

        Raises:
            ShapeMismatch: where the prompts are of several lengths.
        """
        import torch

        rows = [getattr(pair, f"{side}_ids") for pair in self.pairs]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ShapeMismatch(
                f"the {side} prompts have {lengths[0]} to {lengths[-1]} tokens; take those of one length by "
                "`by_length()`, or pad them."
            )
        return torch.stack(rows)

    def places(self, name: str) -> Tensor:
        """Return where something named is in the clean prompts, int64 [N].

        Raises:
            RegardError: for a name that the task does not know.
        """
        import torch

        if name not in self.pairs[0].places:
            raise RegardError(f"{self.task} has no place {name!r}; it has {', '.join(self.pairs[0].places)}.")
        return torch.tensor([pair.places[name] for pair in self.pairs])

    def answers(self) -> Tensor:
        """Return the ids of all correct and wrong tokens, each once, int64 [K].

        `score` reads the logits of no others where the metric is `logit`.
        """
        import torch

        return torch.tensor(sorted({token for pair in self.pairs for token in pair.correct + pair.wrong}))

    def by_length(self) -> list[Prompts]:
        """Return the prompts parted by how many tokens the two sides have, the largest part first."""
        parts: dict[tuple[int, int], list[PromptPair]] = {}
        for pair in self.pairs:
            parts.setdefault((len(pair.clean_ids), len(pair.corrupt_ids)), []).append(pair)
        return [
            Prompts(self.task, tuple(part), self.metric, self.left_out)
            for part in sorted(parts.values(), key=len, reverse=True)
        ]

    def require_aligned(self) -> None:
        """Refuse pairs whose sides have different lengths, so that positions do not answer to each other.

        Raises:
            ShapeMismatch: naming the first such pair.
        """
        for number, pair in enumerate(self.pairs):
            if len(pair.clean_ids) != len(pair.corrupt_ids):
                raise ShapeMismatch(
                    f"prompt {number} of {self.task} has {len(pair.clean_ids)} tokens and its corrupt side "
                    f"{len(pair.corrupt_ids)}, so their positions do not answer to each other."
                )

    def score(self, logits: Tensor) -> Tensor:
        """Return the metric of each prompt, float32 [N].

        Args:
            logits: at the last position of each, [N, V].

        Raises:
            ShapeMismatch: for logits of another number of prompts.
        """
        import torch

        if logits.ndim != 2 or len(logits) != len(self):
            raise ShapeMismatch(f"logits are {list(logits.shape)}; they must be [{len(self)}, vocabulary].")
        rows = logits.float()
        if self.metric == "probability":
            rows = rows.softmax(-1)
        found = []
        for row, pair in zip(rows, self.pairs, strict=True):
            right, wrong = row[list(pair.correct)], row[list(pair.wrong)]
            if self.metric == "probability":
                found.append(right.sum() - wrong.sum())
            else:
                found.append(right.mean() - wrong.mean())
        return torch.stack(found)

    def accuracy(self, logits: Tensor) -> Tensor:
        """Return for each prompt whether its best correct token is above all wrong ones, bool [N]."""
        import torch

        best = [
            row[list(pair.correct)].max() > row[list(pair.wrong)].max()
            for row, pair in zip(logits, self.pairs, strict=True)
        ]
        return torch.stack(best)


def gather_prompts(
    task: str, tokenizer: Any, written: Iterable[Written], metric: str = "logit", left_out: Sequence[str] = ()
) -> Prompts:
    """Tokenize the prompts of a task.

    Raises:
        RegardError: where a text does not tokenize the same when it is cut after a named place.
    """
    pairs = tuple(_pair(tokenizer, each) for each in written)
    return Prompts(task, pairs, metric, tuple(left_out))


def _pair(tokenizer: Any, given: Written) -> PromptPair:
    import torch

    clean, corrupt = tokenizer(given.clean)["input_ids"], tokenizer(given.corrupt)["input_ids"]
    places = {name: _place(tokenizer, given.clean, end, clean) for name, end in given.places.items()}
    ids = torch.tensor(clean), torch.tensor(corrupt)
    return PromptPair(given.clean, given.corrupt, *ids, given.correct, given.wrong, places)


def _place(tokenizer: Any, text: str, end: int, ids: list[int]) -> int:
    """Return the position of the token that ends after so many characters."""
    front = tokenizer(text[:end])["input_ids"]
    if len(front) > len(ids) or front != ids[: len(front)]:
        raise RegardError(f"the tokenizer joins {text[:end][-12:]!r} with what follows it in {text!r}.")
    return len(front) - 1


def single_token(tokenizer: Any, word: str) -> int | None:
    """Return the id of a word that is one token, its leading space included; None where it is several.

    Example:
        >>> single_token(tokenizer, " Mary")                                    # doctest: +SKIP
        6759
    """
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None


def single_tokens(
    tokenizer: Any, words: Iterable[str], kind: str, least: int
) -> tuple[dict[str, int], list[str]]:
    """Return the words that are one token after a space, with their ids, and those that are not.

    Args:
        kind: what they are, for the error: `names`.
        least: how many a task needs.

    Raises:
        RegardError: where fewer are left.
    """
    kept: dict[str, int] = {}
    left_out = []
    for word in words:
        found = single_token(tokenizer, f" {word}")
        if found is None:
            left_out.append(word)
        else:
            kept[word] = found
    if len(kept) < least:
        raise RegardError(
            f"the tokenizer makes one token of {len(kept)} of {len(kept) + len(left_out)} {kind} and the "
            f"task needs {least}; give {kind} of your own that are one token."
        )
    return kept, left_out


def check_count(count: int, least: int = 1) -> None:
    """Refuse a number of prompts that is none.

    Raises:
        RegardError: for anything but a whole number from `least`.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise RegardError(f"count is {count!r}; it must be a whole number from {least}.")
