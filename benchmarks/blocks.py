"""How fast is attention to listed blocks: against SDPA with the same mask, compiled FlexAttention, its floor?

Eight heads of width 64, batch 1, query blocks of 64, random lists of key blocks, one to each key head and
query block; `grid` takes key blocks of 16, 32 and 64 and 256, 512 and 1,024 listed keys, with 8 and with 2
key heads, and `kinds` what else a call may ask for, at 4,096 tokens. FlexAttention gets the same lists as a
block mask whose blocks are all full, and SDPA as a dense mask; it costs the same whatever the mask says, so
that it is timed once a length, with the list of one head for all. On a CPU FlexAttention has no backward.

Operations are 4 T N D H forward and 14 with backward, where N keys are listed; bytes are what inputs, outputs
and their gradients take once. The rate of matrix products is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import Times, interleaved
from regard.engines.blocks import attend_blocks, listed_mask

HEADS, WIDTH, ROWS = 8, 64, 64
KEY_BLOCKS, BUDGETS, KV_HEADS = (16, 32, 64), (256, 512, 1024), (8, 2)
LENGTHS = (4096, 16384)
FORWARD, BOTH, PRODUCTS = 4, 14, 16
PARTS = ("grid", "kinds")
Cases = dict[str, Callable[[], Any]]


@dataclass(frozen=True, eq=False)
class Subject:
    """One size: tensors and lists."""

    length: int
    kv_heads: int
    key_block: int
    budget: int
    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor

    @classmethod
    def of(cls, length: int, kv_heads: int, key_block: int, budget: int) -> Subject:
        """Draw tensors, and lists of different blocks in ascending order."""
        q = torch.randn(1, HEADS, length, WIDTH)
        k, v = torch.randn(2, 1, kv_heads, length, WIDTH)
        scores = torch.rand(1, kv_heads, length // ROWS, length // key_block)
        index = scores.topk(budget // key_block, -1).indices.sort(-1).values
        return cls(length, kv_heads, key_block, budget, q, k, v, index)

    def blocks(self, *given: Tensor, **options: Any) -> Tensor:
        """Attention by the engine, of the own tensors or of given ones."""
        options = {"index": self.index, "key_block": self.key_block, "query_block": ROWS, **options}
        return attend_blocks(*(given or (self.q, self.k, self.v)), **options)[0]

    def mask(self, start: int, stop: int) -> Tensor:
        """What rows see, bool [1, H, stop - start, S]."""
        found = listed_mask(self.index, start, stop, self.length, key_block=self.key_block, query_block=ROWS)
        return found.repeat_interleave(HEADS // self.kv_heads, 1)


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a size, and one a kind of call."""
    flex = None if options.no_flex else compiled_flex()
    rounds = options.rounds or (1 if options.quick else 5)
    rows: list[dict[str, Any]] = []
    if "grid" in options.parts:
        for length in options.lengths or ((256,) if options.quick else LENGTHS):
            for kv_heads in options.kv_heads:
                rows += _grid(length, kv_heads, flex, rounds, floor, options.quick)
    if "kinds" in options.parts:
        rows += _kinds(512 if options.quick else LENGTHS[0], rounds)
    return rows


