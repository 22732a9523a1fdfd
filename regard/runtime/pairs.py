"""Pairs of prompts that differ in one thing: where they differ, and running both sides of many.

The sides are called clean and corrupt, and are whatever is compared: with and without the fact, positive
and negative, with and without an image, two domains, or the same prompt on two checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.protocol import Stage
from regard.runtime.recorded import logits_of
from regard.runtime.row_patch import uncached
from regard.runtime.session import Session
from regard.runtime.tokens import token_id

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two inputs of a model that differ in one thing, and the tokens that tell whether it matters.

    Attributes:
        clean, corrupt: keyword arguments of a forward of a single sequence, `input_ids` [1, S] among
            them; S may differ between the two.
        correct, wrong: token ids that continue the clean, and the corrupt, prompt.

    Raises:
        ShapeMismatch: for input_ids that are not of a single sequence.

    Example:
        >>> clean, corrupt = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[4, 9, 6, 8]])
        >>> pair = Pair({"input_ids": clean}, {"input_ids": corrupt})
        >>> pair.differing(), pair.first_difference()
        ([1, 3], 1)
    """

    clean: Mapping[str, Any]
    corrupt: Mapping[str, Any]
    correct: int | None = None
    wrong: int | None = None

    def __post_init__(self) -> None:
        for name, inputs in (("clean", self.clean), ("corrupt", self.corrupt)):
            ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
            if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
                found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise ShapeMismatch(f"{name} has input_ids {found}; a Pair takes single sequences, [1, S].")

    @classmethod
    def from_text(
        cls,
        tokenizer: Any,
        clean: str,
        corrupt: str,
        correct: str | int | None = None,
        wrong: str | int | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> Pair:
        """Tokenize two prompts and the words that continue them.

        Args:
            tokenizer: of transformers.
            clean, corrupt: the prompts.
            correct, wrong: a word that is one token, its leading space included, or a token id.
            add_special_tokens: whether the tokenizer adds its own; not to a chat template's text.

        Raises:
            RegardError: for a word that is not one token.
        """
        sides = [
            dict(tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens))
            for text in (clean, corrupt)
        ]
        return cls(sides[0], sides[1], token_id(tokenizer, correct), token_id(tokenizer, wrong))

    @property
    def lengths(self) -> tuple[int, int]:
        """How many tokens the two sides have."""
        return self.clean["input_ids"].shape[1], self.corrupt["input_ids"].shape[1]

    def first_difference(self) -> int:
        """Return the first position at which the tokens differ; before it the two are the same.

        Where one side begins with the whole other one, that is where the longer goes on.

        Raises:
            RegardError: where they do not differ.
        """
        first, second = self._ids()
        common = min(self.lengths)
        where = (first[:common] != second[:common]).nonzero()
        if len(where):
            return int(where[0])
        if len(first) == len(second):
            raise RegardError(f"The two sides of the pair have the same {common} tokens.")
        return common

    def differing(self) -> list[int]:
        """Return all positions at which the tokens differ.

        Raises:
            ShapeMismatch: where the sides differ in length, and so no position answers to another.
        """
        self.require_aligned()
        first, second = self._ids()
        return (first != second).nonzero()[:, 0].tolist()

    def require_aligned(self) -> None:
        """Refuse sides of different lengths, as where a value is patched from one into the other.

        Raises:
            ShapeMismatch: saying both lengths, and where the tokens begin to differ.
        """
        clean, corrupt = self.lengths
        if clean != corrupt:
            raise ShapeMismatch(
                f"The clean side has {clean} tokens and the corrupt side {corrupt} (they differ from token "
                f"{self.first_difference()} on), so their positions do not answer to each other; choose "
                "words of as many tokens."
            )

    def _ids(self) -> tuple[Tensor, Tensor]:
        return self.clean["input_ids"][0].cpu(), self.corrupt["input_ids"][0].cpu()


Metric = Callable[[Tensor, Sequence[Pair]], Tensor]


