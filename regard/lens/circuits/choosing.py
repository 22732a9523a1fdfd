"""How well a model answers multiple choice: by the label, and by what the options say.

    by label     the largest of the labels' logits is the right one's; the softmax is over these alone
    net          logit of the right label - mean logit of the others
    by content   the option whose words have the largest mean log-probability after the bare question is the
                 right one

A model may know the content and fail the labels: then heads that carry the right label are no finding.

Source: Lieberum et al., 2023, arXiv 2307.09458, section 2.2. Status: partly our choice (the content's
prompt).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.runtime.anatomy import root_of
from regard.runtime.recorded import logits_of
from regard.tasks.questions import Choices

ROWS = 16
SURE = 0.01


@dataclass(frozen=True, eq=False)
class Answered:
    """What a model says of each option.

    Attributes:
        labels: logits of the labels, float32 [N, options].
        content: mean log-probability of the options' words, float32 [N, options]; None where not asked.
        right: int64 [N].
    """

    labels: Tensor
    content: Tensor | None
    right: Tensor

    @property
    def by_label(self) -> float:
        """Share of questions answered right by the label."""
        return float((self.labels.argmax(1) == self.right).float().mean())

    @property
    def by_content(self) -> float:
        """Share of questions answered right by the content; NaN where not asked."""
        if self.content is None:
            return math.nan
        return float((self.content.argmax(1) == self.right).float().mean())

    @property
    def chance(self) -> float:
        return 1 / self.labels.shape[1]

    @property
    def net(self) -> Tensor:
        """Logit of the right label less the mean of the others, float32 [N]."""
        return net_of(self.labels, self.right)

    @property
    def favourite(self) -> float:
        """Largest share of questions that get the same place in the list, whatever is right."""
        counts = torch.bincount(self.labels.argmax(1), minlength=self.labels.shape[1])
        return float(counts.max()) / len(self.labels)

    @property
    def does_task(self) -> bool:
        """Whether so many right labels come by chance in less than one of a hundred cases."""
        return _tail(len(self.labels), int((self.labels.argmax(1) == self.right).sum()), self.chance) < SURE

    def said(self) -> str:
        """Return in words how well it does."""
        count = len(self.labels)
        found = f"{self.by_label:.0%} right by the label (chance {self.chance:.0%}, {count} questions)"
        if self.content is not None:
            found += f", {self.by_content:.0%} by the content"
        if not self.does_task:
            found += "; the model does not do the task by labels"
        return found


def answer_choices(model: nn.Module, asked: Choices, *, tokenizer: Any = None) -> Answered:
    """Ask a model.

    Args:
        model: a causal language model in evaluation mode.
        asked: of `regard.tasks.questions.choices`.
        tokenizer: to score the options' words too; None leaves that out.

    Example:
        >>> answer_choices(model, asked, tokenizer=tokenizer).said()            # doctest: +SKIP
        '26% right by the label (chance 25%, 200 questions), 71% by the content; the model does not ..'
    """
    labels = torch.cat(
        [logits.gather(1, asked.label_ids[rows]) for rows, logits in last_logits(model, asked)]
    )
    order = [i for rows in _batches(asked) for i in rows]
    labels = labels[torch.tensor(order).argsort()]
    content = None if tokenizer is None else _content(model, asked, tokenizer)
    return Answered(labels, content, asked.right)


def net_of(logits: Tensor, right: Tensor) -> Tensor:
    """Return the logit at `right` [N] less the mean of the others, [N], of logits [N, options]."""
    own = logits.gather(1, right[:, None])[:, 0]
    return own - (logits.sum(1) - own) / (logits.shape[1] - 1)


def last_logits(model: nn.Module, asked: Choices) -> Iterator[tuple[list[int], Tensor]]:
    """Yield some prompts of one length, and their last logits, float32 [n, V], on the CPU."""
    root = root_of(model)
    device = next(root.parameters()).device
    known = inspect.signature(root.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    for rows in _batches(asked):
        ids = torch.stack([asked.ids[i] for i in rows]).to(device)
        with torch.no_grad():
            yield rows, logits_of(root, root(input_ids=ids, use_cache=False, **options))[:, -1].float().cpu()


def _batches(asked: Choices) -> list[list[int]]:
    return [rows[i : i + ROWS] for rows in asked.by_length() for i in range(0, len(rows), ROWS)]


def _content(model: nn.Module, asked: Choices, tokenizer: Any) -> Tensor:
    """Mean log-probability of each option's words after the bare question, [N, options]."""
    root = root_of(model)
    device = next(root.parameters()).device
    found = torch.zeros(asked.label_ids.shape)
    for number, question in enumerate(asked.questions):
        front = tokenizer(f"Question: {question.text}\nAnswer:")["input_ids"]
        whole = [
            tokenizer(f"Question: {question.text}\nAnswer: {option}")["input_ids"]
            for option in question.options
        ]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in whole], batch_first=True).to(device)
        with torch.no_grad():
            said = root(input_ids=ids, use_cache=False).logits[:, len(front) - 1 : -1].float().log_softmax(-1)
        each = said.gather(2, ids[:, len(front) :, None])[..., 0].cpu()
        for place, row in enumerate(whole):
            found[number, place] = each[place, : len(row) - len(front)].mean()
    return found


def _tail(count: int, hits: int, chance: float) -> float:
    """Probability of at least so many hits."""
    return sum(math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(hits, count + 1))
