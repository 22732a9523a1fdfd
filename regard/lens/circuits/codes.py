"""Codes of heads: which atom of a dictionary is largest, and which codes only one kind of prompt shows.

    code_eh   = argmax_k c_ehk                                    of prompt e and head h; 0 where all are 0
    node_h    = |codes at h in positives  \\  codes at h in negatives|
    edge_hg   = the same of the pairs (code at h, code at g), h other than g
    counted_h = how often h is in the first (heads^2) / 2 ends of the edges, largest edges first

Source: O'Neill and Bui, 2024, arXiv 2405.12522, section 3, and its code (`src/node.py`, `src/edge.py`).
Status: agrees with the official code, but for edges of equal size: theirs come in the order that an unstable
sort leaves them in, ours by head.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.head_table import Head

FORMAT = "regard-codes-1"
Values = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of one dictionary.

    Attributes:
        values: int64 [N, heads].
        positive: bool [N].
        names: (alias of the layer, head) of each column.
        n_codes: K.

    Raises:
        ShapeMismatch: where they do not fit together.
    """

    values: Numbers
    positive: npt.NDArray[np.bool_]
    names: tuple[Head, ...]
    n_codes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, dtype=np.int64))
        object.__setattr__(self, "positive", np.asarray(self.positive, dtype=bool))
        if self.values.shape != (len(self.positive), len(self.names)):
            raise ShapeMismatch(
                f"codes are {self.values.shape} beside {len(self.positive)} prompts and {len(self.names)} "
                "heads."
            )

    @property
    def degenerate(self) -> bool:
        """Whether no head ever changes its code, so that nothing can be told from them."""
        return bool((self.values == self.values[:1]).all())

    def nodes(self, *, normalise: bool = False, within_layer: bool = False) -> Values:
        """Return the number of codes of each head that positives alone show, float64 [heads].

        Args:
            normalise: divide by how many codes the head shows at all.
            within_layer: softmax over the heads of each layer, as the official `across_layer` has it.
        """
        some, all_ = _distinct(self.values, self.positive)
        found = some / all_ if normalise else some
        return _softmax_by(found, [site for site, _ in self.names]) if within_layer else found

    def edges(self, *, normalise: bool = False) -> Values:
        """Return the number of pairs of codes that positives alone show, float64 [heads, heads]; 0 on the
        diagonal.

        Args:
            normalise: divide by how many pairs of codes positives show and negatives show, added up.
        """
        count = self.values.shape[1]
        found = np.zeros((count, count))
        for head in range(count - 1):
            pairs = self.values[:, head, None] * self.n_codes + self.values[:, head + 1 :]
            some, all_ = _distinct(pairs, self.positive)
            if normalise:
                shown = _distinct(pairs[self.positive], self.positive[self.positive])[1]
                some = some / (shown + all_ - some)
            found[head, head + 1 :] = found[head + 1 :, head] = some
        return found

    def counted(self, *, normalise: bool = False) -> Values:
        """Return how often each head is an end of the largest edges, float64 [heads]."""
        edges = self.edges(normalise=normalise)
        order = np.argsort(-edges.ravel(), kind="stable")
        ends = np.stack(np.unravel_index(order, edges.shape), 1).ravel()
        most = edges.shape[0] ** 2 // 2
        return np.bincount(ends[:most], minlength=edges.shape[0]).astype(np.float64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the codes to a safetensors file, whole or not at all.

        Raises:
            RegardError: where the path cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        about = {"format": FORMAT, "names": json.dumps(self.names), "n_codes": str(self.n_codes)}
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            save_file({"values": self.values.astype(np.int32), "positive": self.positive}, partial, about)
            os.replace(partial, target)
        except (OSError, SafetensorError) as error:
            raise RegardError(
                f"cannot write {target}: {getattr(error, 'strerror', None) or error}."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codes:
        """Read what `save` wrote.

        Raises:
            RegardError: where the file is missing or holds no codes.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise KeyError("format")
                values, positive = file.get_tensor("values"), file.get_tensor("positive")
            names = tuple((site, int(head)) for site, head in json.loads(about["names"]))
            return cls(values, positive, names, int(about["n_codes"]))
        except OSError as error:
            raise RegardError(f"cannot read {path}: {error.strerror or error}.") from error
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise RegardError(f"{path} holds no codes that regard saved.") from error


def _distinct(values: Numbers, positive: npt.NDArray[np.bool_]) -> tuple[Values, Values]:
    """Return for each column how many values positives alone have, and how many there are at all."""
    keyed = np.sort(2 * values + ~positive[:, None], axis=0)
    last = np.ones(keyed.shape, dtype=bool)
    last[:-1] = keyed[:-1] // 2 != keyed[1:] // 2
    first = np.ones(keyed.shape, dtype=bool)
    first[1:] = last[:-1]
    alone = (last & (keyed % 2 == 0)).sum(0)
    return alone.astype(np.float64), first.sum(0).astype(np.float64)


def _softmax_by(values: Values, groups: list[str]) -> Values:
    found = np.empty_like(values)
    for group in dict.fromkeys(groups):
        members = np.array([g == group for g in groups])
        raised = np.exp(values[members] - values[members].max())
        found[members] = raised / raised.sum()
    return found
