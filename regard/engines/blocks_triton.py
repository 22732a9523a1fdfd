"""Attention to listed key blocks on a GPU: launches of the kernels of `blocks_kernels.py`, with the gradient.

Lists and rows are read as they are. A mask that is a function of positions is evaluated for some query blocks
at a time, MASK bytes of it. Tiles of keys are at least 16 wide: in the gradients of keys, which go by key
block, smaller blocks leave the rest of a tile idle. The kernels have not been run or timed on a GPU yet;
`python -m benchmarks.blocks_gpu` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.block_tiles import Lists, grouped_mask

MASK = 2**28


def attend_triton(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, units: int
) -> tuple[Tensor, Tensor]:
    """Return out in the type of `q` and the float32 logsumexp, as `attend_blocks` returns them.

    Args:
        q: [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], of one type, not float64.
        lists: who reads what.
        units: units to a batch row, Hkv or H.
    """
    out, lse = _TritonBlocks.apply(*(_even(x) for x in (q, k, v)), lists, scale, units)
    if lists.rows is not None:
        shape = (lists.blocks, lists.size)
        out, lse = out.unflatten(2, shape), lse.unflatten(2, shape)
    return out, lse


def _even(x: Tensor) -> Tensor:
    """`x`, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Launch:
    """The inputs of one call, and how its kernels are launched."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, units: int) -> None:
        import triton

        self.q, self.k, self.v, self.lists, self.scale = q, k, v, lists, scale
        self.batch, self.heads, self.length, self.width = q.shape
        self.kv_heads, self.values = k.shape[1], v.shape[3]
        self.units, self.group, self.per = units, self.heads // units, units // self.kv_heads
        self.slots = self.length if lists.rows is None else lists.blocks * lists.size
        rows = self.group * lists.size
        large = max(self.width, self.values) > 128 or q.dtype == torch.float32
        most = 32 if large else 64
        self.tile = min(most, max(16, triton.next_power_of_2(rows)))
        self.tiles = triton.cdiv(rows, self.tile)
        self.columns = min(most, max(16, triton.next_power_of_2(lists.listed)))
        self.inside = min(most, max(16, triton.next_power_of_2(lists.key_block)))
        exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.options = {
            "D": self.width, "DV": self.values, "G": self.group, "R": lists.size, "KB": lists.key_block,
            "BM": self.tile, "BD": max(16, triton.next_power_of_2(self.width)),
            "BV": max(16, triton.next_power_of_2(self.values)), "ROWS": lists.rows is not None,
            "PRECISION": "wide" if not q.is_cuda else "ieee" if exact else "tf32",
        }  # fmt: skip
        self.index = _spread(lists.index.contiguous(), self.batch, units)
        self.rows = q if lists.rows is None else _spread(lists.rows.contiguous(), self.batch, self.heads)
        none = (0, 0, 0)
        self.of_rows = none if lists.rows is None else self.rows.stride()[:3]

    def outputs(self) -> tuple[Tensor, Tensor]:
        """The outputs [B, H, slots, Dv] and logsumexps [B, H, slots]."""
        from regard.engines.blocks_kernels import outputs_kernel

        out = self.q.new_empty(self.batch, self.heads, self.slots, self.values)
        lse = out.new_empty(out.shape[:3], dtype=torch.float32)
        for first, stop, mask in self._pieces():
            outputs_kernel[(self.tiles, stop - first, self.batch * self.units)](
                self.q, self.k, self.v, self.index, self.rows, self._there(mask), out, lse,
                *self._sizes(first), *self._strides(), *self.index.stride()[:3], *self.of_rows,
                *_steps(mask), **self.options, BN=self.columns, MASK=mask is not None,
            )  # fmt: skip
        return out, lse

    def gradients(self, to_out: Tensor, lse: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the queries by slot, and of keys and values, all float32."""
        from regard.engines.blocks_kernels import keys_kernel, queries_kernel

        given = to_out, lse, share
        to_q = lse.new_empty(*lse.shape, self.width)
        to_k, to_v = (lse.new_zeros(x.shape) for x in (self.k, self.v))
        subs = -(-self.lists.key_block // self.inside)
        parts = -(-self.lists.keys // self.lists.key_block) * subs
        for first, stop, mask in self._pieces():
            queries_kernel[(self.tiles, stop - first, self.batch * self.units)](
                self.q, self.k, self.v, self.index, self.rows, self._there(mask), *given, to_q,
                *self._sizes(first), *self._strides(), *self.index.stride()[:3], *self.of_rows,
                *_steps(mask), **self.options, BN=self.columns, MASK=mask is not None,
            )  # fmt: skip
            order, starts = self._turned(first, stop)
            scale, keys, _, slots, first, units, per = self._sizes(first)
            keys_kernel[(parts, self.batch * self.kv_heads)](
                self.q, self.k, self.v, self.rows, self._there(mask), order, starts, *given, to_k, to_v,
                scale, keys, slots, first, units, per, self.lists.index.shape[3], subs,
                *self._strides(), *order.stride()[:2], *starts.stride()[:2], *self.of_rows,
                *_steps(mask), **self.options, BN=self.inside, MASK=mask is not None, num_stages=1,
            )  # fmt: skip
        return to_q, to_k, to_v

    def _sizes(self, first: int) -> tuple[Any, ...]:
        return self.scale, self.lists.keys, self.lists.listed, self.slots, first, self.units, self.per

    def _strides(self) -> tuple[int, ...]:
        return tuple(stride for x in (self.q, self.k, self.v) for stride in x.stride()[:3])

    def _there(self, mask: Tensor | None) -> Tensor:
        return self.q if mask is None else mask

    def _pieces(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """Query blocks from and to, and what they see, uint8 [B, Hu, Q', G, R, N] or None for all listed."""
        lists = self.lists
        if not callable(lists.visible):
            yield 0, lists.blocks, self._spread_mask(lists.visible, lists.blocks)
            return
        said = [x.shape[0] * x.shape[1] for x in (lists.index, lists.rows) if x is not None]
        each = max(said) * self.group * lists.size * lists.listed
        some = max(1, MASK // each)
        for first in range(0, lists.blocks, some):
            stop = min(first + some, lists.blocks)
            mask = lists.mask(first, stop, self.group)
            yield first, stop, self._spread_mask(mask, stop - first)

    def _spread_mask(self, mask: Tensor | None, blocks: int) -> Tensor | None:
        if mask is None:
            return None
        mask = grouped_mask(mask, self.group) if mask.ndim < 6 else mask
        shape = (self.batch, self.units, blocks, self.group, self.lists.size, self.lists.listed)
        return mask.expand(shape).view(torch.uint8)

    def _turned(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Places in the lists of some query blocks, sorted by what is listed there, and where each begins."""
        index = self.lists.index[:, :, first:stop].flatten(2)
        count = -(-self.lists.keys // self.lists.key_block)
        placed, order = torch.where(index < 0, count, index).sort(dim=-1, stable=True)
        blocks = torch.arange(count + 1, device=index.device).expand(*index.shape[:2], -1).contiguous()
        starts = torch.searchsorted(placed, blocks)
        return tuple(_spread(x.int(), self.batch, self.units) for x in (order, starts))  # type: ignore[return-value]


def _spread(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B|1, h, ...] as [B, heads, ...], without a copy where h is 1 or `heads`."""
    x = x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)
    return x.expand(batch, heads, *x.shape[2:])


def _steps(mask: Tensor | None) -> tuple[int, ...]:
    return (0,) * 6 if mask is None else mask.stride()


class _TritonBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, units: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = _Launch(q, k, v, lists, scale, units).outputs()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.given = lists, scale, units
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor | None, to_lse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        lists, scale, units = ctx.given
        to_out = torch.zeros_like(out) if to_out is None else to_out.contiguous()
        share = (to_out.float() * out).sum(-1)
        share = (share if to_lse is None else share - to_lse).masked_fill(lse == -torch.inf, 0.0)
        to_q, to_k, to_v = _Launch(q, k, v, lists, scale, units).gradients(to_out, lse, share)
        if lists.rows is not None:
            to_q = _by_row(to_q, q, lists)
        return to_q.to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype), None, None, None


def _by_row(to_q: Tensor, q: Tensor, lists: Lists) -> Tensor:
    """Gradients by slot [B, H, Q R, D] as those of rows [B, H, T, D]; a row may have several, or none."""
    assert lists.rows is not None
    batch, heads, length, width = q.shape
    rows = lists.rows.expand(batch, heads, -1, -1).flatten(2)
    first = torch.arange(batch * heads, device=q.device).view(batch, heads, 1) * length
    found = to_q.new_zeros(batch * heads * length, width)
    to_q = to_q.masked_fill((rows < 0)[..., None], 0.0)
    found.index_add_(0, (rows.clamp_min(0) + first).flatten(), to_q.reshape(-1, width))
    return found.view(q.shape)
