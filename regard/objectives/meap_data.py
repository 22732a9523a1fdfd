"""Batches for mask-enhanced next-token prediction: of texts, and of questions with answers.

In fine-tuning, every pair gives an ordinary row: labels on the answer and its end. A pair whose answer has
more than 50 tokens gives a second: max(1, int(P L)) of the L tokens of the answer are hidden, P = 0.1, and
only these have labels. The prompt is never hidden.

Source: Zhuang et al., 2025, arXiv 2502.07490, section 3.2. Status: rows agree with the official code for
single turns; here a later turn has those before it in its prompt, which the official code leaves out, and
the prompt follows the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.objectives.meap import RATIO, mask_inputs

IGNORED = -100
ANSWER_RATIO, LONGER_THAN = 0.1, 50


@dataclass(eq=False)
class MEAPCollator:
    """Pads texts, hides tokens, and keeps the labels clean; the `data_collator` of transformers' `Trainer`.

    Attributes:
        tokenizer: of transformers, with a padding token.
        mask_id: see `add_mask_token`.
        ratio: share of the tokens of each row that is hidden.
        protect: token ids that are never hidden, such as image placeholders.
        seed: of what is hidden; each batch goes on from the last.
    """

    tokenizer: Any
    mask_id: int
    ratio: float = RATIO
    protect: Sequence[int] = ()
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each int64 [B, T]."""
        only = [{"input_ids": row["input_ids"]} for row in rows]
        batch = self.tokenizer.pad(only, return_tensors="pt")
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        hidden, _ = mask_inputs(
            ids, self.mask_id, self.ratio, generator=self.generator, valid=valid,
            protect=list(self.protect) or None,
        )  # fmt: skip
        labels = ids.masked_fill(~valid, IGNORED)
        return {"input_ids": hidden, "attention_mask": batch["attention_mask"], "labels": labels}


@dataclass(frozen=True)
class TunedRows:
    """Rows for fine-tuning.

    Attributes:
        rows: each with `input_ids` and `labels`, lists of equal length.
        short: how many answers were too short for a second row.
    """

    rows: list[dict[str, list[int]]]
    short: int


def meap_sft(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    mask_id: int,
    *,
    ratio: float = ANSWER_RATIO,
    longer_than: int = LONGER_THAN,
    seed: int = 0,
) -> TunedRows:
    """Turn questions and answers into rows, ordinary and with hidden tokens in the answer.

    Args:
        examples: each with `instruction`, `output` and maybe `input`, or with `conversations`, a list of
            turns `{"from": "human" | "gpt", "value": text}`.
        tokenizer: of transformers, with an end-of-text token.
        mask_id: see `add_mask_token`.
        ratio: share of an answer that the second row hides, in (0, 1).
        longer_than: tokens that an answer must exceed to give a second row.
        seed: of what is hidden.

    Raises:
        RegardError: for a ratio out of range, an example of neither form, or a tokenizer without an end.
    """
    if not 0 < ratio < 1:
        raise RegardError(f"ratio is {ratio}; it must lie between 0 and 1.")
    end = tokenizer.eos_token_id
    if end is None:
        raise RegardError("the tokenizer has no end-of-text token, which every answer ends with.")
    generator = torch.Generator().manual_seed(seed)
    rows, short = [], 0
    for number, example in enumerate(examples):
        for messages, answer in _turns(example, number):
            asked = _asked(tokenizer, messages)
            said = tokenizer(answer, add_special_tokens=False)["input_ids"]
            rows.append({"input_ids": [*asked, *said, end], "labels": [IGNORED] * len(asked) + [*said, end]})
            if len(said) > longer_than:
                rows.append(_hidden(asked, said, mask_id, ratio, generator))
            else:
                short += 1
    return TunedRows(rows, short)


def _hidden(
    asked: list[int], said: list[int], mask_id: int, ratio: float, generator: torch.Generator
) -> dict[str, list[int]]:
    count = max(1, int(len(said) * ratio))
    chosen = set(torch.randperm(len(said), generator=generator)[:count].tolist())
    inputs = [mask_id if place in chosen else token for place, token in enumerate(said)]
    labels = [token if place in chosen else IGNORED for place, token in enumerate(said)]
    return {"input_ids": [*asked, *inputs], "labels": [IGNORED] * len(asked) + labels}


def _turns(example: Mapping[str, Any], number: int) -> list[tuple[list[dict[str, str]], str]]:
    """Return each answer with the messages before it."""
    if "conversations" in example:
        turns = [(str(turn["from"]), str(turn["value"])) for turn in example["conversations"]]
        before: list[dict[str, str]] = []
        found = []
        for (who, question), (other, answer) in zip(turns[::2], turns[1::2], strict=False):
            if (who, other) != ("human", "gpt"):
                raise RegardError(f"example {number} does not take turns between human and gpt.")
            before = [*before, {"role": "user", "content": question}]
            found.append((before, answer))
            before = [*before, {"role": "assistant", "content": answer}]
        return found
    if {"instruction", "output"} <= set(example):
        more = f"\n{example['input']}" if example.get("input") else ""
        return [([{"role": "user", "content": f"{example['instruction']}{more}"}], str(example["output"]))]
    raise RegardError(f"example {number} has neither `conversations` nor `instruction` and `output`.")


def _asked(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Tokenize what comes before an answer: by the chat template, or, without one, a line a message."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer("".join(f"{m['content']}\n" for m in messages))["input_ids"])
