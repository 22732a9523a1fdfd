"""Where the current token stood before: pairs of a row and a key, found once a forward for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.engines.stats import masked_mass, pair_mass
from regard.lens.visible import mask_key, per_forward, visible, visible_part
from regard.runtime.call import Call

DENSE = 1 / 32
TOKEN_KINDS_NOT = ("vision", "audio", "qformer", "cross")


@dataclass(frozen=True)
class Matches:
    """The pairs of one block.

    Attributes:
        pairs: for each sequence, int32 [n] of row * K + key; None where there are so many that a mask
            is built again for each layer instead, to keep memory linear.
        rows: how many rows have a pair, float32 [].
        chance: sum over those rows of pairs / visible keys, float32 [].
    """

    pairs: list[Tensor] | None
    rows: Tensor
    chance: Tensor


def tokens_of(call: Call) -> Tensor | None:
    """Return the ids of the tokens that the keys of a call stand for, int64 [B, L], or None.

    Index p of the result is the token of absolute position p, padding counted.
    """
    site, run = call.site, call.run
    if site.cross or site.kind in TOKEN_KINDS_NOT:
        return None
    ids = run.encoder_ids if site.kind == "encoder" and run.encoder_ids is not None else run.token_ids
    if ids is None or ids.shape != (call.q.shape[0], call.q_offset + call.query_length):
        return None
    return ids


def match_mass(block: RowBlock, shift: int) -> tuple[Tensor, Matches]:
    """Return the attention from each row to the keys `shift` after earlier occurrences of its token.

    Args:
        shift: 0 for the occurrences themselves, 1 for the tokens after them. Keys before the row only.

    Returns:
        Sum over the block's rows, [B, H], and the pairs it was taken over.
    """
    store = per_forward(block.run)
    key = ("match", shift, mask_key(block.call), block.start, block.stop, block.key_start, block.key_stop)
    found: Matches | None = store.get(key)
    if found is None:
        found = store[key] = _find(block, shift)
    if found.pairs is None:
        return masked_mass(block.weights, _equal(block, shift)), found
    return pair_mass(block.weights, found.pairs), found


def match_total(parts: list[tuple[Tensor, Matches]]) -> tuple[Tensor, Tensor]:
    """Return the sums [2, H] of mass and of chance over a call's blocks, and their counts [2, 1]."""
    mass = torch.stack([part for part, _ in parts]).sum((0, 1))
    chance = torch.stack([matches.chance for _, matches in parts]).sum()
    rows = torch.stack([matches.rows for _, matches in parts]).sum()
    return torch.stack([mass, chance.expand_as(mass)]), rows.expand(2)[:, None]


def _find(block: RowBlock, shift: int) -> Matches:
    equal = _equal(block, shift)
    each = equal.sum(-1, dtype=torch.float32)
    seen = visible(block).keys[:, block.start : block.stop]
    rows, chance = (each > 0).sum(), (each / seen.clamp_min(1)).sum()
    pairs = None
    if float(each.sum()) <= DENSE * equal.numel():
        pairs = [e.flatten().nonzero()[:, 0].int() for e in equal]
    return Matches(pairs, rows.float(), chance)


def _equal(block: RowBlock, shift: int) -> Tensor:
    """Return which keys stand `shift` after a token equal to the row's, bool [B, R, K]."""
    call = block.call
    ids = tokens_of(call)
    assert ids is not None
    low, high = call.q_offset + block.start, call.q_offset + block.stop
    first, last = call.kv_offset + block.key_start, call.kv_offset + block.key_stop
    before = ids[:, max(0, first - shift) : max(0, last - shift)]
    before = F.pad(before, (max(0, shift - first), 0), value=-1)
    before = F.pad(before, (0, last - first - before.shape[1]), value=-1)
    equal = ids[:, low:high, None] == before[:, None, :]
    positions = torch.arange(first, last, device=ids.device)
    equal &= positions < torch.arange(low, high, device=ids.device)[:, None]
    if block.valid_rows is not None:
        equal &= block.valid_rows[..., None] & (block.key_positions >= shift)[:, None]
    if shift and (begins := _begins(call, len(ids[0]))) is not None:
        equal &= ~begins[:, None, first:last]
    part = visible_part(call, block.start, block.stop, block.key_start, block.key_stop)
    return equal if part is None else equal & part


def _begins(call: Call, length: int) -> Tensor | None:
    """Return where a text begins among texts packed one after the other, bool [B|1, length]; else None.

    The token before is of another text, which the rows do not see.
    """
    positions = call.run.position_ids
    if call.plain or positions is None or positions.ndim != 2 or positions.shape[1] != length:
        return None
    return F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)
