"""Fit ACT to a model and a kind of task: try every head on labelled prompts, keep those that help, save them.

Source: Yu et al., 2024, arXiv 2406.15765, section 4. Status: partly our choice: the official code has the
heads of its models as lists, and none that finds them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.edit.act.calibration import ACT
from regard.edit.act.filtering import FilteredHeads, filter_batches
from regard.errors import RegardError
from regard.runtime.edits.targets import HeadName
from regard.runtime.option_scores import _answers
from regard.runtime.prompt import Prompt, encode_prompts, takes_chat
from regard.tasks.sentiment import sentiment

Metric = Literal["accuracy", "log_loss"]
BATCH = 32
FEW = 20


def fit_heads(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    edit: ACT | None = None,
    metric: Metric = "accuracy",
    heads: Sequence[HeadName] | None = None,
    samples: int | None = None,
    chat: bool | None = False,
    batch_size: int = BATCH,
    progress: bool = True,
    save: str | Path | None = None,
) -> FilteredHeads:
    """Try ACT in one head at a time on labelled prompts.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its fast tokenizer.
        prompts: with options and the right one. Options are told apart by the first token of each.
        edit: ACT with its options; default `ACT()`.
        metric: what is to rise: `accuracy`, the share of prompts whose likeliest option is the right one,
            as in the paper; or `log_loss`, minus the log-loss among the options in nats, of which few
            prompts tell more.
        heads: `(layer, head)` pairs to try; default those that `edit` is for.
        samples: how many of the prompts to use, from the first; default all.
        chat: by the tokenizer's chat template; None for whether it has one. Heads found for one way of
            writing prompts are not those of another.
        batch_size: prompts at a time; memory grows with it.
        progress: whether a bar is shown, where stderr is a terminal.
        save: a file that keeps what is finished. The same search, started again, goes on from there.

    Raises:
        RegardError: for a prompt without a right option, options that begin with the same token, prompts that
            all have the same answer, an unknown metric; and as `filter_heads`.

    Example:
        >>> found = ACT().fit(model, tokenizer, prompts)                        # doctest: +SKIP
        >>> regard.save_edits("act.json", model, found.act())                   # doctest: +SKIP
    """
    if metric not in get_args(Metric):
        raise RegardError(f"metric is {metric!r}; it must be one of {', '.join(get_args(Metric))}.")
    if batch_size < 1 or (samples is not None and samples < 1):
        raise RegardError(f"batch_size is {batch_size} and samples {samples}; they take numbers from 1.")
    some = list(prompts)[:samples]
    check_labels(some)
    if len(some) < FEW and metric == "accuracy":
        warnings.warn(
            f"{len(some)} prompts tell accuracy in steps of 1/{len(some)}, so heads are kept by chance; give "
            "more, or metric='log_loss'.",
            stacklevel=2,
        )  # fmt: skip
    ordered = sorted(some, key=lambda prompt: len(prompt.text))
    parts = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    batches = [asked(tokenizer, part, metric, chat) for part in parts]
    return filter_batches(model, batches, edit=edit, heads=heads, progress=progress, save=save)


def asked(
    tokenizer: Any, prompts: Sequence[Prompt], metric: str, chat: bool | None = False
) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Return prompts as a model reads them, padded on the left, and a score of the logits that follow."""
    inputs, _ = encode_prompts(tokenizer, prompts, chat=chat)
    templated = takes_chat(tokenizer, prompts, chat)
    firsts = [first_tokens(tokenizer, prompt, templated) for prompt in prompts]
    most = max(map(len, firsts))
    ids = torch.tensor([some + some[:1] * (most - len(some)) for some in firsts])
    there = torch.tensor([[n < len(some) for n in range(most)] for some in firsts])
    right = torch.tensor([prompt.right for prompt in prompts])

    def score(logits: Tensor) -> Tensor:
        at = (
            logits.gather(-1, ids.to(logits.device)).float().masked_fill(~there.to(logits.device), -torch.inf)
        )
        if metric == "accuracy":
            return (at.argmax(-1).cpu() == right).float()
        return at.log_softmax(-1).gather(-1, right.to(at.device)[:, None])[:, 0]

    return inputs, score


def first_tokens(tokenizer: Any, prompt: Prompt, templated: bool) -> list[int]:
    """Return the first token of each option where it stands.

    Raises:
        RegardError: where two options begin with the same one.
    """
    text = prompt.rendered(tokenizer if templated else None)[0]
    firsts = [answer[0] for answer in _answers(tokenizer, prompt, text, not templated)]
    if len(set(firsts)) < len(firsts):
        raise RegardError(
            f"two of the options {', '.join(map(repr, prompt.answers))} begin with the same token; word them "
            "so that their first tokens differ, or give labels."
        )
    return firsts


def check_labels(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts from which no heads can be chosen.

    Raises:
        RegardError: without prompts, where one has no right option, and where all have the same answer.
    """
    if not prompts:
        raise RegardError("there are no prompts.")
    unknown = [number for number, prompt in enumerate(prompts) if prompt.right is None]
    if unknown:
        raise RegardError(f"prompt {unknown[0]} does not say which of its options is right.")
    answers = {prompt.answers[prompt.right] for prompt in prompts if prompt.right is not None}
    if len(answers) < 2 and len(prompts) > 1:
        raise RegardError(
            f"all {len(prompts)} prompts have the answer {answers.pop()!r}, so that heads which lean to it "
            "would be chosen; give prompts of two classes at least."
        )


def packaged(count: int, test: int, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """Return prompts of made sentences, to fit on and to test on; they share no adjective."""
    data = sentiment(count, test, seed=seed)
    calibration, held_out = (
        [_sentence(text, label) for text, label in some] for some in (data.calibration, data.test)
    )
    return calibration, held_out


def _sentence(text: str, label: int) -> Prompt:
    instruction, question, begun = text.split("\n")
    return Prompt(
        instruction=instruction, question=question, options=("negative", "positive"), right=label, begun=begun
    )


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts, a line of JSON each whose keys are fields of `Prompt`.

    Raises:
        RegardError: for a file that cannot be read, and naming the line that is no prompt.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise RegardError(f"{path} cannot be read: {reason}.") from None
    known = {field.name for field in fields(Prompt)}
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            strange = sorted(set(told) - known)
            if strange:
                raise RegardError(f"it has {strange[0]!r}; a prompt has {', '.join(sorted(known))}.")
            found.append(Prompt(**told))
        except (ValueError, TypeError, AttributeError) as error:
            said = str(error) if isinstance(error, RegardError) else "it is no JSON of a prompt."
            raise RegardError(f"{path}, line {number}: {said}") from None
    return found
