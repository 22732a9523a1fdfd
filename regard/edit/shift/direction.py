"""Vectors to steer by, which know their model and layer, and add up.

    coarse    s = mean(target states) - mean(source states)
    fine      s_ij = u_j - u_i                  two concepts of one dictionary, j the wanted one
    shift     s = Delta_k, or the mean over all samples

Source: Khayatan et al., 2025, arXiv 2501.03012, section 5; steering by a shift is ours. Status: agrees with
the official code (coarse and fine).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.edit.shift.adding import AddVector, Scope
from regard.errors import RegardError, ShapeMismatch
from regard.lens.concepts.dictionary import Concepts
from regard.lens.concepts.features import FINAL_NORM, Features, Layer, read_tensors
from regard.lens.concepts.moved import Shift
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.model_identity import check_same
from regard.runtime.table import write_bytes

FORMAT = "regard direction 1"


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector of the residual stream. `a + b`, `a - b`, `2 * a` and `-a` are directions too.

    Attributes:
        vector: float32 [D].
        layer: the block after which the states were taken.
        about: `model`, what `identify` says, or None, and how it was made; plain JSON.

    Raises:
        RegardError: for states after the final norm, whose scale is another than that of the stream.
    """

    vector: Tensor
    layer: Layer
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layer == FINAL_NORM:
            raise RegardError(
                "vectors of states after the final norm cannot be added before it, as their scale is "
                "another; collect states after a block."
            )

    def edit(self, alpha: float = 1.0, scope: Scope = "all", start: int | None = None) -> AddVector:
        """Return the edit, for `regard.steer` and `regard.save_edits`."""
        return AddVector(vector=self.vector, layer=self.layer, alpha=alpha, scope=scope, start=start)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that it was not made on.

        Raises:
            RegardError: naming both.
        """
        if self.about.get("model"):
            check_same(self.about["model"], anatomy_of(root_of(model)), "this direction")

    def random(self, seed: int = 0) -> Direction:
        """Return a direction drawn at random, of the same norm: the control that steering needs."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.vector.shape, generator=generator)
        drawn *= self.vector.norm() / drawn.norm()
        return replace(self, vector=drawn, about={**self.about, "made": f"random, seed {seed}"})

    def scaled(self, norm: float) -> Direction:
        """Return it at another norm."""
        return self * (norm / float(self.vector.norm()))

    def __add__(self, other: Direction) -> Direction:
        if other.layer != self.layer or other.vector.shape != self.vector.shape:
            raise ShapeMismatch(
                f"one direction is of layer {self.layer} and {len(self.vector)} wide, the other of layer "
                f"{other.layer} and {len(other.vector)}."
            )
        return replace(self, vector=self.vector + other.vector)

    def __sub__(self, other: Direction) -> Direction:
        return self + (-other)

    def __mul__(self, factor: float) -> Direction:
        return replace(self, vector=factor * self.vector)

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return -1.0 * self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        note = {"format": FORMAT, "told": json.dumps({"layer": self.layer, "about": self.about})}
        write_bytes(path, save({"vector": self.vector.contiguous()}, note))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Direction:
        """Read what `save` wrote.

        Args:
            model: which it must have been made on; None does not check.

        Raises:
            RegardError: for a file that cannot be read, holds something else, or was made on another model.
        """
        tensors, told = read_tensors(path, FORMAT, "direction")
        found = cls(tensors["vector"], told["layer"], told["about"])
        if model is not None:
            found.check(model)
        return found


def mean_difference(target: Features, source: Features, layer: Layer | None = None) -> Direction:
    """Return the coarse direction, from the source's mean state to the target's.

    Raises:
        RegardError: for another layer, or features of two models.
        ShapeMismatch: for different widths.
    """
    _check_alike(target, source)
    a, b = target.at(layer), source.at(layer)
    if a.shape[1] != b.shape[1]:
        raise ShapeMismatch(f"target states are {a.shape[1]} wide, and source states {b.shape[1]}.")
    about = {"model": target.about.get("model"), "made": f"means of {len(a)} and {len(b)} states"}
    return Direction(a.mean(0) - b.mean(0), _layer(target, layer), about)


def between_concepts(concepts: Concepts, source: int, target: int) -> Direction:
    """Return the fine direction, from one concept to another.

    Raises:
        RegardError: for PCA, whose components have no sign, a concept that is not there, or one dictionary
            without a layer.
    """
    if concepts.method == "pca":
        raise RegardError(
            "components of PCA have no sign, so none leads to another; take k-means or semi-nmf."
        )
    for number in (source, target):
        if not 0 <= number < len(concepts):
            raise RegardError(f"there is no concept {number}; they are 0 to {len(concepts) - 1}.")
    if concepts.layer is None:
        raise RegardError("these concepts do not say of which layer they are; fit them from Features.")
    about = {"model": concepts.about.get("model"), "made": f"concept {source} to {target}"}
    return Direction(concepts.vectors[target] - concepts.vectors[source], concepts.layer, about)


def of_shift(shift: Shift, concept: int | None = None) -> Direction:
    """Return the shift of a concept, or the mean over all samples.

    Raises:
        RegardError: for a concept that is not there, or without samples.
    """
    concepts = shift.concepts
    if concept is not None and not (0 <= concept < len(concepts) and int(shift.counts[concept])):
        raise RegardError(
            f"concept {concept} has no shift; there are {len(concepts)}, of which some are empty."
        )
    if concepts.layer is None:
        raise RegardError("this shift does not say of which layer it is; analyse Features.")
    vector = shift.common if concept is None else shift.vectors[concept]
    about = {"model": concepts.about.get("model"), "made": f"shift of concept {concept}"}
    return Direction(vector.clone(), concepts.layer, about)


def _layer(states: Features, layer: Layer | None) -> Layer:
    return states.layers[0] if layer is None else layer


def _check_alike(target: Features, source: Features) -> None:
    models = [states.about.get("model") for states in (target, source)]
    if all(models) and models[0] != models[1]:
        raise RegardError("target and source states are of two models; a direction is of one.")
