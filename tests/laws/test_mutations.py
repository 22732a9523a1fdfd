"""The laws catch what they are there for: each broken mechanism is caught by the law meant for it.

A broken mechanism is wrong in one way only: where its definition can be as wrong as its fast path, it is, so
that the law about the definition has nothing to say.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from regard.attention import MECHANISMS, Context, LinearAttention, Softmax, Spec, get, mechanism
from regard.attention.linear import LinearAttentionHeads
from regard.attention.sliding_window import SlidingWindowAttention
from regard.attention.softmax import SoftmaxAttention
from regard.engines.masks import CausalMask, Mask
from tests.laws.laws import LAWS, applies
from tests.laws.test_mechanisms import hold


def spec_of(kind, **statics):
    """Register a module under a spec of its own and return one; the fixture forgets it."""
    made = dataclass(frozen=True)(
        type("Broken", (Spec,), {"module": kind, "__doc__": "Broken.", "__annotations__": {}, **statics})
    )
    return mechanism("broken")(made)()


@pytest.fixture(autouse=True)
def registry():
    before = dict(MECHANISMS)
    yield
    MECHANISMS.clear()
    MECHANISMS.update(before)


def masked(ctx, mask):
    return replace(ctx, mask=mask)


class Leaking(SoftmaxAttention):
    """Every row also sees the key after it."""

    orders = frozenset({"causal"})

    def context(self, q, k, ctx):
        ctx = super().context(q, k, ctx)
        return masked(ctx, CausalMask(q.shape[2], k.shape[2], ctx.offset + 1))


class PaddingBlind(SoftmaxAttention):
    """Sees keys at padding."""

    def context(self, q, k, ctx):
        ctx = super().context(q, k, ctx)
        plain = Context.of(q, k, causal=ctx.causal)
        return replace(ctx, mask=plain.mask)


class NotFinite(SoftmaxAttention):
    """NaN at padding, where nobody looks, and where the next layer would spread it."""

    def forward(self, q, k, v, ctx=None):
        out = super().forward(q, k, v, ctx)
        rows = None if ctx is None else ctx.valid_queries
        return out if rows is None else out.masked_fill(~rows[:, None, :, None], torch.nan)


class Aging(LinearAttentionHeads):
    """Forgets at every position, padding too."""

    orders = frozenset({"causal"})

    def matrix(self, q, k, ctx=None):
        ctx = self.context(q, k, ctx)
        i = torch.arange(q.shape[2])[:, None] + ctx.offset - torch.arange(k.shape[2])
        similar = super().matrix(q, k, ctx) * 0.9 ** i.clamp(min=0)
        return similar / similar.sum(-1, keepdim=True).clamp(min=1e-30)

    def forward(self, q, k, v, ctx=None):
        return self.reference(q, k, v, ctx)


class Decaying(LinearAttentionHeads):
    """Steps forget a little, and forward does not."""

    def step(self, q, k, v, state, ctx=None):
        state = None if state is None else tuple(0.99 * x for x in state)
        return super().step(q, k, v, state, ctx)


class Unordered(LinearAttentionHeads):
    """Keeps its state with the batch last, where beams do not find it."""

    def step(self, q, k, v, state, ctx=None):
        state = None if state is None else tuple(x.movedim(-1, 0) for x in state)
        out, new = super().step(q, k, v, state, ctx)
        return out, tuple(x.movedim(0, -1) for x in new)


class Forgetful(LinearAttentionHeads):
    """Takes nothing over from a cache."""

    def absorb(self, k, v, heads, ctx=None):
        return tuple(torch.zeros_like(x) for x in super().absorb(k, v, heads, ctx))


class Detached(SoftmaxAttention):
    """The right output, and no gradient of the keys' part in the scores."""

    def forward(self, q, k, v, ctx=None):
        return super().forward(q, k.detach() + 0 * k, v, ctx)


class Truncated(SoftmaxAttention):
    """Loses the last row of an odd length."""

    def forward(self, q, k, v, ctx=None):
        out = super().forward(q, k, v, ctx).clone()
        if q.shape[2] % 2 and q.shape[2] > 1:
            out[:, :, -1] = 0
        return out


class NeverEmpty(SoftmaxAttention):
    """Fails on a sequence of no positions."""

    def forward(self, q, k, v, ctx=None):
        assert q.shape[2], "empty"
        return super().forward(q, k, v, ctx)


