"""Titans: attention over a short stretch joined to a neural memory of all that came before, in three ways.

    MAC, context   h = M(q(x)), M as it was before the segment;  y = attention over [P, h, x] in the segment
                   out = y (x) M_t(y), where the memory is written with y
    MAG, gate      y = window attention over [P, x];  out = y (x) M_t(x)
    MAL, layer     out = window attention over norm(M_t([P, x]))

P are learned tokens that do not depend on the input; a (x) b = W (norm(a) * s(norm(b))). The memory is that
of `NeuralMemory`.

Source: Behrouz et al., 2024, arXiv 2501.00663, section 4. Status: paper only, and partly our choice: in MAC a
position sees what was recalled for itself and for those before it in its segment, since what was recalled
for a later one tells of it; what is recalled is normalised; attention has rotary positions, P none; the
paper does not fix the gate. Operations of one token do not depend on what came before.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import Costs
from regard.attention.mechanism import State
from regard.attention.registry import Spec, mechanism
from regard.attention.titans.context import ContextMemory
from regard.attention.titans.core import MemoryCore, Options
from regard.attention.titans.parts import Aligned, Joined, check_counts, check_state, check_x
from regard.attention.titans.window import WindowAttention
from regard.errors import RegardError

KEPT = 3


class GatedMemory(Block):
    """Memory as gate; the module of `Titans(variant="mag")`."""

    causal = True

    def __init__(self, options: Options, window: int, persistent: int) -> None:
        super().__init__()
        self.memory, self.joined = MemoryCore(options), Joined(options.dim)
        self.attention = WindowAttention(options.dim, options.heads, window, persistent)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the outputs [B, T, dim]; valid is bool [B, T], False at padding."""
        return self.step(x, None, valid)[0]

    def step(
        self, x: Tensor, state: State | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state: attention's, then the memory's."""
        check_x(x, self.memory.options.dim)
        rows = Aligned(x, valid)
        near, far = _sides(self, state, len(x))
        y, near = self.attention.step(rows.x, near, rows.filled)
        answers, far = self.memory.mix(rows.x, far, rows.filled)
        return rows.back(self.joined(y, answers)), (*near, *far)

    def reference(self, x: Tensor) -> Tensor:
        return self.joined(self.attention.reference(x), self.memory.naive(len(x)).answer(x))

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.memory.options.dim, generator=generator, dtype=torch.float64)


class LayeredMemory(Block):
    """Memory as layer; the module of `Titans(variant="mal")`."""

    causal = True

    def __init__(self, options: Options, window: int, persistent: int) -> None:
        super().__init__()
        self.memory, dim = MemoryCore(options), options.dim
        self.norm, self.output = nn.RMSNorm(dim, eps=1e-5), nn.Linear(dim, dim, bias=False)
        self.attention = WindowAttention(dim, options.heads, window, 0)
        self.persistent = nn.Parameter(torch.randn(persistent, dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the outputs [B, T, dim]; valid is bool [B, T], False at padding."""
        return self.step(x, None, valid)[0]

    def step(
        self, x: Tensor, state: State | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state: attention's, then the memory's."""
        check_x(x, self.memory.options.dim)
        rows = Aligned(x, valid)
        rows_x, filled, first = rows.x, rows.filled, 0
        near, far = _sides(self, state, len(x))
        if state is None:
            first = len(self.persistent)
            rows_x = self._led(rows_x)
            filled = None if filled is None else filled + first
        answers, far = self.memory.mix(rows_x, far, filled)
        y, near = self.attention.step(self.norm(answers), near, filled)
        return rows.back(self.output(y[:, first:])), (*near, *far)

    def reference(self, x: Tensor) -> Tensor:
        answers = self.memory.naive(len(x)).answer(self._led(x))
        out: Tensor = self.output(self.attention.reference(self.norm(answers)))
        return out[:, len(self.persistent) :]

    def _led(self, x: Tensor) -> Tensor:
        """[P, x]."""
        return torch.cat([self.persistent.to(x.dtype).expand(len(x), -1, -1), x], 1)

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.memory.options.dim, generator=generator, dtype=torch.float64)


def _sides(
    layer: GatedMemory | LayeredMemory, state: State | None, batch: int
) -> tuple[State | None, State | None]:
    """Attention's part of a state and the memory's."""
    if state is None:
        return None, None
    check_state(state, [*layer.attention.shapes(batch), *layer.memory.shapes(batch)])
    return state[:KEPT], state[KEPT:]


VARIANTS: dict[str, type[ContextMemory] | type[GatedMemory] | type[LayeredMemory]] = {
    "mac": ContextMemory, "mag": GatedMemory, "mal": LayeredMemory,
}  # fmt: skip


@mechanism("titans")
@dataclass(frozen=True, kw_only=True)
class Titans(Options, Spec):
    """Attention over a short stretch joined to a neural memory; a causal layer from x to x.

    Attributes:
        variant: `mac`, memory as context, `mag`, as gate, or `mal`, as layer before attention.
        window: positions that attention sees; in `mac` the length of a segment.
        persistent: number of learned tokens.
        dim, heads, ...: as in `NeuralMemory`; attention has as many heads.

    Example:
        >>> layer = Titans(dim=32, heads=4, variant="mag", window=4).build()
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    module: ClassVar = Block
    costs: ClassVar = Costs(
        time="T (w D + D^2)", memory="w D + D^2", step_time="w D + D^2", step_memory="w D + D^2"
    )
    variant: str = "mac"
    window: int = 64
    persistent: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise RegardError(f"variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}.")
        check_counts({"window": self.window})
        check_counts({"persistent": self.persistent}, least=0)
        if self.dim // self.heads % 2:
            raise RegardError(
                f"a head is {self.dim // self.heads} wide, and must be even: attention has rotary positions."
            )

    def build(self, site: object = None) -> Block:
        given = asdict(self)
        options = Options(**{f.name: given[f.name] for f in fields(Options)})
        return VARIANTS[self.variant](options, self.window, self.persistent)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=8, heads=2, window=5, chunk_size=3, persistent=2),
            cls(dim=8, heads=2, window=4, depth=1, chunk_size=1, persistent=0),
            cls(dim=8, heads=2, variant="mag", window=4, chunk_size=4, persistent=2),
            cls(dim=8, heads=2, variant="mal", window=4, chunk_size=4, persistent=2),
        )
