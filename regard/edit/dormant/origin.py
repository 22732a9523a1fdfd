"""Where the residual peak of the sink is made: what blocks hand on is left out, and a deep layer is looked
at.

    r = || residual stream of the first token after a deep block ||_2, with the attention output, the MLP
        output or both of one or several early blocks set to zero

The block without which the norm falls is the one that builds the peak.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo
et al., 2024, arXiv 2410.13835), `LLM/find_attn_sink_circuit.ipynb`, which looks at blocks 0, 1 and 2 of
Llama-3.1-8B from layer 24. Status: agrees with the official code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.lens.extremes.measure import check_fits, make
from regard.lens.extremes.pieces import LENGTH, Texts, cut
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.progress import bar
from regard.runtime.protocol import Edit
from regard.runtime.run import Run
from regard.runtime.site import Point
from regard.runtime.table import Table
from regard.runtime.verbs import steer, watch

PARTS = {"attention": ("attention",), "mlp": ("mlp",), "both": ("attention", "mlp")}
BLOCKS, DEEP = 3, 0.8


def sink_origin(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    blocks: Sequence[int] | None = None,
    read_at: int | None = None,
    together: int = 2,
    length: int | None = LENGTH,
    most: int | None = 4,
    progress: bool = True,
) -> Table:
    """Leave out what early blocks hand on, singly and together, and return what is left of the residual peak.

    Args:
        model, tokenizer, texts, length: as for `regard.lens.measure_sinks`.
        blocks: numbers of the blocks; default the first three.
        read_at: the block after which the first token is looked at; default four fifths of the depth.
        together: at most so many blocks at once.
        most: at most so many pieces.
        progress: whether a bar is shown, where stderr is a terminal.

    Returns:
        One row a choice: `blocks` such as `0+2`, `part`, `first`, the norm of the first token, `peak`, that
        over the largest other, and `left`, `first` over that of the whole model, whose row is the first.

    Raises:
        RegardError: for no block, `together` under 1, or texts of fewer than 2 tokens.
        NoSuchSite: for a block that is not there.
    """
    model = root_of(model)
    anatomy = anatomy_of(model)
    require_attention(anatomy)
    depth = len(anatomy.blocks())
    chosen = list(range(min(BLOCKS, depth - 1))) if blocks is None else list(blocks)
    deep = int(DEEP * depth) if read_at is None else read_at
    if not chosen or together < 1:
        raise RegardError(f"blocks is {chosen} and together {together}; give one block and 1 at least.")
    for block in (*chosen, deep):
        anatomy.block(block)
    pieces = cut(texts, tokenizer, length, most)
    check_fits(model, pieces)
    sets = [
        group for size in range(1, min(together, len(chosen)) + 1) for group in combinations(chosen, size)
    ]
    asked = [((), "none"), *((group, part) for group in sets for part in PARTS)]
    rows = []
    with bar("Leaving blocks out", len(asked), progress) as tick:
        for group, part in asked:
            rows.append(_read(model, pieces, group, PARTS.get(part, ()), f"{anatomy.main}.{deep}"))
            tick(1)
    whole = rows[0][0]
    return Table({
        "blocks": ["+".join(map(str, group)) or "-" for group, _ in asked],
        "part": [part for _, part in asked],
        "first": [first for first, _ in rows], "peak": [peak for _, peak in rows],
        "left": [first / whole for first, _ in rows],
    })  # fmt: skip


def _read(
    model: nn.Module, pieces: Sequence[Tensor], blocks: Sequence[int], parts: Sequence[str], deep: str
) -> tuple[float, float]:
    """Return the norm of the first token after a block, and its peak, with parts of blocks left out."""
    steered: Any = (
        steer(model, LeaveOut(blocks=tuple(blocks), parts=tuple(parts))) if blocks else nullcontext()
    )
    with torch.no_grad(), watch(model, make("residual-norm", name="norms")) as seen, steered:
        for ids in pieces:
            model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False)
    table = seen["norms"].table
    row = list(table["block"]).index(deep)
    return float(table["first"][row]), float(table["peak"][row])


@dataclass(frozen=True, kw_only=True, eq=False)
class LeaveOut(Edit):
    """Set what blocks add to the residual stream to zero.

    Attributes:
        blocks: their numbers in the main stack.
        parts: `attention` or `mlp`, or both.
    """

    blocks: tuple[int, ...]
    parts: tuple[str, ...]

    def wants(self, call: Any) -> None:
        return None

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return [Point(part, layer=block) for block in self.blocks for part in self.parts]

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor:
        return torch.zeros_like(x)
