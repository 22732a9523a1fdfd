"""VAN: published counts and names, weights of other names, evaluation by parts, refusals."""

import math

import pytest
import torch
from torch import nn

from regard.errors import RegardError, ShapeMismatch
from regard.models.images import cost, image_model, load_published
from regard.models.van import VANConfig, official_names

PARAMETERS = {
    "van-b0": 4_105_800, "van-b1": 13_861_800, "van-b2": 26_578_472, "van-b3": 44_765_608,
    "van-b4": 60_283_176, "van-b5": 89_967_688, "van-b6": 199_829_416,
}  # fmt: skip
GIGA = {"van-b0": 0.9, "van-b1": 2.5, "van-b2": 5.0, "van-b3": 9.0, "van-b4": 12.2}
TINY = {"widths": [8, 16], "depths": [1, 2], "mlp_ratios": [2, 2], "strides": [4, 2], "num_labels": 5}


def tiny(**options):
    torch.manual_seed(0)
    model = image_model("van-small", **{**TINY, "drop_path_rate": 0.0, "layer_scale": 0.3, **options}).eval()
    with torch.no_grad():
        for name, x in model.named_buffers():
            if "running" in name:
                x.uniform_(0.3, 1.5)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_operations_are_the_published(name):
    with torch.device("meta"):
        found = cost(image_model(name, num_labels=1000))
    assert found.parameters == PARAMETERS[name]
    if name in GIGA:
        assert abs(found.multiply_adds / 1e9 - GIGA[name]) < 0.11


def test_parameters_have_the_official_names():
    found = {name: tuple(x.shape) for name, x in tiny().state_dict().items()}
    expected = {
        "patch_embed1.proj.weight": (8, 3, 7, 7),
        "patch_embed1.norm.running_var": (8,),
        "patch_embed2.proj.bias": (16,),
        "block2.1.norm1.weight": (16,),
        "block2.1.attn.proj_1.weight": (16, 16, 1, 1),
        "block2.1.attn.spatial_gating_unit.conv0.weight": (16, 1, 5, 5),
        "block2.1.attn.spatial_gating_unit.conv_spatial.weight": (16, 1, 7, 7),
        "block2.1.attn.spatial_gating_unit.conv1.bias": (16,),
        "block2.1.attn.proj_2.bias": (16,),
        "block2.1.layer_scale_1": (16,),
        "block2.1.mlp.fc1.weight": (32, 16, 1, 1),
        "block2.1.mlp.dwconv.dwconv.weight": (32, 1, 3, 3),
        "block2.1.mlp.fc2.bias": (16,),
        "norm2.weight": (16,),
        "head.weight": (5, 16),
    }
    assert expected.items() <= found.items()


