"""Scale heads, or ablate them in three ways.

    out' = r + factor * (out - r)            [B, T, Dv] for one head

where r, what an ablated head gives, is zero, the head's mean output, or its output under attention that
is uniform over the keys each row may see.

`scope="decode"` is that of "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al.,
2024, arXiv 2404.15574), whose code masks heads, in mode `uniform`, only where a token is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.runtime.edits import targets
from regard.runtime.edits.targets import Factor, HeadName
from regard.runtime.head_list import check_made_for
from regard.runtime.protocol import Edit, Wanted

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call

Mode = Literal["zero", "mean", "uniform"]
Scope = Literal["all", "decode"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleHeads(Edit):
    """Scale or ablate heads: factor 1 leaves a head as it is, 0 puts what `mode` says in its place.

    In modes `zero` and `mean` only head outputs are touched, so the fast attention stays in place. Mode
    `uniform` changes the weights, and lenses see it there; rows then sum to 1 at factor 0, also where a
    sink logit took a share before. A row that may see no key is left alone.

    Attributes:
        factors: `(layer, head)` -> factor; may be given first, without its name. A layer is a number in
            the main stack or an alias such as `cross.5`. A factor is a number, or a tensor [] or [B], one
            for each sequence of the batch; gradients reach it.
        heads: `(layer, head)` pairs that share `factor`; or a `HeadList`, which is refused for another model
            than it was made for.
        factor: theirs; default 0.
        mode: what an ablated head gives. `zero`: nothing. `mean`: its mean over the real positions of
            the same sequence, those of this forward and, in `generate()`, those before. Positions fed
            together share one mean, so early ones know of later ones. `uniform`: the mean of the values
            that each row may see.
        means: `(layer, head)` -> [Dv], to be used instead of the sequence's own mean.
        scope: `all` positions; or `decode`, only those that a token is chosen from: the last one of the
            prompt, and in `generate()` every later one. The rest of the prompt is read with all heads.

    Raises:
        RegardError: on creation, for a factor that is no number, or an unknown mode or scope; when a session
            is made, for a list of another model's heads.
        NoSuchSite: when a session is made, for a layer or head that is not there.

    Example:
        >>> edit = ScaleHeads({(5, 3): 0.0, (5, 4): 0.5})
        >>> edit = ScaleHeads(heads=[("cross.0", 1)], mode="mean")
    """

    factors: Mapping[HeadName, Factor] = field(default_factory=dict, kw_only=False)
    heads: Sequence[HeadName] = ()
    factor: Factor = 0.0
    mode: Mode = "zero"
    means: Mapping[HeadName, Tensor] | None = None
    scope: Scope = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Mapping):
            raise RegardError(f"factors is {self.factors!r}; give a mapping such as {{(5, 3): 0.0}}.")
        if self.mode not in get_args(Mode):
            raise RegardError(f"mode is {self.mode!r}; it must be one of {', '.join(get_args(Mode))}.")
        if self.scope not in get_args(Scope):
            raise RegardError(f"scope is {self.scope!r}; it must be one of {', '.join(get_args(Scope))}.")
        for name, factor in (*self.factors.items(), ("factor", self.factor)):
            targets.check_factor(f"the factor of {name}" if name != "factor" else "factor", factor)
        if self.means is not None and self.mode != "mean":
            raise RegardError(f"means are given, and mode is {self.mode!r}; set mode='mean'.")
        for name, mean in (self.means or {}).items():
            if not isinstance(mean, Tensor) or mean.ndim != 1:
                raise ShapeMismatch(f"the mean of {name} is {_shape(mean)}; it must be a tensor [Dv].")

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads that the model does not have, and a list of another model's."""
        check_made_for(self.heads, anatomy)
        targets.check_heads([*self.factors, *self.heads], anatomy, "ScaleHeads")
        named = {(anatomy.site(layer).alias, head) for layer, head in (*self.factors, *self.heads)}
        for layer, head in self.means or {}:
            if (anatomy.check_head(layer, head).alias, head) not in named:
                raise NoSuchSite(f"means has ({layer!r}, {head}), which is not among the heads to scale.")

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers whose heads are scaled."""
        return targets.named_layers((layer for layer, _ in (*self.factors, *self.heads)), anatomy)

    def _chosen(self, call: Call) -> dict[int, Factor]:
        """Head -> factor at this site; heads that stay as they are are left out."""
        pairs = [*self.factors.items(), *((name, self.factor) for name in self.heads)]
        here = {h: f for (layer, h), f in pairs if call.site.named(layer, call.main)}
        here = {h: f for h, f in here.items() if isinstance(f, Tensor) or f != 1}
        return dict(zip(targets.within(call, list(here)), here.values(), strict=True))

    def wants(self, call: Call) -> Wanted | None:
        named = any(call.site.named(layer, call.main) for layer, _ in (*self.factors, *self.heads))
        return Wanted(heads=list(self._chosen(call)), rows=self._rows(call)) if named else None

    def _rows(self, call: Call) -> tuple[int, int] | None:
        """Which rows are meant: the last one alone in the scope of decoding; None for all."""
        if self.scope == "all" or (call.run.phase == "decode" and call.run.grows):
            return None
        return call.query_length - 1, call.query_length

    @property
    def weights(self) -> Any:
        """The stage `weights`, which only uniform attention needs: without it no rows are opened."""
        return self._to_uniform if self.mode == "uniform" else None

    @property
    def head_outputs(self) -> Any:
        """The stage `head_outputs`, which serves the other modes."""
        return None if self.mode == "uniform" else self._scaled

    def _to_uniform(self, block: RowBlock) -> Tensor:
        chosen = self._chosen(block.call)
        where = targets.columns(block, list(chosen))
        old = targets.pick(block.weights, where)
        visible = targets.visible_keys(block)
        visible = visible if visible.shape[1] == 1 else targets.pick(visible, where)
        count = visible.sum(-1, keepdim=True)
        uniform = visible / count.clamp_min(1)
        factor = targets.stack_factors(list(chosen.values()), old)
        meant = count > 0
        if (rows := self._rows(block.call)) is not None:
            meant = meant & (torch.arange(block.start, block.stop, device=old.device) >= rows[0])[:, None]
        new = torch.where(meant, uniform + factor * (old - uniform), old)
        return targets.put(block.weights, where, new)

    def _scaled(self, call: Call) -> Tensor:
        chosen, out = self._chosen(call), call.head_outputs
        assert out is not None
        if not chosen:
            return out
        where = list(chosen)
        factor = targets.stack_factors(list(chosen.values()), out)
        old = targets.pick(out, where)
        if self.mode == "zero":
            new = old * factor
        else:
            mean = self._mean(call, where)
            new = mean + factor * (old - mean)
        if (rows := self._rows(call)) is not None:
            new = torch.cat([old[:, :, : rows[0]], new[:, :, rows[0] :]], 2)
        return targets.put(out, where, new)

    def _mean(self, call: Call, heads: list[int]) -> Tensor:
        """What stands for each ablated head, [B|1, h, 1, Dv]."""
        given = {h: m for (layer, h), m in (self.means or {}).items() if call.site.named(layer, call.main)}
        own = self._own_mean(call, heads) if len(given) < len(heads) else None
        out = call.head_outputs
        assert out is not None
        rows = []
        for column, head in enumerate(heads):
            if head in given and given[head].shape[0] != out.shape[3]:
                raise ShapeMismatch(
                    f"the mean of head {head} of {call.site.alias} has shape {tuple(given[head].shape)}, "
                    f"and a head's output there has shape ({out.shape[3]},)."
                )
            if head in given:
                rows.append(given[head].to(out).expand(out.shape[0], -1))
            else:
                assert own is not None
                rows.append(own[:, column])
        return torch.stack(rows, 1)[:, :, None]

    def _own_mean(self, call: Call, heads: list[int]) -> Tensor:
        """Mean over the real positions of each sequence so far, [B, h, Dv]; the sums are kept in the run."""
        assert call.head_outputs is not None
        x = call.head_outputs[:, heads].float()
        valid = call.valid_queries
        keep = x.new_ones(x.shape[0], x.shape[2]) if valid is None else valid.to(x.dtype)
        keep = keep.expand(x.shape[0], -1)
        total = torch.einsum("bhtd,bt->bhd", x, keep)
        count = keep.sum(1)
        state = call.run.state(self, call.site, call.part)
        if state.get("forward") != call.run.fed:
            state["before"], state["count before"] = state.get("sum"), state.get("count")
            state["forward"] = call.run.fed
        before = state["before"]
        if before is not None and before.shape == total.shape:
            total, count = total + before, count + state["count before"]
        state["sum"], state["count"] = total.detach(), count
        return (total / count.clamp_min(1)[:, None, None]).to(call.head_outputs.dtype)


def _shape(x: Any) -> str:
    return f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
