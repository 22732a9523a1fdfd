"""HiP attention: the search against its definition, exactness, planted keys, decoding and refusals."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.attention import Context, HiP, MultiHeadAttention, get, hip_attention, hip_mask
from regard.attention.hip import HiPAttention
from regard.attention.hip import heads as hip_heads
from regard.attention.hip.reference import seen_by_definition
from regard.attention.layout import rows_of
from regard.attention.softmax import SoftmaxAttention
from regard.errors import RegardError, ShapeMismatch

SMALL = HiP(k=16, query_block=8, window=8, sink=4, refresh=1, dense_layers=0)
SPECS = [
    *HiP.examples(),
    SMALL,
    replace(SMALL, variant="v1"),
    HiP(k=8, window=0, sink=0, query_block=4, refresh=1, dense_layers=0),
]


def drawn(queries, keys=None, *, batch=1, heads=4, kv_heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + queries)
    shapes = (heads, queries), *(2 * [(kv_heads, keys or queries)])
    return [
        torch.randn(batch, h, n, 8, generator=generator, dtype=torch.float64).to(dtype) for h, n in shapes
    ]


def padded(keys, side):
    valid = torch.ones(2, keys, dtype=torch.bool)
    part = {
        "left": slice(0, keys // 3),
        "right": slice(keys - keys // 3, keys),
        "middle": slice(keys // 3, keys // 2),
    }
    if side != "none":
        valid[0, part[side]] = False
    return valid


@pytest.mark.parametrize("side", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.variant} {spec.query_block} {spec.window}")
def test_the_search_is_its_definition(spec, side):
    for queries, keys in ((45, 45), (7, 45), (1, 45), (45, 90), (3, 200)):
        q, k, _ = drawn(queries, keys, batch=2)
        valid = None if side == "none" else padded(keys, side)
        ctx = Context.of(q, k, causal=spec.window > 0, valid=valid)
        found = hip_mask(q, k, spec, valid=valid).to_dense()
        assert torch.equal(found, seen_by_definition(q, k, ctx, spec))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("sink", [4, 64])
def test_it_is_softmax_over_what_it_sees(sink, side):
    spec = replace(SMALL, k=40, query_block=4, sink=sink)
    for queries, keys in ((200, 200), (45, 45), (70, 200)):
        q, k, v = drawn(queries, keys, batch=2)
        valid = None if side == "none" else padded(keys, side)
        seen = hip_mask(q, k, spec, valid=valid).to_dense()
        expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        expected = torch.where(seen.any(-1, True), expected, 0.0)
        torch.testing.assert_close(hip_attention(q, k, v, spec, valid=valid), expected)


def test_one_row_searches_long_texts_as_it_is_defined():
    """Where scoring all keys would read more than the rounds do, and where it reads less."""
    for keys in (60, 900, 901):
        q, k, _ = drawn(1, keys)
        found = hip_mask(q, k, SMALL).to_dense()
        assert torch.equal(found, seen_by_definition(q, k, Context.of(q, k), SMALL))


@pytest.mark.parametrize("per", [1, 2])
def test_part_of_a_cache_is_read_where_it_lies(per):
    cache = torch.randn(2, 3, 12, 4)
    cases = {"part": cache[:, :, 2:8], "odd": cache[:, :, :7], "turned": cache.transpose(1, 2)}
    for name, x in {**cases, "alike": cache[:1].expand(2, -1, -1, -1)}.items():
        flat, first = rows_of(x, per)
        whole = x.shape[2] // per
        at = (first[..., None] + torch.arange(whole)).flatten()
        assert torch.equal(flat[at].view(*x.shape[:2], whole * per, 4), x[:, :, : whole * per])
        copied = name == "turned" or (name == "odd" and per == 2)
        assert (flat.data_ptr() == x.data_ptr()) != copied
    assert rows_of(cache[:0])[0].shape == (0, 4)


def test_every_row_sees_its_window_the_first_tokens_and_at_most_k_more():
    q, k, _ = drawn(300)
    seen = hip_mask(q, k, SMALL).to_dense()
    i, j = torch.arange(300)[:, None], torch.arange(300)
    assert seen[..., (i - j >= 0) & (i - j < 8)].all() and not seen[..., j > i].any()
    assert seen[..., (j < 4) & (j <= i)].all()
    counts = seen.sum(-1)
    assert counts.max() == 8 + 4 + 16 and (counts[..., 100:] > 8 + 4).all()


@pytest.mark.parametrize("queries", [120, 17, 1])
def test_where_the_span_holds_no_more_than_k_it_is_exact(queries):
    q, k, v = drawn(queries, 120, heads=9, kv_heads=3, dtype=torch.float32)
    mask = torch.ones(120, 120).tril().bool()[-queries:]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = hip_attention(q, k, v, replace(SMALL, k=108))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if queries == 120:
        fewer = hip_attention(q, k, v, replace(SMALL, k=104))
        assert (fewer - expected).abs().max() > 1e-3, "one block fewer is not exact"


def turning(length):
    """Keys that turn by little from one to the next, and queries that look for the 40th."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 0.01
    k = torch.cat([angles.cos(), angles.sin()], -1)[None, None]
    return k[:, :, 40:41].expand(-1, -1, length, -1).clone(), k


@pytest.mark.parametrize("variant", ["v1.1", "v1"])
def test_it_finds_what_is_like_its_neighbours_and_misses_what_is_not(variant):
    q, k = turning(300)
    spec = replace(SMALL, variant=variant)
    seen = hip_mask(q, k, spec).to_dense()[0, 0]
    assert seen[200:, 40].all(), "the best key"
    assert seen[299].nonzero().flatten()[4:-8].tolist() == list(range(32, 48)), "and those around it"
    order = torch.randperm(280, generator=torch.Generator().manual_seed(1))
    k[:, :, 4:284] = k[:, :, 4:284][:, :, order]
    hidden = 4 + int((order == 36).nonzero())
    assert not hip_mask(q, k, spec).to_dense()[0, 0, 290:, hidden].all(), "a key among strangers"


