"""Every row's own formula, written naively, with random inputs: what the systems are held to.

`draw(name, length, generator)` makes one sequence of float64 inputs, the system of the row at them, and the
output by the mixer's formula, which shares no code with the system. The widths differ (n = 4 entries of keys,
d = 3 channels), so that a transposition cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.dsf import rows, ssm
from regard.attention.dsf.ltv import LTV
from regard.errors import RegardError

N, WIDTH = 4, 3


@dataclass(frozen=True, eq=False)
class Drawn:
    """A row at random inputs.

    Attributes:
        system: from the table.
        u: values, [L, d].
        expected: outputs by the mixer's own formula, [L, d].
        parts: the inputs that the system was made from, by name.
    """

    system: LTV
    u: Tensor
    expected: Tensor
    parts: dict[str, Tensor]


class Draws:
    """Random inputs of one sequence."""

    def __init__(self, length: int, generator: torch.Generator) -> None:
        self.length, self.generator = length, generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [L, n] and values [L, d]."""
        return self.normal(self.length, N), self.normal(self.length, N), self.normal(self.length, WIDTH)


Row = Callable[[Draws], Drawn]
ROWS: dict[str, Row] = {}


def draw(name: str, length: int, generator: torch.Generator) -> Drawn:
    """Return a row at random inputs.

    Args:
        name: one of `ROWS`.
        length: L, from 1.
        generator: of the inputs.

    Example:
        >>> drawn = draw("delta rule", 9, torch.Generator().manual_seed(0))
        >>> float((drawn.system.simulate(drawn.u) - drawn.expected).abs().max()) < 1e-12
        True
    """
    if name not in ROWS:
        raise RegardError(f"no row {name!r}; the rows are {', '.join(ROWS)}.")
    return ROWS[name](Draws(length, generator))


def row(name: str) -> Callable[[Row], Row]:
    def register(made: Row) -> Row:
        ROWS[name] = made
        return made

    return register