def compiled_flex() -> Callable[..., Any]:
    """FlexAttention compiled anew for each size, as often as there are sizes."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def block_mask(subject: Subject) -> BlockMask:
    """The lists as FlexAttention takes them, every block full."""
    index = subject.index.repeat_interleave(HEADS // subject.kv_heads, 1).int()
    full = torch.zeros(*index.shape[:3], subject.length // subject.key_block, dtype=torch.int32)
    full[..., : index.shape[3]] = index
    count = torch.full(index.shape[:3], index.shape[3], dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(full), count, full,
        BLOCK_SIZE=(ROWS, subject.key_block), seq_lengths=(subject.length, subject.length),
        compute_q_blocks=False,
    )  # fmt: skip


def by_flex(flex: Callable[..., Any], subject: Subject) -> Callable[[], Tensor]:
    """A call of FlexAttention on the same blocks."""
    mask, grouped = block_mask(subject), subject.kv_heads != HEADS
    return lambda: flex(subject.q, subject.k, subject.v, block_mask=mask, enable_gqa=grouped)


def trained(work: Callable[..., Tensor], subject: Subject) -> Callable[[], None]:
    """Forward and backward of a function of q, k and v."""
    given = [x.clone().requires_grad_() for x in (subject.q, subject.k, subject.v)]
    into = torch.randn(1, HEADS, subject.length, WIDTH)

    def both() -> None:
        with torch.enable_grad():
            work(*given).backward(into)

    return both


def _grid(
    length: int, kv_heads: int, flex: Any, rounds: int, floor: dict[str, float], quick: bool
) -> list[dict[str, Any]]:
    """All sizes of a length, and SDPA, in turns."""
    sizes = [(16, 64), (32, 128)] if quick else [(block, n) for block in KEY_BLOCKS for n in BUDGETS]
    subjects = {(block, n): Subject.of(length, kv_heads, block, n) for block, n in sizes}
    cases: Cases = {}
    for (block, n), subject in subjects.items():
        peer = None if flex is None else by_flex(flex, subject)
        _check(subject, peer)
        cases[f"blocks {block} {n}"] = subject.blocks
        cases[f"blocks both {block} {n}"] = trained(subject.blocks, subject)
        if peer is not None:
            cases[f"flex {block} {n}"] = peer
    one = next(iter(subjects.values()))
    mask = one.mask(0, length)[:, :1].contiguous()

    def sdpa(*given: Tensor) -> Tensor:
        return scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=kv_heads != HEADS)

    times = _timed(cases, rounds)
    slow = _timed(
        {"sdpa": lambda: sdpa(one.q, one.k, one.v), "sdpa both": trained(sdpa, one)},
        rounds if length <= LENGTHS[0] else 1,
    )
    rows = [_row(x, times, slow, floor) for x in subjects.values()]
    return [*rows, _sdpa_row(one, slow)]


def _check(subject: Subject, peer: Callable[[], Tensor] | None) -> None:
    """Refuse an output, or gradients, that are not those of SDPA with the same mask, or FlexAttention's."""
    found = subject.blocks()
    if peer is not None:
        _same("FlexAttention", found, peer())
    rows = min(512, subject.length)
    given = [x.clone().requires_grad_() for x in (subject.q[:, :, :rows], subject.k, subject.v)]
    mask, index = subject.mask(0, rows), subject.index[:, :, : rows // ROWS]
    with torch.enable_grad():
        dense = scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=subject.kv_heads != HEADS)
        ours = subject.blocks(*given, index=index)
        wanted = torch.autograd.grad(dense.sin().sum(), given)
        gradients = torch.autograd.grad(ours.sin().sum(), given)
    _same("SDPA", found[:, :, :rows], dense)
    for one, other in zip(gradients, wanted, strict=True):
        _same("SDPA's gradient", one, other)


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 1e-4:
        raise WrongResult(f"attention to listed blocks and {name} differ by {off:.1e} of the largest")


def _timed(cases: Cases, rounds: int) -> Times:
    """Time the cases with matrix products beside them."""
    a, b, out = torch.randn(2048, 576), torch.randn(576, 1536), torch.empty(2048, 1536)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return interleaved({"products": products, **cases}, rounds)


def _share(times: Times, name: str, operations: float) -> float:
    """The rate of a case as a share of the machine's matrix rate."""
    return times.ratio("products", name) * operations / (2 * 2048 * 576 * 1536 * PRODUCTS)


