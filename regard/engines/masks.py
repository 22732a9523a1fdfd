"""Which keys a query row may see, answered a block of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = torch.finfo(torch.float32).min
HIDDEN = -1e4


def unhidden(rows: Tensor) -> Tensor:
    """Return which keys a mask leaves visible, bool: of an additive one, those it adds more than -10,000 to.

    So -inf, the lowest number of a dtype, -1e9 and -1e4 hide a key; a smaller penalty, such as Swin's
    -100, is a bias and leaves it visible.
    """
    return rows if rows.dtype == torch.bool else rows > HIDDEN


class Mask:
    """Every query sees every key. Base of the other masks.

    Rows and keys are array indices of one attention call with `queries` rows and `keys` columns.
    """

    def __init__(self, queries: int, keys: int) -> None:
        self.queries = queries
        self.keys = keys

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys outside of which rows `start:stop` see nothing; never empty."""
        return 0, self.keys

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        """Return the mask of rows `start:stop` and keys `first:last`.

        Returns:
            None where all is visible; else [B|1, H|1, R, K], bool (True is visible) or additive float.
        """
        return None

    def apply(self, scores: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
        """Mask `scores` [B, H, R, K] of those rows and keys; may work in place and returns the result."""
        mask = self.rows(start, stop, first, last)
        if mask is None:
            return scores
        if mask.dtype == torch.bool:
            return scores.masked_fill_(~mask, MASKED)
        # A score of -inf would make statistics that multiply by it NaN.
        return (scores + mask.to(scores.dtype)).clamp_(min=MASKED)

    def for_sdpa(self) -> tuple[Tensor | None, bool]:
        """Return `(attn_mask, is_causal)` as `scaled_dot_product_attention` takes them."""
        return self.rows(0, self.queries, 0, self.keys), False


class CausalMask(Mask):
    """Row i sees keys 0 to i + `shift`."""

    def __init__(self, queries: int, keys: int, shift: int = 0, device: torch.device | None = None):
        super().__init__(queries, keys)
        self.shift = shift
        self.device = device
        self._most: dict[tuple[int, int, int], Tensor] = {}

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        return 0, min(self.keys, max(1, stop + self.shift))

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        if last <= start + self.shift + 1:
            return None
        i = torch.arange(start, stop, device=self.device)[:, None]
        j = torch.arange(first, last, device=self.device)[None, :]
        return (j <= i + self.shift)[None, None]

    def apply(self, scores: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
        corner = max(first, start + self.shift + 1)
        if corner >= last:
            return scores
        key = (stop - start, corner - start, last - corner)
        if key not in self._most:
            mask = self.rows(start, stop, corner, last)
            if mask is None:
                return scores
            most = scores.new_full(mask.shape, torch.inf)
            self._most[key] = most.masked_fill_(~mask.to(scores.device), MASKED)
        # Several times faster than masked_fill_.
        scores[..., corner - first :].clamp_max_(self._most[key])
        return scores

    def for_sdpa(self) -> tuple[Tensor | None, bool]:
        if self.shift == 0 and self.queries == self.keys and self.queries > 1:
            return None, True
        return super().for_sdpa()


class TensorMask(Mask):
    """A mask that exists as a tensor: bool (True is visible) or additive float, [B|1, H|1, T, S]."""

    def __init__(self, tensor: Tensor, queries: int, keys: int) -> None:
        super().__init__(queries, keys)
        self.tensor = tensor[..., :keys]
        self._bounds: dict[tuple[int, int], tuple[int, int]] = {}

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        rows = self.tensor if self.tensor.shape[-2] == 1 else self.tensor[..., start:stop, :]
        return rows[..., first:last]

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        key = (start, stop)
        if key not in self._bounds:
            rows = self.rows(start, stop, 0, self.keys)
            assert rows is not None
            floor = torch.finfo(rows.dtype).min if rows.dtype.is_floating_point else 0
            visible = rows if rows.dtype == torch.bool else rows > floor
            self._bounds[key] = visible_range(visible)
        return self._bounds[key]


def order_and_padding(mask: Tensor) -> tuple[bool, Tensor] | None:
    """Return (whether rows see no later key, which keys are valid, bool [B|1, S]), or None.

    None means that the mask is not made of these two alone. Its last row is taken to stand at the last key,
    and one row alone says nothing of order.

    Args:
        mask: [B|1, H|1, T, S], bool or additive.
    """
    visible = unhidden(mask)
    if mask.dtype != torch.bool and bool(mask[visible].any()):
        return None
    rows, keys = visible.shape[-2:]
    if rows == 0 or not bool((visible == visible[:, :1]).all()):
        return None
    valid = visible[:, 0, -1]
    everything = valid[:, None, None].expand(-1, 1, rows, keys)
    if bool((visible == everything).all()):
        return False, valid
    return (True, valid) if bool((visible == everything.tril(keys - rows)).all()) else None


def visible_range(visible: Tensor) -> tuple[int, int]:
    """Return the first key that any row sees and one past the last; (0, 1) where none sees any.

    Args:
        visible: bool [..., R, K].
    """
    seen = visible.flatten(0, -2).any(0).nonzero()
    if not len(seen):
        return 0, 1
    return int(seen[0]), int(seen[-1]) + 1


class WindowMask(Mask):
    """`base`, and of it only keys within a window of the row.

    Args:
        base: the mask to narrow.
        window: row i sees itself and the `window` - 1 keys before it; both ways where `both`.
        offset: row i stands at key i + `offset`.
        both: see as many keys after the row as before it.
    """

    def __init__(self, base: Mask, window: int, offset: int = 0, both: bool = False) -> None:
        super().__init__(base.queries, base.keys)
        self.base, self.window, self.offset, self.both = base, window, offset, both

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        first, last = self.base.bounds(start, stop)
        first = max(first, start + self.offset - self.window + 1)
        if self.both:
            last = min(last, stop + self.offset + self.window - 1)
        return (first, last) if first < last else (0, 1)

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        below = self.base.rows(start, stop, first, last)
        inside = first > stop - 1 + self.offset - self.window
        if inside and (not self.both or last <= start + self.offset + self.window):
            return below
        device = None if below is None else below.device
        apart = (torch.arange(start, stop, device=device) + self.offset)[:, None] - torch.arange(
            first, last, device=device
        )
        near = apart < self.window
        if self.both:
            near &= apart > -self.window
        return _both(below, near[None, None])


class PaddedMask(Mask):
    """`base`, without the keys that are padding.

    Args:
        base: the mask to narrow.
        valid: bool [B, S], False where a key is padding.
    """

    def __init__(self, base: Mask, valid: Tensor) -> None:
        super().__init__(base.queries, base.keys)
        self.base, self.valid = base, valid

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        return self.base.bounds(start, stop)

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        below = self.base.rows(start, stop, first, last)
        return _both(below, self.valid[:, None, None, first:last].expand(-1, 1, stop - start, -1))


class LedMask(Mask):
    """`base`, with keys in front that every row sees.

    Args:
        base: the mask of the other keys.
        lead: how many keys stand in front.
        device: of the rows it gives.
    """

    def __init__(self, base: Mask, lead: int, device: torch.device | None = None) -> None:
        super().__init__(base.queries, base.keys + lead)
        self.base, self.lead, self.device = base, lead, device

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        return 0, self.lead + self.base.bounds(start, stop)[1]

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        shown = max(0, min(last, self.lead) - first)
        inner = max(0, first - self.lead), max(0, last - self.lead)
        below = self.base.rows(start, stop, *inner) if inner[1] > inner[0] else None
        if below is None:
            return None
        return F.pad(below, (shown, 0), value=1 if below.dtype == torch.bool else 0.0)


def _both(mask: Tensor | None, visible: Tensor) -> Tensor:
    """Narrow a mask, None, bool or additive, to what is `visible`."""
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