class Regrouped(SoftmaxAttention):
    """Gives query heads key heads in turn."""

    def forward(self, q, k, v, ctx=None):
        group = q.shape[1] // k.shape[1]
        return super().forward(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), ctx)


class FromTheStart(SoftmaxAttention):
    """Takes the first query for the one at the first key."""

    orders = frozenset({"causal"})

    def context(self, q, k, ctx):
        ctx = super().context(q, k, ctx)
        return ctx if ctx.offset == 0 else masked(ctx, CausalMask(q.shape[2], k.shape[2], 0))


class Coarse(SoftmaxAttention):
    """Rounds the queries to bfloat16."""

    def forward(self, q, k, v, ctx=None):
        return super().forward(q if q.dtype == torch.float64 else q.bfloat16().to(q.dtype), k, v, ctx)


class Widening(SoftmaxAttention):
    """Gives float32 whatever comes in."""

    def forward(self, q, k, v, ctx=None):
        return (
            super().forward(q.float(), k.float(), v.float(), ctx)
            if q.dtype == torch.bfloat16
            else (super().forward(q, k, v, ctx))
        )


class OffByOne(SlidingWindowAttention):
    """A window that is one key short."""

    def __init__(self):
        super().__init__(18)


CAUGHT = {
    Leaking: "causal", PaddingBlind: "padding", NotFinite: "padding", Aging: "padding", Decaying: "step",
    Unordered: "step", Forgetful: "absorb", Detached: "gradient", Truncated: "matrix", NeverEmpty: "matrix",
    Regrouped: "grouped", FromTheStart: "offset", Coarse: "precision", Widening: "precision",
}  # fmt: skip


@pytest.mark.parametrize("kind", CAUGHT, ids=lambda kind: kind.__name__)
def test_a_broken_mechanism_is_caught_by_the_law_meant_for_it(kind):
    spec = spec_of(kind)
    with pytest.raises(AssertionError):
        hold(CAUGHT[kind], spec)
    with pytest.raises(AssertionError):
        hold(CAUGHT[kind], get("broken"))


@pytest.mark.parametrize("kind", [k for k in CAUGHT if CAUGHT[k] not in ("matrix", "padding")])
def test_the_law_about_the_definition_would_not_have_caught_it(kind):
    if kind not in (Regrouped,):
        LAWS["matrix"](spec_of(kind))


def test_a_limit_that_is_not_reached_is_caught():
    spec = spec_of(OffByOne, limit=classmethod(lambda cls, length: (cls(), Softmax())))
    with pytest.raises(AssertionError):
        hold("limit", spec)


@pytest.mark.parametrize("base", [SoftmaxAttention, LinearAttentionHeads])
def test_the_same_made_without_a_fault_passes(base):
    spec = spec_of(type("Whole", (base,), {"__doc__": "Whole."}))
    for law in LAWS:
        if applies(law, spec):
            hold(law, spec)


def test_an_exemption_is_honoured_and_must_be_real():
    hold("causal", spec_of(type("Honest", (Leaking,), {"exempt": {"causal": "sees one key ahead"}})))
    MECHANISMS.pop("broken")
    false = spec_of(type("False", (SoftmaxAttention,), {"exempt": {"causal": "it says"}}))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        hold("causal", false)
    MECHANISMS.pop("broken")
    silent = spec_of(type("Silent", (Leaking,), {"exempt": {"causal": ""}}))
    with pytest.raises(AssertionError, match="not why"):
        hold("causal", silent)


def test_a_refusal_counts_as_an_exemption():
    class NoPadding(SoftmaxAttention):
        """Refuses padding, as a grid does."""

        exempt: ClassVar = {"padding": "a grid has none"}

        def context(self, q, k, ctx):
            if ctx is not None and ctx.valid_keys is not None:
                from regard.errors import RegardError

                raise RegardError("no padding")
            return super().context(q, k, ctx)

    hold("padding", spec_of(NoPadding))


def test_masks_here_are_what_they_say():
    mask = CausalMask(3, 4, 1)
    assert mask.rows(0, 3, 0, 4)[0, 0].sum(-1).tolist() == [2, 3, 4] and isinstance(mask, Mask)
    assert LinearAttention().to_dict() == {"mechanism": "linear"}
