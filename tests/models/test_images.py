"""What all image models share: the contract of their base, names, published weights, and what they cost."""

import copy
from functools import cache
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageClassification

from regard.errors import RegardError, ShapeMismatch
from regard.models.images import (
    DropPath,
    ImageConfig,
    ImageModel,
    cost,
    drop_rates,
    image_family,
    image_model,
    image_models,
    load_image_model,
    load_published,
    save_image_model,
)
from regard.models.images.registry import MODELS

NAMES = image_models()
PUBLISHED = {"nat-mini": 2.7, "nat-tiny": 4.3, "nat-small": 7.8, "dinat-tiny": 4.3, "dinat-base": 13.7}


@cache
def hollow(name, **options):
    with torch.device("meta"):
        return image_model(name, **options).eval()


def little(name):
    """Whether a model is quick enough here to be run with numbers."""
    return sum(p.numel() for p in hollow(name).parameters()) < 2e6


def size_of(model, free):
    """Height and width that a model is for; `free` where it takes any."""
    size = model.config.image_size or free
    return (size, size) if isinstance(size, int) else size


LITTLE = [name for name in NAMES if little(name)]


class TinyConfig(ImageConfig):
    model_type = "regard_test_tiny"
    presets: ClassVar = {"tiny-test": {"width": 4}}
    width: int = 8


