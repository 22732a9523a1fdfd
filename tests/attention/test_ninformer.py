"""The NiNformer block: its formula, counts, gates, padding, resizing, precision, and refusals."""

import math

import pytest
import torch
from torch import nn

from regard.attention import NiN, NiNBlock, NiNGating, NiNMixer
from regard.attention.ninformer import Fourier, cheaper_from, count_parameters
from regard.errors import RegardError, ShapeMismatch


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(kind=NiNBlock, dim=8, tokens=6, hidden=12, **options):
    torch.manual_seed(0)
    return kind(dim, tokens, hidden, **options).double().eval()


def normed(x, weight, bias):
    return (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt() * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def by_hand(x, w, second="norm"):
    """The block, token by token and channel by channel, from a state dict with the official names."""
    z = normed(x, w["norm.weight"], w["norm.bias"])
    m = z.clone()
    y = normed(z, *(w[f"mgu.Mixer.token_mix.0.{part}"] for part in ("weight", "bias")))
    for channel in range(x.shape[2]):
        m[:, :, channel] += mlp(y[:, :, channel], w, "mgu.Mixer.token_mix.2")
    v, out = m.clone(), x.clone()
    y = normed(m, *(w[f"mgu.Mixer.channel_mix.0.{part}"] for part in ("weight", "bias")))
    for token in range(x.shape[1]):
        v[:, token] += mlp(y[:, token], w, "mgu.Mixer.channel_mix.1")
        out[:, token] += (z[:, token] @ w["mgu.proj.weight"].T + w["mgu.proj.bias"]) * v[:, token]
    return out + mlp(normed(out, w[f"{second}.weight"], w[f"{second}.bias"]), w, "ffn")


def mlp(x, w, name):
    inner = gelu(x @ w[f"{name}.net.0.weight"].T + w[f"{name}.net.0.bias"])
    return inner @ w[f"{name}.net.3.weight"].T + w[f"{name}.net.3.bias"]


@pytest.mark.parametrize("share_norm", [True, False])
def test_the_block_is_its_formula(share_norm):
    block = built(token_hidden=5, share_norm=share_norm)
    nn.init.normal_(block.norm.weight)
    x = drawn(3, 6, 8)
    expected = by_hand(x, block.state_dict(), "norm" if share_norm else "norm2")
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.reference(x), expected, rtol=0, atol=1e-12)
    assert ("norm2.weight" in block.state_dict()) != share_norm


def test_names_and_counts_are_those_published():
    block = NiNBlock(256, tokens=64, hidden=512)
    names = [name for name in block.state_dict() if name.endswith("weight")]
    assert names == [
        "norm.weight", "mgu.Mixer.token_mix.0.weight", "mgu.Mixer.token_mix.2.net.0.weight",
        "mgu.Mixer.token_mix.2.net.3.weight", "mgu.Mixer.channel_mix.0.weight",
        "mgu.Mixer.channel_mix.1.net.0.weight", "mgu.Mixer.channel_mix.1.net.3.weight", "mgu.proj.weight",
        "ffn.net.0.weight", "ffn.net.3.weight",
    ]  # fmt: skip
    assert sum(p.numel() for p in block.parameters()) == 659_264 == count_parameters(256, 64, 512)
    for sizes in ((8, 6, 12, None), (8, 6, 12, 5)):
        assert sum(p.numel() for p in NiNBlock(*sizes).parameters()) == count_parameters(*sizes)


def test_where_it_is_cheaper_than_attention():
    from torch.utils.flop_counter import FlopCounterMode

    def gating(tokens, dim, hidden):
        with FlopCounterMode(display=False) as counter:
            built(NiNMixer, dim, tokens, hidden)(drawn(1, tokens, dim))
        return counter.get_total_flops() // 2

    assert gating(12, 8, 10) == 12 * 8**2 + 4 * 12 * 8 * 10
    for dim, hidden in ((8, 16), (8, 10)):
        border = cheaper_from(dim, hidden)
        assert border == 2 * hidden - 1.5 * dim
        for tokens in (int(border) - 1, int(border) + 1):
            attention = 4 * tokens * dim**2 + 2 * tokens**2 * dim
            assert (gating(tokens, dim, hidden) < attention) == (tokens > border)


