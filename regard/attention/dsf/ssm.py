"""The systems of state-space models, gated recurrences and a linear neural memory, one function a row.

    row       Lambda_i                                  B_i                           C_i
    S6        diag(exp(-Delta_i[:, None] A))            diag(Delta_i) (x) b_i         I (x) c_i^T
    SSD       exp(-Delta_i a) I                         Delta_i I (x) b_i             I (x) c_i^T
    RG-LRU    diag(l_i) = exp(-8 softplus(A) s(r_i))    diag(sqrt(1 - l_i^2) s(w_i))  I
    qLSTM     diag(s(f_i)), reversed s(-f_i)^relu(a)    diag(s(w_i))                  diag(s(o_i))
    Titans    I (x) [[(1 - a_i) I - G_i, e_i I],        2 theta_i I (x) [k_i; k_i]    I (x) [q_i^T, 0]
                     [-G_i, e_i I]]                     G_i = 2 theta_i k_i k_i^T

s is the sigmoid, w_i an input gate; S6 and SSD may have D_i = diag(skip). Conventions as in `rows.py`.

Source: Sieber et al., 2024, arXiv 2405.15731, sections 3.2 and 3.3, for S6, SSD and qLSTM; Gu and Dao, 2023,
arXiv 2312.00752; Dao and Gu, 2024, arXiv 2405.21060; De et al., 2024, arXiv 2402.19427 (RG-LRU); Behrouz et
al., 2024, arXiv 2501.00663 (Titans), whose row is derived here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.rows import matrices_over_channels, over_channels
from regard.errors import NotLinear, RegardError, ShapeMismatch


def s6(delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> LTV:
    """Return the system of S6, the mixer of Mamba, whose step size sets both decay and input.

    Args:
        delta: step sizes, [*batch, L, d], above 0.
        a: rates, [d, n], above 0.
        b, c: input and output vectors, [*batch, L, n].
        skip: [d], or None for none.
    """
    if a.ndim != 2 or delta.shape[-1] != a.shape[0] or b.shape[-1] != a.shape[1]:
        raise ShapeMismatch(
            f"a must be [d, n] with delta [.., d] and b [.., n]; a is {list(a.shape)}, delta "
            f"{list(delta.shape)}, b {list(b.shape)}."
        )
    width = a.shape[0]
    lam = (-delta[..., None] * a).exp().flatten(-2)
    return LTV(
        lam,
        over_channels(b, width) * delta[..., None, :],
        over_channels(c, width).mT,
        _skip(skip, delta.shape[:-1], width),
    )


def ssd(
    delta: Tensor, a: Tensor | float, b: Tensor, c: Tensor, width: int, skip: Tensor | None = None
) -> LTV:
    """Return the system of SSD, the mixer of Mamba-2, with one decay a head.

    Args:
        delta: step sizes, [*batch, L], above 0.
        a: rate, a number or broadcastable to [*batch].
        b, c: input and output vectors, [*batch, L, n].
        width: d, channels of the values.
        skip: [d], or None for none.
    """
    rate = torch.as_tensor(a, dtype=delta.dtype, device=delta.device)
    rate = rate.expand(delta.shape[:-1])[..., None]
    lam = (-delta * rate).exp()[..., None].expand(*delta.shape, width * b.shape[-1])
    B = over_channels(delta[..., None] * b, width)
    return LTV(lam, B, over_channels(c, width).mT, _skip(skip, delta.shape, width))


def ssd_of_normalized(q: Tensor, k: Tensor, eta: Tensor) -> tuple[Tensor, float, Tensor, Tensor]:
    """Return (delta, a, b, c) of the SSD model that equals a normalised attention.

    It exists where eta grows: exp(-delta_i a) = eta_{i-1} / eta_i asks for a step above 0.

    Args:
        q, k: [*batch, L, n].
        eta: [*batch, L], above 0 and growing.

    Raises:
        RegardError: where eta does not grow, so that no state-space model has the same map.
    """
    steps = eta.log().diff(dim=-1)
    if not bool((steps > 0).all()):
        raise RegardError(
            "eta must grow from each position to the next: an SSD model has no decay above 1, so none equals "
            "this normalised attention."
        )
    delta = torch.cat([torch.ones_like(eta[..., :1]), steps], -1)
    return delta, 1.0, k / (eta * delta)[..., None], q


def rg_lru(recurrence: Tensor, gate: Tensor, a: Tensor) -> LTV:
    """Return the system of the real-gated linear recurrent unit of Griffin.

    Args:
        recurrence, gate: logits of the recurrence and input gates, [*batch, L, d].
        a: [d].
    """
    lam = (-8 * F.softplus(a) * recurrence.sigmoid()).exp()
    return gated(lam, (1 - lam**2).sqrt() * gate.sigmoid(), torch.ones_like(lam))


def qlstm(forget: Tensor, write: Tensor, read: Tensor, alpha: Tensor | None = None) -> LTV:
    """Return the system of the qLSTM, an LSTM whose gates do not read its state.

    Args:
        forget, write, read: logits of the gates, [*batch, L, d].
        alpha: exponent of the reversed sigmoid, broadcastable to [d]; None for the plain sigmoid.
    """
    return gated(retained(forget, alpha), write.sigmoid(), read.sigmoid())


def retained(forget: Tensor, alpha: Tensor | None) -> Tensor:
    """Return the share of the state that a qLSTM keeps: s(f), or reversed (1 - s(f))^relu(alpha)."""
    return forget.sigmoid() if alpha is None else (F.logsigmoid(-forget) * alpha.relu()).exp()


def gated(lam: Tensor, write: Tensor, read: Tensor) -> LTV:
    """Return the system of h_i = lam_i h_{i-1} + write_i u_i, y_i = read_i h_i, channel by channel.

    Args:
        lam, write, read: [*batch, L, d].
    """
    return LTV(lam, torch.diag_embed(write), torch.diag_embed(read))


def titans(
    q: Tensor, k: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor, width: int, *, depth: int = 1,
    chunk: int = 1,
) -> LTV:  # fmt: skip
    """Return the system of Titans' neural memory, where the memory is one matrix.

        M_i = (1 - alpha_i) M_{i-1} + S_i,   S_i = eta_i S_{i-1} - theta_i grad |M_{i-1} k_i - u_i|^2

    Args:
        q, k: [*batch, L, n].
        theta, alpha, eta: step size, forgetting and momentum, [*batch, L].
        width: d, channels of the values.
        depth: layers of the memory; above 1 it is refused.
        chunk: positions whose gradients are taken at one memory; above 1 it is refused.

    Raises:
        NotLinear: for a deep memory.
        RegardError: for a chunk above 1.
    """
    if depth != 1:
        raise NotLinear(f"the memory has {depth} layers, and its output is not linear in the values.")
    if chunk != 1:
        raise RegardError(f"chunk is {chunk}; larger chunks take gradients elsewhere, and only 1 is written.")
    n = k.shape[-1]
    eye = torch.eye(n, dtype=k.dtype, device=k.device)
    gradient = 2 * theta[..., None, None] * k[..., :, None] * k[..., None, :]
    kept, carried = ((x[..., None, None]) * eye for x in (1 - alpha, eta))
    block = torch.cat([torch.cat([kept - gradient, carried], -1), torch.cat([-gradient, carried], -1)], -2)
    written = 2 * theta[..., None] * torch.cat([k, k], -1)
    read = torch.cat([q, torch.zeros_like(q)], -1)
    return LTV(
        matrices_over_channels(block, width), over_channels(written, width), over_channels(read, width).mT
    )


def _skip(skip: Tensor | None, lead: torch.Size, width: int) -> Tensor | None:
    if skip is None:
        return None
    if tuple(skip.shape) != (width,):
        raise ShapeMismatch(f"skip must be [{width}], and is {list(skip.shape)}.")
    return torch.diag(skip).expand(*lead, width, width)
