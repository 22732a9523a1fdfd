"""Adversarial training on attention scores.

    g = dL / da at the clean scores       r = eps g / ||g||       loss = L(a) + lambda L(a + r)

with a the scores before the softmax, the norm over a sequence, and r taken as a constant.

    at          r as above
    iat         the paper's construction by differences of scores, d_tk = a_t - a_k, each row of norm 1:
                r_t = sum_k alpha_tk d_tk, alpha = eps dL/dalpha at alpha = 0, normalised over the sequence.
                As ||d_t|| = 1, r_t = eps g_t / ||g||: for scalar scores the same as `at`, but for tokens tied
                with all others, which stay. It is computed so.
    sign        r_t = eps sign(g_t), which normalising alpha a token at a time amounts to
    published   r = -eps g / ||g||, what the official code computes: it lowers the loss. Not adversarial
    random      a random direction of norm eps, the control

Source: Kitada and Iyatomi, 2021, arXiv 2009.12064, sections 3 and 4. Status: partly our choice: gradients
reach scores only, where the official code lets those of the inner step stay in the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.objectives.adversarial.directions import (
    Scores,
    check_masks,
    check_options,
    random_unit,
    scaled,
    signs,
    still,
    unit,
)
from regard.objectives.adversarial.known import with_known_gradients

HOW = (
    "they must be added before the softmax; a fused kernel of scaled_dot_product_attention or "
    "flash_attention_2 passes none to its mask, so take ScorePort, attn_implementation='eager' or "
    "SDPBackend.MATH"
)
Variant = Literal["at", "iat", "sign", "published", "random"]
LossOf = Callable[[Scores], Tensor]


@dataclass(frozen=True)
class Perturbed:
    """What one step did.

    Attributes:
        clean, adversarial: the two losses, detached.
        perturbation: r, of the shapes of the masks.
    """

    clean: Tensor
    adversarial: Tensor
    perturbation: Scores

    @property
    def still(self) -> int:
        """How many sequences were left as they are: without a valid score or a gradient."""
        return still(self.perturbation)


@dataclass(frozen=True)
class AttentionAdversary:
    """A loss on clean and on perturbed attention scores.

    Attributes:
        eps: length of the perturbation of a sequence, in units of scores; it has no default in the paper.
        lam: weight of the perturbed loss.
        variant: see above.
        generator: of `random`.

    Raises:
        RegardError: for an eps or lam that is negative or not finite, or an unknown variant.

    Example:
        >>> scores, values = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 2.0, 4.0]])
        >>> def loss_of(added):
        ...     return ((scores + added[0]).softmax(-1) * values).sum()
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> loss, told = AttentionAdversary(eps=1.0)(loss_of, [mask])
        >>> bool(told.adversarial > told.clean), round(float(told.perturbation[0].norm(dim=1)[0]), 4)
        (True, 1.0)
    """

    eps: float
    lam: float = 1.0
    variant: Variant = "at"
    generator: torch.Generator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_options(self.eps, self.lam, self.variant, get_args(Variant))

    def __call__(
        self, loss_of: LossOf, valid: Sequence[Tensor], parameters: Iterable[Tensor] = ()
    ) -> tuple[Tensor, Perturbed]:
        """Return the loss to lower, and what was done.

        Args:
            loss_of: the task's loss with tensors added to the attention scores, one a mask.
            valid: which scores count, bool [B, ..., keys] each; a row's softmax is over the last dimension.
            parameters: what the loss trains. Where given, the one backward pass that finds g finds their
                gradients as well, and they are handed on when the loss is: a quarter of the time less, where
                most of the model comes after the scores. Not with float16 losses that are scaled later.

        Raises:
            RegardError: where no gradient reaches the scores.
            ShapeMismatch: for masks that do not fit each other.
        """
        masks = check_masks(valid)
        trained = [p for p in parameters if p.requires_grad]
        added = tuple(torch.zeros(m.shape, device=m.device, requires_grad=True) for m in masks)
        with torch.enable_grad():
            clean = loss_of(added)
            gradient, others = _gradients(clean, added, trained)
        if trained:
            clean = with_known_gradients(clean, trained, others)
        r = self.perturbation(gradient, masks)
        adversarial = loss_of(r)
        return clean + self.lam * adversarial, Perturbed(clean.detach(), adversarial.detach(), r)

    def perturbation(self, gradient: Sequence[Tensor], valid: Sequence[Tensor]) -> Scores:
        """Return r for a gradient of the loss at the clean scores.

        Args:
            gradient: [B, ..., keys] each.
            valid: bool, of the same shapes.
        """
        if self.variant == "random":
            return scaled(random_unit(valid, self.generator), self.eps)
        if self.variant == "sign":
            return scaled(signs(gradient, valid), self.eps)
        return scaled(unit(gradient, valid), -self.eps if self.variant == "published" else self.eps)


def _gradients(
    loss: Tensor, added: Scores, trained: Sequence[Tensor]
) -> tuple[Scores, Sequence[Tensor | None]]:
    """Return the gradients of a loss that reach the scores, and those of what it trains."""
    if not loss.requires_grad:
        raise RegardError(f"the loss has no gradient with respect to attention scores; {HOW}.")
    found = torch.autograd.grad(loss, [*added, *trained], retain_graph=not trained, allow_unused=True)
    reached = found[: len(added)]
    if all(g is None for g in reached):
        raise RegardError(f"no gradient reaches the attention scores; {HOW}.")
    whole = tuple(torch.zeros_like(a) if g is None else g for g, a in zip(reached, added, strict=True))
    return whole, found[len(added) :]


def iat_by_definition(scores: Tensor, gradient: Tensor, valid: Tensor, eps: float) -> Tensor:
    """Return iAT's perturbation by differences of scores, written out; [B, T] each.

    The identity in this file's first lines says that it equals `at`, but for tokens tied with all others.
    """
    pairs = valid[:, :, None] & valid[:, None, :]
    d = (scores[:, :, None] - scores[:, None, :]) * pairs
    d = torch.nn.functional.normalize(d, dim=-1)
    by_alpha = gradient[:, :, None] * d * pairs
    alpha = eps * by_alpha / by_alpha.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    return (alpha * d).sum(-1)
