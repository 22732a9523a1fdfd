"""Queries, keys and values of chosen heads, kept to a few directions at chosen positions.

    P = V_r V_r^T,   V from the SVD of  X - mean(X)        X: queries at the last position of many prompts, or
                     keys
    q' = mean + P (q - mean)                               (values) at the labels, over prompts and labels

Queries and keys are taken before rotary positions, so that places need not be the same in all prompts. Where
query heads share a key head, only the chosen head sees the changed keys and values. Rank 0 leaves the mean
alone.

Source: Lieberum et al., 2023, arXiv 2307.09458, section 5. Status: partly our choice (taken before rotation;
the random directions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.anatomy import Anatomy, anatomy_of, root_of
from regard.runtime.call import Call
from regard.runtime.head_table import Head, HeadName
from regard.runtime.path_stages import COMPONENTS
from regard.runtime.protocol import Edit, Lens, Wanted
from regard.runtime.rotary import Rotary
from regard.runtime.row_patch import uncached
from regard.runtime.session import Session

Key = tuple[Head, str]


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Directions that queries, keys and values of heads move in.

    Attributes:
        means: (head, component) -> float32 [D].
        directions: (head, component) -> orthonormal columns, the longest first, float32 [D, most].
        samples: (head, component) -> what they were fitted on, float32 [N, D] of queries, [N, places, D] of
            keys and values.
    """

    means: Mapping[Key, Tensor]
    directions: Mapping[Key, Tensor]
    samples: Mapping[Key, Tensor] = field(repr=False)

    @property
    def heads(self) -> list[Head]:
        return list(dict.fromkeys(head for head, _ in self.means))

    def random(self, seed: int) -> Subspaces:
        """Return the same means with directions drawn at random: the control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            key: torch.linalg.qr(torch.randn(x.shape, generator=generator)).Q.to(x)
            for key, x in self.directions.items()
        }
        return replace(self, directions=drawn)

    def spread(self, head: Head, component: str) -> Tensor:
        """Return the share of the variance along each direction, descending, float32 [most]."""
        key = head, component
        x = (self.samples[key] - self.means[key]).flatten(0, -2)
        along = (x @ self.directions[key]).square().sum(0)
        return along / x.square().sum().clamp_min(1e-12)

    def centroids(self, head: Head, component: str) -> Tensor:
        """Return the mean key or value of each place less the mean of all, float32 [places, D]."""
        return self.samples[head, component].mean(0) - self.means[head, component]

    def edit(
        self,
        rank: int | None,
        *,
        queries: Tensor,
        keys: Tensor,
        components: Sequence[str] = ("query", "key"),
        heads: Iterable[Head] | None = None,
    ) -> InSubspace:
        """Return the edit that keeps heads to their first directions, for `regard.steer(model, edit)`.

        Args:
            rank: how many, from 0; None for all there are.
            queries: whose queries are changed, array indices, int64 [B].
            keys: whose keys and values are, int64 [B, places].
            components: any of `query`, `key`, `value`.
            heads: which; default all that were fitted.

        Raises:
            RegardError: for a rank that there are no directions for, or an unknown component or head.
        """
        chosen = self.heads if heads is None else list(heads)
        unknown = [c for c in components if c not in COMPONENTS]
        if unknown or not components:
            raise RegardError(f"components is {list(components)}; it takes some of {', '.join(COMPONENTS)}.")
        missing = [h for h in chosen for c in components if (h, c) not in self.means]
        if missing:
            raise RegardError(f"nothing was fitted for {missing[0]}.")
        most = min(self.directions[h, c].shape[1] for h in chosen for c in components)
        if rank is not None and not 0 <= rank <= most:
            raise RegardError(f"rank is {rank}; {most} directions were fitted, so it goes from 0 to {most}.")
        if queries.ndim != 1 or keys.ndim != 2 or len(keys) != len(queries):
            raise ShapeMismatch(
                f"queries are {list(queries.shape)} and keys {list(keys.shape)}; give [B] and [B, places]."
            )
        kept = {
            (h, c): (self.means[h, c], self.directions[h, c][:, :rank]) for h in chosen for c in components
        }
        return InSubspace(kept, queries, keys)


@dataclass(frozen=True, eq=False)
class InSubspace(Edit):
    """Keeps queries, keys or values of heads to directions; made by `Subspaces.edit`.

    Attributes:
        kept: (head, component) -> (mean [D], directions [D, rank]).
        queries, keys: array indices [B] and [B, places].
    """

    kept: Mapping[Key, tuple[Tensor, Tensor]]
    queries: Tensor
    keys: Tensor

    def check(self, anatomy: Anatomy) -> None:
        for alias, head in {head for head, _ in self.kept}:
            anatomy.check_head(alias, head)
        object.__setattr__(self, "rotary", Rotary(anatomy))

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers it changes."""
        return sorted({alias for (alias, _), _ in self.kept})

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if any(alias == call.site.alias for (alias, _), _ in self.kept) else None

    def inputs(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        _check_call(call, self.queries)
        here = {component for (head, component) in self.kept if head[0] == call.site.alias}
        parts = {"query": call.q, "key": call.k, "value": call.v}
        if here & {"key", "value"}:
            parts["key"], parts["value"] = call.expand()
        parts = {name: x.clone() if name in here else x for name, x in parts.items()}
        for ((alias, head), component), (mean, directions) in self.kept.items():
            if alias != call.site.alias:
                continue
            at = self.queries[:, None] if component == "query" else self.keys
            x = parts[component]
            rows = torch.arange(len(at), device=x.device)[:, None]
            old = x[rows, head, at.to(x.device)]  # [B, n, D]
            flat = old if component == "value" else self._turned(call, old, at, back=True)
            centre, along = mean.to(x), directions.to(x)
            new = centre + (flat - centre) @ along @ along.T
            new = new if component == "value" else self._turned(call, new, at)
            x[rows, head, at.to(x.device)] = new
        return parts["query"], parts["key"], parts["value"]

    def _turned(self, call: Call, x: Tensor, at: Tensor, back: bool = False) -> Tensor:
        return self.rotary.turned(call, x, at, back=back)  # type: ignore[attr-defined]


def fit_subspaces(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    heads: Iterable[HeadName],
    *,
    queries: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    components: Sequence[str] = COMPONENTS,
    most: int | None = None,
) -> Subspaces:
    """Find the directions that queries, keys and values of heads move in over prompts.

    Args:
        model: a causal language model in evaluation mode.
        inputs: keyword arguments of its forward, batch B; or several such.
        heads: (layer, head) each.
        queries: array indices of the query of each prompt, int64 [B]; a list beside a list of inputs.
        keys: those of the keys and values, int64 [B, places].
        components: any of `query`, `key`, `value`.
        most: how many directions are kept; default all D.

    Raises:
        RegardError: for fewer prompts than `most` + 1, or no head.
        NoSuchSite: for a head that the model does not have.
        UnsupportedModel: where positions are rotary in a way that is not understood.

    Example:
        >>> found = fit_subspaces(model, inputs, [(23, 3)], queries=ends, keys=labels)      # doctest: +SKIP
        >>> with regard.steer(model, found.edit(3, queries=ends, keys=labels)):             # doctest: +SKIP
        ...     logits = model(**inputs).logits
    """
    anatomy = anatomy_of(root_of(model))
    named = [(anatomy.check_head(layer, head).alias, head) for layer, head in heads]
    if not named:
        raise RegardError("heads is empty; name one at least.")
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    ends = [queries] if isinstance(queries, Tensor) else list(queries)
    labels = [keys] if isinstance(keys, Tensor) else list(keys)
    count = sum(len(each) for each in ends)
    if count < (most or 1) + 1:
        raise RegardError(
            f"{count} prompts were given; {most or 1} directions take at least {(most or 1) + 1}."
        )
    parts: dict[Key, list[Tensor]] = {}
    for given, end, label in zip(batches, ends, labels, strict=True):
        lens = HeadInputs(heads=tuple(named), components=tuple(components), queries=end, keys=label)
        with torch.no_grad(), Session(anatomy.root, [lens]) as session:
            anatomy.root(**uncached(anatomy.root, given))
        for key, x in session[HeadInputs].items():
            parts.setdefault(key, []).append(x)
    samples = {key: torch.cat(found) for key, found in parts.items()}
    means, directions = {}, {}
    for key, x in samples.items():
        flat = x.flatten(0, -2).double()
        means[key] = flat.mean(0).float()
        right = torch.linalg.svd(flat - flat.mean(0), full_matrices=True).Vh
        directions[key] = right.T[:, :most].float().contiguous()
    return Subspaces(means, directions, samples)


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadInputs(Lens):
    """Keeps queries, keys and values of heads at positions, before rotation; float32."""

    heads: tuple[Head, ...]
    components: tuple[str, ...]
    queries: Tensor
    keys: Tensor
    found: dict[Key, Tensor] = field(default_factory=dict, init=False)

    def fresh(self) -> Lens:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        return twin

    def check(self, anatomy: Anatomy) -> None:
        object.__setattr__(self, "rotary", Rotary(anatomy))

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if any(alias == call.site.alias for alias, _ in self.heads) else None

    def inputs(self, call: Call) -> None:
        _check_call(call, self.queries)
        whole = {"query": call.q, "key": call.k, "value": call.v}
        for alias, head in self.heads:
            if alias != call.site.alias:
                continue
            for component in self.components:
                x = whole[component]
                own = head * x.shape[1] // call.q.shape[1]
                at = (self.queries[:, None] if component == "query" else self.keys).to(x.device)
                rows = torch.arange(len(at), device=x.device)[:, None]
                old = x[rows, own, at]
                if component != "value":
                    old = self.rotary.turned(call, old, at, back=True)  # type: ignore[attr-defined]
                old = old[:, 0] if component == "query" else old
                self.found[(alias, head), component] = old.detach().float().cpu()

    def result(self) -> dict[Key, Tensor]:
        return dict(self.found)


def _check_call(call: Call, queries: Tensor) -> None:
    if call.q.shape[0] != len(queries):
        raise ShapeMismatch(f"places are of {len(queries)} prompts, and {call.q.shape[0]} were run.")
    if call.k.shape[2] != call.q.shape[2]:
        raise RegardError("subspaces are of whole prompts; run them without a cache, not in generate().")
