"""What every mechanism must satisfy, as functions of a spec that raise AssertionError where it does not.

The numbers are float64 unless a law says otherwise, so that a wrong formula cannot hide in rounding.
"""

import torch

from regard.attention import Context
from regard.engines.rows import expand_heads

EXACT = 1e-9
FLOAT32 = 2e-5
BFLOAT16 = 2e-2
BATCH, HEADS, DIM, VALUES = 2, 4, 8, 6


def inputs(length, keys=None, heads=HEADS, kv_heads=HEADS, dtype=torch.float64, seed=0):
    """Return q, k, v; Dv differs from D."""
    generator = torch.Generator().manual_seed(seed + 17 * length)

    def draw(count, positions, width):
        x = torch.randn(BATCH, count, positions, width, generator=generator, dtype=torch.float64)
        return x.to(dtype)

    keys = length if keys is None else keys
    return draw(heads, length, DIM), draw(kv_heads, keys, DIM), draw(kv_heads, keys, VALUES)


def orders(spec):
    return [order == "causal" for order in sorted(spec.module.orders)]


def carries(spec):
    return spec.module.carries_state


def longest(spec):
    return max(spec.lengths())


def near(found, expected, bound=EXACT):
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(found).all(), "not finite"
    if expected.numel():
        off = (found.double() - expected.double()).abs().max()
        assert off <= bound * max(1.0, expected.abs().max()), f"off by {off:.2e}"


def padded(length, side):
    """bool [B, T]: the first item is shorter by a third, missing at the left, the right or in the middle."""
    valid = torch.ones(BATCH, length, dtype=torch.bool)
    short = length // 3
    if short and side == "middle":
        valid[0, short : 2 * short] = False
    elif short:
        valid[0, :short] = side == "right"
        valid[0, length - short :] = side == "left"
    return valid


def at(x, valid):
    """The rows of x [B, H, T, D] that are not padding."""
    return x.transpose(1, 2)[valid]


def law_matrix(spec):
    """`forward` is the matrix times v, with and without padding, at every length."""
    mechanism = spec.build()
    for causal in orders(spec):
        for length in spec.lengths():
            q, k, v = inputs(length)
            for valid in (None, padded(length, "left"), padded(length, "right")):
                ctx = Context.of(q, k, causal=causal, valid=valid)
                found, expected = mechanism(q, k, v, ctx), mechanism.reference(q, k, v, ctx)
                assert found.shape == (BATCH, HEADS, length, VALUES)
                rows = torch.ones(BATCH, length, dtype=torch.bool) if valid is None else valid
                near(at(found, rows), at(expected, rows))
    if "causal" in spec.module.orders:
        q, k, v = inputs(longest(spec))
        near(mechanism(q, k, v), mechanism.reference(q, k, v))


def law_gradient(spec):
    """Gradients of q, k, v and of parameters are those of the definition."""
    mechanism = spec.build().double()
    for causal in orders(spec):
        for side in ("none", "left", "right"):
            given = [x.requires_grad_() for x in inputs(longest(spec))]
            valid = None if side == "none" else padded(longest(spec), side)
            ctx = Context.of(given[0], given[1], causal=causal, valid=valid)
            rows = torch.ones(BATCH, longest(spec), dtype=torch.bool) if valid is None else valid
            wanted = [*given, *(p for p in mechanism.parameters() if p.requires_grad)]
            found, expected = (
                torch.autograd.grad((at(out, rows) * WEIGHTS[: at(out, rows).shape[-1]]).sin().sum(), wanted)
                for out in (mechanism(*given, ctx), mechanism.reference(*given, ctx))
            )
            for one, other in zip(found, expected, strict=True):
                near(one, other, 100 * EXACT)
                assert other.abs().sum() > 0, "a gradient of nothing but zeros"


WEIGHTS = torch.linspace(-1, 2, 16, dtype=torch.float64)


def law_causal(spec):
    """No later input moves an earlier output."""
    mechanism, length = spec.build(), longest(spec)
    for valid in (None, padded(length, "left")):
        q, k, v = inputs(length)
        ctx = Context.of(q, k, valid=valid)
        before = mechanism(q, k, v, ctx)
        others = inputs(length, seed=1)
        for cut in range(1, length, 3):
            changed = [
                torch.cat([x[:, :, :cut], 5 * y[:, :, cut:]], 2)
                for x, y in zip((q, k, v), others, strict=True)
            ]
            after = mechanism(*changed, ctx)
            rows = torch.ones(BATCH, length, dtype=torch.bool) if valid is None else valid
            near(at(after[:, :, :cut], rows[:, :cut]), at(before[:, :, :cut], rows[:, :cut]))
            assert not torch.equal(after[:, :, cut:], before[:, :, cut:])


