"""Which heads a token uses, and how much of each: the router of MoH.

    learned       p = softmax(W_r x) over the routed heads;  m = 1 for the K largest, else 0
                  g_routed = K p m / sum(p m);  g_shared = h_s softmax(W_s x), 1 where h_s = 1
                  (a_1, a_2) = 2 softmax(W_h x), absent where h_s or h_r is 0
                  g = [a_1 g_shared, a_2 g_routed]                              [B, T, H]
    query_norm    p = softmax(|q_i| / std_i |q_i|) over the routed heads;  g = [1, m]: nothing is learned
    output_norm   the same of what a head gives out, an oracle that saves nothing
    random        m = 1 for K heads drawn by chance, the control

In training m of the norms is straight-through: m + p - stop(p). The paper writes the learned gates without
the factors K, h_s and 2, which `preset="paper"` is; they then sum to at most 1, not to about H.

    balance = h_r^2 mean_e(P_e f_e), f_e and P_e the means of m_e and p_e over tokens; f has no gradient

Source: Jin et al., 2024, arXiv 2410.11842, equations 5 to 8. Status: agrees with the official code
(SkyworkAI/MoH), but that the mask goes by counts, where that of MoH-LLaMA3 is right for h_s = H / 2 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.select import top_mask
from regard.errors import RegardError, ShapeMismatch

Kind = Literal["learned", "query_norm", "output_norm", "random"]
Preset = Literal["official", "paper"]
EPS = 1e-6


class HeadRouter(nn.Module):
    """Gates of all heads for every token: the first `shared` are always on, and `active` of the others.

    In float32 or, from float64, float64.

    Args:
        dim: width of x.
        heads: H.
        shared: h_s, from 0 to H.
        active: K, how many of the other h_r heads a token uses; from 1, and 0 where there are none.
        kind: see above.
        preset: `official` or `paper`, of the learned kind.
        fine_tune: for a model that is trained already: the weights begin at 0, so that the gates are 1.
        device, dtype: of the parameters.

    Attributes:
        balance: the load-balance loss of the last forward in training, until `balance_loss` takes it.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> router = HeadRouter(32, heads=8, shared=2, active=3)
        >>> gates = router(torch.randn(2, 5, 32))
        >>> gates.shape, (gates > 0).sum(-1).unique()
        (torch.Size([2, 5, 8]), tensor([5]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shared: int,
        active: int,
        *,
        kind: Kind = "learned",
        preset: Preset = "official",
        fine_tune: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_split(heads, shared, active)
        check_options(dim, kind, preset, fine_tune)
        self.dim, self.heads, self.shared, self.active = dim, heads, shared, active
        self.routed = heads - shared
        self.kind, self.preset = kind, preset
        self.balance: Tensor | None = None
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        learned, both = kind == "learned", shared > 0 and self.routed > 0
        self.route = nn.Linear(dim, self.routed, **made) if learned and self.routed else None
        self.share = nn.Linear(dim, shared, **made) if learned and shared > 1 else None
        self.split = nn.Linear(dim, 2, **made) if learned and both else None
        if fine_tune:
            for weight in self.parameters():
                nn.init.zeros_(weight)

    def forward(
        self,
        x: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        outputs: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the gates [B, T, H]; those of heads that are off are 0.

        Args:
            x: the layer's input [B, T, dim], read by `learned`.
            queries: [B, H, T, D], read by `query_norm`; before or after rotary embedding.
            outputs: of the heads, [B, H, T, Dv], read by `output_norm`.
            valid: bool [B, T], False at padding, which is left out of the balance.

        Raises:
            RegardError: where what the kind reads was not given.
            ShapeMismatch: where it does not fit.
        """
        given = self._read(x, queries, outputs)
        with torch.autocast(given.device.type, enabled=False):
            if self.kind == "learned":
                return self._learned(_wide(given), valid)
            return self._ranked(given, valid)

    @property
    def straight_through(self) -> bool:
        """Whether heads that are off get a gradient now, so that they must be computed."""
        norms = self.kind in ("query_norm", "output_norm")
        return norms and self.training and torch.is_grad_enabled() and self.active < self.routed

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, shared={self.shared}, active={self.active}, kind={self.kind}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance": None}

    def _read(self, x: Tensor | None, queries: Tensor | None, outputs: Tensor | None) -> Tensor:
        """What the gates are made of: x [B, T, dim], or one tensor of heads [B, H, T, D]."""
        shape: tuple[str | int, ...] = ("batch", self.heads, "time", "dim")
        if self.kind in ("learned", "random"):
            name, found, shape = "x", x, ("batch", "time", self.dim)
        elif self.kind == "query_norm":
            name, found = "queries", queries
        else:
            name, found = "outputs", outputs
        if found is None:
            raise RegardError(f"a router of kind {self.kind!r} reads {name}, and was not given them.")
        fits = found.ndim == len(shape) and all(
            size == wanted for size, wanted in zip(found.shape, shape, strict=True) if isinstance(wanted, int)
        )
        if not fits:
            told = ", ".join(map(str, shape))
            raise ShapeMismatch(f"{name} must be [{told}], and is {list(found.shape)}.")
        return found

    def _learned(self, x: Tensor, valid: Tensor | None) -> Tensor:
        official = self.preset == "official"
        parts = []
        if self.shared:
            if self.share is None:
                even = x.new_ones(*x.shape[:2], 1)
            else:
                even = _linear(self.share, x).softmax(-1) * (self.shared if official else 1)
            parts.append(even)
        if self.route is not None:
            p = _linear(self.route, x).softmax(-1)
            mask = self._chosen(p)
            self._note(p, mask, valid)
            kept = p * mask
            if official:
                kept = self.active * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
            parts.append(kept)
        if self.split is not None:
            weights = _linear(self.split, x).softmax(-1) * (2 if official else 1)
            parts = [weights[..., :1] * parts[0], weights[..., 1:] * parts[1]]
        return torch.cat(parts, -1)

    def _ranked(self, given: Tensor, valid: Tensor | None) -> Tensor:
        """Gates of 0 and 1."""
        if self.kind == "random":
            kind = torch.float64 if given.dtype == torch.float64 else torch.float32
            norms = torch.rand(*given.shape[:2], self.routed, dtype=kind, device=given.device)
        else:
            norms = _wide(given[:, self.shared :]).norm(dim=-1).transpose(1, 2)
        shared = norms.new_ones(*norms.shape[:2], self.shared)
        if not self.routed:
            return shared
        mask = self._chosen(norms)
        if self.kind != "random":
            p = _standardised(norms).softmax(-1)
            self._note(p, mask, valid)
            mask = mask + p - p.detach() if self.straight_through else mask
        return torch.cat([shared, mask], -1)

    def _chosen(self, scores: Tensor) -> Tensor:
        """1 at the `active` largest of scores [B, T, h_r], of equal ones the first, and 0 elsewhere."""
        return top_mask(scores, self.active).to(scores.dtype)

    def _note(self, p: Tensor, mask: Tensor, valid: Tensor | None) -> None:
        """Keep the load-balance loss of this forward."""
        if not (self.training and torch.is_grad_enabled()):
            return
        if valid is not None:
            p, mask = p[valid], mask[valid]
        p, mask = p.flatten(0, -2), mask.flatten(0, -2)
        if len(p):
            self.balance = (p.mean(0) * mask.detach().mean(0)).mean() * self.routed**2


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))


def _standardised(norms: Tensor) -> Tensor:
    if norms.shape[-1] == 1:
        return torch.zeros_like(norms)
    return norms / norms.std(-1, keepdim=True).clamp(min=EPS)


def check_split(heads: Any, shared: Any, active: Any) -> None:
    """Refuse numbers of heads that do not fit together."""
    for name, value, least in (("heads", heads, 1), ("shared", shared, 0), ("active", active, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
    if shared + active > heads:
        raise RegardError(
            f"{shared} shared and {active} active routed heads are more than the {heads} heads there are."
        )
    if active == 0 and shared < heads:
        raise RegardError(
            f"active is 0, and {heads - shared} of {heads} heads are routed: they would never be used; give "
            f"active from 1, or shared={heads}."
        )


def check_options(dim: Any, kind: Any, preset: Any, fine_tune: Any) -> None:
    """Refuse options of a router that do not fit together."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise RegardError(f"dim is {dim!r}; it must be a whole number from 1.")
    for name, value, known in (("kind", kind, get_args(Kind)), ("preset", preset, get_args(Preset))):
        if value not in known:
            raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
    if fine_tune and preset == "paper":
        raise RegardError("the paper's gates do not begin at 1; fine_tune goes with preset='official'.")


def spread(given: dict[str, int | Sequence[int]], layers: int | None = None) -> dict[str, Any]:
    """Return one number a layer for each name; a number stands for all layers.

    Args:
        layers: how many there are; default as many as the lists are long.

    Raises:
        RegardError: where a list has another length.
    """
    lengths = {name: len(numbers) for name, numbers in given.items() if isinstance(numbers, Sequence)}
    wanted = layers if layers is not None else next(iter(lengths.values()), None)
    if wanted is None:
        raise RegardError("a stack needs a list, one number a layer, for heads, shared, active or dim.")
    for name, length in lengths.items():
        if length != wanted:
            raise RegardError(f"{name} has {length} numbers, and there are {wanted} layers; give one each.")
    return {
        name: list(numbers) if isinstance(numbers, Sequence) else [numbers] * wanted
        for name, numbers in given.items()
    }
