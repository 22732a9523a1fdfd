"""The qLSTM, an LSTM whose gates do not read its state, plain and with the reversed sigmoid of S6.

    u = W x                                              [B, T, hidden]
    h_i = keep_i * h_{i-1} + s(W_i u_i) * u_i            channel by channel
    out_i = W_out (s(W_o u_i) * h_i)
    keep_i = s(W_f u_i)                                  plain
    keep_i = (1 - s(W_f u_i))^relu(alpha)                reversed, alpha learned, at first 1

s is the sigmoid. exp(-softplus(f)) = 1 - s(f), so the reversed keep is what S6 has with Delta = softplus(f)
and the rate alpha. At alpha = 1 the two differ only in the sign of W_f.

Source: Sieber et al., 2024, arXiv 2405.15731, section 4.3. Status: partly our choice: the recurrence agrees
with the official code (IntelligentControlSystems/dsf-mqar, `qLSTM`); its short convolution of u and its GELU
gate on the output are left to what surrounds this layer. Operations O(T log T) a channel in training;
decoding costs O(hidden), whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import Costs
from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.ssm import qlstm, retained
from regard.attention.registry import Spec, mechanism
from regard.engines.gated import gated_scan
from regard.errors import RegardError, ShapeMismatch


class QLSTMLayer(Block):
    """The recurrence with its projections; the module of `QLSTM`."""

    causal = True

    def __init__(self, dim: int, hidden: int | None, reverse: bool) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.input, self.output = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.gates = nn.Linear(hidden, 3 * hidden)
        self.alpha = nn.Parameter(torch.ones(())) if reverse else None

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u and the logits of the gates forget, write and read, each [B, T, hidden]."""
        if x.ndim != 3 or x.shape[-1] != self.input.in_features:
            raise ShapeMismatch(f"x must be [batch, time, {self.input.in_features}], and is {list(x.shape)}.")
        u = self.input(x)
        forget, write, read = self.gates(u).chunk(3, -1)
        return u, forget, write, read

    def mix(self, x: Tensor) -> Tensor:
        """Return s(W_o u) * h before the output projection, [B, T, hidden]."""
        return self._run(x, None)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, None)[0]

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only, [B, T, dim].
            state: what this returned before, [B, hidden]; None at the beginning.
        """
        mixed, last = self._run(x, state)
        return self.output(mixed), last

    def _run(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        u, forget, write, read = self.parts(x)
        h, last = gated_scan(retained(forget, self.alpha), write.sigmoid() * u, state)
        return (read.sigmoid() * h).to(u.dtype), last

    def reference(self, x: Tensor) -> Tensor:
        u, forget, write, read = self.parts(x)
        share = forget.sigmoid() if self.alpha is None else (1 - forget.sigmoid()) ** self.alpha.relu()
        h, outputs = torch.zeros_like(u[:, 0]), []
        for i in range(x.shape[1]):
            h = share[:, i] * h + write[:, i].sigmoid() * u[:, i]
            outputs.append(read[:, i].sigmoid() * h)
        return self.output(torch.stack(outputs, 1))

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.input.in_features, generator=generator, dtype=torch.float64)


@system_of(QLSTMLayer)
def system(mixer: QLSTMLayer, x: Tensor) -> tuple[LTV, Tensor]:
    """Return the recurrence as a linear time-varying system, and u."""
    u, forget, write, read = mixer.parts(x)
    return qlstm(forget, write, read, mixer.alpha), u


@mechanism("qlstm")
@dataclass(frozen=True, kw_only=True)
class QLSTM(Spec):
    """An LSTM without feedback into its gates; a causal layer from x to x.

    Attributes:
        dim: width of x.
        hidden: channels of the state; None for dim.
        reverse: whether to keep (1 - sigmoid)^relu(alpha) of the state instead of sigmoid.

    Example:
        >>> layer = QLSTM(dim=16).build()
        >>> x = torch.randn(2, 9, 16)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    module: ClassVar = QLSTMLayer
    costs: ClassVar = Costs(time="T log T D", memory="T D", step_time="D", step_memory="D")
    dim: int
    hidden: int | None = None
    reverse: bool = True

    def __post_init__(self) -> None:
        for name, value in (("dim", self.dim), ("hidden", self.hidden)):
            if value is None and name == "hidden":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if not isinstance(self.reverse, bool):
            raise RegardError(f"reverse is {self.reverse!r}; it must be True or False.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(dim=6, hidden=10), cls(dim=6, reverse=False)
