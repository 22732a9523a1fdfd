"""The plain ViT and the MLP-Mixer: formulas, counts, sizes, maps, matched baselines, and refusals.

Both were compared once with timm 1.0.31 under the same weights.
"""

import pytest
import torch
import torch.nn.functional as F

from regard.errors import RegardError, ShapeMismatch
from regard.models.images import cost, image_model, load_published, matched
from regard.models.patches import GridAttention, MLPMixerConfig, PlainViTConfig

PUBLISHED = {
    "vit-tiny": (5.72, 1.25), "vit-small": (22.0, 4.6), "vit-base": (86.6, 17.5), "mixer-small": (18.5, 3.78),
    "mixer-base": (59.9, 12.6),
}  # fmt: skip


def built(name, **options):
    torch.manual_seed(0)
    model = image_model(name, **{"num_channels": 1, "num_labels": 5, **options}).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def line(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def mlp(x, w, name):
    return line(F.gelu(line(x, w, f"{name}.fc1")), w, f"{name}.fc2")


def patches(x, w, name, size):
    """Every patch, row by row, times the convolution's weights."""
    rows = [
        x[:, :, i : i + size, j : j + size].flatten(1)
        for i in range(0, x.shape[2], size)
        for j in range(0, x.shape[3], size)
    ]
    return torch.stack(rows, 1) @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def attention(x, w, name, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in line(x, w, f"{name}.qkv").chunk(3, -1))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return line(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2), w, f"{name}.proj")


def test_the_vit_is_its_formula():
    model, x = built("vit-digits", image_size=[8, 12]), drawn(3, 1, 8, 12)
    w = model.state_dict()
    h = patches(x, w, "patch_embed.proj", 2) + w["pos_embed"]
    for i in range(3):
        h = h + attention(norm(h, w, f"blocks.{i}.norm1"), w, f"blocks.{i}.attn", 4)
        h = h + mlp(norm(h, w, f"blocks.{i}.norm2"), w, f"blocks.{i}.mlp")
    expected = line(norm(h, w, "norm").mean(1), w, "head")
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-10)


def test_the_mixer_is_its_formula():
    model, x = built("mixer-digits", image_size=[8, 12]), drawn(3, 1, 8, 12)
    w = model.state_dict()
    h = patches(x, w, "stem.proj", 2)
    for i in range(3):
        h = h + mlp(norm(h, w, f"blocks.{i}.norm1").mT, w, f"blocks.{i}.mlp_tokens").mT
        h = h + mlp(norm(h, w, f"blocks.{i}.norm2"), w, f"blocks.{i}.mlp_channels")
    expected = line(norm(h, w, "norm").mean(1), w, "head")
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name):
    with torch.device("meta"):
        model = image_model(name, num_labels=1000)
    found = cost(model)
    parameters, operations = PUBLISHED[name]
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=0.005)
    assert found.multiply_adds / 1e9 == pytest.approx(operations, rel=0.01)


def test_maps_are_on_the_grid_of_patches():
    for name in ("vit-digits", "mixer-digits"):
        model, x = built(name, image_size=[8, 12]), drawn(2, 1, 8, 12)
        out = model(x, output_hidden_states=True)
        assert [tuple(h.shape) for h in out.hidden_states] == [(2, 64, 4, 6)] * 3
        torch.testing.assert_close(model.head(out.hidden_states[-1].mean((2, 3))), out.logits)
        other = x.clone()
        other[:, :, 2:4, 8:10] += 1
        first = (model.patch_embed if name.startswith("vit") else model.stem)(other - x).reshape(2, -1, 64)
        assert first.std((0, 2)).argmax() == 1 * 6 + 4, "patch of row 1 and column 4"


def test_attention_shows_the_rows_that_it_uses():
    torch.manual_seed(0)
    layer, x = GridAttention(8, 2).double(), drawn(2, 3, 4, 8)
    assert layer.grids(x) == ((3, 4), (3, 4))
    rows = layer.rows(x, range(12))
    values = layer.qkv(x.flatten(1, 2))[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
    expected = layer.proj((rows @ values).transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.reference(x), expected, rtol=0, atol=1e-12)
    for wrong in (drawn(2, 12, 8), drawn(2, 3, 4, 9)):
        with pytest.raises(ShapeMismatch, match="batch, height, width, 8"):
            layer(wrong)


def test_positions_grow_with_the_image():
    model = built("vit-digits")
    assert model(drawn(1, 1, 12, 16)).logits.shape == (1, 5)
    smooth = torch.linspace(0, 1, 4, dtype=torch.float64)
    with torch.no_grad():
        model.pos_embed[0, :, 0] = smooth.repeat(4)
    grown = model._positions((8, 8))[0, :, :, 0]
    assert (grown.diff(dim=1) > -0.02).all() and grown.std(0).max() < 1e-5
    assert float(grown.detach().mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: PlainViTConfig(image_size=30), RegardError, "30 x 30, which patches of 16"),
        (lambda: PlainViTConfig(hidden_size=50), RegardError, "which 3 heads do not divide"),
        (lambda: MLPMixerConfig(token_size=0), RegardError, "token_size is 0"),
        (lambda: MLPMixerConfig(image_size=[32, 32, 3]), RegardError, "32 x 32 x 3"),
        (lambda: built("mixer-digits")(drawn(1, 1, 8, 12)), ShapeMismatch, "was built for 8 x 8"),
        (lambda: built("vit-digits")(drawn(1, 1, 8, 13)), ShapeMismatch, "patches of 2 do not divide"),
        (lambda: built("vit-digits")(drawn(1, 1, 1, 8)), ShapeMismatch, "needs 2 x 2 at least"),
        (lambda: matched("vit-nano", 1000, "intermediate_size"), RegardError, "vary another option"),
        (lambda: GridAttention(8, 3), RegardError, "3 heads do not divide"),
    ],
)
def test_wrong_input_is_refused(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


@pytest.mark.parametrize(
    ("name", "vary", "step"), [("vit-nano", "hidden_size", 4), ("mixer-digits", "intermediate_size", 1)]
)
def test_a_baseline_of_equal_parameters(name, vary, step):
    wanted = 300_000
    config = matched(name, wanted, vary, step=step, num_labels=10)
    model = image_model(name, num_labels=10, **{vary: getattr(config, vary)})
    found = sum(p.numel() for p in model.parameters())
    assert abs(found - wanted) < 0.03 * wanted and getattr(config, vary) % step == 0
    for width in (getattr(config, vary) - step, getattr(config, vary) + step):
        other = image_model(name, num_labels=10, **{vary: width})
        assert abs(sum(p.numel() for p in other.parameters()) - wanted) >= abs(found - wanted)


def test_a_head_of_other_classes_stays_fresh():
    source, model = built("mixer-digits", num_labels=3), built("mixer-digits")
    load_published(model, source.state_dict(), fresh=["head."])
    assert torch.equal(model.stem.proj.weight, source.stem.proj.weight)
