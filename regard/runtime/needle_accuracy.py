"""How often a model finds a fact hidden in a text, by how deep it lies.

    right = every token of the answer has the largest logit, given the prompt and the answer before it

which is so where greedy decoding writes the answer token for token. One forward a batch of prompts: nothing
is generated, and logits are kept of the answers alone. Prompts are those of `regard.tasks.needles`.
Status: our choice; the papers let models generate and match words.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.pairs import padded
from regard.runtime.progress import bar

if TYPE_CHECKING:
    from regard.tasks.needles import Asked

BATCH = 4


@dataclass(frozen=True)
class NeedleAccuracy:
    """Which prompts were answered.

    Attributes:
        right: of each prompt, in order.
        depths, lengths: of each prompt, as it was asked for.
    """

    right: tuple[bool, ...]
    depths: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Share of all prompts."""
        return sum(self.right) / len(self.right)

    def by_depth(self) -> dict[float, float]:
        """Return the share of right answers at each depth, from the beginning of the text on."""
        return self._by(self.depths)

    def by_length(self) -> dict[int, float]:
        """Return the share of right answers at each length."""
        return self._by(self.lengths)

    def _by(self, kinds: Sequence[Any]) -> dict[Any, float]:
        found: dict[Any, list[bool]] = {}
        for kind, right in zip(kinds, self.right, strict=True):
            found.setdefault(kind, []).append(right)
        return {kind: sum(found[kind]) / len(found[kind]) for kind in sorted(found)}


@torch.no_grad()
def needle_accuracy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Asked],
    *,
    batch_size: int = BATCH,
    progress: bool = True,
) -> NeedleAccuracy:
    """Return which needles a model finds.

    Args:
        model: a causal language model of transformers; it may stand in `regard.steer`.
        tokenizer: its own.
        prompts: of `regard.tasks.needles.needle`, at the depths that are of interest.
        batch_size: prompts that share a forward.
        progress: show a bar.

    Raises:
        RegardError: for no prompts, an empty answer, or a prompt longer than the model takes.

    Example:
        >>> prompts = needle(tokenizer, lengths=(512,), depths=(0, 0.5, 1))     # doctest: +SKIP
        >>> needle_accuracy(model, tokenizer, prompts).by_depth()               # doctest: +SKIP
        {0: 0.83, 0.5: 0.71, 1: 0.96}
    """
    if not len(prompts):
        raise RegardError("there are no prompts to answer.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RegardError(f"batch_size is {batch_size!r}; it must be a whole number from 1.")
    answers = [_answer(tokenizer, asked) for asked in prompts]
    _check_length(model, max(len(p.ids) + len(a) for p, a in zip(prompts, answers, strict=True)))
    right: list[bool] = []
    was_training = model.training
    model.eval()
    with bar("Looking for needles", len(prompts), progress) as advance:
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            right += _right(model, [p.ids for p in prompts[some]], answers[some])
            advance(len(answers[some]))
    model.train(was_training)
    return NeedleAccuracy(tuple(right), tuple(p.depth for p in prompts), tuple(p.length for p in prompts))


def _answer(tokenizer: Any, asked: Asked) -> Tensor:
    """The tokens of an answer after its prompt."""
    gap = "" if asked.prompt[-1:].isspace() else " "
    ids = tokenizer(f"{gap}{asked.answer}", add_special_tokens=False)["input_ids"]
    if not ids:
        raise RegardError(f"the answer to {asked.fact!r} has no token.")
    return torch.tensor(ids)


def _check_length(model: nn.Module, longest: int) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise RegardError(
            f"{type(model).__name__} takes {most} tokens, and the longest prompt with its answer {longest}."
        )


def _right(model: nn.Module, prompts: list[Tensor], answers: list[Tensor]) -> list[bool]:
    """Whether each answer follows its prompt, padded on the left so that all answers end together."""
    device = next(model.parameters()).device
    inputs = padded(
        [{"input_ids": torch.cat([p, a[:-1]])[None]} for p, a in zip(prompts, answers, strict=True)],
        "left",
        0,
    )
    most = max(len(answer) for answer in answers)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    wanted = {"logits_to_keep": most, "use_cache": False, "position_ids": positions.to(device)}
    known = inspect.signature(model.forward).parameters
    options = {name: value for name, value in wanted.items() if name in known}
    logits = model(**{name: x.to(device) for name, x in inputs.items()}, **options).logits
    said = logits[:, -most:].argmax(-1).cpu()
    return [bool((row[most - len(a) :] == a).all()) for row, a in zip(said, answers, strict=True)]
