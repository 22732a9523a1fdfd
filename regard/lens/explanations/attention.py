"""What attention says of the input tokens: averages, rollout and flow, of weights or of norms.

    M_l = mean_h A_h                                      "weights"
    M_l = mean_h A_h[i, j] ||f_h(x_j)||                   "norm";  f_h(x) = (x W_V^h + b_V^h) W_O^h
    average   max_i mean_l M_l[i, j]
    rollout   row r of  A'_L ... A'_1,   A'_l = rows of (M_l + I), each divided by its sum
    flow      maximum flow from the read-out node at the top to token j at the bottom of the graph whose
              edge from (l, i) to (l - 1, j) has capacity A'_l[i, j]; divided by its sum over j

r is the read-out row: the last token of a causal model, the first of one that reads both ways. Rows of
norms are divided by their sums before I is added, so that the scale of a layer does not decide how much of
a token stays where it is. With grouped keys a value counts for every query head of its group. One forward
gives all, in two or four matrices [T, S] whatever the number of layers and heads (flow alone keeps one a
layer).

Sources: Abnar and Zuidema, 2020, arXiv 2005.00928 (rollout, flow); Kobayashi et al., 2020, arXiv 2004.10102
(norms); Neely et al., 2022, arXiv 2205.04559 (that they be compared). Status: partly our choice (rows of
norms are normalised); the official norms use the output matrix untransposed and are not Kobayashi's.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from regard.engines.rows import RowBlock
from regard.errors import NothingObserved, RegardError, UnsupportedModel
from regard.lens.base import Measure
from regard.lens.projected import projected_norms
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.protocol import Wanted

KINDS = ("weights", "norm")
LONGEST_FLOW = 64
UNIT = 2**29


@dataclass(frozen=True, eq=False)
class TokenPaths:
    """How attention connects the tokens, by kind of matrix, float32 [B, T, T]; rows of padding are zero.

    Attributes:
        mean: kind -> mean over layers and heads.
        rollout: kind -> product of all layers, rows summing to 1.
        layers: kind -> [L, B, T, T], one matrix a layer, or empty where they were not asked for.
        causal: whether a token sees no later one.
    """

    mean: dict[str, Tensor]
    rollout: dict[str, Tensor]
    layers: dict[str, Tensor]
    causal: bool

    def scores(self, aggregate: str, kind: str = "weights", row: int | None = None) -> Tensor:
        """Return one score a token of an unpadded batch, float64 [B, T].

        Args:
            aggregate: "average", "rollout" or "flow".
            kind: "weights" or "norm".
            row: whose row is read; default the last of a causal model, else the first.
        """
        row = (-1 if self.causal else 0) if row is None else row
        if aggregate == "average":
            return self.mean[kind].amax(1).double()
        if aggregate == "rollout":
            return self.rollout[kind][:, row].double()
        if kind not in self.layers:
            raise RegardError("flow needs the matrices of all layers; give AttentionPaths(keep=True).")
        return torch.stack([flow(one, row) for one in self.layers[kind].transpose(0, 1)])


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPaths(Measure):
    """Follow attention through all layers of one forward; the result is a `TokenPaths`.

    Attributes:
        norms: whether to weigh by the norms of values too.
        keep: whether to keep one matrix a layer, as flow needs.
    """

    definition = "how much of each input token attention hands to each position"
    source = "Abnar and Zuidema 2020, arXiv 2005.00928"

    norms: bool = True
    keep: bool = False
    anatomy: Any = field(default=None, init=False, repr=False)
    seen: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def fresh(self) -> AttentionPaths:
        twin = super().fresh()
        object.__setattr__(twin, "seen", {})
        assert isinstance(twin, AttentionPaths)
        return twin

    def check(self, anatomy: Anatomy) -> None:
        object.__setattr__(self, "anatomy", weakref.ref(anatomy))
        if anatomy.unreachable:
            name, kind = anatomy.unreachable[0]
            raise UnsupportedModel(
                f"{kind} ({name}) computes attention out of reach, so its layers would be missing."
            )

    def wants(self, call: Call) -> Wanted | None:
        if call.site.kind != call.main:
            return None
        if call.q_offset or call.key_length != call.query_length:
            raise RegardError(
                "AttentionPaths reads one forward over all tokens; this one goes on from a cache."
            )
        return Wanted()

    def inputs(self, call: Call) -> None:
        shape = (call.q.shape[0], call.query_length, call.key_length)
        matrices = {"weights": call.q.new_zeros(shape, dtype=torch.float32)}
        if self.norms:
            matrices["norm"] = torch.zeros_like(matrices["weights"])
            call.extra["value norms"] = projected_norms(call.v, self.anatomy(), call)
        call.extra["paths"] = matrices

    def weights(self, block: RowBlock) -> None:
        matrices, weights = block.call.extra["paths"], block.weights
        if block.valid_rows is not None:
            weights = weights * block.valid_rows[:, None, :, None]
        keys = slice(block.key_start, block.key_stop)
        rows = slice(block.start, block.stop)
        matrices["weights"][:, rows, keys] = weights.mean(1)
        if self.norms:
            norms = block.call.extra["value norms"][:, :, keys]
            mixed = torch.einsum("bhrk,bhk->brk", weights, norms) / weights.shape[1]
            matrices["norm"][:, rows, keys] = mixed

    def end_call(self, call: Call) -> None:
        seen = self.seen
        if seen.get("run") is not call.run:
            seen.clear()
            seen.update(run=call.run, count=0, sites=[], mean={}, rollout={}, layers={})
        seen["count"] += 1
        seen["sites"].append(call.site.alias)
        seen["causal"] = call.causal
        for kind, matrix in call.extra.pop("paths").items():
            step = with_residual(matrix)
            before = seen["rollout"].get(kind)
            seen["rollout"][kind] = step if before is None else step @ before
            total = seen["mean"].get(kind)
            seen["mean"][kind] = matrix if total is None else total + matrix
            if self.keep:
                seen["layers"].setdefault(kind, []).append(step)
        call.extra.pop("value norms", None)

    def result(self) -> TokenPaths:
        """Return what the last forward showed.

        Raises:
            NothingObserved: where no attention was seen.
        """
        seen = self.seen
        if not seen:
            raise NothingObserved(f"AttentionPaths has seen nothing: {self.needs}.")
        mean = {kind: total / seen["count"] for kind, total in seen["mean"].items()}
        layers = {kind: torch.stack(steps) for kind, steps in seen["layers"].items()}
        return TokenPaths(mean, dict(seen["rollout"]), layers, seen["causal"])


def with_residual(matrix: Tensor) -> Tensor:
    """Return A' of one layer: rows divided by their sums, I added, and again.

    Args:
        matrix: [..., T, T], non-negative; a row of zeros, as of padding, becomes that of I.
    """
    rows = matrix / matrix.sum(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    with_self = rows + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return with_self / with_self.sum(-1, keepdim=True)


def rollout(layers: Tensor) -> Tensor:
    """Return R = A'_L ... A'_1 of head-averaged attention [L, T, T]; the identity where L is 0.

    Example:
        >>> rollout(torch.zeros(0, 3, 3)).equal(torch.eye(3))
        True
    """
    found = torch.eye(layers.shape[-1], dtype=layers.dtype, device=layers.device)
    for layer in layers:
        found = with_residual(layer) @ found
    return found


def flow(steps: Tensor, row: int) -> Tensor:
    """Return the maximum flow from a top node to every input token, divided by its sum, float64 [T].

    Capacities are rounded to 2^-29, as scipy's algorithm takes whole numbers.

    Args:
        steps: A' of each layer, [L, T, T].
        row: the node at the top.

    Raises:
        RegardError: for more than 64 tokens, of each of which a flow is computed.

    Example:
        >>> uniform = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
        >>> flow(uniform, -1).tolist()
        [0.5, 0.5]
    """
    layers, length = steps.shape[:2]
    if length > LONGEST_FLOW:
        raise RegardError(
            f"flow computes {length} maximum flows for {length} tokens; it takes texts of up to "
            f"{LONGEST_FLOW}. Use rollout or average."
        )
    if layers == 0:
        return torch.eye(length, dtype=torch.float64)[row]
    capacities = np.rint(steps.detach().cpu().double().numpy() * UNIT).astype(np.int32)
    found = np.array(_flows(capacities, row % length), dtype=np.float64)
    return torch.from_numpy(found / max(found.sum(), 1.0))


def _flows(capacities: npt.NDArray[np.int32], row: int) -> list[int]:
    """The maximum flow from node (L, row) to each (0, j); node (l, i) has number l * T + i."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    layers, length = capacities.shape[:2]
    layer, query, key = np.nonzero(capacities)
    size = (layers + 1) * length
    graph = csr_array(
        (capacities[layer, query, key], ((layer + 1) * length + query, layer * length + key)),
        shape=(size, size),
    )
    return [int(maximum_flow(graph, layers * length + row, token).flow_value) for token in range(length)]


def paths_of(
    model: nn.Module, inputs: dict[str, Any], *, norms: bool = True, keep: bool = False
) -> TokenPaths:
    """Run a model once and return its paths.

    Raises:
        UnsupportedModel: where its attention, or that of some layer, cannot be reached.
    """
    from regard.runtime.anatomy import anatomy_of, require_attention, root_of
    from regard.runtime.verbs import watch

    anatomy = anatomy_of(root_of(model))
    require_attention(anatomy)
    with torch.no_grad(), watch(model, AttentionPaths(norms=norms, keep=keep)) as seen:
        model(**inputs)
    expected = [site.alias for site in anatomy.sites if site.kind == anatomy.main]
    lens = seen.lens(AttentionPaths)
    missing = set(expected) - set(lens.seen.get("sites", ()))  # type: ignore[attr-defined]
    if missing:
        raise UnsupportedModel(
            f"{type(model).__name__} did not show the attention of {sorted(missing)[0]} in this forward."
        )
    return seen[AttentionPaths]
