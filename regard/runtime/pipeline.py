"""One attention call: edits and lenses at each stage, by the cheapest path that serves them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.engines.masks import MASKED
from regard.engines.rows import RowBlock, attend, mix, mix_into, row_blocks, softmax
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.call import Call
from regard.runtime.protocol import Edit, Inner, Lens, Stage, Wanted, asked, defines

ROW_METHODS = ("scores", "weights", "survey")


@dataclass
class _Opened:
    """The stages that need rows of this call, and which rows and heads they need together."""

    edits: list[Edit]
    lenses: list[Lens]
    heads: Tensor | None = None
    rows: tuple[int, int] | None = None

    @property
    def everything(self) -> bool:
        return self.heads is None and self.rows is None

    def __bool__(self) -> bool:
        return bool(self.edits or self.lenses)


def perform(call: Call, edits: Sequence[Edit], lenses: Sequence[Lens]) -> Tensor:
    """Compute one attention call under edits and lenses.

    Returns:
        Head outputs [B, H, T, Dv], as the edits left them.
    """
    wanted = {id(stage): asked(stage, call) for stage in (*edits, *lenses)}
    edits = [e for e in edits if wanted[id(e)] is not None]
    lenses = [lens for lens in lenses if wanted[id(lens)] is not None]
    call.served = edits
    if edits:
        early = [lens for lens in lenses if lens.before]
        if early:
            arrived = copy.copy(call)
            arrived.extra = dict(call.extra)
            _observe(arrived, early, wanted)
            lenses = [lens for lens in lenses if not lens.before]
        _edit_inputs(call, edits)
    _tell(lenses, "inputs", call)
    out = _attend(call, edits, lenses, wanted)
    call.head_outputs = out
    for edit in edits:
        if defines(edit, "head_outputs"):
            call.head_outputs = _replaced(edit, edit.head_outputs(call), call.head_outputs)  # type: ignore[attr-defined]
    _tell(lenses, "head_outputs", call)
    for stage in (*edits, *lenses):
        if defines(stage, "end_call"):
            with reading(stage):
                stage.end_call(call)  # type: ignore[attr-defined]
    return call.head_outputs


def reading(stage: Stage) -> AbstractContextManager[Any]:
    """A lens reads without autograd, unless its class says `differentiable = True`."""
    if isinstance(stage, Lens) and not _differentiable(stage):
        return torch.no_grad()
    return nullcontext()


def _differentiable(stage: Stage) -> bool:
    return bool(getattr(stage, "differentiable", False))


def _tell(lenses: Sequence[Lens], method: str, subject: Any) -> None:
    recorded = torch.is_grad_enabled()
    for lens in lenses:
        read = getattr(lens, method, None)
        if read is not None:
            with reading(lens) if recorded else nullcontext():
                read(subject)


def _edit_inputs(call: Call, edits: Sequence[Edit]) -> None:
    for edit in edits:
        if not defines(edit, "inputs"):
            continue
        new = edit.inputs(call)  # type: ignore[attr-defined]
        if new is None:
            continue
        if not isinstance(new, tuple | list) or len(new) != 3:
            raise ShapeMismatch(f"{type(edit).__name__}.inputs must return (q, k, v), or None.")
        old = (call.q, call.k, call.v)
        heads = call.q.shape[1]
        call.q, call.k, call.v = (_replaced(edit, *pair, heads) for pair in zip(new, old, strict=True))


def _replaced(edit: Edit, new: Tensor | None, old: Tensor, heads: int | None = None) -> Tensor:
    """The tensor that an edit returned; keys and values may come back as `call.expand()` gives them."""
    if new is None:
        return old
    expanded = (old.shape[0], heads, *old.shape[2:])
    if new.shape not in (old.shape, expanded):
        raise ShapeMismatch(
            f"{type(edit).__name__} returned a tensor of shape {tuple(new.shape)} "
            f"in place of one of shape {tuple(old.shape)}."
        )
    return new


def _observe(call: Call, lenses: Sequence[Lens], wanted: dict[int, Wanted | None]) -> None:
    """Show lenses the call as it arrived, before any edit."""
    if call.carried is not None and call.carried.length > call.query_length:
        raise RegardError(
            f"{call.site.alias} decodes from a state, so its attention before the swap cannot be seen; leave "
            "before=True out, or run with use_cache=False."
        )
    with torch.no_grad():
        _tell(lenses, "inputs", call)
        call.head_outputs = _softmax_attention(call, [], lenses, wanted)
        _tell(lenses, "head_outputs", call)
        _tell(lenses, "end_call", call)


def _attend(
    call: Call, edits: Sequence[Edit], lenses: Sequence[Lens], wanted: dict[int, Wanted | None]
) -> Tensor:
    """The whole call, through every edit that defines `attend`; the last one given is outermost."""
    seen = False

    def readers() -> Sequence[Lens]:
        nonlocal seen
        fresh, seen = not seen, True
        return lenses if fresh else ()

    def softmax_attention(inner_call: Call) -> Tensor:
        return _softmax_attention(inner_call, edits, readers(), wanted)

    inner: Inner = softmax_attention
    for edit in edits:
        if defines(edit, "attend"):
            inner = _outer(edit, inner)
        if defines(edit, "matrix"):
            inner = _by_matrix(edit, inner, lambda: _opened(call, edits, readers(), wanted))
    return inner(call)


def _outer(edit: Edit, inner: Inner) -> Inner:
    def outer(call: Call) -> Tensor:
        out = edit.attend(call, inner)  # type: ignore[attr-defined]
        shape = (*call.q.shape[:3], call.v.shape[3])
        if out.shape != shape:
            raise ShapeMismatch(
                f"{type(edit).__name__} returned a tensor of shape {tuple(out.shape)} "
                f"as head outputs, which are of shape {shape}."
            )
        return out

    return outer


def _by_matrix(edit: Edit, fast: Inner, opens: Callable[[], _Opened]) -> Inner:
    """What reads or edits weights gets those that a swapped-in mechanism has by its definition."""

    def outer(call: Call) -> Tensor:
        opened = opens()
        readers = [lens for lens in opened.lenses if defines(lens, "weights")]
        editors = opened.edits
        _refuse_edits(call, editors, edit)
        if not readers and not editors:
            return fast(call)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(editors)):
            weights = edit.matrix(call)  # type: ignore[attr-defined]
        if weights is None:
            return fast(call)
        block = RowBlock(0, weights.shape[2], 0, weights.shape[3])
        call.annotate(block)
        block.weights = weights.float()
        for editor in editors:
            if defines(editor, "survey") and _surveys(editor, call):
                with torch.no_grad():
                    editor.survey(block)  # type: ignore[attr-defined]
            if defines(editor, "weights"):
                block.weights = _replaced(editor, editor.weights(block), block.weights)  # type: ignore[attr-defined]
        if opened.heads is not None and not editors:
            block.heads, block.weights = opened.heads, block.weights.index_select(1, opened.heads)
        _tell(readers, "weights", block)
        return mix(call, block) if editors else fast(call)

    return outer


def _refuse_edits(call: Call, editors: Sequence[Edit], swapped: Edit) -> None:
    """A swapped-in mechanism may have no scores, and one with a state has no weights for earlier keys."""
    for edit in editors:
        if defines(edit, "scores"):
            raise RegardError(
                f"{type(edit).__name__} changes scores, and {call.site.alias} computes attention by "
                f"{swapped!r}; steer other layers, or edit weights."
            )
    if editors and call.carried is not None:
        raise RegardError(
            f"{type(editors[0]).__name__} changes weights, and {call.site.alias} decodes from a state, in "
            "which earlier keys have none; run it with use_cache=False."
        )


def _opened(
    call: Call, edits: Sequence[Edit], lenses: Sequence[Lens], wanted: dict[int, Wanted | None]
) -> _Opened:
    opened = _Opened(
        [e for e in edits if _needs_rows(e, wanted[id(e)])],
        [lens for lens in lenses if _needs_rows(lens, wanted[id(lens)])],
    )
    wants = [wanted[id(stage)] for stage in (*opened.edits, *opened.lenses)]
    given = [w for w in wants if w is not None]
    if given and all(w.heads is not None for w in given):
        union = sorted({h for w in given for h in w.heads or ()})
        if len(union) < call.heads:
            opened.heads = torch.tensor(union, device=call.q.device)
    if given and all(w.rows is not None for w in given):
        start = min(w.rows[0] for w in given if w.rows)
        stop = min(call.query_length, max(w.rows[1] for w in given if w.rows))
        if (start, stop) != (0, call.query_length):
            opened.rows = (start, stop)
    return opened


def _needs_rows(stage: Stage, want: Wanted | None) -> bool:
    some = want is not None and (want.heads is None or len(want.heads) > 0)
    return some and any(defines(stage, method) for method in ROW_METHODS)


def _softmax_attention(
    call: Call, edits: Sequence[Edit], lenses: Sequence[Lens], wanted: dict[int, Wanted | None]
) -> Tensor:
    opened = _opened(call, edits, lenses, wanted)
    if not opened:
        return attend(call)
    if torch.is_grad_enabled() and not opened.edits and not any(map(_differentiable, opened.lenses)):
        return _watched(call, opened)
    reuse = False if torch.is_grad_enabled() and opened.edits else None
    for count, edit in enumerate(opened.edits):
        if defines(edit, "survey") and _surveys(edit, call):
            _survey(call, edit, opened, opened.edits[:count])
    writes = opened.everything or bool(opened.edits)
    keep_all = reuse is False or torch.is_grad_enabled()
    if opened.everything:
        out = None if keep_all else _output_like(call)
    else:
        out = attend(call)
        out = out.clone() if writes else out
    parts = []
    for block in _blocks(call, opened, reuse):
        _run_block(call, block, opened.edits, opened.lenses)
        if not writes:
            continue
        if out is None:
            parts.append(mix(call, block))
        else:
            mix_into(out, call, block)
    if out is None:
        return torch.cat(parts, 2)
    return out


def _watched(call: Call, opened: _Opened) -> Tensor:
    """Attention under autograd as without lenses, so that checkpointing repeats it; then what they read."""
    out = attend(call)
    with torch.no_grad():
        for block in _blocks(call, opened, None):
            _run_block(call, block, (), opened.lenses)
    return out


def _output_like(call: Call) -> Tensor:
    batch, heads, length, _ = call.q.shape
    return call.q.new_empty(batch, length, heads, call.v.shape[3]).transpose(1, 2)


def _blocks(call: Call, opened: _Opened, reuse: bool | None) -> Any:
    size = call.extra.get("block_rows")
    memory = call.run.memory
    return row_blocks(call, heads=opened.heads, rows=opened.rows, block_rows=size, reuse=reuse, memory=memory)


def _run_block(call: Call, block: RowBlock, edits: Sequence[Edit], lenses: Sequence[Lens]) -> None:
    call.annotate(block)
    for edit in edits:
        if defines(edit, "scores"):
            new = edit.scores(block)  # type: ignore[attr-defined]
            # A row that sees nothing stays even, and does not become NaN, where masked scores grow.
            if new is not None:
                block.scores = _replaced(edit, new, block.scores).clamp(min=MASKED)
    _tell(lenses, "scores", block)
    softmax(call, block)
    for edit in edits:
        if defines(edit, "weights"):
            new = edit.weights(block)  # type: ignore[attr-defined]
            if new is not None:
                block.weights = _replaced(edit, new, block.weights)
    _tell(lenses, "weights", block)


def _surveys(edit: Edit, call: Call) -> bool:
    return not defines(edit, "surveys") or edit.surveys(call)  # type: ignore[attr-defined]


def _survey(call: Call, edit: Edit, opened: _Opened, earlier: Sequence[Edit]) -> None:
    """Show `edit` all weights as the edits before it left them."""
    with torch.no_grad():
        for block in _blocks(call, opened, None):
            _run_block(call, block, earlier, ())
            edit.survey(block)  # type: ignore[attr-defined]
