"""NAT and DiNAT: the published names, transformers' DiNAT mended, saving, training, refusals."""

import sys
import types

import pytest
import torch
from transformers import AutoModelForImageClassification, DinatConfig, DinatForImageClassification
from transformers.models.dinat import modeling_dinat

from regard.errors import RegardError, ShapeMismatch
from regard.models.neighborhood import (
    NATConfig,
    NATForImageClassification,
    NeighborhoodTransformer,
    official_names,
    serve_dinat,
)

SIZES = {
    "embed_dim": 16,
    "depths": [2, 1, 1],
    "num_heads": [2, 4, 8],
    "kernel_size": 3,
    "dilations": [[1, 4], [2], [1]],
    "mlp_ratio": 2.0,
}


def small(**options):
    torch.manual_seed(0)
    model = NATForImageClassification(NATConfig(**{**SIZES, "num_labels": 5, **options})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "rpb" in name:
                weight.normal_()
    return model


def theirs(**options):
    torch.manual_seed(1)
    config = DinatConfig(**SIZES, num_labels=5, initializer_range=0.1, **options)
    model = DinatForImageClassification(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "rpb" in name or "bias" in name:
                weight.normal_(std=3.0 if "rpb" in name else 1.0)
    return model


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("size", [(48, 40), (20, 33)])
def test_it_is_the_dinat_of_transformers_when_that_works(scale, size):
    """Their tokens, levels, norms and padding with our attention, and all ours, give the same."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with serve_dinat(), torch.no_grad():
        model = theirs(layer_scale_init_value=scale)
        expected = model(images, output_attentions=True)
        weights = expected.attentions[0]
        assert weights.shape[:2] == (2, 2) and weights.shape[-1] == 9
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(model(images).logits, expected.logits, rtol=0, atol=1e-5)
    ours = small(layer_scale=scale or None)
    ours.load_state_dict(official_names(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(ours(images).logits, expected.logits, rtol=0, atol=1e-5)
        for name, weight in ours.named_parameters():
            if "rpb" in name:
                weight.zero_()
        assert (ours(images).logits - expected.logits).abs().max() > 1e-2, "the bias is used"


def test_without_serving_transformers_refuses_and_after_it_is_as_before():
    before = dict(vars(modeling_dinat)), modeling_dinat.NeighborhoodAttention.forward
    with serve_dinat():
        theirs()
    assert dict(vars(modeling_dinat)) == before[0]
    assert modeling_dinat.NeighborhoodAttention.forward is before[1]
    if "natten" not in sys.modules:
        with pytest.raises(ImportError):
            theirs()


def test_a_natten_without_the_two_functions_is_given_them(monkeypatch):
    package, functional = types.ModuleType("natten"), types.ModuleType("natten.functional")
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    with serve_dinat():
        assert callable(functional.natten2dav) and callable(functional.natten2dqkrpb)
    assert not hasattr(functional, "natten2dav")


def test_parameters_have_the_official_names():
    found = {name: tuple(x.shape) for name, x in small(layer_scale=0.1).state_dict().items()}
    expected = {
        "patch_embed.proj.0.weight": (8, 3, 3, 3),
        "patch_embed.proj.1.bias": (16,),
        "patch_embed.norm.weight": (16,),
        "levels.0.blocks.1.norm1.weight": (16,),
        "levels.0.blocks.1.attn.qkv.weight": (48, 16),
        "levels.0.blocks.1.attn.rpb": (2, 5, 5),
        "levels.0.blocks.1.attn.proj.bias": (16,),
        "levels.0.blocks.1.mlp.fc1.weight": (32, 16),
        "levels.0.blocks.1.mlp.fc2.weight": (16, 32),
        "levels.0.blocks.0.gamma1": (16,),
        "levels.2.blocks.0.gamma2": (64,),
        "levels.0.downsample.reduction.weight": (32, 16, 3, 3),
        "levels.1.downsample.norm.bias": (64,),
        "norm.weight": (64,),
        "head.weight": (5, 64),
    }
    assert expected.items() <= found.items()
    assert "levels.2.downsample.norm.bias" not in found


PUBLISHED = [("nat-mini", 20), ("nat-tiny", 28), ("dinat-small", 51), ("nat-base", 90)]


@pytest.mark.parametrize(("name", "millions"), PUBLISHED)
def test_presets_have_as_many_parameters_as_published(name, millions):
    with torch.device("meta"):
        model = NATForImageClassification(NATConfig.preset(name, num_labels=1000))
    assert round(sum(x.numel() for x in model.parameters()) / 1e6) == millions


def test_a_saved_model_comes_back(tmp_path):
    model, images = small(), torch.randn(1, 3, 40, 40)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=1e-6)


def test_maps_before_each_reduction_and_a_loss():
    out = small()(torch.randn(2, 3, 48, 40), labels=torch.tensor([1, 4]), output_hidden_states=True)
    assert [tuple(x.shape) for x in out.hidden_states] == [(2, 16, 12, 10), (2, 32, 6, 5), (2, 64, 3, 3)]
    assert out.loss > 0 and small()(torch.randn(2, 3, 48, 40)).hidden_states is None


def test_it_trains_with_dropped_paths():
    model = small(drop_path_rate=0.3, layer_scale=0.1).train()
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_small_transformer_learns_to_copy_a_neighbour(axes):
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "layers": 2, "kernel_size": 3}
    model = NeighborhoodTransformer(1, 1, **sizes, axes=axes, dilations=(1, 2), position_bias=True)
    assert sum(name.endswith("rpb") for name, _ in model.named_parameters()) == 2
    x = torch.randn(4, *((40,), (8, 8), (6, 6, 6))[axes - 1], 1)
    wanted = x.roll(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - wanted)[:, 1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses


def grid_model(layers=1):
    return NeighborhoodTransformer(1, 1, dim=8, heads=2, layers=layers, kernel_size=3)


LONE = {"levels.0.layers.0.attention.self.query.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: NATConfig.preset("nat-huge"), RegardError, "no preset 'nat-huge'; they are nat-nano"),
        (lambda: NATConfig(kernel_size=4), RegardError, "kernel_size is 4; it must be odd"),
        (lambda: NATConfig(num_heads=[2, 4]), RegardError, "the same levels"),
        (lambda: NATConfig(num_heads=[3, 4, 8, 16]), RegardError, "3 heads do not divide"),
        (lambda: NATConfig(dilations=[[1], [1], [1], [1]]), RegardError, "dilations must be"),
        (lambda: small()(torch.randn(1, 1, 40, 40)), ShapeMismatch, "pixel_values must be"),
        (lambda: official_names(LONE), RegardError, "the weights have no "),
        (lambda: grid_model(layers=0), RegardError, "layers is 0"),
        (lambda: grid_model()(torch.zeros(1, 9, 1)), ShapeMismatch, "2 axes, 1"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()