@dataclass(frozen=True, eq=False)
class PairResults:
    """What `run_pairs` found.

    Attributes:
        clean, corrupt: the session of each side; index one with a lens' class or name for its result.
        clean_metric, corrupt_metric: the metric of each pair, float32 [N] on the CPU, or None where there
            was none.
    """

    clean: Session
    corrupt: Session
    clean_metric: Tensor | None
    corrupt_metric: Tensor | None

    @property
    def difference(self) -> Tensor:
        """How much higher the metric is on the clean side, [N].

        Raises:
            RegardError: where there was no metric.
        """
        if self.clean_metric is None or self.corrupt_metric is None:
            raise RegardError("There is no metric: give the pairs correct and wrong, or run_pairs a metric=.")
        return self.clean_metric - self.corrupt_metric


def logit_difference(
    logits: Tensor,
    correct: int | Sequence[int] | Tensor,
    wrong: int | Sequence[int] | Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the logit of one token minus that of another, at the last real position.

    Args:
        logits: [B, T, V], or [B, V] of one position.
        correct, wrong: token ids, one for all or [B].
        attention_mask: [B, T], needed where the right side is padded; default none is.

    Returns:
        float32 [B].

    Raises:
        ShapeMismatch: where there is not one id a sequence.
        RegardError: for an id that the logits do not have.

    Example:
        >>> logit_difference(torch.tensor([[1.0, 5.0, 2.0], [0.0, 1.0, 4.0]]), [1, 2], 0)
        tensor([4., 4.])
    """
    rows = last_logits(logits, attention_mask).float()
    found = []
    for name, given in (("correct", correct), ("wrong", wrong)):
        ids = torch.as_tensor(given, device=rows.device).long()
        if ids.ndim > 1 or (ids.ndim and len(ids) != len(rows)):
            raise ShapeMismatch(f"{name} has shape {tuple(ids.shape)} for logits of {len(rows)} sequences.")
        if int(ids.min()) < 0 or int(ids.max()) >= rows.shape[1]:
            raise RegardError(f"{name} has a token id that logits over {rows.shape[1]} tokens do not have.")
        found.append(rows.gather(1, ids.expand(len(rows))[:, None])[:, 0])
    return found[0] - found[1]


def last_logits(logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the logits [B, V] at the last real position of each sequence, of logits [B, T, V] or [B, V].

    Args:
        logits: where T is less than the mask is long, they are of the last T positions.
        attention_mask: [B, S]; default none is padded on the right.
    """
    if logits.ndim == 2 or attention_mask is None:
        return logits if logits.ndim == 2 else logits[:, -1]
    mask = attention_mask.to(logits.device).bool()
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).amax(1) - mask.shape[1] + logits.shape[1]
    if mask.shape[0] != len(logits) or int(last.min()) < 0:
        raise ShapeMismatch(
            f"logits {tuple(logits.shape)} do not hold the last real positions of a mask {tuple(mask.shape)}."
        )
    return logits[torch.arange(len(logits), device=logits.device), last]


def run_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *stages: Stage,
    batch_size: int = 8,
    metric: Metric | None = None,
    against: nn.Module | None = None,
) -> PairResults:
    """Run both sides of many pairs, in padded batches and without gradients, each under its own lenses.

    Models that generate are padded on the left, others on the right; positions follow the padding.

    Args:
        model: runs the clean side, and the corrupt one where there is no `against`.
        pairs: what to run.
        stages: lenses, and edits that apply on both sides; each side has lenses of its own.
        batch_size: how many sequences share a forward.
        metric: takes the logits [b, V] at the last real positions and the b pairs; returns [b]. Default:
            the logit difference of `correct` and `wrong`, where the pairs have them.
        against: another model for the corrupt side, such as a second checkpoint.

    Raises:
        RegardError: for no pairs, and where only some of them have `correct` and `wrong`.
        ShapeMismatch: for inputs that cannot stand in one batch, and a metric of another shape.
        UnsupportedModel: for an encoder-decoder.

    Example:
        >>> found = run_pairs(model, pairs, Entropy())                  # doctest: +SKIP
        >>> found.clean[Entropy].table, found.difference.mean()         # doctest: +SKIP
    """
    pairs = list(pairs)
    if not pairs or not isinstance(batch_size, int) or batch_size < 1:
        raise RegardError(f"run_pairs got {len(pairs)} pairs and {batch_size=}; both must be at least 1.")
    if metric is None and _have_answers(pairs):
        metric = _answer_difference
    clean = _run_side(model, [pair.clean for pair in pairs], pairs, stages, batch_size, metric)
    corrupt = _run_side(against or model, [pair.corrupt for pair in pairs], pairs, stages, batch_size, metric)
    return PairResults(clean[0], corrupt[0], clean[1], corrupt[1])