@row("softmax, slots")
def _softmax(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    scores = (q @ k.T / N**0.5).masked_fill(torch.ones(x.length, x.length).triu(1).bool(), -torch.inf)
    own = [F.softmax(k[: i + 1] @ q[i] / N**0.5, 0) @ u[: i + 1] for i in range(x.length)]
    return Drawn(rows.slots(scores.softmax(-1), WIDTH), u, torch.stack(own), {"q": q, "k": k})


@row("softmax, Taylor")
def _taylor(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    s = q @ k.T / N**0.5
    weights = torch.tril(1 + s + s**2 / 2)
    system = rows.taylor_attention(q, k, WIDTH, order=2)
    return Drawn(system, u, weights @ u / weights.sum(-1, keepdim=True), {"q": q, "k": k})


def _linear(gauge: rows.Gauge) -> Row:
    def made(x: Draws) -> Drawn:
        q, k, u = x.qkv()
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weights = torch.tril(q @ k.T)
        expected = weights @ u / weights.sum(-1, keepdim=True)
        return Drawn(rows.linear_attention(q, k, WIDTH, gauge=gauge), u, expected, {"q": q, "k": k})

    return made


row("linear attention")(_linear("read-out"))
row("linear attention, decaying")(_linear("decay"))


@row("normalised attention")
def _normalised(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    eta = x.normal(x.length).exp()
    system = rows.normalized_attention(q, k, eta, WIDTH, gauge="decay")
    return Drawn(system, u, torch.tril(q @ k.T) @ u / eta[:, None], {"q": q, "k": k, "eta": eta})


@row("lightning")
def _lightning(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    steps = torch.arange(x.length, dtype=torch.float64)
    weights = torch.tril(q @ k.T) * 0.9 ** (steps[:, None] - steps).clamp(min=0)
    return Drawn(rows.lightning_attention(q, k, 0.9, WIDTH), u, weights @ u, {"q": q, "k": k})


@row("LightNet")
def _lightnet(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    own = [q[i] @ (k[: i + 1].softmax(0).T @ u[: i + 1]) for i in range(x.length)]
    return Drawn(rows.lightnet(q, k, WIDTH), u, torch.stack(own), {"q": q, "k": k})


@row("delta rule")
def _delta(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    k, beta = F.normalize(k, dim=-1), x.normal(x.length).sigmoid()
    memory, own = u.new_zeros(WIDTH, N), []
    for i in range(x.length):
        memory = memory + beta[i] * torch.outer(u[i] - memory @ k[i], k[i])
        own.append(memory @ q[i])
    return Drawn(rows.delta_rule(q, k, beta, WIDTH), u, torch.stack(own), {"q": q, "k": k, "beta": beta})


@row("Flow-Attention")
def _flow(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    q, k = q.sigmoid(), k.sigmoid()
    write, read, expected = causal_flow(q, k, u)
    return Drawn(rows.flow_attention(q, k, write, read, WIDTH), u, expected, {"q": q, "k": k})


def causal_flow(q: Tensor, k: Tensor, u: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Return competition, allocation over incoming flow, and outputs of Flow-Attention, position by position.

    Source: Wu et al., 2022, arXiv 2202.06258, with the cumulative sums of its causal code and no clamp.
    """

    def flow(a: Tensor, b: Tensor) -> Tensor:
        return ((a + eps) * (b + eps)).sum()

    incoming, outgoing, writes, reads, outputs = [], [], [], [], []
    powers: list[Tensor] = []
    for t in range(len(q)):
        n = t + 1
        incoming.append(n / flow(q[t], k[:n].sum(0)))
        outgoing.append(n / flow(k[t], q[:n].sum(0)))
        arriving = flow(q[t], torch.stack(outgoing) @ k[:n]) / n
        leaving = flow(k[t], torch.stack(incoming) @ q[:n]) / n
        powers.append(leaving.exp())
        writes.append(n * powers[t] / torch.stack(powers).sum())
        reads.append(arriving.sigmoid() * incoming[t] / n)
        outputs.append(reads[t] * (k[:n] @ q[t] * torch.stack(writes)) @ u[:n])
    return torch.stack(writes), torch.stack(reads), torch.stack(outputs)


@row("S6")
def _s6(x: Draws) -> Drawn:
    c, b, u = x.qkv()
    delta, a, skip = F.softplus(x.normal(x.length, WIDTH)), x.normal(WIDTH, N).exp(), x.normal(WIDTH)
    h, own = u.new_zeros(WIDTH, N), []
    for i in range(x.length):
        h = torch.exp(-delta[i][:, None] * a) * h + torch.outer(delta[i] * u[i], b[i])
        own.append(h @ c[i] + skip * u[i])
    parts = {"delta": delta, "a": a, "b": b, "c": c, "skip": skip}
    return Drawn(ssm.s6(**parts), u, torch.stack(own), parts)


@row("SSD")
def _ssd(x: Draws) -> Drawn:
    c, b, u = x.qkv()
    delta, rate, skip = F.softplus(x.normal(x.length)), 0.7, x.normal(WIDTH)
    h, own = u.new_zeros(WIDTH, N), []
    for i in range(x.length):
        h = torch.exp(-delta[i] * rate) * h + delta[i] * torch.outer(u[i], b[i])
        own.append(h @ c[i] + skip * u[i])
    system = ssm.ssd(delta, rate, b, c, WIDTH, skip)
    return Drawn(system, u, torch.stack(own), {"delta": delta, "b": b, "c": c})


@row("RG-LRU")
def _rg_lru(x: Draws) -> Drawn:
    recurrence, gate, u = (x.normal(x.length, WIDTH) for _ in range(3))
    a, h, own = x.normal(WIDTH), u.new_zeros(WIDTH), []
    for i in range(x.length):
        log = -8 * torch.log1p(a.exp()) * torch.sigmoid(recurrence[i])
        h = log.exp() * h + (1 - (2 * log).exp()).sqrt() * torch.sigmoid(gate[i]) * u[i]
        own.append(h)
    return Drawn(ssm.rg_lru(recurrence, gate, a), u, torch.stack(own), {"a": a})


def _lstm(alpha: float | None) -> Row:
    def made(x: Draws) -> Drawn:
        forget, write, read, u = (x.normal(x.length, WIDTH) for _ in range(4))
        h, own = u.new_zeros(WIDTH), []
        for i in range(x.length):
            keep = torch.sigmoid(forget[i]) if alpha is None else torch.sigmoid(-forget[i]) ** alpha
            h = keep * h + torch.sigmoid(write[i]) * u[i]
            own.append(torch.sigmoid(read[i]) * h)
        power = None if alpha is None else torch.tensor(alpha, dtype=u.dtype)
        return Drawn(ssm.qlstm(forget, write, read, power), u, torch.stack(own), {"forget": forget})

    return made


row("qLSTM")(_lstm(None))
row("qLSTM, reversed")(_lstm(1.3))


@row("Titans, one matrix")
def _titans(x: Draws) -> Drawn:
    q, k, u = x.qkv()
    k = F.normalize(k, dim=-1)
    theta, alpha, eta = (s * x.normal(x.length).sigmoid() for s in (0.3, 0.2, 0.9))
    system = ssm.titans(q, k, theta, alpha, eta, WIDTH)
    expected = titans_memory(q, k, u, theta, alpha, eta)
    parts = {"q": q, "k": k, "theta": theta, "alpha": alpha, "eta": eta}
    return Drawn(system, u, expected, parts)


def titans_memory(
    q: Tensor, k: Tensor, u: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor, chunk: int = 1
) -> Tensor:
    """Return the outputs of Titans' memory of one matrix; gradients are taken at the start of each chunk.

    Source: Behrouz et al., 2024, arXiv 2501.00663, equations 9 to 14.
    """
    memory = surprise = start = u.new_zeros(u.shape[1], k.shape[1])
    outputs = []
    for i in range(len(q)):
        start = memory if i % chunk == 0 else start
        surprise = eta[i] * surprise - theta[i] * 2 * torch.outer(start @ k[i] - u[i], k[i])
        memory = (1 - alpha[i]) * memory + surprise
        outputs.append(memory @ q[i])
    return torch.stack(outputs)
