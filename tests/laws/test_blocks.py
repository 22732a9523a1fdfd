"""Every registered block satisfies the laws of blocks, and broken ones are caught."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.attention import MECHANISMS, Block, LinearAttention
from regard.attention.block import BLOCK_LAWS as NAMED
from regard.errors import RegardError
from regard.runtime import Edit
from tests.laws.block_laws import BLOCK_LAWS, block_law_applies
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


CAUGHT = {
    Reversed: "causal", OtherItems: "batch", NoGradient: "gradient", Shifted: "reference", Short: "precision",
}  # fmt: skip


def test_every_registered_block():
    for spec in SPECS.values():
        torch.manual_seed(0)
        for law in (law for law in BLOCK_LAWS if block_law_applies(law, spec)):
            if law in spec.module.exempt:
                with pytest.raises((AssertionError, RegardError)):
                    BLOCK_LAWS[law](spec)
            else:
                BLOCK_LAWS[law](spec)


@pytest.mark.parametrize("law", BLOCK_LAWS)
def test_a_block_without_a_fault_passes(law):
    BLOCK_LAWS[law](spec_of(Smoothing))


@pytest.mark.parametrize("kind", CAUGHT, ids=lambda kind: kind.__name__)
def test_a_broken_block_is_caught_by_the_law_meant_for_it(kind):
    spec = spec_of(kind)
    with pytest.raises(AssertionError):
        BLOCK_LAWS[CAUGHT[kind]](spec)
    for law in {"causal", "batch"} - {CAUGHT[kind]}:
        BLOCK_LAWS[law](spec)


def test_the_laws_are_those_that_blocks_can_name():
    assert set(BLOCK_LAWS) == set(NAMED)


def test_a_block_cannot_stand_for_attention():
    import regard

    model = FAMILIES["llama"].build()
    with pytest.raises(RegardError, match="no queries"):
        regard.swap(model, spec_of(Smoothing))
    assert isinstance(regard.swap(model, LinearAttention()).edits[0], Edit)
