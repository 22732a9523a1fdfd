"""Turn experts off, on, or to a strength, while a mixture-of-experts model runs.

    drop      the router chooses as it does; the weights of experts that are off become 0, and the others of
              the token are scaled to the sum that the weights had. The vacancy stays
    refill    experts that are off are left out before the choice, so that others take their place
    silence   as drop, without the scaling
    on        an expert that was not chosen takes the place of the weakest that was; it gets the weight that
              the router's own formula gives it, or one that is given
    gain      the weight of an expert, where it is chosen, is multiplied

The experts that all tokens share, and the parameters of the router, stay as they are.

Source: Dahlke et al., 2025, arXiv 2502.11096, section 4. Status: partly our choice: accounts of the paper
differ between drop and refill.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.edit.experts.routers import Formula, Router, check_experts, routed, routers_of
from regard.errors import RegardError
from regard.runtime.anatomy import root_of

Expert = tuple[int, int]
Mode = Literal["drop", "refill", "silence"]
Scope = Literal["all", "prompt", "generated"]


@dataclass
class Tuned:
    """What happened while experts were tuned.

    Attributes:
        empty: tokens of which no routed expert was left, summed over layers.
    """

    empty: int = 0
    prompt: bool = field(default=True, repr=False)


@contextmanager
def tune_experts(
    model: nn.Module,
    *,
    off: Sequence[Expert] = (),
    on: Sequence[Expert] = (),
    gain: Mapping[Expert, float] | None = None,
    mode: Mode = "drop",
    scope: Scope = "all",
    weight: float | None = None,
) -> Iterator[Tuned]:
    """Run the block with experts turned off, on, or to a strength; `generate()` included.

    Args:
        model: a mixture-of-experts model of transformers.
        off, on: (layer, expert) each; a layer is the number of its block in the model.
        gain: (layer, expert) -> factor, from 0; it scales nothing else.
        mode: what `off` means, see above.
        scope: `prompt` leaves forwards of one token a sequence alone, `generated` all others.
        weight: of experts that are on; default what the router's formula gives.

    Raises:
        UnsupportedModel: for a model without routers, or one whose formula is not known.
        NoSuchSite: for a layer or expert that is not there.
        RegardError: for nothing to do, contradictions, a negative factor or weight, or more experts on in a
            layer than its router chooses.

    Example:
        >>> with tune_experts(model, off=[(4, 143)]):                           # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    what = Choice(tuple(off), tuple(on), dict(gain or {}), mode, scope, weight)
    what.check_plain()
    routers = routers_of(model)
    what.check(routers)
    state = Tuned()
    root = root_of(model)

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1), None)
        state.prompt = given is None or given.shape[1] > 1

    with ExitStack() as undo:
        undo.callback(root.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for router in what.touched(routers):

            def hook(module: nn.Module, args: Any, output: Any, router: Router = router) -> Any:
                return what.change(router, output, state) if what.now(state.prompt) else None

            undo.callback(router.module.register_forward_hook(hook).remove)
        yield state
    if state.empty:
        warnings.warn(emptied(state.empty), stacklevel=3)


def emptied(count: int) -> str:
    """Return what is said where tokens had no expert left."""
    return f"{count} times a token had no routed expert left; its layer gave what all tokens share."


@dataclass(frozen=True)
class Choice:
    """Which experts, and what becomes of them; as for `tune_experts`."""

    off: tuple[Expert, ...]
    on: tuple[Expert, ...]
    gain: Mapping[Expert, float]
    mode: str
    scope: str
    weight: float | None

    def check_plain(self) -> None:
        """Refuse what no model could be asked for.

        Raises:
            RegardError: for nothing to do, contradictions, unknown words, or a negative number.
        """
        if not (self.off or self.on or self.gain):
            raise RegardError("no experts were given to turn off, on, or to a strength.")
        for name, value, known in (
            ("mode", self.mode, get_args(Mode)), ("scope", self.scope, get_args(Scope)),
        ):  # fmt: skip
            if value not in known:
                raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        both = set(self.off) & set(self.on)
        if both:
            raise RegardError(f"expert {min(both)} is to be both off and on.")
        gains = [(f"the gain of {expert}", factor) for expert, factor in self.gain.items()]
        for name, number in [("weight", self.weight), *gains]:
            if number is not None and not 0 <= number < float("inf"):
                raise RegardError(f"{name} is {number}; it must be a finite number from 0.")

    def check(self, routers: Sequence[Router]) -> None:
        """Refuse what does not fit a model.

        Raises:
            NoSuchSite: for a layer or expert that is not there.
            RegardError: for more experts on in a layer than its router chooses.
        """
        check_experts([*self.off, *self.on, *self.gain], routers)
        for router in routers:
            wanted = sum(layer == router.layer for layer, _ in set(self.on))
            if wanted > router.chosen:
                raise RegardError(
                    f"{wanted} experts of layer {router.layer} are to be on, and its router chooses "
                    f"{router.chosen}."
                )

    def now(self, prompt: bool) -> bool:
        """Whether it acts on a forward of the prompt, or of tokens after it."""
        return self.scope == "all" or (self.scope == "prompt") == prompt

    def touched(self, routers: Sequence[Router]) -> list[Router]:
        """Return the routers of layers of which an expert is named."""
        layers = {layer for layer, _ in (*self.off, *self.on, *self.gain)}
        return [router for router in routers if router.layer in layers]

    def change(self, router: Router, output: Any, state: Tuned) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a router gives instead of its output, as (logits, weights, indices)."""
        off, on = ([e for layer, e in some if layer == router.layer] for some in (self.off, self.on))
        scaled = {e: g for (layer, e), g in self.gain.items() if layer == router.layer}
        logits, weights, indices = routed(output, router)
        tuning = _Tuning(router, logits, weights, indices, self.mode, self.weight)
        return (logits, *tuning.run(off, on, scaled, state))


class _Tuning:
    """One call of one router."""

    def __init__(
        self, router: Router, logits: Tensor, weights: Tensor, indices: Tensor, mode: str,
        weight: float | None,
    ) -> None:  # fmt: skip
        self.router, self.logits, self.mode, self.given = router, logits, mode, weight
        self.weights, self.indices, self.dtype = weights.float(), indices, weights.dtype
        self.original = weights, indices
        self.known: Formula | None = None
        self.total = self.weights.sum(-1, keepdim=True)

    def run(
        self, off: list[int], on: list[int], gains: dict[int, float], state: Tuned
    ) -> tuple[Tensor, Tensor]:
        if off:
            self._off(off)
            state.empty += int((self.weights.sum(-1) == 0).sum())
        for expert in on:
            self._on(expert, on)
        for expert, factor in gains.items():
            self.weights = torch.where(self.indices == expert, self.weights * factor, self.weights)
        return self.weights.to(self.dtype), self.indices

    def _off(self, off: list[int]) -> None:
        if self.mode == "refill":
            self._refill(off)
            return
        gone = torch.isin(self.indices, torch.tensor(off, device=self.indices.device))
        left = self.weights.masked_fill(gone, 0.0)
        if self.mode == "drop":
            size = left.sum(-1, keepdim=True)
            left = torch.where(size > 0, left * self.total / size.clamp_min(1e-20), left)
        self.weights = left

    def _refill(self, off: list[int]) -> None:
        formula = self._formula()
        indices, there = formula.without(off, self.router.chosen)
        same = indices.sort(-1).values == self.indices.sort(-1).values
        other = ~same.all(-1, keepdim=True)
        self.weights = torch.where(other, formula.weigh(indices, there, self.total), self.weights)
        self.indices = torch.where(other, indices, self.indices)

    def _on(self, expert: int, on: list[int]) -> None:
        there = (self.indices == expert).any(-1)
        if self.given is not None:
            self.weights = torch.where(self.indices == expert, self.given, self.weights)
        if bool(there.all()):
            return
        formula = self._formula()
        kept = torch.isin(self.indices, torch.tensor(on, device=self.indices.device))
        weakest = self.weights.masked_fill(kept, torch.inf).argmin(-1, keepdim=True)
        indices = self.indices.scatter(-1, weakest, expert)
        new = formula.weigh(indices, torch.ones_like(indices, dtype=torch.bool), self.total)
        if self.given is not None:
            new = self.weights.scatter(-1, weakest, self.given)
        self.weights = torch.where(there[..., None], self.weights, new)
        self.indices = torch.where(there[..., None], self.indices, indices)

    def _formula(self) -> Formula:
        if self.known is None:
            self.known = Formula.of(self.router, self.logits, *self.original)
        return self.known
