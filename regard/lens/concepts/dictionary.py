"""Dictionaries of concepts: K directions that hidden states are made of.

    Z ~ V U        Z [n, D] hidden states, U [K, D] concepts, V [n, K] how active each is in each

    k-means     U: centroids;  V = 1 / (1 + ||z - u||)
    pca         U: components, which have no sign;  V = (z - mean) U^T
    semi-nmf    min 1/2 ||Z - V U||^2 + penalty ||V||_1,  V >= 0, ||u|| <= 1
    nmf         min ||Z - V U||^2,  V >= 0, U >= 0, for states that are never negative
    simple      U: the K states of the largest norm;  V as for k-means

A state is of the concept that is the most active in it.

Source: Khayatan et al., 2025, arXiv 2501.03012, section 3 and appendix (k-means is their default); computed
by scikit-learn. Status: agrees with the official code; `nmf` is ours.
"""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch
from regard.lens.concepts.features import Features, Layer, read_tensors
from regard.runtime.table import write_bytes

Method = Literal["k-means", "pca", "semi-nmf", "nmf", "simple"]
FORMAT = "regard concepts 1"
COUNT, RESTARTS, MOST_ROUNDS, PENALTY = 20, 8, 300, 1.0


@dataclass(frozen=True, eq=False)
class Concepts:
    """A dictionary.

    Attributes:
        vectors: float32 [K, D].
        method: how they were found, and so how `activate` reads them.
        mean: float32 [D], what `pca` takes off first; None for the others.
        layer: where the states were; None where it was not told.
        about: `model`, `seed`, `samples`, `penalty`; plain JSON.
    """

    vectors: Tensor
    method: Method
    mean: Tensor | None = None
    layer: Layer | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    def activate(self, states: Tensor) -> Tensor:
        """Return how active each concept is in states [n, D], float32 [n, K].

        Raises:
            ShapeMismatch: for states of another width.
        """
        if states.ndim != 2 or states.shape[1] != self.vectors.shape[1]:
            raise ShapeMismatch(
                f"states are {list(states.shape)}; these concepts take [n, {self.vectors.shape[1]}]."
            )
        states = states.float()
        if self.method in ("k-means", "simple"):
            return 1 / (1 + torch.cdist(states, self.vectors))
        if self.method == "pca":
            assert self.mean is not None
            return (states - self.mean) @ self.vectors.T
        decomposition, x, u = sklearn("decomposition"), states.numpy(), self.vectors.numpy()
        if self.method == "semi-nmf":
            penalty = self.about.get("penalty", PENALTY)
            codes = decomposition.sparse_encode(
                x, u, algorithm="lasso_cd", alpha=penalty, positive=True, max_iter=1000
            )
        else:
            codes, _, _ = decomposition.non_negative_factorization(
                x, H=u, update_H=False, n_components=len(u)
            )
        return torch.from_numpy(np.asarray(codes, dtype=np.float32))

    def assign(self, states: Tensor) -> Tensor:
        """Return of which concept each of states [n, D] is, int64 [n]."""
        return self.activate(states).argmax(1)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {"vectors": self.vectors.contiguous()}
        if self.mean is not None:
            tensors["mean"] = self.mean.contiguous()
        told = {"method": self.method, "layer": self.layer, "about": self.about}
        write_bytes(path, save(tensors, {"format": FORMAT, "told": json.dumps(told)}))

    @classmethod
    def load(cls, path: str | Path) -> Concepts:
        """Read what `save` wrote.

        Raises:
            RegardError: for a file that cannot be read, or holds something else.
        """
        tensors, told = read_tensors(path, FORMAT, "concepts")
        return cls(tensors["vectors"], told["method"], tensors.get("mean"), told["layer"], told["about"])


def fit_concepts(
    states: Features | Tensor,
    count: int = COUNT,
    method: Method = "k-means",
    *,
    layer: Layer | None = None,
    seed: int = 0,
    restarts: int = RESTARTS,
    penalty: float = PENALTY,
) -> Concepts:
    """Find a dictionary.

    Args:
        states: of `collect_features`, or [n, D].
        count: K, concepts.
        method: see above.
        layer: which of the states, where they are of several; of a tensor, what it is called.
        seed: of everything drawn.
        restarts: of k-means; the best counts.
        penalty: of `semi-nmf`, on the sum of activations.

    Raises:
        RegardError: for more concepts than states, an unknown method, a state that is not finite, negative
            ones for `nmf`, or where scikit-learn is missing.

    Example:
        >>> states = torch.cat([torch.randn(20, 4) + 9, torch.randn(20, 4) - 9])
        >>> found = fit_concepts(states, 2)
        >>> sorted(found.assign(states).bincount().tolist())
        [20, 20]
    """
    x = states.at(layer) if isinstance(states, Features) else states
    about: dict[str, Any] = {"seed": seed, "samples": len(x), "penalty": penalty}
    if isinstance(states, Features):
        layer = states.layers[0] if layer is None else layer
        about["model"] = states.about.get("model")
    _check(x, count, method, restarts, penalty)
    values = x.float().cpu().numpy()
    mean = None
    if method == "simple":
        u = values[np.argsort(np.linalg.norm(values, axis=1))[-count:]]
    else:
        u, mean = _found(values, count, method, seed, restarts, penalty)
    vectors = torch.from_numpy(np.array(u, dtype=np.float32))
    return Concepts(vectors, method, None if mean is None else torch.from_numpy(mean), layer, about)


def sklearn(module: str) -> Any:
    """Return a module of scikit-learn.

    Raises:
        RegardError: where it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as missing:
        raise RegardError('concepts need scikit-learn; run `pip install "regard[concepts]"`.') from missing


def _found(values: Any, count: int, method: str, seed: int, restarts: int, penalty: float) -> tuple[Any, Any]:
    """The dictionary [K, D], and the mean that was taken off, or None."""
    with warnings.catch_warnings():  # equal states give fewer clusters, long searches end early: no error
        warnings.simplefilter("ignore")
        if method == "k-means":
            made = sklearn("cluster").KMeans(count, n_init=restarts, max_iter=MOST_ROUNDS, random_state=seed)
            return made.fit(values).cluster_centers_, None
        part = sklearn("decomposition")
        if method == "pca":
            made = part.PCA(count, svd_solver="full").fit(values)
            return made.components_, made.mean_.astype(np.float32)
        if method == "nmf":
            return part.NMF(count, random_state=seed, max_iter=MOST_ROUNDS).fit(values).components_, None
        made = part.DictionaryLearning(
            count, alpha=penalty, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd",
            max_iter=MOST_ROUNDS, random_state=seed,
        )  # fmt: skip
        return made.fit(values).components_, None


def _check(x: Any, count: int, method: str, restarts: int, penalty: float) -> None:
    if method not in get_args(Method):
        raise RegardError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}.")
    if not isinstance(x, Tensor) or x.ndim != 2:
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeMismatch(f"states are {shape}; they must be a tensor [n, D].")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(x):
        raise RegardError(f"count is {count!r}; {len(x)} states can have 1 to {len(x)} concepts.")
    if method == "pca" and count > x.shape[1]:
        raise RegardError(f"count is {count}; states of width {x.shape[1]} have as many components at most.")
    if restarts < 1 or not penalty > 0:
        raise RegardError(f"restarts is {restarts} and penalty {penalty}; they take 1 or more, and above 0.")
    if not bool(torch.isfinite(x).all()):
        raise RegardError("a state is not finite.")
    if method == "nmf" and bool((x < 0).any()):
        raise RegardError("nmf takes states that are never negative, and these are; take semi-nmf.")
