"""Attention calibration (ACT): take attention from hidden sinks, and hand it to the other tokens of the row.

    a_h[t]  = 1 / n_t sum_{i >= t} A_h[i, t]             n_t: rows that see key t
    S_h     = { t >= 1 : a_h[t] > alpha / N }            N: tokens of the sequence, 5 = alpha
    A'[i,s] = beta A[i, s]                               s in S_h, beta = 0.4
    A'[i,t] = A[i, t] (1 + (1 - beta) sum_s A[i, s] / sum_{u not in S_h} A[i, u])        t not in S_h

Sinks are found anew for every head, sequence and input, over the whole prompt. The first token is none of
them and receives its share; row 0 stays. Padding is not counted. In decoding, where the paper says nothing,
the sinks of the prompt stay, and each new row is calibrated over them (`admit_new` counts new rows too); a
prompt fed in chunks has the sinks of all columns seen so far.

Source: Yu et al., 2024, arXiv 2406.15765, sections 3 and 4. Status: agrees with the official code where
position 0 is the first column above its threshold, in a prefill without padding; decoding is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from regard.edit.registry import edit
from regard.engines.rows import RowBlock
from regard.errors import RegardError, UnsupportedModel
from regard.runtime.edits import redistribute, targets
from regard.runtime.edits.targets import HeadName, Layer
from regard.runtime.protocol import EVERYTHING, Edit, Wanted

if TYPE_CHECKING:
    from regard.edit.act.filtering import FilteredHeads
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.head_table import Head
    from regard.runtime.prompt import Prompt

Chosen = Sequence[HeadName] | Mapping[Layer, Sequence[int]] | str
ALPHA, BETA = 5.0, 0.4
FEWEST = 3


@edit("act")
@dataclass(frozen=True, kw_only=True, eq=False)
class ACT(Edit):
    """Calibrate the attention of chosen heads.

    Attributes:
        heads: `(layer, head)` pairs, or a mapping of a layer to its heads; default all heads of the main
            stack but those of the first two layers and of the last, as the paper has it; "all" for those
            too. May be given first, without its name. A layer is a number in the main stack or an alias.
        alpha: how many times the even share 1 / N a column's mean must exceed to be a sink.
        threshold: a fixed bound in place of alpha / N; the official code has 0.1.
        beta: the part of a sink's attention that it keeps, in [0, 1]; 1 changes nothing.
        min_rows: rows that must see a key for it to be a sink; the paper asks for none, and its last
            columns are means of very few.
        layers: all heads of these, where `heads` is left out.
        admit_new: let tokens become sinks, and cease to be, as `generate()` goes on, by the mean over all
            rows so far; default they stay as the prompt has them.

    Raises:
        RegardError: on creation, for an alpha, threshold, beta or min_rows out of range, no heads, or both
            heads and layers.
        NoSuchSite: when a session is made, for a layer or head that is not there.

    Example:
        >>> edit = ACT([(5, 3), (6, 0)], beta=0.2)
        >>> edit.alpha
        5.0
    """

    heads: Chosen | None = field(default=None, kw_only=False)
    alpha: float = ALPHA
    threshold: float | None = None
    beta: float = BETA
    min_rows: int = 1
    layers: Sequence[Layer] | None = None
    admit_new: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.heads, Mapping):
            pairs = [(layer, head) for layer, heads in self.heads.items() for head in heads]
            object.__setattr__(self, "heads", pairs)
        if isinstance(self.heads, str) and self.heads != "all":
            raise RegardError(f"heads is {self.heads!r}; it takes (layer, head) pairs, or 'all'.")
        if self.heads is not None and not list(self.heads):
            raise RegardError("ACT was given no heads; leave heads= out to mean all of the middle layers.")
        if self.layers is not None and (self.heads is not None or not list(self.layers)):
            raise RegardError("ACT takes heads or layers, and at least one of them.")
        if not self.alpha > 0:
            raise RegardError(f"alpha is {self.alpha}; it must be above 0.")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise RegardError(
                f"threshold is {self.threshold}; it must be from 0 up to, and not including, 1."
            )
        if not 0 <= self.beta <= 1:
            raise RegardError(f"beta is {self.beta}; it must be from 0 to 1.")
        if self.min_rows < 1:
            raise RegardError(f"min_rows is {self.min_rows}; it must be 1 at least.")

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads that the model does not have, and a model without middle layers."""
        here: dict[str, list[int] | None] = {}
        stack = [site.alias for site in anatomy.sites if site.kind == anatomy.main]
        if self.layers is not None:
            here = {anatomy.site(layer).alias: None for layer in self.layers}
        elif self.heads == "all":
            here = dict.fromkeys(stack)
        elif self.heads is None:
            here = dict.fromkeys(stack[2:-1])
        else:
            targets.check_heads(self.heads, anatomy, "ACT")
            pairs = cast("Sequence[HeadName]", self.heads)
            here = {anatomy.site(layer).alias: [] for layer, _ in pairs}
            for layer, head in pairs:
                cast("list[int]", here[anatomy.site(layer).alias]).append(head)
        if not here:
            raise RegardError(
                f"ACT leaves out the first two layers and the last, and there are {len(stack)}; name heads."
            )
        object.__setattr__(self, "_here", here)

    def each(self, anatomy: Anatomy) -> list[Head]:
        """Return the heads that are meant, as (alias, head).

        Raises:
            UnsupportedModel: for a layer that does not say how many heads it has.
        """
        self.check(anatomy)
        found = []
        for alias, heads in self._here.items():  # type: ignore[attr-defined]
            site = anatomy.site(alias)
            if heads is None and site.heads is None:
                raise UnsupportedModel(f"{type(site.module).__name__} does not say how many heads it has.")
            found += [(alias, head) for head in (range(site.heads or 0) if heads is None else heads)]
        return found

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers that are named, or whose heads are."""
        if self.heads is None or self.heads == "all":
            return targets.named_layers(self.layers or (), anatomy)
        return targets.named_layers((layer for layer, _ in cast("Sequence[HeadName]", self.heads)), anatomy)

    def fit(
        self, model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], **options: Any
    ) -> FilteredHeads:
        """Try these options in one head at a time on labelled prompts: `regard.edit.act.fit_heads`."""
        from regard.edit.act.fitting import fit_heads

        return fit_heads(model, tokenizer, prompts, edit=self, **options)

    def wants(self, call: Call) -> Wanted | None:
        here = self._here  # type: ignore[attr-defined]
        if call.site.cross or call.site.alias not in here:
            return None
        heads = here[call.site.alias]
        return EVERYTHING if heads is None else Wanted(heads=targets.within(call, heads))

    def surveys(self, call: Call) -> bool:
        """Steps of one token leave the sinks as they are, unless new ones are admitted."""
        return (
            self.admit_new
            or call.query_length > 1
            or "sinks" not in call.run.state(self, call.site, call.part)
        )

    def survey(self, block: RowBlock) -> None:
        """Add up what each key receives."""
        call, state = block.call, self._state(block)
        if state.get("forward") != call.run.fed:
            state["before"] = state.get("mass"), state.get("rows")
            state["forward"] = call.run.fed
            state["mass"], state["rows"] = self._begun(block, state.pop("before"))
        state.pop("sinks", None)
        place = slice(call.kv_offset + block.key_start, call.kv_offset + block.key_stop)
        real = 1.0 if block.valid_rows is None else block.valid_rows[:, None, :, None].float()
        received = (self._mine(block, block.weights) * real).sum(2)
        seen = (targets.visible_keys(block).float() * real).sum(2).amax(1)
        state["mass"][..., place] += received
        state["rows"][:, place] += seen

    def weights(self, block: RowBlock) -> Tensor:
        call, state = block.call, self._state(block)
        if "sinks" not in state:
            state["sinks"] = self._sinks(call, state)
        place = slice(call.kv_offset + block.key_start, call.kv_offset + block.key_stop)
        sinks = state["sinks"][..., place]
        missing = block.key_stop - block.key_start - sinks.shape[2]
        sinks = torch.nn.functional.pad(sinks, (0, missing))[:, :, None]
        columns = self._columns(block)
        old = targets.pick(block.weights, columns)
        after_first = (block.query_positions > 0)[:, None]
        return targets.put(block.weights, columns, redistribute(old, sinks, None, 1 - self.beta, after_first))

    def _state(self, block: RowBlock) -> dict[str, Any]:
        return block.run.state(self, block.site, block.call.part)

    def _columns(self, block: RowBlock) -> list[int] | None:
        return targets.columns(block, self._here[block.site.alias])  # type: ignore[attr-defined]

    def _mine(self, block: RowBlock, x: Tensor) -> Tensor:
        return targets.pick(x, self._columns(block))

    def _begun(self, block: RowBlock, before: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Sums of zero for every position so far, and what earlier chunks of the prompt gave."""
        weights, call = self._mine(block, block.weights), block.call
        end = call.kv_offset + call.key_length
        mass = weights.new_zeros(weights.shape[0], weights.shape[1], end)
        rows = weights.new_zeros(weights.shape[0], end)
        if before[0] is not None and before[0].shape[:2] == mass.shape[:2]:
            mass[..., : before[0].shape[2]] += before[0]
            rows[:, : before[1].shape[1]] += before[1]
        return mass, rows

    def above(self, call: Call, state: dict[str, Any]) -> Tensor:
        """Return which keys receive more than the bound, the first token among them, bool [B, H', P].

        Args:
            state: what `survey` gathered of this call.
        """
        mass, rows = state["mass"], state["rows"]
        start = rows.new_zeros(len(rows)) if call.pad_left is None else call.pad_left.to(rows)
        places = torch.arange(rows.shape[1], device=rows.device)
        count = (rows > 0).sum(1, keepdim=True)
        bound = self.alpha / count.clamp_min(1) if self.threshold is None else self.threshold
        mean = mass / rows.clamp_min(1)[:, None]
        able = (rows >= self.min_rows) & (places >= start[:, None]) & (count >= FEWEST)
        over = mean > (bound[:, None] if isinstance(bound, Tensor) else bound)
        return over & able[:, None]

    def _sinks(self, call: Call, state: dict[str, Any]) -> Tensor:
        """Return which keys are sinks of which heads, bool [B, H', P]."""
        above = self.above(call, state)
        start = 0 if call.pad_left is None else call.pad_left.to(above.device)[:, None, None]
        return above & (torch.arange(above.shape[-1], device=above.device) > start)