def law_offset(spec):
    """The last queries alone, over all keys, give the last rows."""
    mechanism, length = spec.build(), longest(spec)
    q, k, v = inputs(length)
    whole = mechanism(q, k, v)
    for start in (1, length // 2, length - 1, length):
        near(mechanism(q[:, :, start:], k, v, Context.of(q[:, :, start:], k)), whole[:, :, start:])


def law_step(spec):
    """Stepping, one by one or in chunks, padded or not, equals `forward`; a state follows its sequence."""
    mechanism, length = spec.build(), longest(spec)
    for valid in (None, *(padded(length, side) for side in ("left", "right", "middle"))):
        q, k, v = inputs(length)
        whole = mechanism(q, k, v, Context.of(q, k, valid=valid))
        rows = torch.ones(BATCH, length, dtype=torch.bool) if valid is None else valid
        for sizes in ([1] * length, [5, 3, length - 8], [length], [0, length - 1, 0, 1]):
            out, _ = stepped(mechanism, q, k, v, sizes, valid)
            near(at(out, rows), at(whole, rows))
    _law_reordered(mechanism, length)


def stepped(mechanism, q, k, v, sizes, valid=None, state=None):
    """Return the outputs of q, k, v in pieces of the given sizes, and the last state."""
    parts, start = [], 0
    for size in sizes:
        q_, k_, v_ = (x[:, :, start : start + size] for x in (q, k, v))
        now = None if valid is None else valid[:, start : start + size]
        out, state = mechanism.step(q_, k_, v_, state, Context.of(q_, k_, valid=now))
        assert all(x.shape[0] == q.shape[0] for x in state), "a state without the batch first"
        parts.append(out)
        start += size
    return torch.cat(parts, 2), state


def _law_reordered(mechanism, length):
    q, k, v = inputs(length)
    half, beams = length // 2, torch.tensor([1, 1])
    _, state = stepped(mechanism, *(x[:, :, :half] for x in (q, k, v)), [half])
    late = [x[:, :, half:] for x in (q, k, v)]
    found, _ = stepped(
        mechanism, *late, [length - half], state=tuple(x.index_select(0, beams) for x in state)
    )
    chosen = [torch.cat([x[beams, :, :half], x[:, :, half:]], 2) for x in (q, k, v)]
    near(found, mechanism(*chosen)[:, :, half:])


def law_absorb(spec):
    """A state made from keys and values continues as if it had been stepped to."""
    mechanism, length = spec.build(), longest(spec)
    half = length // 2
    for valid in (None, padded(length, "left")):
        q, k, v = inputs(length)
        whole = mechanism(q, k, v, Context.of(q, k, valid=valid))
        first, last = k[:, :, :half], [x[:, :, half:] for x in (q, k, v)]
        ctx = Context.of(first, first, valid=None if valid is None else valid[:, :half])
        state = mechanism.absorb(first, v[:, :, :half], HEADS, ctx)
        out, _ = stepped(mechanism, *last, [length - half], None if valid is None else valid[:, half:], state)
        near(out, whole[:, :, half:])


def law_padding(spec):
    """A batch equals its items one by one; what stands at padding is never read, and nothing is NaN.

    Padding in the middle comes about where a sequence padded at the right is gone on with; a state must not
    age there.
    """
    mechanism, length = spec.build(), longest(spec)
    for causal in orders(spec):
        for side in ("left", "right", "middle") if carries(spec) else ("left", "right"):
            q, k, v = inputs(length)
            valid = padded(length, side)
            for junk in (1.0, 1e4):
                dirty = [torch.where(valid[:, None, :, None], x, junk * x) for x in (q, k, v)]
                out = mechanism(*dirty, Context.of(q, k, causal=causal, valid=valid))
                assert torch.isfinite(out).all(), "not finite at padding"
                for item in range(BATCH):
                    alone = [x[item : item + 1, :, valid[item]] for x in (q, k, v)]
                    expected = mechanism(*alone, Context.of(alone[0], alone[1], causal=causal))
                    near(out[item : item + 1, :, valid[item]], expected)


def law_grouped(spec):
    """Query heads that share a key head give what they give with keys and values repeated."""
    mechanism, length = spec.build(), longest(spec)
    for kv_heads in (2, 1):
        for causal in orders(spec):
            q, k, v = inputs(length, heads=4, kv_heads=kv_heads)
            ctx = Context.of(q, k, causal=causal)
            expected = mechanism(q, expand_heads(k, 4), expand_heads(v, 4), ctx)
            near(mechanism(q, k, v, ctx), expected)
            near(mechanism.reference(q, k, v, ctx), expected)
        if carries(spec):
            q, k, v = inputs(length, heads=4, kv_heads=kv_heads)
            near(stepped(mechanism, q, k, v, [5, length - 5])[0], mechanism(q, k, v))
        if carries(spec) and "absorb" not in spec.exempt:
            state = mechanism.absorb(k[:, :, :5], v[:, :, :5], 4)
            out, _ = stepped(mechanism, *(x[:, :, 5:] for x in (q, k, v)), [length - 5], state=state)
            near(out, mechanism(q, k, v)[:, :, 5:])


def law_limit(spec):
    """At full budget it equals what it approximates."""
    for length in spec.lengths():
        full, exact = type(spec).limit(length)
        for causal in orders(spec):
            q, k, v = inputs(length)
            ctx = Context.of(q, k, causal=causal, valid=padded(length, "left"))
            rows = padded(length, "left")
            near(at(full.build()(q, k, v, ctx), rows), at(exact.build()(q, k, v, ctx), rows))


def law_precision(spec):
    """float32 and bfloat16 stay within bounds of float64 on the same inputs, and come out as they went in."""
    mechanism, length = spec.build(), longest(spec)
    for dtype, bound in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        q, k, v = inputs(length, dtype=dtype)
        exact = [x.double() for x in (q, k, v)]
        for causal in orders(spec):
            found = mechanism(q, k, v, Context.of(q, k, causal=causal))
            assert found.dtype == dtype, f"{dtype} went in and {found.dtype} came out"
            near(found, mechanism(*exact, Context.of(q, k, causal=causal)), bound)
        if carries(spec):
            out, state = stepped(mechanism, q, k, v, [1] * length)
            assert all(x.dtype != torch.bfloat16 for x in state), "a bfloat16 state"
            assert out.dtype == dtype
            near(out, mechanism(*exact), bound)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


def applies(law, spec):
    """Whether a law speaks about a spec at all."""
    if law in ("step", "absorb"):
        return carries(spec)
    if law in ("causal", "offset"):
        return "causal" in spec.module.orders
    return law != "limit" or type(spec).limit(longest(spec)) is not None
