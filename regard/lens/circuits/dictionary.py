"""A sparse autoencoder of few atoms, trained in seconds on a few vectors.

    c = relu(W_e (x - b) + b_e)          x' = W_d c + b                   W_e [K, D], W_d [D, K]
    loss = mean (x' - x)^2 + l1 mean_rows ||c||_1

The rows of W_e have unit norm; they are set back to it before every step, and what of a gradient is parallel
to them is taken out. So are the columns of W_d, the atoms (`decoder_norm="atom"`), or its rows, as in the
official code (`"official"`), where it constrains another axis than it says. b starts at 0. Adam, all vectors
a step.

Source: O'Neill and Bui, 2024, arXiv 2405.12522, section 3, and its code (charlieoneill11/sae-circuits,
`src/sae.py`). Status: agrees with the official code (`decoder_norm="official"`);
its gradients are written out, which changes rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from regard.errors import RegardError

NORMS = ("atom", "official")
RATE = 1e-3


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained autoencoder.

    Attributes:
        encoder, encoder_bias: float32 [K, D], [K].
        decoder, bias: float32 [D, K], [D].
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    bias: Tensor

    def activations(self, x: Tensor) -> Tensor:
        """Return c of vectors [..., D], float32 [..., K]."""
        return torch.relu((x - self.bias) @ self.encoder.T + self.encoder_bias)

    def reconstruct(self, c: Tensor) -> Tensor:
        """Return x' of activations [..., K], float32 [..., D]."""
        return c @ self.decoder.T + self.bias


def train_dictionary(
    vectors: Tensor,
    n_codes: int = 200,
    *,
    l1: float = 0.02,
    epochs: int = 500,
    decoder_norm: str = "atom",
    generator: torch.Generator | None = None,
    tick: Callable[[int], None] = lambda steps: None,
) -> Dictionary:
    """Train an autoencoder on vectors.

    Args:
        vectors: float32 [N, D].
        n_codes: K, 2 at least.
        l1: weight of the activations' sum, at least 0.
        epochs: steps of Adam, each on all vectors.
        decoder_norm: `atom` or `official`, see above.
        generator: of the first weights, on the CPU.
        tick: called with 1 after every step.

    Raises:
        RegardError: for an option out of range.

    Example:
        >>> found = train_dictionary(torch.randn(50, 8), 16, epochs=20)
        >>> found.activations(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """
    check_training(n_codes, l1, epochs, decoder_norm)
    x = vectors.detach()
    width, axis = x.shape[1], 0 if decoder_norm == "atom" else 1
    first = torch.randn(n_codes, width, generator=generator), torch.randn(width, n_codes, generator=generator)
    offsets = (2 * torch.rand(n_codes, generator=generator) - 1) / width**0.5
    made = [w.to(x).requires_grad_() for w in (*first, offsets, torch.zeros(width))]
    encoder, decoder, encoder_bias, bias = made
    optimizer = torch.optim.Adam(made, RATE)
    slopes = _Slopes(x, n_codes, l1)
    with torch.no_grad():
        for _ in range(epochs):
            encoder.copy_(normalize(encoder, dim=1))
            decoder.copy_(normalize(decoder, dim=axis))
            for parameter, slope in zip(made, slopes(*made), strict=True):
                parameter.grad = slope
            for weight, along in ((encoder, 1), (decoder, axis)):
                assert weight.grad is not None
                weight.grad -= (weight.grad * weight).sum(along, keepdim=True) * weight
            optimizer.step()
            tick(1)
        encoder.copy_(normalize(encoder, dim=1))
        decoder.copy_(normalize(decoder, dim=axis))
    return Dictionary(encoder.detach(), encoder_bias.detach(), decoder.detach(), bias.detach())


class _Slopes:
    """The gradients of the loss, written out so that nothing of the size of all vectors is made anew.

    With G = W_d^T W_d, the sum of squares needs x W_d and c G alone; two products with x make a step.
    """

    def __init__(self, x: Tensor, n_codes: int, l1: float) -> None:
        self.x, self.codes, self.l1 = x, n_codes, l1
        self.total = x.sum(0)
        self.ahead = x.new_empty(len(x), 2 * n_codes)
        self.back = x.new_empty(len(x), 2 * n_codes)
        self.beside = x.new_empty(len(x), n_codes)
        self.whole = x.new_empty(len(x), n_codes)

    def __call__(self, encoder: Tensor, decoder: Tensor, encoder_bias: Tensor, bias: Tensor) -> list[Tensor]:
        """Return those of W_e, W_d, b_e and b."""
        x, count = self.x, self.codes
        scale = 2.0 / x.numel()
        torch.mm(x, torch.cat([encoder.T, decoder], 1), out=self.ahead)
        slope, c = self.back[:, :count], self.back[:, count:]
        whole = torch.add(self.ahead[:, :count], encoder_bias - encoder @ bias, out=self.whole).relu_()
        c.copy_(whole)
        error = torch.mm(whole, decoder.T @ decoder, out=self.beside)
        error.sub_(self.ahead[:, count:]).add_(bias @ decoder).mul_(scale).add_(self.l1 / len(x))
        torch.mul(error, whole.sign_(), out=slope)
        products = self.back.T @ x  # [2 K, D]
        active, sums = c.sum(0), slope.sum(0)
        missed = decoder @ active + len(x) * bias - self.total
        of_decoder = decoder @ (c.T @ c) + bias[:, None] * active - products[count:].T
        return [
            products[:count] - sums[:, None] * bias,
            scale * of_decoder,
            sums,
            scale * missed - sums @ encoder,
        ]


def check_training(n_codes: int, l1: float, epochs: int, decoder_norm: str) -> None:
    """Refuse options of `train_dictionary` that are out of range.

    Raises:
        RegardError: naming the option.
    """
    if isinstance(n_codes, bool) or not isinstance(n_codes, int) or n_codes < 2:
        raise RegardError(f"n_codes is {n_codes!r}; a dictionary needs 2 codes at least.")
    if not l1 >= 0:
        raise RegardError(f"l1 is {l1}; it must be at least 0.")
    if not isinstance(epochs, int) or epochs < 1:
        raise RegardError(f"epochs is {epochs!r}; it must be a whole number from 1.")
    if decoder_norm not in NORMS:
        raise RegardError(f"decoder_norm is {decoder_norm!r}; it must be one of {', '.join(NORMS)}.")
