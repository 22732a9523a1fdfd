"""MobileNet-V1 and -V2: published counts and names, with subspace attention, and its insertion anywhere."""

import pytest
import torch
from torch import nn

from regard.attention import ULSAM
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.models.images import cost, image_model, load_published
from regard.models.mobilenet import (
    MobileNetV1Config,
    MobileNetV2Config,
    insert_ulsam,
    official_names,
)

PUBLISHED = {
    "mobilenet-v1": (4_231_976, 568_740_352),
    "mobilenet-v2": (3_504_872, 300_774_272),
}
REDUCED = {
    "mobilenet-v1-ulsam": (517e6, 0.26e6), "mobilenet-v2-ulsam": (261.88e6, 0.44e6),
    "mobilenet-v2-ulsam-least": (223.77e6, 0.86e6),
}  # fmt: skip


def hollow(name, **options):
    with torch.device("meta"):
        return image_model(name, num_labels=1000, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_are_the_published(name):
    found = cost(hollow(name))
    assert (found.parameters, found.multiply_adds) == PUBLISHED[name]


@pytest.mark.parametrize("name", REDUCED)
def test_with_subspace_attention_they_are_the_papers(name):
    """The operations of the paper's tables to 1 M; what it takes off 3.4 M or 4.2 M parameters, to 0.03 M."""
    plain, found = (cost(hollow(n)) for n in (name.split("-ulsam")[0], name))
    operations, fewer = REDUCED[name]
    assert abs(found.multiply_adds - operations) < 1e6
    assert abs(plain.parameters - found.parameters - fewer) < 0.03e6


def test_wider_models_are_rounded_as_published():
    for width, parameters in ((0.5, 1_968_680), (1.4, 6_108_776)):
        assert cost(hollow("mobilenet-v2", width=width)).parameters == parameters
    assert cost(hollow("mobilenet-v1", width=0.5)).parameters == 1_331_592


def test_parameters_have_torchvisions_names():
    found = {name: tuple(x.shape) for name, x in hollow("mobilenet-v2").state_dict().items()}
    theirs = {
        "features.0.0.weight": (32, 3, 3, 3), "features.0.1.running_mean": (32,),
        "features.1.conv.0.0.weight": (32, 1, 3, 3), "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.1.conv.2.bias": (16,), "features.2.conv.0.0.weight": (96, 16, 1, 1),
        "features.2.conv.1.1.weight": (96,), "features.2.conv.2.weight": (24, 96, 1, 1),
        "features.17.conv.3.running_var": (320,), "features.18.0.weight": (1280, 320, 1, 1),
        "classifier.1.weight": (1000, 1280),
    }  # fmt: skip
    assert official_names(theirs).items() <= found.items()
    assert hollow("mobilenet-v1").state_dict()["model.13.3.weight"].shape == (1024, 1024, 1, 1)


def test_an_inverted_residual_is_as_written():
    torch.manual_seed(0)
    model = image_model("mobilenet-v2-small", num_labels=4).eval().double()
    layer, x = model.layers[4], torch.randn(2, 24, 7, 6, dtype=torch.float64)

    def normed(x, norm):
        return norm.weight.view(-1, 1, 1) * x / (1 + norm.eps) ** 0.5 + norm.bias.view(-1, 1, 1)

    (wide, first, _), (deep, second, _), narrow, third = layer.conv
    y = normed(torch.einsum("oi,bihw->bohw", wide.weight[:, :, 0, 0], x), first).clamp(0, 6)
    y = normed(nn.functional.conv2d(y, deep.weight, stride=2, padding=1, groups=96), second).clamp(0, 6)
    y = normed(torch.einsum("oi,bihw->bohw", narrow.weight[:, :, 0, 0], y), third)
    torch.testing.assert_close(layer(x), y)
    again, z = model.layers[5], torch.randn(2, 40, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(again(z), z + again.conv(z))


def test_weights_go_where_attention_replaced_nothing():
    plain, images = image_model("mobilenet-v2-small", num_labels=4).eval(), torch.randn(2, 3, 32, 32)
    theirs = {name.replace("layers.", "features."): x for name, x in plain.state_dict().items()}
    again = image_model("mobilenet-v2-small", num_labels=4).eval()
    load_published(again, theirs, official_names)
    assert torch.equal(again(images).logits, plain(images).logits)
    other = image_model("mobilenet-v2-small-ulsam", num_labels=4)
    with pytest.raises(RegardError, match="missing .layers.5.conv_dws.weight"):
        load_published(other, theirs, official_names)
    kept = {k: x for k, x in theirs.items() if not k.startswith(("features.5.", "features.8."))}
    load_published(other, kept, official_names, fresh=["layers.5.", "layers.8."])
    torch.testing.assert_close(other.layers[4].conv[0][0].weight, plain.layers[4].conv[0][0].weight)


def test_attention_stands_where_the_config_says():
    model = image_model("mobilenet-v2-small", ulsam_replace=[5], ulsam_after=[8], ulsam_groups=8)
    assert isinstance(model.layers[5], ULSAM) and model.layers[5].groups == 8
    assert isinstance(model.layers[8][1], ULSAM) and model.layers[8][1].channels == 64
    assert [x.shape[1] for x in model.eval().features(torch.randn(1, 3, 32, 32))] == [40, 128]


class Own(nn.Module):
    """A network of nobody's family, in the manner of torchvision."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
            nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1),
        )  # fmt: skip
        self.classifier = nn.Linear(24, 5)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def test_it_is_inserted_in_any_network():
    model, images = Own().eval(), torch.randn(2, 3, 20, 20)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = insert_ulsam(model, after=["features.3"], replace=["features.1"], groups=8, image_size=20)
    assert found.places == {"features.3.1": 24, "features.1": 16}
    assert found.before == cost(model, 20) and found.after == cost(found.model, 20)
    assert found.before.parameters - found.after.parameters == 16 * 16 * 9 + 16 - (5 * 40 + 3 * 16)
    assert isinstance(found.model.features[1], ULSAM) and not found.model.features[1].training
    assert model.state_dict().keys() == before.keys() and not isinstance(model.features[1], ULSAM)
    x = found.model.features[0](images)
    x = found.model.features[3][0](model.features[2](found.model.features[1](x)))
    expected = model.classifier(found.model.features[3][1](x).mean((2, 3)))
    torch.testing.assert_close(found.model(images), expected)
    assert "%" in str(found)
    assert insert_ulsam(Own().double(), after=["features.2"]).model.features[2][1].conv_dws.weight.dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: insert_ulsam(Own()), RegardError, "each once"),
        (lambda: insert_ulsam(Own(), after="features"), RegardError, "must list names"),
        (lambda: insert_ulsam(Own(), after=["features.9"]), NoSuchSite, "no module 'features.9'; it has"),
        (
            lambda: insert_ulsam(Own(), replace=["features.3"], image_size=16),
            ShapeMismatch,
            r"features.3 takes \[1, 16, 8, 8\] and gives \[1, 24, 8, 8\]",
        ),
        (lambda: insert_ulsam(Own(), after=["classifier"]), ShapeMismatch, r"gives \[1, 5\]"),
        (
            lambda: insert_ulsam(Own(), after=["features"], replace=["features.2"]),
            RegardError,
            "features.2 is inside features",
        ),
        (
            lambda: insert_ulsam(Own(), after=["features.2"], groups=5),
            RegardError,
            "5 groups do not",
        ),
        (lambda: MobileNetV2Config(width=0), RegardError, "width is 0"),
        (lambda: MobileNetV1Config(dropout=1.0), RegardError, "dropout is 1.0"),
        (lambda: MobileNetV1Config(ulsam_replace=[3], ulsam_after=[3]), RegardError, "layer 3 is in"),
        (
            lambda: image_model("mobilenet-v2-small", ulsam_replace=[4]),
            RegardError,
            "layer 4, which changes channels or size; those that keep them are 1, 3, 5, 6, 8.",
        ),
        (lambda: image_model("mobilenet-v1-small", ulsam_after=[70]), RegardError, "layers are 0 to 6"),
        (
            lambda: image_model("mobilenet-v1-small")(torch.zeros(1, 3, 7, 7)),
            ShapeMismatch,
            "7 x 7 pixels.*needs 8 x 8",
        ),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()
