"""How fine-tuning moves concepts, and whether one vector for each tells where they go.

    delta_m = b_m - a_m                                    the same sample m before and after
    k(m)    = argmax_k V_k(a_m)                            its concept before
    Delta_k = mean of delta_m over the samples of k
    u_k^s   = u_k + alpha Delta_k                          the shifted concept
    consistency_k = mean over m of cos(delta_m, Delta_k)   1 / sqrt(n_k) where nothing is common
    recovery      = cosine and distance of a concept to its partner among those of the fine-tuned model,
                    by the Hungarian method on cosines
    explained     = 1 - sum ||delta_m - Delta_k(m)||^2 / sum ||delta_m||^2, on samples that Delta has not seen

Held beside it: the concept as it was, one shift for all, and the shift of another concept. `Delta` comes from
one half of the samples, the fine-tuned concepts and `explained` from the other: on the same samples recovery
is circular, as the centroid of a surviving cluster after fine-tuning *is* u_k + Delta_k, whatever the noise.
Shuffling the pairs is no control for consistency, as delta then contains -a_m, which a cluster shares.

Source: Khayatan et al., 2025, arXiv 2501.03012, section 4. Status: `split=False, match="original"` agrees
with the official code; the halves, the controls and `explained` are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from regard.errors import RegardError, ShapeMismatch
from regard.lens.concepts.dictionary import COUNT, Concepts, Method, fit_concepts
from regard.lens.concepts.features import Features, Layer
from regard.runtime.table import Table

Match = Literal["original", "scored"]
Mean = Literal["mean", "median", "trimmed"]
VARIANTS = ("unshifted", "shifted", "common", "other")
TRIM = 0.1


@dataclass(frozen=True, eq=False)
class Shift:
    """What `analyse_shift` found.

    Attributes:
        concepts: of the original model.
        tuned: of the fine-tuned one.
        vectors: Delta, float32 [K, D]; NaN where a concept has no sample.
        common: the mean of all delta, [D].
        counts: samples of each concept that Delta comes from, int64 [K].
        consistency: [K]; `chance`, what it is where nothing is common, 1 / sqrt(n_k).
        pairwise: mean cosine of two different delta of a concept, [K].
        cosine: variant -> [K], of each concept with its partner; `unshifted`, `shifted`, `common` (all moved
            by the one mean) and `other` (mean over the shifts of all other concepts).
        distance: the same, as L2.
        partner: which of `tuned` each shifted concept goes with, int64 [K].
        explained: `shifted`, `common` and `other` -> share of the held-out shift.
        alpha: by which shifts were multiplied.
        held_out: whether the halves share no sample.
    """

    concepts: Concepts
    tuned: Concepts
    vectors: Tensor
    common: Tensor
    counts: Tensor
    consistency: Tensor
    pairwise: Tensor
    cosine: dict[str, Tensor]
    distance: dict[str, Tensor]
    partner: Tensor
    explained: dict[str, float]
    alpha: float
    held_out: bool

    @property
    def shifted(self) -> Tensor:
        """Concepts where their shift takes them, [K, D]; where there is none, as they were."""
        return self.concepts.vectors + self.alpha * self.vectors.nan_to_num()

    @property
    def chance(self) -> Tensor:
        return self.counts.float().rsqrt()

    def recovery(self, measure: Literal["cosine", "distance"] = "cosine") -> dict[str, float]:
        """Return the mean over concepts that have a shift, variant -> number."""
        told = self.cosine if measure == "cosine" else self.distance
        return {name: float(told[name][self.counts > 0].mean()) for name in VARIANTS}

    @property
    def gain(self) -> float:
        """How much more of the held-out shift a shift for each concept explains than one for all."""
        return self.explained["shifted"] - self.explained["common"]

    @property
    def table(self) -> Table:
        """One row a concept."""
        return Table({
            "concept": list(range(len(self.concepts))), "samples": self.counts,
            "norm": self.vectors.norm(dim=1), "consistency": self.consistency, "chance": self.chance,
            "partner": self.partner, **{name: self.cosine[name] for name in VARIANTS},
        })  # fmt: skip

    def __str__(self) -> str:
        told = self.recovery()
        way = "held-out halves" if self.held_out else "the same samples, so that recovery is circular"
        return "\n".join([
            str(self.table), "",
            "Cosine with the fine-tuned concept: " + ", ".join(f"{n} {told[n]:.3f}" for n in VARIANTS)
            + f" ({way}).",
            "Share of the shift explained: " + ", ".join(f"{n} {x:.2f}" for n, x in self.explained.items())
            + f"; a shift for each concept brings {self.gain:+.2f} over one for all.",
        ])  # fmt: skip


def analyse_shift(
    before: Features | Tensor,
    after: Features | Tensor,
    *,
    count: int = COUNT,
    method: Method = "k-means",
    concepts: Concepts | None = None,
    tuned: Concepts | None = None,
    layer: Layer | None = None,
    split: bool = True,
    match: Match = "original",
    average: Mean = "mean",
    alpha: float = 1.0,
    seed: int = 0,
) -> Shift:
    """Compare the concepts of a model before and after fine-tuning.

    Args:
        before, after: hidden states of the same samples; `Features` are paired by sample, tensors [n, D] by
            row.
        count, method: of both dictionaries.
        concepts, tuned: dictionaries to use, in place of fitting them.
        layer: which, where `Features` are of several.
        split: Delta and original concepts from one half, fine-tuned concepts and `explained` from the other.
        match: `original`: partners are those of the unshifted concepts, as in the official code; `scored`:
            every variant has its own, which favours none of them.
        average: how delta of a concept are averaged; `trimmed` leaves a tenth out at either end.
        alpha: by which shifts are multiplied.
        seed: of the halves and the dictionaries.

    Raises:
        ShapeMismatch: where states are of different widths, or tensors of different lengths.
        RegardError: where the two share no sample, or fewer than there are concepts; for an unknown `match`
            or `average`, or an alpha that is not finite.

    Example:
        >>> before = torch.cat([torch.randn(40, 8) + 9, torch.randn(40, 8) - 9])
        >>> found = analyse_shift(before, before + 3, count=2)
        >>> round(found.explained["shifted"], 2), round(found.gain, 2)
        (1.0, 0.0)
    """
    for name, value, kinds in (("match", match, Match), ("average", average, Mean)):
        if value not in get_args(kinds):
            raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kinds))}.")
    if not np.isfinite(alpha):
        raise RegardError(f"alpha is {alpha}; it must be a finite number.")
    a, b = paired(before, after, layer)
    first, second = halves(len(a), seed) if split else (torch.arange(len(a)),) * 2
    needed = count if concepts is None else len(concepts)
    if len(first) < needed or len(second) < needed:
        half = f", {len(first)} and {len(second)} in either half" if split else ""
        raise RegardError(f"count is {needed}, and the two models share {len(a)} samples{half}.")
    where = layer if layer is not None or not isinstance(before, Features) else before.layers[0]
    if concepts is None:
        concepts = fit_concepts(a[first], count, method, layer=where, seed=seed)
        if isinstance(before, Features):
            concepts.about["model"] = before.about.get("model")
    if tuned is None:
        tuned = fit_concepts(b[second], len(concepts), concepts.method, layer=where, seed=seed)
    delta, mine = (b - a)[first], concepts.assign(a[first])
    vectors, consistency, pairwise = _averaged(delta, mine, len(concepts), average)
    counts = mine.bincount(minlength=len(concepts))
    common = delta.mean(0)
    cosine, distance, partner = _recovered(concepts.vectors, tuned.vectors, vectors, common, alpha, match)
    explained = _explained((b - a)[second], concepts.assign(a[second]), vectors, common)
    return Shift(
        concepts, tuned, vectors, common, counts, consistency, pairwise, cosine, distance, partner, explained,
        alpha, split,
    )  # fmt: skip


def paired(
    before: Features | Tensor, after: Features | Tensor, layer: Layer | None = None
) -> tuple[Tensor, Tensor]:
    """Return the states of samples that both have, float32 [n, D] each, in one order.

    Raises:
        RegardError: where there are none, or one is a tensor and the other is not.
        ShapeMismatch: for different widths, or tensors of different lengths.
    """
    if isinstance(before, Features) != isinstance(after, Features):
        raise RegardError("one of the two is Features and the other a tensor; give two of a kind.")
    if isinstance(before, Features) and isinstance(after, Features):
        shared = sorted(set(before.samples) & set(after.samples))
        if not shared:
            raise RegardError(
                f"the two models share no sample: {len(before)} were kept of the one, and {len(after)} of "
                "the other."
            )
        a, b = (_picked(x, shared, layer) for x in (before, after))
    else:
        assert isinstance(before, Tensor) and isinstance(after, Tensor)
        a, b = before, after
    if a.shape[-1] != b.shape[-1] or a.shape != b.shape or a.ndim != 2:
        raise ShapeMismatch(
            f"states are {list(a.shape)} before and {list(b.shape)} after; they must be [n, D], alike."
        )
    return a.float(), b.float()


def _picked(states: Features, shared: Sequence[int], layer: Layer | None) -> Tensor:
    place = {sample: row for row, sample in enumerate(states.samples)}
    return states.at(layer)[[place[sample] for sample in shared]]


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two sets of rows that share none, drawn from a seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


def _averaged(delta: Tensor, mine: Tensor, count: int, average: str) -> tuple[Tensor, Tensor, Tensor]:
    """Delta [K, D], consistency [K] and mean pairwise cosine [K]; NaN for concepts without samples."""
    vectors = delta.new_full((count, delta.shape[1]), torch.nan)
    consistency, pairwise = (delta.new_full((count,), torch.nan) for _ in range(2))
    for k in range(count):
        here = delta[mine == k]
        if not len(here):
            continue
        vectors[k] = _mean(here, average)
        consistency[k] = cosine_similarity(here, vectors[k][None], dim=1).mean()
        if len(here) > 1:
            unit = normalize(here, dim=1)
            pairwise[k] = (unit.sum(0).square().sum() - len(here)) / (len(here) * (len(here) - 1))
    return vectors, consistency, pairwise


def _mean(rows: Tensor, average: str) -> Tensor:
    if average == "mean":
        return rows.mean(0)
    if average == "median":
        return rows.median(0).values
    cut = int(TRIM * len(rows))
    return rows.sort(0).values[cut : len(rows) - cut].mean(0)


def match_concepts(first: Tensor, second: Tensor) -> Tensor:
    """Return which of `second` [K, D] each of `first` [K, D] goes with, so that cosines are largest in all.

    Raises:
        RegardError: where scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as missing:
        raise RegardError('concepts are matched by scipy; run `pip install "regard[concepts]"`.') from missing
    cosines = normalize(first, dim=1) @ normalize(second, dim=1).T
    return torch.from_numpy(linear_sum_assignment(-cosines.numpy())[1])


