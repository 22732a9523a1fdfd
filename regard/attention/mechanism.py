"""What a mechanism of attention is: its matrix by definition, a fast path, and steps where it carries state.

What a user configures is a *spec*, a frozen dataclass such as `SlidingWindow(256)`; `build` makes the
module of one layer from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from regard.engines.masks import CausalMask, Mask, PaddedMask
from regard.engines.rows import AttentionInputs
from regard.errors import RegardError

State = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Context:
    """What a mechanism knows of a call besides q, k and v.

    Attributes:
        mask: which keys each row may see, padding included.
        causal: whether a row may not see keys after it.
        offset: row i stands at key i + `offset`.
        plain: whether `mask` is nothing but this order and padding: no window, no image block.
        valid_queries, valid_keys: bool [B, T] and [B, S], False at padding; None where there is none.
        scale: factor on q k^T, where the mechanism forms it; None for 1 / sqrt(D).
        softcap: c in c * tanh(scores / c), or None.
        bias: added to the scores, broadcastable to [B, H, T, S], or None.
        sink_logits: one logit a head [H] that joins a softmax, or None.
        dropout: probability, on the weights of a softmax.
    """

    mask: Mask
    causal: bool = True
    offset: int = 0
    plain: bool = True
    valid_queries: Tensor | None = None
    valid_keys: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    sink_logits: Tensor | None = None
    dropout: float = 0.0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *, causal: bool = True, valid: Tensor | None = None) -> Context:
        """Return the context of self-attention over `k`, the last positions of which are those of `q`.

        Args:
            q: [B, H, T, D].
            k: [B, Hkv, S, D]; S >= T where causal.
            valid: bool [B, S], False at padding.
        """
        queries, keys = q.shape[2], k.shape[2]
        offset = keys - queries if causal else 0
        if offset < 0:
            raise RegardError(f"causal attention of {queries} queries needs as many keys, and has {keys}.")
        mask = CausalMask(queries, keys, offset, q.device) if causal else Mask(queries, keys)
        rows = None
        if valid is not None:
            mask, rows = PaddedMask(mask, valid), valid[:, keys - queries :] if causal else None
        return cls(mask, causal, offset, valid_queries=rows, valid_keys=valid)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionInputs:
        """Return the same call as the engines take it."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return AttentionInputs(
            q, k, v, self.mask, scale, self.softcap, self.bias, self.sink_logits, self.dropout
        )


class Mechanism(nn.Module):
    """The attention of one layer.

        matrix(q, k, ctx)          [B, H, T, S], the definition, O(T * S)
        forward(q, k, v, ctx)      [B, H, T, Dv], the fast path
        step(q, k, v, state, ctx)  the same for new positions only, and the new state; where it carries one

    q is [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], with H a multiple of Hkv.

    Attributes:
        carries_state: whether it decodes from a state of its own instead of the cached keys and values.
        honours: which of `bias`, `softcap` and `sink_logits` it takes into account, or does without
            because it forms no scores; a call with another is refused.
        exempt: laws that it breaks by design, and why.
    """

    carries_state: ClassVar[bool] = False
    honours: ClassVar[frozenset[str]] = frozenset()
    exempt: ClassVar[dict[str, str]] = {}

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        """Return the weight of each key for each row, [B, H, T, S]; rows of padding are arbitrary."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        """Return head outputs [B, H, T, Dv]; without `ctx`, causal self-attention."""
        raise NotImplementedError

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of T >= 1 new positions [B, H, T, Dv], and the state after them.

        Args:
            k, v: the new positions only.
            state: what this returned before, tensors with the batch first; None at the beginning.
            ctx: of the new positions only: its mask is T x T.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Spec:
    """The options of a mechanism; a subclass names its module in `module`."""

    module: ClassVar[type[Mechanism]]
    registered: ClassVar[str]

    def build(self, site: Any = None) -> Mechanism:
        """Return the module of one layer.

        Args:
            site: the `regard.runtime.Site` it is for, where the mechanism depends on the layer.
        """
        return self.module(**{f.name: getattr(self, f.name) for f in fields(self)})

    def to_dict(self) -> dict[str, Any]:
        """Return the options with the mechanism's name, as JSON can hold them."""
        return {"mechanism": self.registered, **asdict(self)}


MECHANISMS: dict[str, type[Spec]] = {}
S = TypeVar("S", bound=type[Spec])


def mechanism(name: str) -> Callable[[S], S]:
    """Register a spec under `name`.

    Raises:
        RegardError: where the name is taken.
    """

    def register(kind: S) -> S:
        if name in MECHANISMS:
            raise RegardError(f"mechanism {name!r} is registered already, as {MECHANISMS[name].__name__}.")
        MECHANISMS[name] = kind
        kind.registered = name
        return kind

    return register


def get(name: str, **options: Any) -> Spec:
    """Return the spec registered under `name`, with `options`.

    Raises:
        RegardError: where there is none, or it does not take an option; the message names what there is.

    Example:
        >>> get("sliding-window", window=256)
        SlidingWindow(window=256)
    """
    if name not in MECHANISMS:
        near = difflib.get_close_matches(name, MECHANISMS, n=3)
        known = ", ".join(sorted(MECHANISMS))
        hint = f"did you mean {' or '.join(near)}?" if near else f"the mechanisms are {known}."
        raise RegardError(f"no mechanism {name!r}; {hint}")
    kind = MECHANISMS[name]
    takes = [f.name for f in fields(kind)]
    unknown = [option for option in options if option not in takes]
    if unknown:
        raise RegardError(f"{name} takes no {unknown[0]!r}; its options are {', '.join(takes) or 'none'}.")
    return kind(**options)


def from_dict(given: dict[str, Any]) -> Spec:
    """Return the spec that `Spec.to_dict` described."""
    options = dict(given)
    return get(options.pop("mechanism"), **options)
