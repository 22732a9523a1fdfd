"""What all layers with a neural memory share: projections, gates, the memory at first, and its definition."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from regard.attention.mechanism import State
from regard.attention.titans.parts import ShortConvolution, check_counts, check_state, heads_of, merged
from regard.engines.memory import ACTIVATIONS, Memory, Weights, apply, neural_memory
from regard.errors import RegardError

Gates = tuple[Tensor, Tensor | None, Tensor | None]
BIASES = {"step": -1.0, "forget": -4.0, "momentum": -1.0}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a memory is like; `NeuralMemory` says what the fields mean."""

    dim: int
    heads: int
    depth: int = 2
    expansion: int = 2
    chunk_size: int | None = 16
    momentum: bool = True
    forget: bool = True
    convolution: int = 4
    activation: str = "silu"
    max_step: float | None = None
    second_order: bool = True

    def __post_init__(self) -> None:
        counts = {n: getattr(self, n) for n in ("dim", "heads", "depth", "expansion", "chunk_size")}
        check_counts(counts, optional=("chunk_size",))
        check_counts({"convolution": self.convolution}, least=0)
        if self.dim % self.heads:
            raise RegardError(f"dim is {self.dim}, which {self.heads} heads do not divide.")
        for name in ("momentum", "forget", "second_order"):
            if not isinstance(getattr(self, name), bool):
                raise RegardError(f"{name} is {getattr(self, name)!r}; it must be True or False.")
        if self.activation not in ACTIVATIONS:
            raise RegardError(
                f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}."
            )
        if self.max_step is not None and not 0 < self.max_step < float("inf"):
            raise RegardError(f"max_step is {self.max_step}; it must be a number above 0.")

    @property
    def step(self) -> float:
        """The largest theta."""
        return self.max_step if self.max_step is not None else 1 / (self.chunk_size or 64)


class Gate(nn.Linear):
    """One number a head, a linear function of x.

    Attributes:
        first: what it is at first where x is 0.
    """

    def __init__(self, dim: int, heads: int, first: float) -> None:
        super().__init__(dim, heads)
        self.first = first
        nn.init.constant_(self.bias, first)


