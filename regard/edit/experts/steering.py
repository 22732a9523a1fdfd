"""Tuned experts as an edit: for `regard.steer`, beside lenses and other edits, and for files of edits.

Source: Dahlke et al., 2025, arXiv 2502.11096, section 4. Status: partly our choice: accounts of the paper
differ between drop and refill.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.edit.experts.routers import Router, routers_of
from regard.edit.experts.tuning import Choice, Expert, Mode, Scope, Tuned, emptied
from regard.edit.registry import edit
from regard.errors import RegardError
from regard.runtime.protocol import Edit, Wanted

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.run import Run

PAIR = re.compile(r"(\d+)\.(\d+)(?::([0-9.eE+-]+))?")


@edit("tune-experts")
@dataclass(frozen=True, kw_only=True, eq=False)
class TuneExperts(Edit):
    """Turn experts of a mixture-of-experts model off, on, or to a strength.

    Experts that all tokens share, the router's parameters, and the logits that a balancing loss reads stay as
    they are. Layers of which no expert is named cost nothing.

    Attributes:
        off, on: (layer, expert) each, or words such as `4.143,3.7`; a layer is the number of its block.
        gain: (layer, expert) -> factor, from 0, or words such as `4.143:0.5`; where the expert is chosen.
        mode: what `off` means. `drop`: the others of a token are scaled to the sum that there was; `silence`:
            they are not; `refill`: the router chooses others.
        scope: `all`, `prompt`, or `generated` for tokens after it.
        weight: of experts that are on; default what the router's formula gives.
        start: the first position of a sequence, padding left out, at which they are tuned.

    Raises:
        RegardError: for nothing to do, contradictions, a negative factor, weight or start; on entering, for
            more experts on in a layer than its router chooses.
        UnsupportedModel: on entering, for a model without routers.
        NoSuchSite: on entering, for a layer or expert that is not there.

    Example:
        >>> with regard.steer(model, TuneExperts(off=[(4, 143)])):              # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    off: Sequence[Expert] = ()
    on: Sequence[Expert] = ()
    gain: Mapping[Expert, float] = field(default_factory=dict)
    mode: Mode = "drop"
    scope: Scope = "all"
    weight: float | None = None
    start: int = 0
    told: Tuned = field(default_factory=Tuned, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("off", "on"):
            given = getattr(self, name)
            found = (
                [e for e, _ in _pairs(given, name)] if isinstance(given, str) else [tuple(e) for e in given]
            )
            object.__setattr__(self, name, tuple(found))
        gain = dict(_pairs(self.gain, "gain", True)) if isinstance(self.gain, str) else dict(self.gain)
        object.__setattr__(self, "gain", gain)
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise RegardError(f"start is {self.start!r}; it must be a whole number from 0.")
        self._choice.check_plain()

    @property
    def _choice(self) -> Choice:
        return Choice(tuple(self.off), tuple(self.on), self.gain, self.mode, self.scope, self.weight)

    def wants(self, call: Call) -> Wanted | None:
        return None

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model that it does not fit."""
        self._choice.check(routers_of(anatomy.root))

    def hooks(self, anatomy: Anatomy) -> Iterator[tuple[nn.Module, Any]]:
        """Where it acts: the routers of the layers that are named."""
        what = self._choice
        for router in what.touched(routers_of(anatomy.root)):

            def change(output: Any, run: Run, router: Router = router) -> Any:
                if not what.now(run.phase == "prefill" and not run.seen):
                    return None
                before = self.told.empty
                new = what.change(router, output, self.told)
                if self.told.empty and not before:
                    warnings.warn(emptied(self.told.empty), stacklevel=2)
                return self._from_start(output, new, run)

            yield router.module, change

    def _from_start(self, old: Any, new: tuple[Tensor, ...], run: Run) -> tuple[Tensor, ...]:
        """Leave tokens before `start` as they were."""
        if not self.start:
            return new
        late = (positions(run, new[1].shape[0]) >= self.start).flatten()[:, None].to(new[1].device)
        return tuple(torch.where(late, b, a) for a, b in zip(old, new, strict=True))


def positions(run: Run, tokens: int) -> Tensor:
    """Return where in its sequence each token of this forward stands, padding left out, int64 [B, T]."""
    width = tokens // max(run.batch, 1)
    if run.valid is not None and run.valid.shape[1] >= width:
        return (run.valid.long().cumsum(1) - 1)[:, -width:]
    return ((run.seen or 0) + torch.arange(width)).expand(max(run.batch, 1), width)


def _pairs(words: str, name: str, valued: bool = False) -> list[tuple[Expert, float]]:
    """The experts of words such as `4.143,3.7`, or `4.143:0.5` where each has a number."""
    found = []
    for part in words.split(","):
        match = PAIR.fullmatch(part.strip())
        if match is None or (match[3] is not None) is not valued:
            form = "LAYER.EXPERT:FACTOR such as 4.143:0.5" if valued else "LAYER.EXPERT such as 4.143,3.7"
            raise RegardError(f"{name} takes {form}, and got {words!r}.")
        found.append(((int(match[1]), int(match[2])), _number(match[3]) if valued else 0.0))
    return found


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise RegardError(f"gain takes LAYER.EXPERT:FACTOR, and {word!r} is no number.") from None