def _row(subject: Subject, times: Times, slow: Times, floor: dict[str, float]) -> dict[str, Any]:
    size = f"{subject.key_block} {subject.budget}"
    ours, both, flex = f"blocks {size}", f"blocks both {size}", f"flex {size}"
    each = subject.length * subject.budget * WIDTH * HEADS
    inputs = 4 * (2 * subject.q.numel() + 2 * subject.k.numel())
    row: dict[str, Any] = {
        "case": ["grid", subject.length, subject.kv_heads, subject.key_block, subject.budget],
        "ms": 1e3 * times.median(ours),
        "of_rate": _share(times, ours, FORWARD * each),
        "bytes_ms": 1e3 * inputs / floor["bytes"],
        "both_ms": 1e3 * times.median(both),
        "both_of_rate": _share(times, both, BOTH * each),
        "both_bytes_ms": 2e3 * inputs / floor["bytes"],
        "sdpa_over_blocks": slow.median("sdpa") / times.median(ours),
        "sdpa_both_over_blocks": slow.median("sdpa both") / times.median(both),
    }
    if flex in times.seconds:
        low, high = times.spread(flex, ours)
        row |= {"flex_ms": 1e3 * times.median(flex), "flex_over_blocks": times.ratio(flex, ours)}
        row |= {"flex_least": low, "flex_most": high}
    kept = {name: times.seconds[name] for name in ("products", ours, both, flex) if name in times.seconds}
    return row | {"dropped": times.dropped, "times": Times(kept, times.dropped).as_json()}


def _sdpa_row(subject: Subject, times: Times) -> dict[str, Any]:
    each = subject.length**2 * WIDTH * HEADS
    return {
        "case": ["sdpa", subject.length, subject.kv_heads],
        "ms": 1e3 * times.median("sdpa"),
        "of_rate": _share(times, "sdpa", FORWARD * each),
        "both_ms": 1e3 * times.median("sdpa both"),
        "both_of_rate": _share(times, "sdpa both", BOTH * each),
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _kinds(length: int, rounds: int) -> list[dict[str, Any]]:
    """What masks, ragged lists and gathered rows cost, beside whole lists of the same length."""
    subject = Subject.of(length, 2, 32, min(512, length // 2))
    listed, count = subject.index.shape[3], length // ROWS
    by_head = subject.index.repeat_interleave(HEADS // 2, 1)
    half = subject.index.clone()
    half[..., listed // 2 :] = -1
    rows = torch.randperm(length).view(1, 1, count, ROWS)
    seen = torch.rand(1, 1, count, ROWS, listed * 32) < 0.9
    kinds: dict[str, dict[str, Any]] = {
        "a list a key head": {},
        "a list a query head": {"index": by_head},
        "a list for all heads": {"index": subject.index[:, :1]},
        "causal, by a function": {"visible": lambda i, j: j <= i},
        "a mask of rows and listed keys": {"visible": seen},
        "half of each list empty": {"index": half},
        "gathered rows": {"rows": rows, "query_block": None},
        "a softmax a block": {"merge": False},
    }
    cases: Cases = {}
    for name, given in kinds.items():
        cases[name] = lambda given=given: subject.blocks(**given)
        cases[f"{name}, both"] = _trained_kind(subject, given)
    times = _timed(cases, rounds)
    base = "a list a key head"
    return [
        {
            "case": ["kinds", length, name],
            "ms": 1e3 * times.median(name),
            "over_whole_lists": times.ratio(name, base),
            "both_ms": 1e3 * times.median(f"{name}, both"),
            "both_over_whole_lists": times.ratio(f"{name}, both", f"{base}, both"),
            "dropped": times.dropped,
        }
        for name in kinds
    ]


def _trained_kind(subject: Subject, given: dict[str, Any]) -> Callable[[], None]:
    inputs = [x.clone().requires_grad_() for x in (subject.q, subject.k, subject.v)]

    def both() -> None:
        with torch.enable_grad():
            subject.blocks(*inputs, **given).sum().backward()

    return both


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    options.add_argument("--lengths", type=int, nargs="+", help="tokens, in 64s (default: 4096 16384)")
    options.add_argument("--kv-heads", type=int, nargs="+", choices=KV_HEADS, default=KV_HEADS)
    options.add_argument("--no-flex", action="store_true", help="leave FlexAttention out: no compiling")
    return answer("blocks", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