class MemoryCore(nn.Module):
    """Neural memories of one layer, from x to what they answer, without a projection of the output.

    Args:
        options: what the memories are like.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options, dim, heads = options, options.dim, options.heads
        self.projections = nn.Linear(dim, 3 * dim, bias=False)
        self.short = ShortConvolution(3 * dim, options.convolution) if options.convolution else None
        there = {"step": True, "forget": options.forget, "momentum": options.momentum}
        self.gates = nn.ModuleDict({name: Gate(dim, heads, BIASES[name]) for name in there if there[name]})
        width = dim // heads
        sizes = [width, *[options.expansion * width] * (options.depth - 1), width]
        self.weights = nn.ParameterList(torch.randn(heads, a, b) * a**-0.5 for a, b in pairwise(sizes))

    def parts(
        self, x: Tensor, tail: Tensor, filled: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Gates, Tensor]:
        """Return q, k, v [B, H, T, d], the gates theta, alpha, eta [B, H, T], and the next tail."""
        mixed = self.projections(x)
        if self.short is not None:
            mixed, tail = self.short(mixed, tail, filled)
        q, k, v = (
            heads_of(part, self.options.heads) for part in _raised(F.silu(mixed)).split(x.shape[-1], -1)
        )
        told = {name: _raised(gate(x)).sigmoid().mT for name, gate in self.gates.items()}
        gates = (self.options.step * told["step"], told.get("forget"), told.get("momentum"))
        return (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v), gates, tail

    def fresh_tail(self, x: Tensor) -> Tensor:
        """Return what stands before the first position of the convolution."""
        kept = 0 if self.short is None else self.short.kept
        return x.new_zeros(x.shape[0], kept, 3 * self.options.dim)

    def mix(self, x: Tensor, state: State | None, filled: Tensor | None = None) -> tuple[Tensor, State]:
        """Return what the memories answer while they are written, [B, T, dim], and the state after.

        The state is the convolution's tail, then the tensors of `Memory`.
        """
        tail, memory = self.fresh_tail(x), None
        if state is not None:
            self.check(state, x.shape[0])
            tail, memory = state[0], Memory.of(state[1:], self.options.depth)
        (q, k, v), (theta, alpha, eta), tail = self.parts(x, tail, filled)
        out, memory = neural_memory(
            q, k, v, theta, alpha, eta, weights=None if memory else tuple(self.weights), memory=memory,
            chunk=self.options.chunk_size, activation=self.options.activation, filled=filled,
            second_order=self.options.second_order,
        )  # fmt: skip
        return merged(out).to(x.dtype), (tail, *memory.tensors())

    def recall(self, x: Tensor, weights: Weights, tail: Tensor | None = None) -> Tensor:
        """Return what memories of these weights answer to x, [B, T, dim], without being written.

        Args:
            tail: of the convolution; None leaves the convolution out.
        """
        mixed = self.projections(x)
        if tail is not None and self.short is not None:
            mixed = self.short(mixed, tail)[0]
        q = F.normalize(heads_of(_raised(F.silu(mixed[..., : x.shape[-1]])), self.options.heads), dim=-1)
        return merged(apply(weights, q, self.options.activation)).to(x.dtype)

    def shapes(self, batch: int) -> list[list[int]]:
        """Return the shapes of the state's tensors."""
        kept = 0 if self.short is None else self.short.kept
        weights = [[batch, *w.shape] for w in self.weights]
        copies = 3 if self.options.momentum else 2
        return [[batch, kept, 3 * self.options.dim], [batch], *copies * weights]

    def check(self, state: State, batch: int) -> None:
        """Refuse a state of another layer, batch or dtype."""
        check_state(state, self.shapes(batch))
        kind = _raised(self.weights[0]).dtype
        if any(t.dtype != kind for t in state[2:]):
            raise RegardError(f"the memories of the state are {state[2].dtype}, and must be {kind}.")

    def naive(self, batch: int) -> NaiveMemory:
        """Return memories by definition."""
        return NaiveMemory(self, batch)


class NaiveMemory:
    """Memories by definition: one position after the other, gradients by automatic differentiation."""

    def __init__(self, core: MemoryCore, batch: int) -> None:
        self.core, self.options, self.seen = core, core.options, 0
        self.weights = tuple(w.expand(batch, *w.shape) for w in core.weights)
        self.start, self.surprise = self.weights, tuple(torch.zeros_like(w) for w in self.weights)
        self.gradient = vmap(vmap(grad(self._loss)))

    def _loss(self, weights: Weights, k: Tensor, v: Tensor) -> Tensor:
        return (apply(weights, k[None], self.options.activation)[0] - v).square().sum()

    def write(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """Write one position, q, k, v [B, H, d] and gates [B, H], and return the answer to q."""
        if self.options.chunk_size and self.seen % self.options.chunk_size == 0:
            self.start = self.weights
        theta, alpha, eta = (None if g is None else g[..., None, None] for g in gates)
        pairs = zip(self.surprise, self.gradient(self.start, k, v), strict=True)
        self.surprise = tuple((0 if eta is None else eta * s) - theta * g for s, g in pairs)
        keep = 1 if alpha is None else 1 - alpha
        self.weights = tuple(keep * w + s for w, s in zip(self.weights, self.surprise, strict=True))
        self.seen += 1
        return apply(self.weights, q[..., None, :], self.options.activation)[..., 0, :]

    def answer(self, x: Tensor) -> Tensor:
        """Write all positions of x [B, T, dim], from the first, and return the answers [B, T, dim]."""
        (q, k, v), gates, _ = self.core.parts(x, self.core.fresh_tail(x))
        outs = [x[:, 0:0]]
        for i in range(x.shape[1]):
            here = [None if g is None else g[..., i] for g in gates]
            out = self.write(q[:, :, i], k[:, :, i], v[:, :, i], (here[0], here[1], here[2]))  # type: ignore[arg-type]
            outs.append(out.flatten(1)[:, None].to(x.dtype))
        return torch.cat(outs, 1)


def _raised(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
