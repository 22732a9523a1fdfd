"""Batches for mask-enhanced next-token prediction: of texts, and of questions with answers.

In fine-tuning, every pair gives an ordinary row: labels on the answer and its end. A pair whose answer has
more than 50 tokens gives a masked copy: max(1, int(P L)) of the L tokens of the answer are hidden, P = 0.1,
and only these have labels. The prompt is never hidden, and the end has no label in the copy.

    rows      [prompt answer end], [prompt masked-answer end]      the official code; the default
    concat    [prompt answer end  prompt masked-answer end]        the paper's formula, as we read it

In `concat` a masked position may look back at the clean answer, so it is the easier task.

Source: Zhuang et al., 2025, arXiv 2502.07490, section 3.2. Status: rows agree with the official code for
single turns; here a later turn has those before it in its prompt, which the official code leaves out, the
prompt follows the tokenizer's chat template, and what `max_length` cuts off is cut off the labels too.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.objectives.meap import RATIO, check_ratio, mask_inputs
from regard.objectives.meap_objective import documents_of

Layout = Literal["rows", "concat"]
IGNORED = -100
ANSWER_RATIO, LONGER_THAN = 0.1, 50


@dataclass(eq=False)
class MEAPCollator:
    """Pads or packs texts, hides tokens, and keeps the labels clean: the `data_collator` of a `Trainer`.

    What is hidden depends on the seed and on the tokens of the whole batch, and on no batch before it: a
    training that goes on from a checkpoint, or has several workers, hides what it would have hidden, and a
    shuffled epoch hides anew. It hides in evaluation, too; where the validation loss is to be of clean
    inputs, or the ratio to change, take `MEAPCallback`.

    Attributes:
        tokenizer: of transformers, with a padding token; not needed with `inner`.
        mask_id: see `add_mask_token`.
        ratio: share of the tokens of each row, or packed document, that is hidden.
        protect: token ids that are never hidden, such as image placeholders; see `placeholders`.
        seed: of what is hidden.
        inner: makes the batch instead, such as `DataCollatorWithFlattening()`, whose `position_ids` tell the
            documents, or the collator of an image-text model; labels are then its own.
    """

    tokenizer: Any
    mask_id: int
    ratio: float = RATIO
    protect: Sequence[int] = ()
    seed: int = 0
    inner: Callable[[list[Any]], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.inner is None and getattr(self.tokenizer, "pad_token_id", None) is None:
            raise RegardError("the tokenizer has no padding token; set one, or give an inner collator.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch: `input_ids`, `labels`, and what else it has, each int64 [B, T]."""
        batch = self._padded(rows) if self.inner is None else dict(self.inner(list(rows)))
        ids, mask, positions = (batch.get(k) for k in ("input_ids", "attention_mask", "position_ids"))
        if not isinstance(ids, Tensor) or "labels" not in batch:
            raise RegardError(
                f"the inner collator made {', '.join(batch)}; it must make input_ids and labels."
            )
        batch["input_ids"], _ = mask_inputs(
            ids, self.mask_id, self.ratio, generator=self._generator(ids),
            valid=mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else None,
            documents=documents_of(positions) if isinstance(positions, Tensor) else None,
            protect=list(self.protect) or None,
        )  # fmt: skip
        return batch

    def _padded(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        only = [{"input_ids": row["input_ids"]} for row in rows]
        batch = dict(self.tokenizer.pad(only, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), IGNORED)
        return batch

    def _generator(self, ids: Tensor) -> torch.Generator:
        digest = hashlib.blake2b(ids.contiguous().numpy().tobytes(), digest_size=7, salt=b"meap")
        digest.update(str(self.seed).encode())
        return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))


@dataclass(frozen=True)
class TunedRows:
    """Rows for fine-tuning.

    Attributes:
        rows: each with `input_ids` and `labels`, lists of equal length.
        answers: how many there were.
        short: how many answers were too short for a masked copy.
        cut: how many answers `max_length` cut, or left nothing of.
    """

    rows: list[dict[str, list[int]]]
    answers: int
    short: int
    cut: int = 0

    def save(self, path: str | Path) -> None:
        """Write a JSON object a line, as `datasets.load_dataset("json", ...)` reads it."""
        from regard.runtime.table import write_text

        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))


