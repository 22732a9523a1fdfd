"""A linear time-varying system, simulated step by step, and the map from inputs to outputs that it implies.

    h_i = Lambda_i h_{i-1} + B_i u_i            state [N], h_{-1} = 0
    y_i = C_i h_i + D_i u_i                     output [d_out], input u_i [d]

    Phi_ij = C_i Lambda_i ... Lambda_{j+1} B_j  for i > j;   Phi_ii = C_i B_i + D_i;   0 above

Source: Sieber et al., 2024, arXiv 2405.15731, section 3. Status: agrees with the paper. It is written
to be obviously right, not fast: a loop over positions, matrices in full. Lambda_0 multiplies nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch

LIMIT = 10**8


class LTV:
    """A linear time-varying system of L positions.

    Two systems may have the same map and different matrices, so compare `phi()`, never these.

    Args:
        lam: Lambda, [*batch, L, N] where it is diagonal, else [*batch, L, N, N].
        B: [*batch, L, N, d].
        C: [*batch, L, d_out, N].
        D: [*batch, L, d_out, d]; default zero.

    Raises:
        ShapeMismatch: where they do not fit together.
        RegardError: where one of them is not finite.

    Example:
        >>> ones = torch.ones(3, 1)
        >>> sums = LTV(ones, ones[..., None], ones[..., None])
        >>> sums.simulate(torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist()
        [1.0, 3.0, 6.0]
        >>> sums.phi()[..., 0, 0].tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, lam: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> None:
        _check(lam, B, C, D)
        self.lam, self.B, self.C, self.D = lam, B, C, D

    @property
    def is_diagonal(self) -> bool:
        """Whether Lambda is stored as vectors."""
        return self.lam.ndim == self.B.ndim - 1

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the dimensions before time, such as batch and heads."""
        return tuple(self.B.shape[:-3])

    @property
    def length(self) -> int:
        """Number of positions."""
        return int(self.B.shape[-3])

    @property
    def states(self) -> int:
        """N, the size of the state."""
        return int(self.B.shape[-2])

    def simulate(self, u: Tensor) -> Tensor:
        """Run the system from the state zero.

        Args:
            u: [*batch, L, d].

        Returns:
            y, [*batch, L, d_out].
        """
        expected = (*self.batch, self.length, self.B.shape[-1])
        if tuple(u.shape) != expected:
            raise ShapeMismatch(f"u must be {list(expected)}, and is {list(u.shape)}.")
        h, outputs = u.new_zeros(*self.batch, self.states), []
        for i in range(self.length):
            now = u[..., i, :, None]
            h = self._age(i, h[..., None])[..., 0] + (self.B[..., i, :, :] @ now)[..., 0]
            y = self.C[..., i, :, :] @ h[..., None]
            outputs.append((y if self.D is None else y + self.D[..., i, :, :] @ now)[..., 0])
        return torch.stack(outputs, -2) if outputs else u.new_zeros(*self.batch, 0, self.C.shape[-2])

    def phi(self) -> Tensor:
        """Return the map from inputs to outputs, [*batch, L, L, d_out, d]: block (i, j) is Phi_ij.

        Raises:
            RegardError: where it, or what it is made from, has more than 1e8 entries.
        """
        length, rows, columns = self.length, self.C.shape[-2], self.B.shape[-1]
        refuse_large("phi()", *self.batch, length, length, rows, columns)
        refuse_large("phi()'s working memory", *self.batch, self.states, length, columns)
        out = self.B.new_zeros(*self.batch, length, length, rows, columns)
        reach = self.B.new_zeros(*self.batch, self.states, 0)
        for i in range(length):
            reach = torch.cat([self._age(i, reach), self.B[..., i, :, :]], -1)
            blocks = (self.C[..., i, :, :] @ reach).unflatten(-1, (i + 1, columns))
            out[..., i, : i + 1, :, :] = blocks.movedim(-3, -2)
            if self.D is not None:
                out[..., i, i, :, :] += self.D[..., i, :, :]
        return out

    def transform(self, T: Tensor, *, diagonal: bool = False) -> LTV:
        """Return the same system in other states, T_i h_i; its map is the same.

        Args:
            T: [N, N], or one a position, [*batch, L, N, N]; invertible.
            diagonal: T holds the diagonals alone, [N] or [*batch, L, N]; a diagonal system stays so.

        Raises:
            ShapeMismatch: where T has another shape.
            RegardError: where T has no inverse.
        """
        N = self.states
        tail = (N,) if diagonal else (N, N)
        whole = (*self.batch, self.length, *tail)
        if tuple(T.shape) not in (tail, whole):
            raise ShapeMismatch(f"T must be {list(tail)} or {list(whole)}, and is {list(T.shape)}.")
        T = T.expand(whole)
        if diagonal:
            if bool((T == 0).any()):
                raise RegardError("T has a zero on its diagonal, so it has no inverse.")
            before = torch.cat([torch.ones_like(T[..., :1, :]), T[..., :-1, :]], -2)
            ratio = T / before if self.is_diagonal else T[..., :, None] / before[..., None, :]
            return LTV(self.lam * ratio, T[..., None] * self.B, self.C / T[..., None, :], self.D)
        try:
            inverse = torch.linalg.inv(T)
        except torch.linalg.LinAlgError as error:
            raise RegardError(f"T has no inverse: {error}.") from None
        eye = torch.eye(N, dtype=T.dtype, device=T.device).expand_as(T[..., :1, :, :])
        before = torch.cat([eye, inverse[..., :-1, :, :]], -3)
        lam = torch.diag_embed(self.lam) if self.is_diagonal else self.lam
        return LTV(T @ lam @ before, T @ self.B, self.C @ inverse, self.D)

    def _age(self, i: int, h: Tensor) -> Tensor:
        """Lambda_i times states [*batch, N, any]."""
        return self.lam[..., i, :, None] * h if self.is_diagonal else self.lam[..., i, :, :] @ h

    def __repr__(self) -> str:
        kind = "diagonal" if self.is_diagonal else "full"
        return (
            f"LTV(batch={list(self.batch)}, length={self.length}, states={self.states}, "
            f"inputs={self.B.shape[-1]}, outputs={self.C.shape[-2]}, {kind})"
        )


def refuse_large(what: str, *sizes: int) -> None:
    """Raise where a tensor of `sizes` would have more than `LIMIT` entries."""
    if math.prod(sizes) > LIMIT:
        raise RegardError(
            f"{what} would be {list(sizes)}, {math.prod(sizes):.2g} entries, and the limit is {LIMIT:.0e}; "
            "take a shorter input, fewer heads or a narrower state."
        )


def _check(lam: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    if B.ndim < 3 or C.ndim < 3:
        raise ShapeMismatch(
            f"B must be [*batch, L, N, d] and C [*batch, L, d_out, N], and they are {list(B.shape)} and "
            f"{list(C.shape)}."
        )
    *lead, N, inputs = B.shape
    outputs = C.shape[-2]
    diagonal = lam.ndim == B.ndim - 1
    allowed = {
        "lam": (lam, (*lead, N) if diagonal else (*lead, N, N)),
        "C": (C, (*lead, outputs, N)),
        "D": (D, (*lead, outputs, inputs)),
    }
    for name, (given, shape) in allowed.items():
        if given is not None and tuple(given.shape) != shape:
            raise ShapeMismatch(
                f"{name} must be {list(shape)} beside B {list(B.shape)}, and is {list(given.shape)}."
            )
    for name, given in (("lam", lam), ("B", B), ("C", C), ("D", D)):
        if given is not None and not bool(torch.isfinite(given).all()):
            raise RegardError(f"{name} holds a number that is not finite.")
