"""Where the attention of two models goes on the same hidden inputs: the diagnostics of MEAP.

    decay    = (Att_A[masked] - Att_B[masked]) / Att_A[masked]
    variance = (Var_B[others] - Var_A[others]) / Var_A[others]         keys that are not masked

Att is what a key receives, mean over the rows able to see it; means over heads, layers and sequences. Var is
taken over the keys of each head and sequence, and then averaged. With an answer marked, also the share of
attention that chosen rows give it on clean inputs, beside what even attention would give. The same numbers a
head come from the lenses of `regard.lens.span_focus`.

Source: Zhuang et al., 2025, arXiv 2502.07490, section 5, from a digest. Status: partly our choice (over what
is averaged; the rows that look at the answer).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.lens.span_focus import SpanFocus, SpanMass
from regard.runtime.head_table import HeadTable
from regard.runtime.verbs import watch

ROWS = 8


@dataclass(frozen=True)
class Focus:
    """Where attention goes in a model A, such as one trained plainly, and in B, trained with MEAP.

    Attributes:
        masked_a, masked_b: mean attention that a masked key receives.
        others_a, others_b: the same of another key.
        variance_a, variance_b: variance over the keys that are not masked.
        answer_a, answer_b: share of attention on the answer; None where none was marked.
        elsewhere_a, elsewhere_b: share on other keys, 1 less the answer's but for a sink logit's share.
        even: share that even attention would give the answer.
    """

    masked_a: float
    masked_b: float
    others_a: float
    others_b: float
    variance_a: float
    variance_b: float
    answer_a: float | None = None
    answer_b: float | None = None
    elsewhere_a: float | None = None
    elsewhere_b: float | None = None
    even: float | None = None

    @property
    def decay(self) -> float:
        """By what share masked keys receive less in B than in A."""
        return (self.masked_a - self.masked_b) / self.masked_a

    @property
    def variance(self) -> float:
        """By what share attention varies more over the other keys in B than in A."""
        return (self.variance_b - self.variance_a) / self.variance_a

    def told(self) -> dict[str, float | None]:
        """Return all numbers, as JSON holds them."""
        return {"decay": self.decay, "variance": self.variance, **asdict(self)}


def attention_focus(
    model_a: nn.Module,
    model_b: nn.Module,
    ids: Tensor,
    mask: Tensor,
    *,
    mask_id: int,
    valid: Tensor | None = None,
    answer: Tensor | None = None,
    rows: Tensor | None = None,
    batch_size: int = ROWS,
) -> Focus:
    """Compare where the attention of two models goes on the same inputs.

    Args:
        model_a, model_b: of transformers, such as one trained plainly and one with MEAP.
        ids: clean tokens, int64 [B, T].
        mask: which are hidden, bool [B, T]; as `mask_inputs` returned it.
        mask_id: what stands for them.
        valid: bool [B, T], False at padding.
        answer: bool [B, T], the tokens of the answer in the context.
        rows: bool [B, T], the rows whose attention on it counts; default the last of each sequence.
        batch_size: sequences read at once.

    Raises:
        RegardError: where nothing is hidden, or everything, or a model's embedding has no row for `mask_id`.
        ShapeMismatch: for masks of another shape.

    Example:
        >>> ids = regard.load()[1]("...", return_tensors="pt")["input_ids"]    # doctest: +SKIP
        >>> hidden, mask = mask_inputs(ids, 0)                                 # doctest: +SKIP
        >>> attention_focus(before, after, ids, mask, mask_id=0).decay         # doctest: +SKIP
        0.31
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
    for name, given in (("mask", mask), ("valid", valid), ("answer", answer), ("rows", rows)):
        if given is not None and (given.shape != ids.shape or given.dtype != torch.bool):
            raise ShapeMismatch(
                f"{name} is {given.dtype} {list(given.shape)}; it must be bool {list(ids.shape)}."
            )
    if not bool((mask & valid).any()) or not bool((~mask & valid).any()):
        raise RegardError("mask hides nothing or everything; it must hide some of the tokens.")
    if answer is not None and rows is None:
        last = valid.int().cumsum(1).argmax(1, keepdim=True)
        rows = torch.zeros_like(valid).scatter(1, last, True)
    a, b = (
        _focus(model, ids, mask & valid, mask_id, valid, answer, rows, batch_size)
        for model in (model_a, model_b)
    )
    found = {
        f"{name}_{side}": told[name] for side, told in (("a", a), ("b", b)) for name in told if name != "even"
    }
    return Focus(**found, even=a.get("even"))


def _focus(
    model: nn.Module, ids: Tensor, mask: Tensor, mask_id: int, valid: Tensor, answer: Tensor | None,
    rows: Tensor | None, batch_size: int,
) -> dict[str, float]:  # fmt: skip
    embedded: Any = model.get_input_embeddings()  # type: ignore[operator]
    if not 0 <= mask_id < len(embedded.weight):
        raise RegardError(
            f"mask_id is {mask_id}, and the embedding of {type(model).__name__} has {len(embedded.weight)} "
            "rows; resize it before."
        )
    table = _seen(
        model, ids.masked_fill(mask, mask_id), valid, SpanFocus(span="masked"), {"masked": mask}, batch_size
    )
    found = {"masked": table["on"], "others": table["off"], "variance": table["spread"]}
    if answer is not None and rows is not None:
        lens = SpanMass(span="answer", rows="asking")
        seen = _seen(model, ids, valid, lens, {"answer": answer, "asking": rows}, batch_size)
        found |= {"answer": seen["mass"], "elsewhere": 1 - seen["mass"], "even": seen["even"]}
    return {name: float(values.mean()) for name, values in found.items()}


def _seen(
    model: nn.Module, ids: Tensor, valid: Tensor, lens: Any, spans: dict[str, Tensor], batch_size: int
) -> HeadTable:
    """Return the table of a lens over batches, each with its spans."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for some in torch.arange(len(ids)).split(batch_size):
            here = {name: span[some].to(device) for name, span in spans.items()}
            with torch.no_grad(), watch(model, lens, spans=here) as session:
                model(input_ids=ids[some].to(device), attention_mask=valid[some].long().to(device))
            lens.merge(session.lens(type(lens)))
    finally:
        model.train(was_training)
    table: HeadTable = lens.result()
    return table