def test_it_is_the_network_as_written():
    model, images = tiny().double(), torch.randn(2, 3, 40, 36, dtype=torch.float64)
    x = images
    for stage in (1, 2):
        embedding = getattr(model, f"patch_embed{stage}")
        kernel = embedding.proj.weight
        x = nn.functional.conv2d(x, kernel, embedding.proj.bias, (4, 2)[stage - 1], kernel.shape[-1] // 2)
        x = embedding.norm(x)
        for block in getattr(model, f"block{stage}"):
            x = block.reference(x)
        norm = getattr(model, f"norm{stage}")
        tokens = nn.functional.layer_norm(x.flatten(2).mT, x.shape[1:2], norm.weight, norm.bias, 1e-6)
        x = tokens.mT.unflatten(2, x.shape[2:])
        torch.testing.assert_close(model.features(images)[stage - 1], x)
    torch.testing.assert_close(model(images).logits, model.head(tokens.mean(1)))


def theirs_of(state):
    """Weights under the names that transformers' model had."""
    inside = {
        "norm1": "pre_normomalization", "norm2": "post_normalization",
        "attn.proj_1": "attention.pre_projection.conv", "attn.proj_2": "attention.post_projection",
        "attn.spatial_gating_unit.conv0": "attention.attention_layer.attention.depth_wise",
        "attn.spatial_gating_unit.conv_spatial": "attention.attention_layer.attention.depth_wise_dilated",
        "attn.spatial_gating_unit.conv1": "attention.attention_layer.attention.point_wise",
        "mlp.fc1": "mlp.in_dense", "mlp.fc2": "mlp.out_dense", "mlp.dwconv.dwconv": "mlp.depth_wise",
    }  # fmt: skip
    found = {}
    for name, x in state.items():
        part, rest = name.split(".", 1)
        stage = f"van.encoder.stages.{int(part[-1]) - 1}." if part[-1].isdigit() else ""
        if part.startswith("patch_embed"):
            rest = rest.replace("proj", "convolution").replace("norm", "normalization")
            name = f"{stage}embeddings.{rest}"
        elif part.startswith("norm"):
            name = f"{stage}normalization.{rest}"
        elif part.startswith("block"):
            layer, rest = rest.split(".", 1)
            scales = {"layer_scale_1": "attention_scaling.weight", "layer_scale_2": "mlp_scaling.weight"}
            stem, _, kind = rest.rpartition(".")
            name = f"{stage}layers.{layer}.{scales.get(rest) or f'{inside[stem]}.{kind}'}"
        else:
            name = name.replace("head", "classifier")
        found[name] = x
    return found


def test_weights_of_either_name_load_and_what_does_not_fit_is_named():
    model, images = tiny(), torch.randn(2, 3, 40, 36)
    for state, rename in ((model.state_dict(), None), (theirs_of(model.state_dict()), official_names)):
        again = tiny(layer_scale=0.1)
        assert not torch.equal(again(images).logits, model(images).logits)
        load_published(again, state, rename)
        assert torch.equal(again(images).logits, model(images).logits)
    other = tiny(num_labels=7)
    with pytest.raises(RegardError, match=r"head.weight is \[5, 16\] there and \[7, 16\] here"):
        load_published(other, model.state_dict())
    load_published(other, model.state_dict(), fresh=["head."])
    torch.testing.assert_close(other.features(images)[-1], model.features(images)[-1])
    lacking = {k: x for k, x in model.state_dict().items() if "conv_spatial" not in k}
    with pytest.raises(RegardError, match="6 missing .block1.0.attn.spatial_gating_unit.conv_spatial.weight"):
        load_published(other, lacking, fresh=["head."])


def test_fresh_weights_are_those_of_the_official_code():
    model = image_model("van-small", num_labels=1000)
    block = model.block3[0]
    wide, narrow = block.mlp.fc1.weight, block.attn.spatial_gating_unit.conv_spatial.weight
    assert abs(wide.std() / math.sqrt(2 / wide.shape[0]) - 1) < 0.03
    assert abs(narrow.std() / math.sqrt(2 / 49) - 1) < 0.05
    assert abs(model.head.weight.std() / 0.02 - 1) < 0.03
    assert not block.mlp.fc1.bias.any() and (block.layer_scale_1 == 0.1).all()


def test_small_pictures_and_export():
    model = image_model("van-small", num_labels=10, num_channels=1).eval()
    assert model(torch.randn(2, 1, 8, 8)).logits.shape == (2, 10)
    assert [x.shape[2] for x in model.features(torch.randn(2, 1, 32, 32))] == [16, 8, 4]
    images = torch.randn(2, 1, 16, 16)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images).logits, model(images).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: VANConfig.preset("van-b7"), RegardError, "no preset 'van-b7'; they are van-small, van-b0"),
        (lambda: VANConfig(depths=[1, 2]), RegardError, "depths has 2 numbers and strides 4"),
        (lambda: VANConfig(widths=[8, 8, 8, 0]), RegardError, "widths is .8, 8, 8, 0."),
        (lambda: tiny(dilation=30), RegardError, "dilation is 30 and kernel 21"),
        (lambda: tiny()(torch.zeros(1, 3, 40, 7)), ShapeMismatch, "40 x 7 pixels.*needs 8 x 8"),
        (lambda: tiny()(torch.zeros(1, 1, 40, 40)), ShapeMismatch, "pixel_values must be"),
        (lambda: tiny().train()(torch.zeros(1, 3, 8, 8)), RegardError, "one number a channel"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()
