"""Titans' neural long-term memory as a layer: a small network whose weights learn what passes by.

    k_t, v_t, q_t = s(conv(x_t W))                     s is SiLU, conv causal and of one filter a channel
    S_t = eta_t S_{t-1} - theta_t grad |M'(k_t) - v_t|^2      surprise, k and q of norm 1
    M_t = (1 - alpha_t) M_{t-1} + S_t                  the memory, an MLP of `depth` layers a head
    y_t = W_o (norm(M_t(q_t)) * s(W_g x_t))

alpha, eta in [0, 1] and theta in [0, max_step] are sigmoids of linear functions of x_t. M' is the memory at
the start of the chunk of t: with chunks of one position this is gradient descent with momentum, and with
larger ones another model, which can be computed faster. Training passes through the memory's gradients.

Source: Behrouz et al., 2024, arXiv 2501.00663, section 3 (the paper's LMM). Status: paper only, there is no
official code; the recurrence agrees with lucidrains/titans-pytorch where the two coincide. Operations
O(T P) a head for P weights; decoding O(P), whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import CARRIES_STATE
from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.ssm import titans
from regard.attention.mechanism import State
from regard.attention.registry import Spec, mechanism
from regard.attention.titans.core import MemoryCore, Options
from regard.attention.titans.parts import Aligned, check_x
from regard.engines.memory import Memory
from regard.errors import NotLinear


class NeuralMemoryLayer(Block):
    """A neural memory with its projections; the module of `NeuralMemory`."""

    causal = True

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.memory = MemoryCore(options)
        self.norm = nn.RMSNorm(options.dim, eps=1e-5)
        self.gate = nn.Linear(options.dim, options.dim, bias=False)
        self.output = nn.Linear(options.dim, options.dim, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return y [B, T, dim]; valid is bool [B, T], False at padding."""
        return self.step(x, None, valid)[0]

    def step(
        self, x: Tensor, state: State | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only, [B, T, dim].
            state: what this returned before; None at the beginning. Tensors, batch first: the convolution's
                tail, positions seen, and weights at the start of the chunk, weights and surprise by layer.
            valid: bool [B, T] of the new positions; padding is not written, and ages nothing.
        """
        check_x(x, self.memory.options.dim)
        rows = Aligned(x, valid)
        answers, after = self.memory.mix(rows.x, state, rows.filled)
        return rows.back(self._closed(rows.x, answers)), after

    def read(self, x: Tensor, state: State | None = None) -> Tensor:
        """Return what the layer answers to x [B, T, dim] from its memory as it is, writing nothing."""
        check_x(x, self.memory.options.dim)
        if state is None:
            fresh = Memory.fresh(tuple(self.memory.weights), x.shape[0], False)
            return self._closed(x, self.memory.recall(x, fresh.weights, self.memory.fresh_tail(x)))
        self.memory.check(state, x.shape[0])
        weights = Memory.of(state[1:], self.memory.options.depth).weights
        return self._closed(x, self.memory.recall(x, weights, state[0]))

    def reset(self, state: State, rows: Tensor) -> State:
        """Return the state with the sequences `rows`, bool [B], begun anew."""
        first = self.step(state[0].new_zeros(len(rows), 0, self.memory.options.dim))[1]
        shape = (-1, *[1] * 8)
        pairs = zip(first, state, strict=True)
        return tuple(torch.where(rows.view(shape[: s.ndim]), f.to(s.dtype), s) for f, s in pairs)

    def reference(self, x: Tensor) -> Tensor:
        return self._closed(x, self.memory.naive(x.shape[0]).answer(x))

    def _closed(self, x: Tensor, answers: Tensor) -> Tensor:
        closed: Tensor = self.output(self.norm(answers) * nn.functional.silu(self.gate(x)))
        return closed

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.memory.options.dim, generator=generator, dtype=torch.float64)


@system_of(NeuralMemoryLayer)
def system(mixer: NeuralMemoryLayer, x: Tensor) -> tuple[LTV, Tensor]:
    """Return memories of one matrix that begin empty as a linear time-varying system, and their values."""
    core, options = mixer.memory, mixer.memory.options
    if any(bool(w.any()) for w in core.weights):
        raise NotLinear("the memory at first is not zero, and what it answers does not come from the values.")
    (q, k, v), (theta, alpha, eta), _ = core.parts(x, core.fresh_tail(x))
    alpha, eta = (torch.zeros_like(theta) if g is None else g for g in (alpha, eta))
    chunk = options.chunk_size or x.shape[1] + 1
    return titans(q, k, theta, alpha, eta, v.shape[-1], depth=options.depth, chunk=chunk), v


@mechanism("neural-memory")
@dataclass(frozen=True, kw_only=True)
class NeuralMemory(Options, Spec):
    """Titans' neural memory alone; a causal layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of memories; each is as wide as dim / heads.
        depth: layers of a memory, from 1, a matrix.
        expansion: width of a memory's hidden layers, relative to its input.
        chunk_size: positions whose gradients are taken at one memory; 1 is the exact recurrence, None takes
            all at the first memory.
        momentum: whether surprise is carried on.
        forget: whether the memory is decayed.
        convolution: positions that the short convolution sees; 0 for none.
        activation: inside a memory, `silu` or `gelu`.
        max_step: the largest theta; None for 1 / chunk_size.
        second_order: whether training passes through the memory's gradients; without, keys and values learn
            nothing from it.

    Example:
        >>> layer = NeuralMemory(dim=32, heads=4).build()
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    module: ClassVar = NeuralMemoryLayer
    costs: ClassVar = CARRIES_STATE

    def build(self, site: object = None) -> NeuralMemoryLayer:
        return NeuralMemoryLayer(Options(**{f.name: getattr(self, f.name) for f in fields(Options)}))

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=8, heads=2, depth=1, chunk_size=1),
            cls(dim=8, heads=2, depth=1, chunk_size=4, momentum=False),
            cls(dim=8, heads=2, depth=2, chunk_size=4, activation="gelu"),
            cls(dim=8, heads=2, depth=3, chunk_size=1, forget=False, convolution=0),
            cls(dim=6, heads=1, depth=2, chunk_size=None),
        )
