"""Find the retrieval heads of a model by needle tests.

    score_h = mean over the prompts that were answered of what head h copied, as `Copying` counts it

A prompt counts where ROUGE-1 recall of the answer in the response is above 0.5. A head is called a retrieval
head from a score of 0.1 on. Prompts are read without attention weights; weights are opened for single rows
only, so memory grows with the length of the text, not with its square.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., 2024, arXiv 2404.15574)
and its official code, which generates up to 50 tokens. Status: agrees with the official code (the scores);
partly our choice (the prompts, `chance`, halves of facts that share none).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.lens.retrieval_heads.answering import (
    BATCH,
    Batch,
    batches,
    check_prompts,
    rouge_recall,
    stop_tokens,
)
from regard.lens.retrieval_heads.lens import SPAN, Copying
from regard.lens.retrieval_heads.scores import Record, RetrievalScores, score_table
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.head_table import Head
from regard.runtime.model_identity import identify
from regard.runtime.verbs import watch
from regard.tasks.needles import Asked, needle

Score = Literal["recall", "frequency"]
Row = tuple[Record, list[float]]


def detect(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Asked] | None = None,
    *,
    score: Score = "recall",
    steps: int | None = None,
    batch_size: int = BATCH,
    beyond: bool = False,
    resume: str | Path | None = None,
    name: str = "",
    progress: bool = True,
) -> RetrievalScores:
    """Score every head by how much of hidden facts it copies.

    Args:
        model: any causal language model of transformers, in evaluation mode.
        tokenizer: its own.
        prompts: default `needle(tokenizer)`: 24 facts at two depths of texts of 256 tokens.
        score: `recall`, distinct positions of the answer copied, at most 1; or `frequency`, as the official
            code counts, where a position may count again.
        steps: tokens that are generated at most; default those of the longest answer and 4.
        batch_size: how many prompts share a forward, padded on the left.
        beyond: let prompts be longer than the model was made for.
        resume: a file that every finished batch is added to; what is in it already is not run again.
        name: what to call the model in the result.
        progress: show a bar.

    Returns:
        The scores. Heads of layers without softmax attention are left out, and `about["left_out"]` names
        these layers.

    Raises:
        RegardError: for no prompts, prompts without a span or longer than the model takes, an unknown score,
            a `resume` file of other prompts, or without the package rouge_score.
        UnsupportedModel: for a model that does not generate, or whose attention cannot be reached.

    Example:
        >>> found = detect(model, tokenizer)                                    # doctest: +SKIP
        >>> found.top("score", 3)                                               # doctest: +SKIP
        [('text.17', 3, 0.93), ('text.18', 6, 0.9), ('text.18', 7, 0.78)]
    """
    prompts = needle(tokenizer) if prompts is None else prompts
    if score not in get_args(Score):
        raise RegardError(f"score is {score!r}; it must be one of {', '.join(get_args(Score))}.")
    lacking = next((asked for asked in prompts if asked.span is None), None)
    if lacking is not None:
        raise RegardError(
            f"the answer {lacking.answer!r} does not stand in its prompt, so nothing can copy it."
        )
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    length = check_prompts(root, prompts, steps, tokenizer, beyond)
    rouge_recall()
    identity = identify(root, name)
    kept = _Kept(resume, {"model": identity, "steps": length, "score": score}, prompts)
    names = kept.names
    waiting = [asked for asked, row in zip(prompts, kept.rows, strict=True) if row is None]
    for batch, found, names in _answered(root, tokenizer, waiting, score, length, batch_size, progress):
        kept.add(batch, found, names)
    rows = [row for row in kept.rows if row is not None]
    counted = [scores for record, scores in rows if record.counted]
    each = np.array(counted, dtype=np.float64).reshape(len(counted), len(names))
    about = {
        "lens": "retrieval", "definition": Copying.definition, "source": Copying.source, "score": score,
        "main": anatomy.main, "model": identity, "prompts": len(rows), "counted": len(counted),
        "left_out": [name for name, _ in anatomy.unreachable],
    }  # fmt: skip
    return score_table(names, each, [record for record, _ in rows], about)


def _answered(
    root: nn.Module, tokenizer: Any, prompts: list[Asked], score: Score, steps: int, size: int, progress: bool
) -> Any:
    """Yield each batch with its records and scores, and the names of the heads."""
    if not prompts:
        return
    recall, lens = rouge_recall(), Copying(stops=stop_tokens(root, tokenizer))
    sessions: list[Any] = []

    def watching(inputs: dict[str, Any], some: Sequence[Asked]) -> Any:
        sessions.append(watch(root, lens, spans={SPAN: spans(inputs["input_ids"], some)}))
        return sessions[-1]

    for batch in batches(root, tokenizer, prompts, steps, size, around=watching, progress=progress):
        found = sessions.pop().lens(Copying).each()[score]
        names = [(alias, head) for alias, x in found.items() for head in range(x.shape[1])]
        scores = torch.cat(list(found.values()), 1).tolist()
        rows = [
            (_record(asked, text, tokens, recall(asked.answer, text)), row)
            for asked, text, tokens, row in zip(
                batch.prompts, batch.texts(tokenizer), batch.tokens, scores, strict=True
            )
        ]
        yield batch, rows, names


def spans(ids: Tensor, prompts: Sequence[Asked]) -> Tensor:
    """Return where the answers stand in prompts padded on the left, bool [B, S]."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row, asked in zip(found, prompts, strict=True):
        assert asked.span is not None
        pad = ids.shape[1] - len(asked.ids)
        row[pad + asked.span[0] : pad + asked.span[1]] = True
    return found


