"""Virtual adversarial training on attention scores: no labels are needed.

    p = p(y | a), held;  d ~ N(0, I) on valid scores, of norm 1
    K times:  g = d KL(p || p(y | a + xi d)) / dd;  d = g / ||g||
    loss = lambda KL(p || p(y | a + eps d))

    vat         as above
    ivat        by differences of scores (see `labelled`); after a power step it has the form of `vat`, and
                its random start is normal for every token as well, so it is computed so
    ivat_token  differences normalised a token at a time: eps sign(g_t)
    random      the random start itself, the control

With one output for two classes the power step finds the line of the supervised gradient, up to its sign.

Source: Kitada and Iyatomi, 2023, arXiv 2104.08763, section 3. Status: paper only; K, lambda and xi are those
of the usual virtual adversarial training, which the paper's own were not confirmed to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.adversarial.directions import (
    LogitsOf,
    Scores,
    check_masks,
    check_options,
    random_unit,
    scaled,
    signs,
    still,
    unit,
)

Variant = Literal["vat", "ivat", "ivat_token", "random"]


@dataclass(frozen=True)
class Moved:
    """What one step did.

    Attributes:
        divergence: KL of each sequence, in nats, float32 [B], detached.
        perturbation: r, of the shapes of the masks.
    """

    divergence: Tensor
    perturbation: Scores

    @property
    def still(self) -> int:
        """How many sequences were skipped: with no two valid scores, or a prediction that nothing moves."""
        return still(self.perturbation)


@dataclass(frozen=True)
class AttentionVirtualAdversary:
    """A loss on how far a perturbation of attention scores moves the prediction.

    Attributes:
        eps: length of the perturbation of a sequence, in units of scores.
        lam: weight of the loss.
        xi: length of the probe.
        steps: K, power steps.
        variant: see above.
        generator: of the random start.

    Raises:
        RegardError: for numbers out of range, or an unknown variant.
    """

    eps: float
    lam: float = 1.0
    xi: float = 1.0
    steps: int = 1
    variant: Variant = "vat"
    generator: torch.Generator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_options(self.eps, self.lam, self.variant, get_args(Variant))
        if not 0 < self.xi < float("inf"):
            raise RegardError(f"xi is {self.xi}; it must be a finite number above 0.")
        if self.steps < 1:
            raise RegardError(f"steps is {self.steps}; there must be one at least.")

    def __call__(
        self, logits_of: LogitsOf, valid: Sequence[Tensor], held: Tensor | None = None
    ) -> tuple[Tensor, Moved]:
        """Return the loss to lower beside the task's, a mean over sequences, and what was done.

        A sequence whose prediction no perturbation moves, as one of a single valid token, gets none. Under
        autocast the power steps are computed in float32, where small differences do not vanish.

        Args:
            logits_of: logits [B, C], or [B] of two classes, with tensors added to the attention scores. It
                must be a function: dropout differs between two calls, so turn it off, or share its masks as
                the readers of `reach(model)` do.
            valid: which scores count, bool [B, ..., keys] each.
            held: the logits with nothing added, where they are known; it saves a pass.

        Raises:
            RegardError: where no gradient reaches the scores.
            ShapeMismatch: for masks that do not fit, or logits of another shape.
        """
        masks = check_masks(valid)
        mixed = torch.is_autocast_enabled(masks[0].device.type)
        if held is None:
            held = _unmoved(logits_of, masks)
        if held.ndim not in (1, 2) or held.shape[0] != masks[0].shape[0]:
            raise ShapeMismatch(f"logits are {list(held.shape)}; they must be [B] or [B, classes].")
        with _full_precision(masks[0].device, mixed):
            exact = _unmoved(logits_of, masks) if mixed and self.variant != "random" else held.detach()
            direction = self._direction(logits_of, exact, masks)
        r = scaled(direction, self.eps)
        each = divergence(held, logits_of(r))
        return self.lam * each.mean(), Moved(each.detach(), r)

    def _direction(self, logits_of: LogitsOf, held: Tensor, masks: Scores) -> Scores:
        direction = random_unit(masks, self.generator)
        gradient: Scores = direction
        for _ in range(0 if self.variant == "random" else self.steps):
            gradient = self._gradient(logits_of, held, direction)
            direction = unit(gradient, masks)
        return signs(gradient, masks) if self.variant == "ivat_token" else direction

    def _gradient(self, logits_of: LogitsOf, held: Tensor, direction: Scores) -> Scores:
        probe = tuple((self.xi * d).detach().requires_grad_() for d in direction)
        with torch.enable_grad():
            moved = divergence(held, logits_of(probe)).sum()
        if not moved.requires_grad:
            raise RegardError("the logits have no gradient with respect to attention scores.")
        found = torch.autograd.grad(moved, probe, allow_unused=True)
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, probe, strict=True))


def _unmoved(logits_of: LogitsOf, masks: Scores) -> Tensor:
    with torch.no_grad():
        return logits_of(tuple(torch.zeros(m.shape, device=m.device) for m in masks)).float()


def _full_precision(device: torch.device, mixed: bool) -> AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if mixed else nullcontext()


def divergence(held: Tensor, logits: Tensor) -> Tensor:
    """Return KL(held || other) of each sequence in nats, float32 [B]; no gradient reaches `held`.

    Args:
        held, logits: [B, C], or [B] of two classes.
    """
    held, logits = held.detach().float(), logits.float()
    if held.ndim == 1:
        held, logits = (torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], -1) for x in (held, logits))
    else:
        held, logits = held.log_softmax(-1), logits.log_softmax(-1)
    return (held.exp() * (held - logits)).sum(-1)
