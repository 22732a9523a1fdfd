"""What mechanisms say that they looked at is where their matrix has weights."""

import pytest
import torch

from regard.attention import MECHANISMS, Context, Mechanism
from tests.laws.laws import BATCH, HEADS, inputs, orders, padded

SPECS = {
    repr(s): s for kind in MECHANISMS.values() if issubclass(kind.module, Mechanism) for s in kind.examples()
}
CHOOSING = [name for name, spec in SPECS.items() if type(spec.build()).looked_at is not Mechanism.looked_at]


def test_those_that_choose_say_what():
    assert {SPECS[name].registered for name in CHOOSING} >= {"hip", "landmark-memory", "sliding-window"}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", CHOOSING)
def test_it_is_where_the_matrix_has_weights(name, side):
    spec, early = SPECS[name], 4
    mechanism = spec.build()
    decodes = "offset" not in spec.exempt or mechanism.decodes_approximately
    for causal in orders(spec):
        for length in spec.lengths():
            q, k, _ = inputs(length, kv_heads=2)
            valid = None if side is None else padded(length, side)
            real = torch.ones(BATCH, length, dtype=torch.bool) if valid is None else valid
            for first in (0, early) if decodes and causal and side is None and length > early else (0,):
                ctx = Context.of(q[:, :, first:], k, causal=causal, valid=valid)
                expected = mechanism.matrix(q[:, :, first:], k, ctx) > 0
                rows = mechanism.looked_at(q[:, :, first:], k, ctx)
                shape = (BATCH, HEADS, length - first, length)
                parts = [
                    rows(i, min(i + 3, length - first)).expand(BATCH, HEADS, -1, -1)
                    for i in range(0, length - first, 3)
                ]
                found = torch.cat(parts, 2) if parts else expected
                assert found.shape == shape and found.dtype == torch.bool
                kept = real[:, None, first:, None]
                own = torch.eye(length, dtype=torch.bool)[first:]  # it may be read only where nothing else is
                assert torch.equal(found & kept & ~own, expected & kept & ~own)
                assert (found | ~(expected & kept & own)).all()