def _record(asked: Asked, text: str, tokens: Tensor, recall: float) -> Record:
    return Record(asked.fact, asked.length, asked.depth, text, recall, _chance(asked, tokens))


def _chance(asked: Asked, tokens: Tensor) -> float:
    """What a head would score that looks at any token it can see, all as likely."""
    assert asked.span is not None
    inside = asked.ids[slice(*asked.span)]
    written = [token for token in tokens.tolist() if token >= 0]
    hits = sum(
        int((inside == token).sum()) / (len(asked.ids) + step) for step, token in enumerate(written)
    )  # fmt: skip
    return hits / len(inside)


class _Kept:
    """What is known of each prompt, and the file it is kept in, a line a prompt."""

    def __init__(self, path: str | Path | None, made: dict[str, Any], prompts: Sequence[Asked]) -> None:
        self.path = None if path is None else Path(path)
        self.made = {**made, "model": {k: v for k, v in made["model"].items() if k != "name"}}
        self.keys = [_digest(self.made, asked) for asked in prompts]
        self.rows: list[Row | None] = [None] * len(prompts)
        self.names: list[Head] = []
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        known = {}
        try:
            lines = path.read_text("utf-8").splitlines()
            for number, line in enumerate(lines):
                try:
                    told = json.loads(line)
                except ValueError:
                    if number < len(lines) - 1:
                        raise
                    continue
                self.names = [(site, int(head)) for site, head in told["heads"]]
                scores = [0.0] * len(self.names)
                for place, value in told["scores"].items():
                    scores[int(place)] = float(value)
                known[told["key"]] = (Record(**told["record"]), scores)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RegardError(f"{path} is no file that a search for retrieval heads was kept in.") from error
        if known and not known.keys() & set(self.keys):
            raise RegardError(
                f"{path} holds other prompts or another model; give another file to resume from."
            )
        self.rows = [known.get(key) for key in self.keys]

    def add(self, batch: Batch, rows: list[Row], names: list[Head]) -> None:
        self.names = names
        lines = []
        for asked, row in zip(batch.prompts, rows, strict=True):
            key = _digest(self.made, asked)
            self.rows = [row if k == key else old for k, old in zip(self.keys, self.rows, strict=True)]
            scores = {str(place): value for place, value in enumerate(row[1]) if value}
            lines.append(json.dumps({"key": key, "record": asdict(row[0]), "scores": scores, "heads": names}))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))


def _digest(made: dict[str, Any], asked: Asked) -> str:
    told = json.dumps([made, asked.ids.tolist(), asked.span, asked.answer], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:24]