def test_gates_differ_as_their_formulas_say():
    x = drawn(2, 6, 8)
    raw = built(NiNMixer)
    v, u = raw.Mixer(x), raw.proj(x)
    for gate, expected in {"raw": u * v, "sigmoid": u / (1 + (-v).exp()), "add": u + v, "one": u}.items():
        unit = built(NiNMixer, gate=gate)
        unit.load_state_dict(raw.state_dict(), strict=gate != "one")
        torch.testing.assert_close(unit(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gate", "moves"), [("raw", True), ("sigmoid", True), ("add", True), ("one", False)])
def test_tokens_talk_through_the_gate_alone(gate, moves):
    block, x = built(gate=gate), drawn(1, 6, 8)
    other = x.clone()
    other[:, 2, 3] += 1
    change = (block(other) - block(x)).abs().amax((0, 2))
    assert change[2] > 1e-3
    assert bool((change[[0, 1, 3, 4, 5]] > 1e-6).all()) == moves
    assert moves or not (change[[0, 1, 3, 4, 5]] > 0).any()


@pytest.mark.parametrize("generator", ["mixer", "fourier"])
def test_padded_tokens_are_not_read(generator):
    block, x = built(generator=generator), drawn(2, 6, 8)
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    junk = torch.where(valid[..., None], x, 1e3 * drawn(2, 6, 8, seed=1))
    found = block(junk, valid)
    torch.testing.assert_close(found[valid], block(x, valid)[valid], rtol=0, atol=1e-12)
    torch.testing.assert_close(found, block.reference(junk, valid), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1:], block(x[1:]), rtol=0, atol=1e-12)
    assert (block(junk)[0, :4] - block(x)[0, :4]).abs().max() > 1e-3, "without the mark they are read"


def test_pieces_of_a_batch_give_what_the_whole_gives(monkeypatch):
    block, x = built(), drawn(7, 6, 8)
    whole = block(x)
    monkeypatch.setattr("regard.attention.ninformer.gating.AT_ONCE", 5 * 8 * 12)
    seen = []
    with torch.no_grad():
        assert block.mgu.at_once(x, None) == 5
        torch.testing.assert_close(block(x), whole, rtol=0, atol=1e-12)
        handle = block.ffn.register_forward_hook(lambda module, given, out: seen.append(len(out)))
        block(x)
        assert seen == [7], "whoever watches a part sees the whole batch"
        handle.remove()


def test_a_generator_of_ones_own():
    class ShortConv(nn.Module):
        def __init__(self, dim, tokens):
            super().__init__()
            self.conv = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)

        def forward(self, z):
            return self.conv(z.mT).mT

    unit = built(NiNMixer, generator=ShortConv)
    x = drawn(2, 6, 8)
    torch.testing.assert_close(unit(x), unit.proj(x) * unit.Mixer(x), rtol=0, atol=1e-12)
    with pytest.raises(RegardError, match="ShortConv as generator cannot be resized"):
        built(NiNMixer, tokens=9, generator=ShortConv).resize_tokens((4, 4))
    with pytest.raises(ShapeMismatch, match="must keep the shape"):
        built(NiNMixer, generator=lambda dim, tokens: nn.Linear(dim, 2)).double()(x)


def test_fourier_is_the_transform():
    x = drawn(1, 6, 8)
    n, d = torch.arange(6.0, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64)
    phase = n[:, None, None, None] * n[None, None, :, None] / 6 + d[None, :, None, None] * d / 8
    expected = torch.einsum("kcnd,bnd->bkc", torch.cos(2 * math.pi * phase), x)
    torch.testing.assert_close(Fourier()(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1])
def test_tokens_split_in_four_give_four_times_the_same(prefix):
    """With nearest weights, a plane whose tokens are each repeated two by two is treated as the plane was."""
    block = built(tokens=6 + prefix, prefix=prefix, grid=(2, 3))
    x = drawn(2, 6 + prefix, 8)
    larger = block.resize_tokens((4, 6), mode="nearest")

    def split(x):
        plane = x[:, prefix:].unflatten(1, (2, 3)).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return torch.cat([x[:, :prefix], plane.flatten(1, 2)], 1)

    torch.testing.assert_close(larger(split(x)), split(block(x)), rtol=0, atol=1e-12)
    assert larger.mgu.tokens == 24 + prefix and larger.mgu.grid == (4, 6) and block.mgu.tokens == 6 + prefix
    assert (larger.mgu(split(x)) - split(block.mgu(x + 1))).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
