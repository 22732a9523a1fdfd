"""How fast is attention to listed blocks on a GPU: against FlexAttention on the same blocks, and dense flash?

Bfloat16, 16 query and 4 key heads of width 128, one sequence, query blocks of 64, for each key head and query
block a random list of key blocks, 1,024 keys in all; forward, and forward with backward. FlexAttention is
left out where it refuses blocks so small. Operations are 4 T N D H, and 3.5 times that with backward; bytes
are what a gather of every list reads. Rates are those measured on the same card in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.blocks import compiled_flex
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.scan_gpu import both, rates, seconds
from regard.engines.blocks import attend_blocks

HEADS, KV_HEADS, WIDTH, ROWS, BUDGET = 16, 4, 128, 64, 1024
LENGTHS, KEY_BLOCKS = (8192, 32768, 131072), (16, 32, 64, 128)


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length and key block."""
    for key_block in (2, *KEY_BLOCKS):
        _check(key_block)
    rounds = options.rounds or (3 if options.quick else 20)
    multiply, move = rates(rounds)
    lengths = options.lengths or (LENGTHS[:1] if options.quick else LENGTHS)
    flex = compiled_flex()
    return [
        _row(length, key_block, rounds, multiply, move, flex)
        for length in lengths
        for key_block in KEY_BLOCKS
    ]


def _inputs(length: int) -> list[Tensor]:
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    made = (torch.randn(1, n, length, WIDTH, device="cuda", dtype=torch.bfloat16) for n in sizes)
    return [x.requires_grad_() for x in made]


def _lists(length: int, key_block: int, budget: int) -> Tensor:
    count = budget // key_block
    scores = torch.rand(1, KV_HEADS, -(-length // ROWS), -(-length // key_block), device="cuda")
    return scores.topk(count, -1).indices.sort(-1).values


def _check(key_block: int) -> None:
    """Refuse outputs or gradients that are not those of the torch path in float64, of causal ragged lists."""
    given = _inputs(1000)
    wide = [x.detach().double().requires_grad_() for x in given]
    index = _lists(1000, key_block, 256)
    index[..., -1] = -1
    call = {"index": index, "key_block": key_block, "query_block": ROWS, "visible": lambda i, j: j <= i}
    with torch.enable_grad():
        out = attend_blocks(*given, **call, backend="triton")[0]
        exact = attend_blocks(*wide, **call, backend="torch")[0]
        found, expected = (torch.autograd.grad((o * o).sum(), x) for o, x in ((out, given), (exact, wide)))
    for one, other in zip((out, *found), (exact, *expected), strict=True):
        off = float((one - other).abs().max() / other.abs().max())
        if not off < 0.03:
            raise WrongResult(f"the kernels are off by {off:.1e} with key blocks of {key_block}")


def _block_mask(index: Tensor, length: int, key_block: int) -> BlockMask:
    every = index.repeat_interleave(HEADS // KV_HEADS, 1).int()
    full = every.new_zeros(*every.shape[:3], length // key_block)
    full[..., : every.shape[3]] = every
    count = torch.full_like(every[..., 0], every.shape[3])
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(full), count, full,
        BLOCK_SIZE=(ROWS, key_block), seq_lengths=(length, length),
    )  # fmt: skip


def _row(
    length: int, key_block: int, rounds: int, multiply: float, move: float, flex: Callable[..., Any]
) -> dict[str, Any]:
    q, k, v = _inputs(length)
    index = _lists(length, key_block, BUDGET)
    mask = _block_mask(index, length, key_block)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    cases: dict[str, Callable[[], Tensor]] = {
        "blocks": lambda: attend_blocks(
            q, k, v, index, key_block=key_block, query_block=ROWS, backend="triton"
        )[0],
        "flash": flash,
        "flex": lambda: flex(q, k, v, block_mask=mask, enable_gqa=True),
    }
    row: dict[str, Any] = {"case": [length, key_block], "gpu": torch.cuda.get_device_name()}
    _leave_out(cases, row, key_block)
    for name, work in cases.items():
        with torch.no_grad():
            row[f"{name}_ms"] = 1e3 * seconds(work, rounds)
        row[f"{name}_both_ms"] = 1e3 * seconds(lambda work=work: both(work), rounds)
    operations = 4 * length * BUDGET * WIDTH * HEADS
    gathered = length // ROWS * BUDGET * 2 * WIDTH * 2 * KV_HEADS
    row["of_rate"] = operations / (1e-3 * row["blocks_ms"]) / multiply
    row["of_bytes"] = gathered / (1e-3 * row["blocks_ms"]) / move
    row["both_of_rate"] = 3.5 * operations / (1e-3 * row["blocks_both_ms"]) / multiply
    for name in cases:
        row[f"{name}_over_blocks"] = row[f"{name}_ms"] / row["blocks_ms"]
        row[f"{name}_over_blocks_both"] = row[f"{name}_both_ms"] / row["blocks_both_ms"]
    return row


def _leave_out(cases: dict[str, Callable[[], Tensor]], row: dict[str, Any], key_block: int) -> None:
    """Drop FlexAttention where it cannot do such blocks, and say why; refuse one that answers otherwise."""
    try:
        with torch.no_grad():
            found, expected = cases["flex"](), cases["blocks"]()
        both(cases["flex"])
    except Exception as error:  # whatever its compiler raises
        row["flex_refuses"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        print(f"without FlexAttention for key blocks of {key_block}: {row['flex_refuses']}", file=sys.stderr)
        del cases["flex"]
        return
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 0.03:
        raise WrongResult(f"FlexAttention and the kernels differ by {off:.1e}, key blocks of {key_block}")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong, 2 without a GPU."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens (default: 8192 32768 131072)")
    given = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.blocks_gpu needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    return answer("blocks_gpu", given, ask)


if __name__ == "__main__":
    sys.exit(main())
