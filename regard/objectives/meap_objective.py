"""The objective of mask-enhanced next-token prediction, for a loop of one's own: what to hide at which step.

    P(step) = a constant, or a ramp:  start + (end - start) min(1, step / steps)

What is hidden depends on the seed, the step, the part of the batch and the ratio, and on nothing that came
before, so a training that goes on from its file hides what it would have hidden. Source: Zhuang et al., 2025,
arXiv 2502.07490, section 3. Status: partly our choice (the ramp; the seeds, where the official code has 51).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.objectives.meap import RATIO, Scheme, check_ratio, mask_inputs
from regard.objectives.schedule import check_count, mixed

PLACEHOLDERS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
    "audio_token_index",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A ratio that goes from one value to another in a straight line, and stays there.

    Attributes:
        start, end: ratios, in [0, 1).
        steps: optimiser steps from the one to the other, from 1.

    Example:
        >>> ramp = Ramp(steps=100)
        >>> ramp.at(0), ramp.at(50), ramp.at(500)
        (0.0, 0.075, 0.15)
    """

    start: float = 0.0
    end: float = RATIO
    steps: int

    def __post_init__(self) -> None:
        check_ratio(self.start, "start")
        check_ratio(self.end, "end")
        check_count("steps", self.steps, 1)

    def at(self, step: int) -> float:
        """Return the ratio of a step, counted from 0."""
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True, kw_only=True)
class MEAP:
    """What to hide of the inputs at each step; targets and the loss stay those of next-token prediction.

    Attributes:
        mask_id: the token that stands for a hidden one; see `add_mask_token`.
        ratio: share of the tokens of each row, or document, in [0, 1); or a `Ramp`. Beyond 0.2 the authors
            tried none.
        protect: token ids that are never hidden, such as the beginning of text or image placeholders.
        scheme: see `mask_inputs`.
        seed: of what is hidden.

    Example:
        >>> objective = MEAP(mask_id=99)
        >>> hidden, where = objective.hide(torch.arange(20)[None], step=7)
        >>> int(where.sum()), bool((hidden == objective(torch.arange(20)[None], 7)).all())
        (3, True)
    """

    mask_id: int
    ratio: float | Ramp = RATIO
    protect: Sequence[int] = ()
    scheme: Scheme = "independent"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, Ramp):
            check_ratio(self.ratio)
        check_count("mask_id", self.mask_id, 0)
        check_count("seed", self.seed, 0)

    def ratio_at(self, step: int) -> float:
        """Return the ratio of a step, counted from 0."""
        return self.ratio.at(step) if isinstance(self.ratio, Ramp) else self.ratio

    def hide(
        self,
        ids: Tensor,
        *,
        step: int,
        part: int = 0,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        protect: Sequence[int] = (),
        rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hide some of the inputs of a step.

        Args:
            ids: inputs, int64 [B, T], on any device; not changed.
            step: of the optimiser, from 0.
            part: of the batch, where gradients of several are added up or several processes have one each.
            valid, documents, rows: as for `mask_inputs`.
            protect: more token ids that are never hidden.

        Returns:
            The ids with some hidden, and where, bool [B, T].
        """
        ratio = self.ratio_at(step)
        if self.scheme == "shared51":
            alone = valid is None or bool(valid.all())
            return mask_inputs(
                ids, self.mask_id, ratio, scheme="shared51", step=step, rows=rows, documents=documents,
                valid=None if alone else valid, protect=(*self.protect, *protect) or None,
            )  # fmt: skip
        generator = torch.Generator().manual_seed(mixed(mixed(self.seed, step), part))
        return mask_inputs(
            ids, self.mask_id, ratio, generator=generator, valid=valid, documents=documents, rows=rows,
            protect=(*self.protect, *protect) or None,
        )  # fmt: skip

    def __call__(self, ids: Tensor, step: int) -> Tensor:
        """Return the ids of a step with some hidden; `inputs` of `regard.objectives.train`."""
        return self.hide(ids, step=step)[0]

    def told(self) -> dict[str, Any]:
        """Return what a training's file says of it, as JSON holds it."""
        return asdict(self) | {"objective": "meap"}


def placeholders(config: Any) -> tuple[int, ...]:
    """Return the token ids that stand for images, videos and sounds in a model's inputs.

    Hidden, they would be missing where the model puts the features in.

    Args:
        config: of a transformers model.
    """
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def documents_of(positions: Tensor) -> Tensor | None:
    """Return which document each token of packed rows is of, int64 [B, T]; None where rows are one each.

    Args:
        positions: `position_ids` as transformers has them, int64 [B, T]; a document begins where they do not
            go on.

    Example:
        >>> documents_of(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist()
        [[0, 0, 0, 1, 1, 2]]
    """
    if positions.ndim != 2:
        return None
    found = (positions.diff(dim=1) != 1).long().cumsum(1)
    if not bool(found.any()):
        return None
    return torch.nn.functional.pad(found, (1, 0))


def check_trainable(model: Any, mask_id: int) -> int:
    """Return the rows of a model's embedding.

    Raises:
        RegardError: where it has no row for `mask_id`.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if mask_id >= rows:
        raise RegardError(f"mask_id is {mask_id}, and the embedding has {rows} rows; resize it before.")
    return rows
