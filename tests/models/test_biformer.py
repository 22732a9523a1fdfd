"""BiFormer: the paper's table, the published names, a layer by hand, maps, sizes of images, refusals."""

import re

import pytest
import torch
import torch.nn.functional as F

from regard.attention import BRA
from regard.attention.biformer import LePEAttention
from regard.errors import RegardError, ShapeMismatch
from regard.models.biformer import BiFormerConfig, BiFormerForImageClassification, official_names
from regard.models.images import cost, image_model, load_published

TABLE = {"tiny": (13.1, 2.2), "small": (25.5, 4.5), "base": (56.8, 9.8), "stl": (28.4, 4.6)}
SIZES = {
    "embed_dims": [8, 16, 24, 32],
    "depths": [1, 2, 1, 1],
    "head_dim": 8,
    "whole_heads": 4,
    "num_labels": 5,
}


def made(**options):
    torch.manual_seed(0)
    model = BiFormerForImageClassification(BiFormerConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(0.0, 0.3) if "norm" not in name else x.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_operations_are_those_of_the_paper(name):
    with torch.device("meta"):
        model = image_model(f"biformer-{name}", num_labels=1000)
    found = cost(model)
    assert (round(found.parameters / 1e6, 1), round(found.multiply_adds / 1e9, 1)) == TABLE[name]


def theirs(name, newer):
    """The official name of one of ours."""
    attention = {".attn.qkv.": ".attn.qkv_linear.", ".attn.proj.": ".attn.output_linear."} if newer else {
        ".attn.qkv.": ".attn.qkv.qkv.", ".attn.proj.": ".attn.wo."}  # fmt: skip
    if not name.startswith("stages.3"):
        for ours, other in attention.items():
            name = name.replace(ours, other)
    return name.replace(".fc1.", ".mlp.0.").replace(".mlp.mlp.", ".mlp.").replace("mlp.fc2.", "mlp.3.")


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("stem", ["convolutions", "patch"])
def test_published_names_load(newer, stem):
    model, images = made(stem=stem, position=3 if stem == "convolutions" else 0), torch.randn(1, 3, 112, 112)
    state = {}
    for name, x in model.state_dict().items():
        other = theirs(name, newer)
        if stem == "patch":
            other = re.sub(r"^stages\.(\d)\.", r"stages.\1.blocks.", other).replace("mlp.3.", "mlp.2.")
        state[other] = x[..., None, None] if "_linear.weight" in other else x
    told = "stages.1.blocks.1." if stem == "patch" else "stages.1.1."
    some = {f"{told}mlp.0.weight", f"{told}attn.{'qkv_linear' if newer else 'qkv.qkv'}.weight", "norm.weight",
            "downsample_layers.0.0.weight", f"{told}attn.lepe.weight"}  # fmt: skip
    assert some <= state.keys()
    again = BiFormerForImageClassification(model.config).eval()
    load_published(again, state, official_names)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    del state["head.bias"]
    with pytest.raises(RegardError, match=r"1 missing \(head.bias\)"):
        load_published(again, state, official_names)


def test_a_layer_by_hand():
    model = made()
    x = torch.randn(2, 14, 14, 16)
    layer = model.stages[1][0]
    moved = x + F.conv2d(
        x.permute(0, 3, 1, 2), layer.pos_embed.weight, layer.pos_embed.bias, padding=1, groups=16
    ).permute(0, 2, 3, 1)
    norms = [(y.weight, y.bias, 1e-6) for y in (layer.norm1, layer.norm2)]
    seen = moved + layer.attn(F.layer_norm(moved, (16,), *norms[0]))
    inner = F.gelu(F.layer_norm(seen, (16,), *norms[1]) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias)
    expected = seen + inner @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    assert layer.mlp.fc1.weight.shape == (48, 16)


def test_stages_have_the_regions_heads_and_scales_of_the_paper():
    with torch.device("meta"):
        model = image_model("biformer-base")
    found = [stage[0].attn for stage in model.stages]
    assert [type(attention) for attention in found] == [BRA, BRA, BRA, LePEAttention]
    assert [attention.topk for attention in found[:3]] == [1, 4, 16]
    assert [attention.heads for attention in found] == [3, 6, 12, 8], "eight in the last stage, as officially"
    assert [attention.scale for attention in found] == [96**-0.5, 192**-0.5, 384**-0.5, (768 / 8) ** -0.5]
    assert found[3].qkv.bias is None and found[0].qkv.bias is not None
    assert [len(stage) for stage in model.stages] == [4, 4, 18, 4]
    assert [round(layer.drop_path.rate, 2) for layer in image_model("biformer-small").stages[3]][-1] == 0.15


def test_maps_of_four_strides_and_of_a_rectangle():
    model = made()
    with torch.no_grad():
        out = model(torch.randn(2, 3, 112, 224), labels=torch.tensor([1, 4]), output_hidden_states=True)
    shapes = [(2, 8, 28, 56), (2, 16, 14, 28), (2, 24, 7, 14), (2, 32, 4, 7)]
    assert [tuple(x.shape) for x in out.hidden_states] == shapes and out.loss > 0
    last = out.hidden_states[-1]
    norm = model.norm
    pooled = F.batch_norm(last, norm.running_mean, norm.running_var, norm.weight, norm.bias).mean((2, 3))
    expected = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 97), ({"stem": "patch"}, 112), ({"stem_stride": 2}, 49), ({"regions": [7, 4, 3, 1]}, 33)],
)
def test_the_smallest_image_is_taken_and_a_smaller_one_is_not(options, least):
    model = made(topks=[1, 4, 9, 0], **options)
    assert model.smallest_image == least
    with torch.no_grad():
        assert model(torch.randn(1, 3, least, least + 13)).logits.isfinite().all()
        with pytest.raises(ShapeMismatch, match=f"needs {least} x {least} at least"):
            model(torch.randn(1, 3, least, least - 1))
        with pytest.raises(RegardError, match="no more regions than positions"):
            model.features(torch.randn(1, 3, least, least - 1))


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (8, 2), (32, 2)])
def test_nano_takes_small_pictures(size, stride):
    model = image_model("biformer-nano", num_labels=10, num_channels=1, stem_stride=stride)
    out = model(torch.randn(2, 1, size, size), output_hidden_states=True)
    assert out.hidden_states[0].shape[2] == size // stride and out.logits.shape == (2, 10)