class Tiny(ImageModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(config.num_channels, config.width, 4, stride=4)
        self.head = nn.Linear(config.width, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    @property
    def smallest_image(self):
        return 4

    def features(self, pixel_values):
        return (self.stem(pixel_values),)

    def classify(self, maps):
        return self.head(maps[-1].mean((2, 3)))


def tiny(**options):
    torch.manual_seed(0)
    return Tiny(TinyConfig(**{"num_labels": 5, **options})).eval()


def test_forward_gives_logits_loss_and_maps():
    model, images, labels = tiny(), torch.randn(3, 3, 8, 12), torch.tensor([0, 4, 2])
    out = model(images, labels=labels, output_hidden_states=True)
    assert out.logits.shape == (3, 5) and [tuple(x.shape) for x in out.hidden_states] == [(3, 8, 2, 3)]
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    assert model(images).loss is None and model(images).hidden_states is None
    loss, logits = model(images, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (
            lambda: tiny()(torch.randn(1, 1, 8, 8)),
            ShapeMismatch,
            r"be \[batch, 3, height, width\], .* \[1, 1, 8, 8\]",
        ),
        (lambda: tiny()(torch.randn(3, 8, 8)), ShapeMismatch, "pixel_values must be"),
        (
            lambda: tiny()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
            ShapeMismatch,
            "floating-point, and are uint8",
        ),
        (lambda: tiny()(torch.randn(1, 3, 8, 3)), ShapeMismatch, "8 x 3 pixels; Tiny needs 4 x 4 at least"),
        (
            lambda: tiny()(torch.randn(1, 3, 8, 8), torch.tensor([5])),
            RegardError,
            "5 to 5; .* classes 0 to 4",
        ),
        (lambda: tiny()(torch.randn(1, 3, 8, 8), torch.tensor([1, 2])), ShapeMismatch, r"int64 \[1\]"),
        (lambda: tiny()(torch.randn(1, 3, 8, 8), torch.tensor([1.0])), ShapeMismatch, r"float32 \[1\]"),
        (lambda: tiny(num_labels=0)(torch.randn(1, 3, 8, 8), torch.tensor([0])), RegardError, "no classes"),
        (lambda: image_model("nat-min"), RegardError, "no image model 'nat-min'; did you mean nat-mini"),
        (lambda: image_model("resnet"), RegardError, "no image model 'resnet'; "),
        (
            lambda: image_model("nat-mini", num_label=3),
            RegardError,
            "no 'num_label'; did you mean 'num_labels'",
        ),
        (
            lambda: image_model("nat-mini", colour=3),
            RegardError,
            "no 'colour'; its options are num_labels, .*depths",
        ),
        (lambda: image_family("nat-mini")(Tiny), RegardError, "'nat-mini' is registered already, as NATFor"),
        (lambda: image_family("tiny-test")(Tiny), RegardError, "begins with no family"),
        (lambda: TinyConfig.preset("large"), RegardError, "no preset 'large'; they are tiny-test"),
        (lambda: cost(tiny(), 0), RegardError, "image_size is 0"),
        (lambda: cost(tiny(), 2), ShapeMismatch, "needs 4 x 4"),
        (lambda: DropPath(1.0), RegardError, "must be from 0 to below 1"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def test_a_refused_family_leaves_nothing():
    before = dict(MODELS)
    with pytest.raises(RegardError):
        image_family("nat-new", "nat-mini")(Tiny)
    assert before == MODELS


def test_drop_path_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    branch, x = DropPath(0.25), torch.ones(4000, 2, 3)
    out = branch(x)
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(float(out.mean()) - 1) < 0.05 and bool((out.flatten(1).std(1) == 0).all())
    assert torch.equal(branch.eval()(x), x)
    assert drop_rates(0.2, [2, 0, 1]) == [[0.0, 0.1], [], [0.2]] and drop_rates(0.2, [1]) == [[0.0]]


class TestPublished:
    def test_a_file_or_a_mapping_is_loaded(self, tmp_path):
        source, model, other = tiny(), tiny(), tiny()
        nn.init.ones_(source.stem.weight)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        load_published(model, tmp_path / "w.safetensors")
        load_published(
            other,
            {f"net.{k}": v for k, v in source.state_dict().items()},
            lambda f: {k[4:]: v for k, v in f.items()},
        )
        for loaded in (model, other):
            assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())

    def test_what_does_not_fit_is_named_and_nothing_is_loaded(self):
        model = tiny()
        before = copy.deepcopy(model.state_dict())
        wrong = {
            **{k: v + 1 for k, v in before.items()},
            "head.weight": torch.zeros(9, 8),
            "neck": torch.zeros(1),
        }
        del wrong["stem.bias"]
        with pytest.raises(RegardError) as told:
            load_published(model, wrong)
        for part in (
            "1 missing (stem.bias)",
            "1 unexpected (neck)",
            "head.weight is [9, 8] there and [5, 8] here",
        ):
            assert part in str(told.value)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())

    def test_a_head_of_other_classes_can_stay_fresh(self):
        model, source = tiny(), tiny(num_labels=9)
        nn.init.ones_(source.stem.weight)
        head = model.head.weight.clone()
        load_published(model, source.state_dict(), fresh=["head."])
        assert bool((model.stem.weight == 1).all()) and torch.equal(model.head.weight, head)

    def test_other_files_are_refused(self, tmp_path):
        torch.save(tiny().state_dict(), tmp_path / "w.pth")
        (tmp_path / "bad.safetensors").write_bytes(b"no weights")
        with pytest.raises(RegardError, match="is no .safetensors file, and other kinds may run code"):
            load_published(tiny(), tmp_path / "w.pth")
        with pytest.raises(RegardError, match="bad.safetensors cannot be read"):
            load_published(tiny(), tmp_path / "bad.safetensors")
        with pytest.raises(RegardError, match="there is no file"):
            load_published(tiny(), tmp_path / "none.safetensors")
        with pytest.raises(RegardError, match="a mapping of names to tensors"):
            load_published(tiny(), {"stem": 3})


class TestSaved:
    def test_a_model_comes_back_with_classes_and_normalisation(self, tmp_path):
        torch.manual_seed(0)
        model = image_model(
            "nat-nano", num_labels=2, num_channels=1, image_mean=[0.5], image_std=[0.25]
        ).eval()
        model.config.id2label = {0: "cat", 1: "dog"}
        save_image_model(model, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        again, images = load_image_model(tmp_path), torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
        assert again.config.id2label == {0: "cat", 1: "dog"} and not again.training
        x = again.prepared(images)
        torch.testing.assert_close(x, (images / 255 - 0.5) / 0.25)
        with torch.no_grad():
            torch.testing.assert_close(again(x).logits, model(x).logits, rtol=0, atol=1e-6)

    def test_what_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(RegardError, match="there is no config.json in"):
            load_image_model(tmp_path)
        save_image_model(image_model("nat-nano"), tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(RegardError, match="holds no image model that can be loaded"):
            load_image_model(tmp_path)
        with pytest.raises(RegardError, match="no image_mean and image_std"):
            image_model("nat-nano").prepared(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        with pytest.raises(RegardError, match="cannot be written to"):
            save_image_model(image_model("nat-nano"), tmp_path / "nowhere")


class TestCost:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_it_agrees_with_the_papers(self, name):
        found = cost(hollow(name, num_labels=1000))
        assert round(found.multiply_adds / 1e9, 1) == PUBLISHED[name]

    def test_convolutions_products_and_attention_by_hand(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.line = nn.Conv2d(2, 6, 3, padding=1, groups=2), nn.Linear(6, 5)

            def forward(self, x):
                rows = self.conv(x).flatten(2).mT
                return self.line(nn.functional.scaled_dot_product_attention(rows, rows, rows))

        found = cost(Net(), (4, 5), channels=2)
        attention, rows = 2 * 20 * 20 * 6, 20
        assert found.multiply_adds == rows * 6 * 9 + attention + rows * 6 * 5
        assert found.parameters == 6 * 9 + 6 + 35 and found.image_size == (4, 5)

    def test_a_module_may_say_itself_what_it_costs(self):
        class Says(nn.Module):
            def __init__(self):
                super().__init__()
                self.line = nn.Linear(4, 4)

            def multiply_adds(self, x):
                return 7

            def forward(self, x):
                return self.line(x) if x.sum() > 0 else x

            def reference(self, x):
                return self.line(x)

        inner = Says()
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(4, 4), inner, nn.Linear(4, 4))
        assert cost(model, 2).multiply_adds == 4 * 3 * 4 + 4 * 16 + 7 + 4 * 16
        assert (
            "forward" not in vars(inner)
            and not inner._forward_hooks
            and inner.line.weight.device.type == "cpu"
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_built_without_memory(name):
    parameters = list(hollow(name).parameters())
    assert sum(p.numel() for p in parameters) > 1e4 and all(p.is_meta for p in parameters)


@pytest.mark.parametrize("name", LITTLE)
def test_every_small_model_is_counted(name):
    found = cost(hollow(name))
    assert found.multiply_adds > 1e5 and found.parameters == sum(p.numel() for p in hollow(name).parameters())


@pytest.mark.parametrize("name", LITTLE)
def test_every_small_model_learns_is_saved_and_comes_back(name, tmp_path):
    torch.manual_seed(0)
    model = image_model(name, num_labels=4, num_channels=1)
    images, labels = torch.randn(8, 1, *size_of(model, (32, 32))), torch.arange(8) % 4
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(12):
        loss = model(images, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LITTLE)
def test_every_small_model_gives_maps_and_pooled_features(name):
    model = image_model(name, num_labels=0).eval()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size_of(model, (40, 48))), output_hidden_states=True)
    assert out.hidden_states and all(x.ndim == 4 and len(x) == 2 for x in out.hidden_states)
    sizes = [x.shape[2] * x.shape[3] for x in out.hidden_states]
    assert sizes == sorted(sizes, reverse=True)
    assert out.logits.shape == (2, out.hidden_states[-1].shape[1])
