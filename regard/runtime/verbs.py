"""The verbs watch, steer and patch; `swap` stands with the mechanisms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.protocol import Edit, Lens
from regard.runtime.session import Session
from regard.runtime.site import Point


def watch(
    model: nn.Module,
    *lenses: Lens,
    layers: Iterable[int | str] | None = None,
    spans: dict[str, Tensor] | None = None,
) -> Session:
    """Open a session in which `lenses` read the attention of `model` while it runs.

    Args:
        model: any transformers model whose attention regard can reach; it is not changed.
        lenses: what to measure. With none, only which sites are called is noted.
        layers: numbers in the main stack or aliases that the lenses see; default all.
        spans: name -> bool [B, S], which positions are what; lenses and edits find them in `run.spans`.

    Returns:
        A context manager; index it with a lens' class or name for its result.

    Raises:
        UnsupportedModel: where the model's attention cannot be reached.
        NoSuchSite: where `layers` names one that is not there.

    Example:
        >>> with regard.watch(model, Entropy()) as seen:        # doctest: +SKIP
        ...     model(**inputs)
        >>> seen[Entropy].table                                  # doctest: +SKIP
    """
    for lens in lenses:
        if not isinstance(lens, Lens):
            raise RegardError(f"watch takes lenses, and {lens!r} is none; edits go to steer.")
    return Session(model, lenses, spans, layers)


def steer(model: nn.Module, *edits: Edit | Lens, spans: dict[str, Tensor] | None = None) -> Session:
    """Open a session in which `edits` change the attention of `model` while it runs.

    Args:
        model: as for `watch`.
        edits: applied in the order given; lenses among them see the result.
        spans: as for `watch`.

    Raises:
        UnsupportedModel: where the model's attention cannot be reached.
        NoSuchSite: where an edit names a layer or head that is not there.
    """
    if not edits:
        raise RegardError("steer needs at least one edit.")
    return Session(model, edits, spans)


def patch(model: nn.Module, values: Mapping[Point, Any]) -> Session:
    """Open a session in which the tensors at some points of `model` are replaced.

    Args:
        model: as for `watch`.
        values: point -> tensor that broadcasts to the point's shape, or a function of the old tensor.

    Raises:
        NoSuchSite: for a point that the model does not have.
        ShapeMismatch: when run, for a value that does not fit.
    """
    from regard.runtime.patch import Patch

    return Session(model, [Patch(values)])