def test_padding_is_hidden_unless_told():
    model, images = made(), torch.randn(1, 3, 118, 131)
    seen = made(mask_padding=False)
    with torch.no_grad():
        assert (model(images).logits - seen(images).logits).abs().max() > 1e-5
        whole = torch.randn(1, 3, 224, 224)
        assert torch.equal(model(whole).logits, seen(whole).logits)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: BiFormerConfig(depths=[2, 2, 8]), "must name the same stages"),
        (lambda: BiFormerConfig(regions=[7, 7]), r"regions is \[7, 7\]; it must be one number or 4"),
        (lambda: BiFormerConfig(embed_dims=[60, 128, 256, 512]), "stage 0 is 60, which heads of 32 do not"),
        (lambda: BiFormerConfig(whole_heads=7), "stage 3 is 512, which 7 heads do not"),
        (lambda: BiFormerConfig(stem="conv"), "stem is 'conv'"),
        (lambda: BiFormerConfig(stem_stride=3), "stem_stride 3"),
        (lambda: BiFormerConfig(position=2), "position is 2"),
        (lambda: image_model("biformer-nano", topks=[17, 0]), "topk is 17; .* from 1 to 16"),
        (lambda: image_model("biformer-huge"), "no image model 'biformer-huge'"),
    ],
)
def test_wrong_options_are_refused(call, told):
    with pytest.raises(RegardError, match=told):
        call()