@pytest.mark.parametrize(
    "valid", [None, padded(90, "left"), padded(90, "middle")], ids=["none", "left", "middle"]
)
def test_with_a_search_for_each_query_steps_equal_the_whole(valid):
    spec = replace(SMALL, query_block=1, query_stride=1, k=8, variant="v1.1")
    q, k, v = drawn(90, batch=2)
    whole = hip_attention(q, k, v, spec, valid=valid)
    for at in range(60, 90):
        now = None if valid is None else valid[:, : at + 1]
        step = hip_attention(q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1], spec, valid=now)
        torch.testing.assert_close(step[:, :, 0], whole[:, :, at])


def test_in_decoding_it_searches_every_refresh_steps(monkeypatch):
    searched = []
    search = hip_heads.search
    monkeypatch.setattr(hip_heads, "search", lambda *given: searched.append(1) or search(*given))
    spec = replace(SMALL, refresh=4)
    attention, kept = spec.build(), {}
    q, k, v = drawn(100)
    for at in range(60, 72):
        now = q[:, :, at : at + 1], k[:, :, : at + 1], v[:, :, : at + 1]
        out = attention(*now, replace(Context.of(*now[:2]), kept=kept))
        if at % 4 == 0:
            made = hip_mask(*now[:2], spec)
        torch.testing.assert_close(out, hip_attention(*now, spec, mask=made))
    assert len(searched) == 3 + 3, "three here, and three by hip_mask"


def test_what_was_found_can_be_used_again_for_a_while():
    q, k, v = drawn(80)
    spec = replace(SMALL, refresh=4)
    mask = hip_mask(q[:, :, 70:71], k[:, :, :71], spec)
    assert hip_attention(q[:, :, 73:74], k[:, :, :74], v[:, :, :74], spec, mask=mask).isfinite().all()
    with pytest.raises(RegardError, match="made at 71 keys, and there are 75"):
        hip_attention(q[:, :, 74:75], k[:, :, :75], v[:, :, :75], spec, mask=mask)
    with pytest.raises(RegardError, match="mask was made with"):
        hip_attention(q[:, :, 70:71], k[:, :, :71], v[:, :, :71], SMALL, mask=mask)
    with pytest.raises(ShapeMismatch, match="key blocks"):
        hip_attention(q[:, :1, 70:71], k[:, :1, :71], v[:, :1, :71], spec, mask=mask)


def test_it_trains():
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, mechanism=replace(SMALL, k=4), positions="rotary")
    x = torch.randn(1, 60, 16)
    target = torch.randn(1, 60, 16)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_first_layers_stay_dense_and_not_all_of_them():
    layers = [MultiHeadAttention(16, 4, mechanism=HiP(dense_layers=1), layer=n, layers=2) for n in (0, 1)]
    assert [type(layer.mechanism) for layer in layers] == [SoftmaxAttention, HiPAttention]
    with pytest.raises(RegardError, match="dense_layers is 3 and the model has 2 layers"):
        MultiHeadAttention(16, 4, mechanism=get("hip"), layers=2)


WRONG = {
    "window is 7; it must be a multiple of key_block": {"window": 7},
    "sink is 3; it must be a multiple of key_block": {"sink": 3},
    "key_block is 4; it can be at most k": {"k": 2, "key_block": 4},
    "key_stride is 3; it can be at most key_block": {"key_stride": 3},
    "query_stride is 9; it can be at most query_block": {"query_block": 8, "query_stride": 9},
    "refresh is 300; it can be at most window": {"refresh": 300},
    "sink is 16 and window 0": {"window": 0},
    "k is 0; it must be a whole number from 1": {"k": 0},
    "query_block is 2.0": {"query_block": 2.0},
    "representative is 'last'": {"representative": "last"},
    "variant is 'v3'": {"variant": "v3"},
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options_are_refused(words):
    with pytest.raises(RegardError) as error:
        HiP(**WRONG[words])
    assert words in str(error.value)


def test_wrong_calls_are_refused():
    q, k, v = drawn(20)
    with pytest.raises(ShapeMismatch, match="needs as many keys"):
        hip_attention(q, k[:, :, :10], v[:, :, :10], SMALL)
    with pytest.raises(RegardError, match=r"no causal order \(which takes window=0 and sink=0\)"):
        SMALL.build()(q, k, v, Context.of(q, k, causal=False))
    with pytest.raises(RegardError, match=r"causal order \(which takes a window\)"):
        replace(SMALL, window=0, sink=0).build()(q, k, v, Context.of(q, k))
    with pytest.raises(RegardError, match="soft-cap"):
        SMALL.build()(q, k, v, replace(Context.of(q, k), softcap=5.0))
    with pytest.raises(RegardError, match="dropout"):
        SMALL.build().train()(q, k, v, replace(Context.of(q, k), dropout=0.1))
    with pytest.raises(RegardError, match="spec is 512"):
        hip_mask(q, k, 512)
    with pytest.raises(RegardError, match="preset is 'old'"):
        HiP.of("old")
    k[0, 0, 3, 0] = torch.nan
    with pytest.raises(RegardError, match="1 numbers that are NaN"):
        hip_mask(q, k, SMALL)


def test_both_ways_it_sees_keys_on_both_sides():
    spec = replace(SMALL, window=0, sink=0, k=60)
    q, k, v = drawn(60)
    expected = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(hip_attention(q, k, v, spec), expected)
