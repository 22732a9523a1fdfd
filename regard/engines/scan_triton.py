"""The recurrence on a GPU: launches of the kernels of `scan_kernels.py`, with their gradient.

Chunks are of 64 positions, of 32 in float32 or where D is above 128, and of 16 with a decay by channel, so
that the memory of a multiprocessor holds what a program needs. Exponents are summed in float32 and are at
least FORGET, below which exp is 0 there anyway: a chunk that forgets all somewhere may be off by some 1e-5 of
what it keeps. The kernels have not been run or timed on a GPU yet; `python -m benchmarks.scan_gpu` does it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.errors import RegardError

FORGET, WIDEST = -100.0, 256


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot take these inputs, or None where they can."""
    kinds = {x.dtype for x in (q, k, v)}
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"q is on {q.device}, and triton needs a GPU"
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16, torch.float16}:
        named = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"q, k and v are {named}; they must all be float32, bfloat16 or float16"
    if max(q.shape[3], v.shape[3]) > WIDEST or q.shape[3] == 0 or v.shape[3] == 0:
        return f"heads are {q.shape[3]} and {v.shape[3]} wide; triton takes 1 to {WIDEST}"
    return None


def uses_triton(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether kernels are to take these inputs: by default on a GPU, where they can.

    Raises:
        RegardError: for a backend that is neither `torch`, `triton` nor None, or `triton` where it cannot.
    """
    if backend not in (None, "torch", "triton"):
        raise RegardError(f"backend is {backend!r}; it must be 'torch', 'triton' or None.")
    if backend == "torch" or (backend is None and not q.is_cuda):
        return False
    reason = why_not(q, k, v)
    if backend == "triton" and reason is not None:
        raise RegardError(f"backend is 'triton', but {reason}.")
    return reason is None


def scan_triton(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, T, Dv] and the last state, both float32.

    Args:
        q: [B, H, T, D], T > 0; k [B, Hkv, T, D] and v [B, Hkv, T, Dv] of the same type.
        decay: g, [Hkv] or [B|1, Hkv|1, T, D|1], or None.
        state: float32 [B, Hkv, D, Dv].
        starts: bool [B, T], or None.
    """
    if decay is not None:
        shape = (k.shape[0], k.shape[1], k.shape[2], 1 if decay.ndim == 1 else decay.shape[3])
        by_step = decay.view(1, -1, 1, 1) if decay.ndim == 1 else decay
        decay = by_step.float().clamp(min=FORGET).expand(shape)
    sequences = None if starts is None else starts.to(torch.int32).cumsum(1, dtype=torch.int32)
    out, last = _TritonScan.apply(*(_rows(x) for x in (q, k, v)), decay, state.contiguous(), sequences)
    return out, last


def _rows(x: Tensor) -> Tensor:
    """`x`, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Launch:
    """The inputs of one call, and how its kernels are launched."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, sequences: Tensor | None
    ) -> None:
        import triton

        self.q, self.k, self.v = q, k, v
        self.batch, self.heads, self.length, self.width = q.shape
        self.kv_heads, self.values = k.shape[1], v.shape[3]
        self.group = self.heads // self.kv_heads
        kind = 0 if decay is None else 2 if decay.shape[3] > 1 else 1
        self.g = q if decay is None else decay if kind == 1 or decay.stride(3) == 1 else decay.contiguous()
        self.sequences = q if sequences is None else sequences
        large = self.width > 128 or q.dtype == torch.float32
        chunk = 16 if kind == 2 else 32 if large else 64
        self.chunks = triton.cdiv(self.length, chunk)
        room = max(16, triton.next_power_of_2(self.width))
        block = min(32 if room > 128 else 64, max(16, triton.next_power_of_2(self.values)))
        self.blocks = triton.cdiv(self.values, block)
        exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        precision = "wide" if not q.is_cuda else "ieee" if exact else "tf32"
        self.options = {
            "D": self.width, "DV": self.values, "C": chunk, "BD": room, "BV": block, "KIND": kind,
            "STARTS": sequences is not None, "PRECISION": precision,
        }  # fmt: skip

    def new(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def states(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """The states before chunks, [B, Hkv, N, D, Dv], and the last."""
        from regard.engines.scan_kernels import states_kernel

        states = self.new(self.batch, self.kv_heads, self.chunks, self.width, self.values)
        last = torch.empty_like(first)
        states_kernel[(self.blocks, self.batch * self.kv_heads)](
            self.k, self.v, self.g, self.sequences, first, states, last,
            self.length, self.chunks, self.kv_heads,
            *_strides(self.k, self.v, self.g), **self.options,
        )  # fmt: skip
        return states, last

    def outputs(self, states: Tensor) -> Tensor:
        """The outputs, [B, H, T, Dv]."""
        from regard.engines.scan_kernels import outputs_kernel

        out = self.new(self.batch, self.heads, self.length, self.values)
        outputs_kernel[(self.blocks, self.chunks, self.batch * self.heads)](
            self.q, self.k, self.v, self.g, self.sequences, states, out,
            self.length, self.chunks, self.heads, self.group,
            *_strides(self.q, self.k, self.v, self.g), **self.options,
        )  # fmt: skip
        return out

    def later(self, to_out: Tensor, to_last: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the states after chunks, [B, Hkv, N, D, Dv], and of the first."""
        from regard.engines.scan_kernels import later_kernel

        later = self.new(self.batch, self.kv_heads, self.chunks, self.width, self.values)
        to_first = torch.empty_like(to_last)
        later_kernel[(self.blocks, self.batch * self.kv_heads)](
            self.q, to_out, self.g, self.sequences, to_last, later, to_first,
            self.length, self.chunks, self.kv_heads, self.group,
            *_strides(self.q, to_out, self.g), **self.options,
        )  # fmt: skip
        return later, to_first

    def gradients(self, states: Tensor, later: Tensor, to_out: Tensor) -> list[Tensor]:
        """Those of q, k and v."""
        from regard.engines.scan_gradients import gradients_kernel

        widths = (self.width, self.width, self.values)
        found = [self.new(self.batch, self.heads, self.length, width) for width in widths]
        gradients_kernel[(self.chunks, self.batch * self.heads)](
            self.q, self.k, self.v, self.g, self.sequences, states, later, to_out, *found,
            self.length, self.chunks, self.heads, self.group,
            *_strides(self.q, self.k, self.v, self.g, to_out), **self.options, num_stages=1,
        )  # fmt: skip
        shared = [x.unflatten(1, (self.kv_heads, self.group)).sum(2) for x in found[1:]]
        return [found[0], *shared]


def _strides(*given: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in given for stride in x.stride()[:3])


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        state: Tensor,
        sequences: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch(q, k, v, decay, sequences)
        states, last = launch.states(state)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, decay, state, sequences, last)
        return launch.outputs(states), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor, to_last: Tensor) -> tuple[Tensor | None, ...]:
        from regard.engines.scan import gradient_of_decay

        q, k, v, decay, state, sequences, last = ctx.saved_tensors
        launch = _Launch(q, k, v, decay, sequences)
        to_out, to_last = _rows(to_out), to_last.contiguous()
        later, to_state = launch.later(to_out, to_last)
        to_q, to_k, to_v = launch.gradients(launch.states(state)[0], later, to_out)
        to_decay = None
        if ctx.needs_input_grad[3]:
            each, to_each = (x.unflatten(1, (launch.kv_heads, launch.group)) for x in (q, to_q))
            to_decay = gradient_of_decay(each, k, to_each, to_k, last, to_last, decay)
        return to_q.to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype), to_decay, to_state, None