def _recovered(
    u: Tensor, tuned: Tensor, vectors: Tensor, common: Tensor, alpha: float, match: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Cosine and distance of every variant with its partners, and the partners of the shifted concepts."""
    own = vectors.nan_to_num()
    rolls = range(1, len(u)) or range(1)
    moved = {
        "unshifted": [u], "shifted": [u + alpha * own], "common": [u + alpha * common],
        "other": [u + alpha * own.roll(roll, 0) for roll in rolls],
    }  # fmt: skip
    kept = match_concepts(u, tuned)
    cosine, distance = {}, {}
    for name, some in moved.items():
        partners = [kept if match == "original" else match_concepts(one, tuned) for one in some]
        pairs = list(zip(some, partners, strict=True))
        cosine[name] = torch.stack([cosine_similarity(x, tuned[p], dim=1) for x, p in pairs]).mean(0)
        distance[name] = torch.stack([(x - tuned[p]).norm(dim=1) for x, p in pairs]).mean(0)
    partner = kept if match == "original" else match_concepts(moved["shifted"][0], tuned)
    return cosine, distance, partner


def _explained(delta: Tensor, mine: Tensor, vectors: Tensor, common: Tensor) -> dict[str, float]:
    """The share of shifts [n, D] that is explained by that of their concept, by one for all, by others'."""
    total = delta.square().sum().clamp_min(1e-30)
    own = torch.where(vectors.isnan(), common, vectors)

    def share(told: Tensor) -> float:
        return float(1 - (delta - told).square().sum() / total)

    others = [share(own.roll(roll, 0)[mine]) for roll in range(1, len(own))] or [share(own[mine])]
    return {"shifted": share(own[mine]), "common": share(common), "other": sum(others) / len(others)}
