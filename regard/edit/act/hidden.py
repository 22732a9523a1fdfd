"""Which tokens are sinks, head by head and text by text: what ACT would calibrate, and nothing changed.

    a_h[t] = 1 / n_t sum_{i >= t} A_h[i, t] > alpha / N        n_t: rows that see key t, N: tokens of the text

Source: Yu et al., 2024, arXiv 2406.15765, section 3. Status: agrees with the paper; the official code has a
fixed bound, `threshold=0.1`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.edit.act.calibration import ACT, ALPHA
from regard.engines.rows import RowBlock
from regard.errors import NothingObserved, RegardError
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.call import Call
from regard.runtime.protocol import EVERYTHING, Lens, Wanted
from regard.runtime.table import Table
from regard.runtime.verbs import watch


@dataclass(frozen=True, eq=False)
class SinkMap:
    """Sinks of some texts.

    Attributes:
        sites: aliases of the layers, L of them.
        sinks: which tokens are hidden sinks of which heads, bool [B, L, H, T]. Padding and the first token of
            a text are none; of a layer with fewer heads than another, what is too much is False.
        first: whether the first token of a text is above the bound too, bool [B, L, H].
        ids: the tokens, int64 [B, T].
        valid: which of them are no padding, bool [B, T].
    """

    sites: tuple[str, ...]
    sinks: Tensor
    first: Tensor
    ids: Tensor
    valid: Tensor

    @property
    def counts(self) -> Tensor:
        """In how many heads each token is a hidden sink, int64 [B, T]."""
        return self.sinks.sum((1, 2))

    @property
    def heads(self) -> Tensor:
        """Which heads have a hidden sink, bool [B, L, H]."""
        return self.sinks.any(-1)

    def strings(self, tokenizer: Any = None) -> Table:
        """Return which strings are sinks, the most frequent first.

        Columns: `token`; `heads`, in how many heads it is a sink, summed over where it stands; `places`, how
        often it stands in the texts, but first; `share`, in what share of all heads it is a sink there.

        Args:
            tokenizer: of transformers; without it tokens are numbers.
        """
        after_first = self.valid & (self.valid.cumsum(1) > 1)
        total: dict[int, list[int]] = {}
        for token, count in zip(
            self.ids[after_first].tolist(), self.counts[after_first].tolist(), strict=True
        ):
            told = total.setdefault(token, [0, 0])
            told[0], told[1] = told[0] + count, told[1] + 1
        ranked = sorted(((n, p, t) for t, (n, p) in total.items() if n), key=lambda row: (-row[0], row[2]))
        each = self.first[0].numel()
        return Table({
            "token": [t if tokenizer is None else tokenizer.decode([t]) for _, _, t in ranked],
            "heads": [n for n, _, _ in ranked],
            "places": [p for _, p, _ in ranked],
            "share": [n / (p * each) for n, p, _ in ranked],
        })  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Above(Lens):
    """Keeps which columns are above the bound of ACT, the first token's among them."""

    edit: ACT
    kind: str

    def wants(self, call: Call) -> Wanted | None:
        return EVERYTHING if call.site.kind == self.kind and not call.site.cross else None

    def weights(self, block: RowBlock) -> None:
        self.edit.survey(block)

    def end_call(self, call: Call) -> None:
        state = call.run.state(self.edit, call.site, call.part)
        if "mass" in state:
            self.tally.append(call.site, "above", self.edit.above(call, state).cpu())

    def result(self) -> dict[str, Tensor]:
        return {alias: found[-1] for alias, found in self.tally.get("above").items()}


def sink_map(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    alpha: float = ALPHA,
    *,
    threshold: float | None = None,
    min_rows: int = 1,
) -> SinkMap:
    """Find the hidden sinks of texts in every head of the main stack.

    Args:
        model: a causal language model of transformers, or an image-text model with such a decoder.
        inputs: keyword arguments of its forward, padded on either side; or token ids int64 [B, T] alone.
        alpha: how many times the even share 1 / N the mean of a column must exceed.
        threshold: a fixed bound in its place; the official code has 0.1.
        min_rows: rows that must see a token for it to be a sink.

    Raises:
        RegardError: for options out of range, and inputs without `input_ids`.
        UnsupportedModel: where the model's attention cannot be reached.
        NothingObserved: where no layer of the main stack was run.

    Example:
        >>> found = sink_map(model, tokenizer("A cat sat on the mat.", return_tensors="pt"))  # doctest: +SKIP
        >>> found.sinks.shape, int(found.heads.sum())                           # doctest: +SKIP
        (torch.Size([1, 30, 9, 7]), 121)
    """
    edit = ACT("all", alpha=alpha, threshold=threshold, min_rows=min_rows)
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if not isinstance(given.get("input_ids"), Tensor):
        raise RegardError("sink_map takes token ids, or the inputs of a model with input_ids among them.")
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    edit.check(anatomy)
    for name, value in (("logits_to_keep", 1), ("use_cache", False)):
        if name in inspect.signature(root.forward).parameters:
            given[name] = value  # type: ignore[assignment]
    lens = _Above(edit=edit, kind=anatomy.main)
    with torch.no_grad(), watch(model, lens) as seen:
        root(**given)
    found: dict[str, Tensor] = seen[_Above]
    if not found:
        raise NothingObserved(f"No layer of {type(root).__name__} was run.")
    return _mapped(found, given["input_ids"].cpu(), given.get("attention_mask"))


def _mapped(found: Mapping[str, Tensor], ids: Tensor, mask: Tensor | None) -> SinkMap:
    most = max(above.shape[1] for above in found.values())
    pad = torch.nn.functional.pad
    above = torch.stack([pad(some, (0, 0, 0, most - some.shape[1])) for some in found.values()], 1)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    begins = valid & (valid.cumsum(1) == 1)
    first = (above & begins[:, None, None]).any(-1)
    return SinkMap(tuple(found), above & ~begins[:, None, None] & valid[:, None, None], first, ids, valid)
