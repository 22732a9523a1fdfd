"""Every registered block satisfies the laws of blocks, and broken ones are caught."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.attention import MECHANISMS, Block, LinearAttention
from regard.attention.block import BLOCK_LAWS as NAMED
from regard.attention.block import Maps, chosen_queries
from regard.errors import RegardError
from regard.runtime import Edit
from tests.laws.block_laws import BLOCK_LAWS, block_law_applies, given
from tests.laws.test_mutations import registry, spec_of  # noqa: F401
from tests.support.families import FAMILIES

SPECS = {
    repr(s): s for kind in MECHANISMS.values() if issubclass(kind.module, Block) for s in kind.examples()
}


class Smoothing(Block):
    """A learned causal filter of width 3; by its definition a sum, and fast a convolution."""

    causal = True

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.tensor([0.2, -0.5, 1.0]))

    def reference(self, x):
        padded = F.pad(x, (0, 0, 2, 0))
        return sum(self.filter[i] * padded[:, i : i + x.shape[1]] for i in range(3))

    def forward(self, x):
        rows = F.pad(x.transpose(1, 2).flatten(0, 1)[:, None], (2, 0))
        return F.conv1d(rows, self.filter[None, None]).view(len(x), x.shape[2], -1).transpose(1, 2)

    def example(self, generator):
        return torch.randn(2, 13, 4, generator=generator, dtype=torch.float64)


class Reversed(Smoothing):
    def forward(self, x):
        return super().forward(x + 1e-6 * x.flip(1))

    reference = forward


class OtherItems(Smoothing):
    def forward(self, x):
        return super().forward(x + 1e-6 * x.mean(0))

    reference = forward


class NoGradient(Smoothing):
    def forward(self, x):
        return super().forward(x) + 0.1 * (x.sin() - x.sin().detach())


class Shifted(Smoothing):
    def forward(self, x):
        return super().forward(x) + 1e-6


class Short(Smoothing):
    def forward(self, x):
        return super().forward(x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x)


class Gate(Block):
    """Softmax over a plane, times the features."""

    shows = "maps"

    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.tensor([0.2, -0.5, 1.0, 0.3]))

    def weights(self, x):
        scores = torch.einsum("bchw,c->bhw", x, self.direction)
        return scores.flatten(1).softmax(1).view_as(scores)[:, None]

    def reference(self, x):
        return x * self.weights(x)

    forward = reference

    def maps(self, x):
        return Maps(self.weights(x), "probability")

    def example(self, generator):
        return torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)


class SharedSum(Gate):
    def maps(self, x):
        values = self.weights(x)
        return Maps(values + 1e-6 * values.mean(0), "probability")


class SignedFactor(Gate):
    def maps(self, x):
        return Maps(self.weights(x) - 0.01, "factor")


class Attending(Gate):
    """Attention of a plane to a coarser one, of which it sees a part."""

    shows = "rows"

    def grids(self, x):
        return (5, 3), (5, 1)

    def rows(self, x, queries):
        chosen = chosen_queries(queries, (5, 3))
        seen = x.flatten(2).mT[:, chosen] @ x.mean(3)
        return 0.9 * seen.softmax(-1)[:, None]


class OtherQueries(Attending):
    def rows(self, x, queries):
        rows = super().rows(x, queries)
        return rows * (1 - 1e-6 * rows.mean(2, keepdim=True))


CAUGHT = {
    Reversed: "causal", OtherItems: "batch", NoGradient: "gradient", Shifted: "reference", Short: "precision",
    SharedSum: "shown", SignedFactor: "shown", OtherQueries: "shown",
}  # fmt: skip


UNFIT = {Smoothing: {"shown"}, Gate: {"causal"}, Attending: {"causal"}}


def test_every_registered_block():
    for spec in SPECS.values():
        torch.manual_seed(0)
        for law in (law for law in BLOCK_LAWS if block_law_applies(law, spec)):
            if law in spec.module.exempt:
                with pytest.raises((AssertionError, RegardError)):
                    BLOCK_LAWS[law](spec)
            else:
                BLOCK_LAWS[law](spec)


@pytest.mark.parametrize("kind", [Smoothing, Gate, Attending])
@pytest.mark.parametrize("law", BLOCK_LAWS)
def test_a_block_without_a_fault_passes(law, kind):
    spec = spec_of(kind)
    assert block_law_applies(law, spec) == (law not in UNFIT[kind])
    if law not in UNFIT[kind]:
        BLOCK_LAWS[law](spec)


@pytest.mark.parametrize("kind", CAUGHT, ids=lambda kind: kind.__name__)
def test_a_broken_block_is_caught_by_the_law_meant_for_it(kind):
    spec = spec_of(kind)
    with pytest.raises(AssertionError):
        BLOCK_LAWS[CAUGHT[kind]](spec)
    for law in {"causal", "batch"} - {CAUGHT[kind]}:
        if block_law_applies(law, spec):
            BLOCK_LAWS[law](spec)


def test_the_laws_are_those_that_blocks_can_name():
    assert set(BLOCK_LAWS) == set(NAMED)


def test_a_block_cannot_stand_for_attention():
    import regard

    model = FAMILIES["llama"].build()
    with pytest.raises(RegardError, match="no queries"):
        regard.swap(model, spec_of(Smoothing))
    assert isinstance(regard.swap(model, LinearAttention()).edits[0], Edit)


def test_a_block_that_shows_nothing_says_so():
    block = Smoothing()
    for look in (block.maps, block.grids, lambda x: block.rows(x, [0])):
        with pytest.raises(RegardError, match="Smoothing has no"):
            look(given(block))
    with pytest.raises(RegardError, match=r"use maps\(\)"):
        Gate().rows(given(Gate()), [0])
    with pytest.raises(RegardError, match=r"use rows\(\)"):
        Block.maps(Attending(), given(Gate()))


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (torch.ones(2, 3, 4), "gate", "batch, heads, height, width"),
        (torch.ones(2, 3, 4, 5).long(), "gate", "floating-point"),
        (torch.ones(2, 3, 4, 5), "score", "probability, factor, gate"),
    ],
)
def test_maps_are_refused_where_they_are_none(values, kind, said):
    with pytest.raises(RegardError, match=said):
        Maps(values, kind)


@pytest.mark.parametrize("queries", [[], [[1, 2]], [0.5], [True], [15], [-1]])
def test_queries_are_refused_where_they_are_no_positions(queries):
    with pytest.raises(RegardError, match="queries"):
        chosen_queries(queries, (5, 3))
