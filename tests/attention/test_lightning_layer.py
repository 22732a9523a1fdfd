"""The gated layer: its parts written out, LRPE, state and padding, and transformers' MiniMax beside it."""

import pytest
import torch
import torch.nn.functional as F

from regard.attention import LightningLayer, decay_rates
from regard.attention.lightning import Lrpe
from regard.errors import RegardError

PRESETS = ("paper", "official", "minimax")


def layer(preset="paper", **options):
    torch.manual_seed(0)
    spec = LightningLayer(dim=12, heads=3, layer=1, layers=4, preset=preset, **options)
    made = spec.build().double()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.startswith("norm") and name.endswith("weight"):
                weight.copy_(torch.linspace(0.5, 1.5, len(weight)))
    return made


def drawn(length, seed=0):
    return torch.randn(2, length, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(q, k, v, rates):
    steps = torch.arange(q.shape[2])
    left = torch.exp(-rates[:, None, None] * (steps[:, None] - steps)).tril()
    return ((q @ k.mT * left) @ v).transpose(1, 2).flatten(2)


def split(x):
    return x.unflatten(-1, (3, 4)).transpose(1, 2)


def test_the_paper_written_out():
    mixer, x = layer(), drawn(9)
    q, k, v, u = mixer.qkvu_proj(x).chunk(4, -1)
    heads = mixed(split(F.silu(q)), split(F.silu(k)), split(v), decay_rates(3, 1, 4))
    normed = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(mixer(x), mixer.out_proj(normed * u), rtol=0, atol=1e-12)
    assert [name for name, _ in mixer.named_parameters()] == ["qkvu_proj.weight", "out_proj.weight"]


def test_the_official_example_module_written_out():
    mixer, x = layer("official"), drawn(9)
    q, k, v = (F.silu(part) for part in mixer.qkvu_proj(x).chunk(3, -1))
    heads = mixed(split(q), split(k), split(v), decay_rates(3, 1, 4))
    gate = mixer.low_rank[1](mixer.low_rank[0](x)).sigmoid()
    normed = F.layer_norm(heads, (12,), mixer.norm.weight, mixer.norm.bias)
    torch.testing.assert_close(mixer(x), mixer.out_proj(normed * gate), rtol=0, atol=1e-12)


def test_minimax_is_that_of_transformers():
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=6,
        num_hidden_layers=4,
        block_size=8,
        layer_types=["linear_attention"] * 4,
    )
    torch.manual_seed(0)
    theirs, mine = MiniMaxLightningAttention(config, 1).double(), layer("minimax", width=6)
    with torch.no_grad():
        theirs.norm.weight.copy_(mine.norm.weight)
        by_head = theirs.qkv_proj.weight.view(3, 3, 6, 12).transpose(0, 1).reshape(54, 12)
        mine.qkvu_proj.weight.copy_(torch.cat([by_head, theirs.output_gate.weight]))
        mine.out_proj.weight.copy_(theirs.out_proj.weight)
    x, mask = drawn(30), torch.ones(2, 30, dtype=torch.bool)
    expected, state = theirs(x, None, None)
    found, (last, seen) = mine.step(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-6)
    assert seen.tolist() == [30, 30]
    mask[0, :7] = False
    expected, _ = theirs(x, None, mask)
    torch.testing.assert_close(mine(x, mask)[mask], expected[mask], rtol=0, atol=1e-6)
    assert (layer("minimax", width=6, rates="alibi")(x) - found).abs().max() > 1e-3


def test_scores_under_lrpe_depend_on_the_distance_alone():
    lrpe = Lrpe(3, 4).double()
    q, k = (torch.randn(1, 3, 1, 4, dtype=torch.float64) for _ in range(2))

    def score(i, j):
        return (lrpe(q, torch.tensor([[i]])) * lrpe(k, torch.tensor([[j]]))).sum(-1)

    torch.testing.assert_close(score(9, 4), score(1009, 1004), rtol=0, atol=1e-12)
    expected = (q * k * torch.cos(5 * lrpe.theta.double())).sum(-1)
    torch.testing.assert_close(score(9, 4), expected, rtol=0, atol=1e-12)
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lrpe", [False, True])
def test_steps_and_padding(preset, lrpe):
    mixer, x = layer(preset, lrpe=lrpe), drawn(20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :4] = mask[0, 9:11] = mask[1, 17:] = False
    whole, (last, seen) = mixer.step(x, None, mask)
    assert seen.tolist() == [14, 17]
    for item in range(2):
        alone, (state, _) = mixer.step(x[item : item + 1, mask[item]])
        torch.testing.assert_close(whole[item : item + 1, mask[item]], alone, rtol=0, atol=1e-11)
        torch.testing.assert_close(last[item : item + 1], state, rtol=0, atol=1e-11)
    outs, state, start = [], None, 0
    for size in (1, 5, 0, 14):
        part = slice(start, start + size)
        out, state = mixer.step(x[:, part], state, mask[:, part])
        outs.append(out)
        start += size
    torch.testing.assert_close(torch.cat(outs, 1)[mask], whole[mask], rtol=0, atol=1e-11)


def test_a_norm_of_every_head_by_itself():
    mixer, x = layer(norm="group"), drawn(9)
    heads = torch.randn(2, 9, 12, dtype=torch.float64)
    by_head = F.layer_norm(heads.unflatten(-1, (3, 4)), (4,)).flatten(-2) * mixer.norm.weight
    torch.testing.assert_close(mixer.norm(heads), by_head)
    assert mixer(x).shape == x.shape


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preset": "vllm"}, "paper, official, minimax"),
        ({"norm": "batch"}, "srms, rms, layer, group"),
        ({"gate": "tanh"}, "linear, sigmoid"),
        ({"activation": "softmax"}, "silu"),
        ({"heads": 5}, "which 5 heads do not divide"),
        ({"layer": 4, "layers": 4}, "layer is 4"),
        ({"rates": (0.1,)}, "each of 3 heads"),
        ({"rates": "slope"}, "alibi"),
        ({"chunk_size": -1}, "chunk_size is -1"),
    ],
)
def test_wrong_options_are_refused(options, told):
    with pytest.raises(RegardError, match=told):
        LightningLayer(**{"dim": 12, "heads": 3, **options})


def test_wrong_input_is_refused():
    with pytest.raises(RegardError, match=r"x must be \[batch, time, 12\]"):
        layer()(torch.zeros(2, 9, 11))
    with pytest.raises(RegardError, match=r"mask must be bool \[2, 9\]"):
        layer()(drawn(9), torch.ones(2, 9, 9, dtype=torch.bool))
    with pytest.raises(RegardError, match="the state is"):
        layer(lrpe=True).step(drawn(2), layer().step(drawn(9))[1])
