"""Attention patterns in few bytes: a byte a weight, compressed, for the page to open.

    code = round(255 sqrt(w / scale))       w' = scale (code / 255)^2

so that small weights keep their relative size: |w - w'| <= scale (sqrt(w / scale) / 255 + 4e-6), at most
0.004 where scale is 1. `scale` is 1 for weights between 0 and 1, else the largest magnitude. Where weights
are negative, code = sign(w) round(127 sqrt(|w| / scale)), a signed byte.
Bytes are deflated (zlib) and written in base64; browsers open both themselves.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regard.report.recorder import Recorded

Floats = npt.NDArray[np.floating[Any]]
EXACT_CELLS = 600_000


@dataclass(frozen=True)
class Packed:
    """One head's pattern, or with head None the pooled patterns of all heads of a site.

    Attributes:
        kind: 'exact', 'top' (the strongest `k` keys of each row) or 'pooled'.
        shape: [rows, keys], or [heads, rows, keys] where head is None.
        width: positions in a bin.
        key_bytes: bytes of a key in 'top'.
        data: base64.
    """

    site: str
    head: int | None
    kind: str
    shape: tuple[int, ...]
    scale: float
    signed: bool
    data: str
    width: int = 1
    k: int = 0
    key_bytes: int = 2

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the page, those at their default left out."""
        found: dict[str, Any] = {
            "site": self.site, "head": self.head, "kind": self.kind, "shape": list(self.shape),
            "data": self.data,
        }  # fmt: skip
        for name, usual in (("scale", 1.0), ("signed", False), ("width", 1), ("k", 0), ("key_bytes", 2)):
            if getattr(self, name) != usual:
                found[name] = getattr(self, name)
        return found


def quantised(weights: Floats) -> tuple[npt.NDArray[Any], float, bool]:
    """Return codes (uint8, or int8 where some are negative), the scale, and whether they are signed."""
    weights = np.nan_to_num(np.asarray(weights, dtype=np.float32), posinf=0.0, neginf=0.0)
    signed = bool((weights < 0).any())
    largest = float(np.abs(weights).max(initial=0.0))
    scale = 1.0 if not signed and largest <= 1.0 else largest
    share = np.sqrt(np.abs(weights) / scale)
    if signed:
        return (np.sign(weights) * np.round(share * 127)).astype(np.int8), scale, True
    return np.round(share * 255).astype(np.uint8), scale, False


def opened(codes: npt.NDArray[Any], scale: float, signed: bool) -> Floats:
    """Return the weights that codes stand for; what the page computes."""
    share = codes.astype(np.float32) / (127 if signed else 255)
    return scale * np.sign(share) * share**2


def pack(site: str, head: int | None, weights: Floats, kind: str = "exact", width: int = 1) -> Packed:
    """Return weights [T, S], or [H, T, S] for head None, in few bytes."""
    codes, scale, signed = quantised(weights)
    return Packed(site, head, kind, codes.shape, scale, signed, encoded(codes.tobytes()), width)


def pooled(kept: Recorded) -> Packed:
    """Return the pooled patterns of all heads of a site, in steps of 3 codes to save bytes."""
    weights, _ = kept.grid.pattern(0)
    codes, scale, signed = quantised(weights.numpy())
    codes = (np.round(codes / 3.0) * 3).astype(codes.dtype)
    data = encoded(codes.tobytes())
    return Packed(kept.site, None, "pooled", codes.shape, scale, signed, data, kept.grid.width)


def exact(kept: Recorded, head: int) -> Packed | None:
    """Return all weights of a head, or None where they were not kept or are too many."""
    if kept.exact is None or kept.length[0] * kept.length[1] > EXACT_CELLS:
        return None
    return pack(kept.site, head, kept.exact[head].float().cpu().numpy())


def top(kept: Recorded, head: int, k: int) -> Packed:
    """Return the k strongest keys of each row of a head.

    For each rank: one plane of rows a byte of the key's position, the lowest first, then the codes.
    """
    keys, weights = (x[head, :, :k] for x in kept.strongest)
    codes, scale, signed = quantised(weights.numpy())
    places = keys.numpy()
    size = 2 if kept.length[1] <= 1 << 16 else 3
    planes = []
    for rank in range(codes.shape[1]):
        planes += [((places[:, rank] >> (8 * b)) & 255).astype(np.uint8).tobytes() for b in range(size)]
        planes.append(np.ascontiguousarray(codes[:, rank]).tobytes())
    data = encoded(b"".join(planes))
    return Packed(kept.site, head, "top", kept.length, scale, signed, data, 1, codes.shape[1], size)


def encoded(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 7)).decode("ascii")


def within(
    sites: Sequence[Recorded], first: Sequence[tuple[str, int]], budget: int, most_exact: int
) -> list[Packed]:
    """Choose what is kept of each head so that all of it fits into `budget` characters.

    The pooled patterns of all heads come first, then all weights of the `most_exact` heads named first, then
    the strongest keys of the rest: as many a row as fit for all, down to one; then for fewer heads.

    Args:
        first: `(alias, head)` of the heads that matter most, in order.
    """
    known = {kept.site: kept for kept in sites}
    packed = [pooled(kept) for kept in sites]
    left = budget - sum(len(p.data) for p in packed)
    named = [(s, h) for s, h in dict.fromkeys(first) if s in known and h < known[s].heads]
    done = set()
    for site, head in named[:most_exact]:
        found = exact(known[site], head) or top(known[site], head, 8)
        if len(found.data) <= left:
            packed.append(found)
            done.add((site, head))
            left -= len(found.data)
    rest = [(s, h) for s in known for h in range(known[s].heads)]
    rest = [head for head in dict.fromkeys([*named, *rest]) if head not in done]
    return packed + _strongest(known, rest, left)


def named_only(sites: Sequence[Recorded], heads: Sequence[tuple[str, int]], budget: int) -> list[Packed]:
    """Return what is kept of some heads only, in their order, as far as it fits into `budget` characters."""
    known = {kept.site: kept for kept in sites}
    packed = []
    for site, head in dict.fromkeys(heads):
        if site not in known or head >= known[site].heads:
            continue
        found = exact(known[site], head) or top(known[site], head, 8)
        if len(found.data) <= budget:
            packed.append(found)
            budget -= len(found.data)
    return packed


def _strongest(known: dict[str, Recorded], heads: Sequence[tuple[str, int]], left: int) -> list[Packed]:
    for k in (8, 6, 4, 3, 2, 1):
        sample = heads[:: max(1, len(heads) // 8)]
        about = sum(len(top(known[s], h, k).data) for s, h in sample) / max(1, len(sample))
        if about * len(heads) > left and k > 1:
            continue
        found = []
        for site, head in heads:
            part = top(known[site], head, k)
            if len(part.data) <= left:
                found.append(part)
                left -= len(part.data)
        return found
    return []
