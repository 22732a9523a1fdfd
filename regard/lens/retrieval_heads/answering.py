"""Let a model answer prompts, in batches, and say how much of each answer it gave.

    recall = share of the words of the expected answer that the response has      ROUGE-1, stemmed

The package `rouge_score` computes it, as in the official code of Wu et al., 2024, arXiv 2404.15574.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import root_of
from regard.runtime.pairs import padded
from regard.runtime.progress import bar
from regard.runtime.protocol import Edit
from regard.runtime.verbs import steer
from regard.tasks.needles import Asked

BATCH = 8
MORE = 4
ENDS = ("\n", "\n\n", ".\n", ".\n\n")
LIMITS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        responses: the texts, one a prompt.
        recall: share of each expected answer that is in them, from 0 to 1.
    """

    responses: tuple[str, ...]
    recall: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean recall over the prompts."""
        return sum(self.recall) / len(self.recall)


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Asked],
    *edits: Edit,
    steps: int | None = None,
    batch_size: int = BATCH,
    progress: bool = True,
) -> Answers:
    """Let a model answer greedily, under edits if there are any.

    Args:
        model: a causal language model of transformers in evaluation mode.
        prompts: of `regard.tasks.needles` or its controls.
        edits: such as `ScaleHeads(heads=...)`.
        steps: tokens at most; default those of the longest answer and 4. An answer ends at a new line.
        batch_size: how many prompts share a forward, padded on the left.
        progress: show a bar.

    Raises:
        RegardError: for no prompts, prompts longer than the model takes, or without the package rouge_score.
        UnsupportedModel: for a model that does not generate.

    Example:
        >>> answer(model, tokenizer, needle(tokenizer)).mean                    # doctest: +SKIP
        0.82
    """
    recall = rouge_recall()
    with steer(model, *edits) if edits else nullcontext():
        responses = [
            text
            for batch in batches(model, tokenizer, prompts, steps, batch_size, progress=progress)
            for text in batch.texts(tokenizer)
        ]
    asked = [prompt.answer for prompt in prompts]
    return Answers(tuple(responses), tuple(recall(*pair) for pair in zip(asked, responses, strict=True)))


def rouge_recall() -> Callable[[str, str], float]:
    """Return the function (expected, response) -> recall of its words.

    Raises:
        RegardError: where rouge_score is not installed.
    """
    try:
        scorer = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError:
        raise RegardError(
            "answers are scored by the package rouge_score; install it with `pip install regard[heads]`."
        ) from None
    score = scorer.RougeScorer(["rouge1"], use_stemmer=True).score
    return lambda expected, response: float(score(expected, response)["rouge1"].recall)


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that were answered together.

    Attributes:
        prompts: which.
        inputs: what the model was fed.
        tokens: what it answered, int64 [B, steps], up to and with the stop; what follows is -1.
    """

    prompts: Sequence[Asked]
    inputs: dict[str, Any]
    tokens: Tensor

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the responses as text."""
        return [tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True) for row in self.tokens]


def batches(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Asked],
    steps: int | None = None,
    batch_size: int = BATCH,
    *,
    around: Callable[[dict[str, Any], Sequence[Asked]], Any] | None = None,
    progress: bool = True,
) -> Iterator[Batch]:
    """Yield the prompts answered, a batch at a time, in their order.

    Args:
        around: called with the inputs and the prompts of a batch; returns a context to generate in.
    """
    root = root_of(model)
    length = check_prompts(root, prompts, steps, tokenizer)
    stops = stop_tokens(root, tokenizer)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = stops[0] if pad is None else pad
    with bar("Answering", len(prompts), progress) as advance:
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            device = next(root.parameters()).device
            inputs = {
                k: v.to(device)
                for k, v in padded([{"input_ids": p.ids[None]} for p in some], "left", pad).items()
            }
            with torch.no_grad(), around(inputs, some) if around is not None else nullcontext():
                out = root.generate(  # type: ignore[operator]
                    **inputs,
                    max_new_tokens=length,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=pad,
                    eos_token_id=stops,
                )
            yield Batch(some, inputs, _until(out[:, inputs["input_ids"].shape[1] :].cpu(), stops))
            advance(len(some))


def check_prompts(
    root: nn.Module, prompts: Sequence[Asked], steps: int | None, tokenizer: Any, beyond: bool = False
) -> int:
    """Return how many tokens are to be generated; refuse what the model cannot answer.

    Args:
        beyond: let prompts be longer than the model was made for.
    """
    if not len(prompts):
        raise RegardError("there are no prompts to answer.")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise RegardError(f"steps is {steps!r}; it must be a number of tokens, from 1.")
    config = getattr(root, "config", None)
    name = type(root).__name__
    if getattr(config, "is_encoder_decoder", False) or not getattr(root, "can_generate", lambda: False)():
        raise UnsupportedModel(f"{name} does not generate text after a prompt, and so answers nothing.")
    if steps is None:
        steps = MORE + max(
            len(tokenizer(f" {p.answer}", add_special_tokens=False)["input_ids"]) for p in prompts
        )
    text = config.get_text_config() if config is not None else None
    most = next((v for k in LIMITS if isinstance(v := getattr(text, k, None), int)), None)
    longest = max(len(prompt.ids) for prompt in prompts)
    if most is not None and longest + steps > most and not beyond:
        raise RegardError(
            f"{name} takes {most} tokens, and the longest prompt has {longest} with {steps} to come; ask for "
            "smaller lengths, or give beyond=True."
        )
    return steps


def stop_tokens(root: nn.Module, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's own ends, and new lines."""
    own = getattr(getattr(root, "generation_config", None), "eos_token_id", None)
    found = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    for text in ENDS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and "\n" in tokenizer.decode(ids):
            found.append(int(ids[0]))
    if not found:
        raise RegardError(
            "the tokenizer knows neither an end of text nor a new line, so no answer would end."
        )
    return list(dict.fromkeys(found))


def _until(tokens: Tensor, stops: Sequence[int]) -> Tensor:
    """Put -1 after the first stop of each row."""
    ended = torch.isin(tokens, torch.tensor(list(stops))).cumsum(1)
    after = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1) > 0
    return tokens.masked_fill(after, -1)