def _run_side(
    model: nn.Module,
    items: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    stages: Sequence[Stage],
    size: int,
    metric: Metric | None,
) -> tuple[Session, Tensor | None]:
    session = Session(model, list(stages))
    found = []
    with torch.no_grad(), session:
        for begin in range(0, len(items), size):
            part = slice(begin, begin + size)
            logits = _forward(session.root, items[part], metric is not None)
            if metric is not None:
                found.append(_measured(metric(logits, pairs[part]), len(pairs[part])))
    return session, torch.cat(found) if found else None


def padded(items: Sequence[Mapping[str, Any]], side: Side = "left", pad: int = 0) -> dict[str, Any]:
    """Put the inputs of single sequences into one batch.

    Args:
        items: each with `input_ids` [1, S_i]. What else is [1, S_i] is padded with 0; other tensors, such
            as images, are joined along their first dimension, of the items that have them.
        side: where the padding goes.
        pad: token id in the padding.

    Returns:
        The batch, with an `attention_mask` [B, S].

    Raises:
        ShapeMismatch: for tensors that cannot be joined, or that some sequences lack.
        RegardError: for options that differ between the items.
    """
    lengths = [item["input_ids"].shape[1] for item in items]
    items = [{"attention_mask": torch.ones_like(item["input_ids"]), **item} for item in items]
    batch: dict[str, Any] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        values = [(item[name], length) for item, length in zip(items, lengths, strict=True) if name in item]
        if not all(isinstance(value, Tensor) for value, _ in values):
            if len(values) < len(items) or any(value != values[0][0] for value, _ in values):
                raise RegardError(f"{name} differs between the inputs of a batch: {[v for v, _ in values]}.")
            batch[name] = values[0][0]
            continue
        if all(value.shape == (1, length) for value, length in values):
            if len(values) < len(items):
                raise ShapeMismatch(
                    f"{len(values)} of {len(items)} inputs have {name}; all need it, or none."
                )
            filler = pad if name == "input_ids" else 0
            values = [(_pad(value, max(lengths), side, filler), length) for value, length in values]
        batch[name] = _joined(name, [value for value, _ in values])
    return batch


def _pad(x: Tensor, length: int, side: Side, filler: int) -> Tensor:
    missing = length - x.shape[1]
    return nn.functional.pad(x, (missing, 0) if side == "left" else (0, missing), value=filler)


def _joined(name: str, values: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat(list(values))
    except RuntimeError:
        shapes = [tuple(value.shape) for value in values]
        raise ShapeMismatch(f"{name} cannot stand in one batch: {shapes}; set batch_size=1.") from None


def _forward(model: nn.Module, items: Sequence[Mapping[str, Any]], needed: bool) -> Tensor:
    """Run one padded batch, and return the logits [b, V] at the last real positions."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder, which run_pairs does not run.")
    parameters = inspect.signature(model.forward).parameters
    generates = callable(getattr(model, "can_generate", None)) and model.can_generate()  # type: ignore[operator]
    side: Side = "left" if generates else "right"
    batch = padded(items, side, getattr(config, "pad_token_id", None) or 0)
    mask = batch["attention_mask"]
    own = "position_ids" in batch or any(hasattr(module, "get_rope_index") for module in model.modules())
    if side == "left" and "position_ids" in parameters and not own and not bool(mask.all()):
        batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    if side == "left" and "logits_to_keep" in parameters:
        batch["logits_to_keep"] = 1
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    output = model(**uncached(model, batch))
    return last_logits(logits_of(model, output), mask) if needed else mask


def _have_answers(pairs: Sequence[Pair]) -> bool:
    lacking = [pair.correct is None or pair.wrong is None for pair in pairs]
    if any(lacking) and not all(lacking):
        raise RegardError(
            f"{sum(lacking)} of {len(pairs)} pairs lack correct or wrong; all need them, or none."
        )
    return not any(lacking)


def _answer_difference(logits: Tensor, pairs: Sequence[Pair]) -> Tensor:
    correct, wrong = ([getattr(pair, name) for pair in pairs] for name in ("correct", "wrong"))
    return logit_difference(logits, correct, wrong)


def _measured(value: Any, count: int) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (count,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeMismatch(f"The metric gave {found} for {count} pairs; it must give a tensor, one each.")
    return value.float().cpu()