def meap_sft(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    mask_id: int,
    *,
    ratio: float = ANSWER_RATIO,
    longer_than: int = LONGER_THAN,
    layout: Layout = "rows",
    max_length: int | None = None,
    seed: int = 0,
) -> TunedRows:
    """Turn questions and answers into rows, ordinary and with hidden tokens in the answer.

    Pad them with `DataCollatorForSeq2Seq(tokenizer)`, which pads the labels with -100.

    Args:
        examples: each with `instruction`, `output` and maybe `input`, or with `conversations`, a list of
            turns `{"from": "human" | "gpt", "value": text}`.
        tokenizer: of transformers, with an end-of-text token.
        mask_id: see `add_mask_token`.
        ratio: share of an answer that the masked copy hides, in (0, 1).
        longer_than: tokens that an answer must exceed to be copied.
        layout: `rows`, the copy in a row of its own, or `concat`, after the original in one row.
        max_length: tokens of an original, and of a copy, at most; longer answers are cut, and pairs whose
            prompt leaves no room for an answer are left out.
        seed: of what is hidden; positions are those of the official code after `random.seed(seed)`.

    Raises:
        RegardError: for an option out of range, an example of neither form, no examples, or a tokenizer
            without an end.
    """
    if isinstance(ratio, bool) or not 0 < ratio < 1:
        raise RegardError(f"ratio is {ratio}; it must lie between 0 and 1.")
    if layout not in get_args(Layout):
        raise RegardError(f"layout is {layout!r}; it must be one of {', '.join(get_args(Layout))}.")
    if max_length is not None and max_length < 3:
        raise RegardError(f"max_length is {max_length}; it takes 3 tokens at least.")
    end = tokenizer.eos_token_id
    if end is None:
        raise RegardError("the tokenizer has no end-of-text token, which every answer ends with.")
    source = random.Random(seed)
    made = TunedRows([], 0, 0)
    answers = short = cut = 0
    for number, example in enumerate(examples):
        for messages, answer in _turns(example, number):
            asked = _asked(tokenizer, messages)
            whole = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
            said = whole if max_length is None else whole[: max(0, max_length - 1 - len(asked))]
            answers, cut = answers + 1, cut + (len(said) < len(whole))
            if not said:
                continue
            plain = _row(asked, said, said, end, end)
            if len(whole) <= longer_than:
                short += 1
                made.rows.append(plain)
                continue
            copy = _row(asked, *_hidden(said, mask_id, ratio, source), end, IGNORED)
            made.rows.extend([plain, copy] if layout == "rows" else [_joined(plain, copy)])
    if not answers:
        raise RegardError("there are no examples to make rows of.")
    return TunedRows(made.rows, answers, short, cut)


def read_examples(path: str | Path) -> list[dict[str, Any]]:
    """Read examples for `meap_sft` from a file: a JSON list, or a JSON object a line.

    Raises:
        RegardError: where it cannot be read or holds none, or a line is no JSON object.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RegardError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError as error:
        raise RegardError(f"{path} is no JSON list: {error}.") from None
    if found is None:
        found = [
            _parsed(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    if not found or not all(isinstance(example, dict) for example in found):
        raise RegardError(f"{path} holds no examples; give a JSON object a line, or a list of them.")
    return found


def _parsed(line: str, number: int, path: str | Path) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise RegardError(f"line {number} of {path} is no JSON object.") from None


def _row(asked: list[int], inputs: list[int], labels: list[int], end: int, last: int) -> dict[str, list[int]]:
    return {"input_ids": [*asked, *inputs, end], "labels": [*[IGNORED] * len(asked), *labels, last]}


def _joined(first: dict[str, list[int]], second: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: first[name] + second[name] for name in first}


def _hidden(
    said: list[int], mask_id: int, ratio: float, source: random.Random
) -> tuple[list[int], list[int]]:
    """Return an answer with some tokens hidden, and its labels."""
    chosen = set(source.sample(range(len(said)), max(1, int(len(said) * ratio))))
    inputs = [mask_id if place in chosen else token for place, token in enumerate(said)]
    return inputs, [token if place in chosen else IGNORED for place, token in enumerate(said)]


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