def test_resizing_to_the_same_grid_changes_nothing(mode):
    block = built(grid=(2, 3))
    x = drawn(2, 6, 8)
    torch.testing.assert_close(block.resize_tokens((2, 3), mode)(x), block(x), rtol=0, atol=1e-12)
    assert block.resize_tokens((5, 4), mode)(drawn(1, 20, 8)).shape == (1, 20, 8)


def test_maps_are_the_gate_over_the_plane():
    x = drawn(2, 7, 8)
    for gate, kind in (("raw", "gate"), ("sigmoid", "factor")):
        block = built(tokens=7, prefix=1, grid=(2, 3), gate=gate)
        found, v = block.maps(x), block.mgu.Mixer(block.norm(x))
        v = v.sigmoid() if gate == "sigmoid" else v
        assert found.kind == kind and found.head == "channel" and found.values.shape == (2, 8, 2, 3)
        torch.testing.assert_close(found.values[1, 3, 1, 2], v[1, 6, 3], rtol=0, atol=1e-12)
    for block, said in ((built(gate="one"), "gate of 1"), (built(), "no known grid")):
        assert block.shows is None
        with pytest.raises(RegardError, match=said):
            block.maps(drawn(1, 6, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_bounded_by_the_norm_before_the_product(dtype):
    block = built(dim=64, tokens=16, hidden=128)
    x = drawn(2, 16, 64) * 3e3
    expected, low = block(x), built(dim=64, tokens=16, hidden=128).to(dtype)
    found = low(x.to(dtype))
    assert found.dtype == dtype and found.isfinite().all()
    step = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert (found - expected).abs().max() < 4 * step * expected.abs().max()
    if dtype == torch.float16:
        with torch.no_grad():
            assert not (low.mgu.proj(x.to(dtype)) * x.to(dtype)).isfinite().all(), "unnormed, it overflows"


def test_it_learns():
    """Whether two tokens have the same sign is a product; the gate learns it, and nothing does at gate 1."""
    losses = {}
    for gate in ("raw", "one"):
        torch.manual_seed(0)
        block, read = NiNBlock(8, 4, 16, gate=gate), nn.Linear(8, 1)
        optimizer = torch.optim.Adam([*block.parameters(), *read.parameters()], 1e-2)
        for step in range(150):
            x = drawn(64, 4, 8, seed=step, dtype=torch.float32)
            wanted = (x[:, 0, 0] * x[:, 3, 0] > 0).float()
            loss = nn.functional.binary_cross_entropy_with_logits(read(block(x)).mean(1)[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[gate] = float(loss.detach())
    assert losses["raw"] < 0.55 < 0.66 < losses["one"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"tokens": 2.5}, "tokens is 2.5"),
        ({"hidden": -1}, "hidden is -1"),
        ({"token_hidden": 0}, "token_hidden is 0"),
        ({"gate": "tanh"}, "raw, sigmoid, one, add"),
        ({"generator": "conv"}, "'mixer', 'fourier' or a function"),
        ({"generator": lambda dim, tokens: 3}, "returned a int"),
        ({"prefix": 6}, "prefix is 6"),
        ({"grid": (2, 2)}, "do not make 6 tokens"),
        ({"grid": 6}, "rows and columns"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(RegardError, match=said):
        NiNBlock(**{"dim": 8, "tokens": 6, "hidden": 12, **options})


def test_wrong_inputs_are_refused():
    block, x = built(), drawn(2, 6, 8)
    for wrong in (drawn(2, 7, 8), drawn(2, 6, 9), drawn(6, 8)):
        for part in (block, block.mgu, block.maps):
            with pytest.raises(ShapeMismatch, match="6 tokens, 8"):
                part(wrong)
    for valid in (torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)):
        with pytest.raises(ShapeMismatch, match="valid must be bool"):
            block(x, valid)
    with pytest.raises(RegardError, match="no known grid"):
        block.resize_tokens((3, 3))
    for grid, mode, said in (
        ((0, 3), "bicubic", "grid is"),
        (3, "bicubic", "grid is"),
        ((3, 3), "area", "mode is"),
    ):
        with pytest.raises(RegardError, match=said):
            built(grid=(2, 3)).resize_tokens(grid, mode)


def test_specs_come_back_from_json():
    from regard.attention import from_dict

    for spec in (*NiN.examples(), *NiNGating.examples()):
        told = spec.to_dict()
        told["grid"] = list(told["grid"]) if told["grid"] else None
        assert from_dict(told) == spec
