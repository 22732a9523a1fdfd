"""Training an image classifier: it learns, goes on where it was killed, and refuses what will not do."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import lru_cache

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from regard.errors import RegardError, ShapeMismatch
from regard.models.images import image_model
from regard.objectives import Confusion, ImageRecipe, confusion, train_images
from regard.objectives.checkpoint import FILE
from regard.objectives.images import _Batches, per_epoch
from regard.tasks.images import Images, normalized
from regard.tasks.textures import textures

SMALL = {"batch": 8, "checkpoint_every": 1, "evaluate_every": 4}


@lru_cache(maxsize=1)
def data():
    """Three textures of 8 x 8 pixels, 24 images to train on."""
    return textures(8, kinds=("dots", "stripes", "grain"), train=8, held_out=4)


class Net(nn.Module):
    """A small network with what must be kept: running statistics, dropout."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.line = nn.Linear(8, classes)

    def forward(self, x):
        mixed = nn.functional.dropout(self.norm(self.conv(x)).relu(), 0.2, self.training)
        return self.line(mixed.mean((2, 3)))


def model():
    torch.manual_seed(0)
    return Net()


def coloured(shuffled=False):
    """Red and blue images, which can be told apart; or with labels in no order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randint(0, 60, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), 2 * labels] += 150
    if shuffled:
        labels = labels[torch.randperm(60, generator=generator)]
    return Images("colours", ("red", "blue"), images[:40], labels[:40], images[40:], labels[40:])


def test_it_learns_what_can_be_learned_and_no_more():
    found = {}
    for shuffled in (False, True):
        torch.manual_seed(0)
        made = Net(2)
        log = train_images(made, coloured(shuffled), epochs=12, batch=8, rate=1e-2)
        found[shuffled] = log.measures[-1][1]["accuracy"]
        assert len(log.losses) == 60 and [step for step, _ in log.held_out] == [*range(0, 61, 5)]
        assert confusion(made, coloured(shuffled)).accuracy == found[shuffled]
    assert found[False] == 1.0 and found[True] < 0.9


def test_the_same_seed_gives_the_same_losses_whatever_was_drawn_before():
    first = train_images(model(), data(), steps=4, **SMALL).losses
    torch.rand(7)
    assert train_images(model(), data(), steps=4, **SMALL).losses == first
    assert train_images(model(), data(), steps=4, seed=1, **SMALL).losses != first


def test_an_epoch_sees_every_image_once():
    recipe = ImageRecipe(batch=7, shift=0)
    batches = _Batches(data(), recipe)
    assert per_epoch(data(), 7) == 3 and per_epoch(data(), 1000) == 1
    for epoch in range(2):
        seen = torch.cat([batches.at(3 * epoch + i)[0] for i in range(3)]).flatten(1)
        assert len(seen) == 21 == len(seen.unique(dim=0))
    assert not torch.equal(batches.at(0)[0], batches.at(3)[0])
    moved = _Batches(data(), ImageRecipe(batch=7, shift=2)).at(0)
    assert torch.equal(moved[1], batches.at(0)[1]) and not torch.equal(moved[0], batches.at(0)[0])


def test_the_first_loss_is_smoothed_cross_entropy_of_normalised_images():
    made = model()
    made.forward = lambda x: made.line(made.conv(x).mean((2, 3)))
    recipe = ImageRecipe(batch=8, smoothing=0.3, steps=1)
    images, labels = _Batches(data(), recipe).at(0)
    log_p = made(normalized(images, *data().statistics())).log_softmax(1)
    expected = -(0.7 * log_p.gather(1, labels[:, None])[:, 0] + 0.3 * log_p.mean(1)).mean()
    found = train_images(made, data(), recipe=recipe).losses[0]
    assert found == pytest.approx(float(expected.detach()), abs=1e-6)


def test_pieces_of_a_batch_add_up_to_it():
    def plain():
        made = model()
        made.forward = lambda x: made.line(made.conv(x).relu().mean((2, 3)))
        return made

    whole, pieces = plain(), plain()
    one = train_images(whole, data(), steps=3, **SMALL).losses
    other = train_images(pieces, data(), steps=3, accumulate=3, **SMALL).losses
    assert other == pytest.approx(one, abs=1e-6)
    torch.testing.assert_close(whole.conv.weight, pieces.conv.weight, rtol=0, atol=1e-4)


def test_bfloat16_computes_differently_and_keeps_float32_weights():
    made = model()
    plain = train_images(model(), data(), steps=2, **SMALL).losses
    found = train_images(made, data(), steps=2, precision="bf16", **SMALL).losses
    assert found != plain and found == pytest.approx(plain, abs=0.05)
    assert made.conv.weight.dtype == torch.float32


def test_an_accelerator_outside_is_left_alone():
    outside = Accelerator(gradient_accumulation_steps=5, cpu=True)
    train_images(model(), data(), steps=1, precision="bf16", **SMALL)
    assert outside.gradient_accumulation_steps == 5 and outside.mixed_precision == "no"
    assert outside.device.type == "cpu" and "ACCELERATE_TORCH_DEVICE" not in os.environ


RUN = """
import sys
from regard.objectives import train_images
from tests.objectives.test_images import SMALL, data, model
train_images(model(), data(), steps=150, out=sys.argv[1], flip=True, **SMALL)
"""


def test_a_run_killed_at_any_moment_goes_on_with_the_losses_of_one_that_was_not(tmp_path):
    """Killed from outside, twice, while it trains and writes a file every step."""
    moments, file, done = random.Random(0), tmp_path / FILE, 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)])
        before, deadline = file.stat().st_mtime_ns if file.exists() else 0, time.monotonic() + 90
        while (not file.exists() or file.stat().st_mtime_ns == before) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        steps = []
        with pytest.raises(KeyboardInterrupt):
            train_images(model(), data(), steps=150, out=tmp_path, flip=True, tick=stopping(steps), **SMALL)
        assert round(steps[0] * 150) > done
        done = round(steps[0] * 150)
        assert [p.name for p in tmp_path.iterdir()] == [FILE]
    again, whole = model(), model()
    found = train_images(again, data(), steps=150, out=tmp_path, flip=True, **SMALL)
    expected = train_images(whole, data(), steps=150, flip=True, **SMALL)
    assert found.losses == expected.losses and found.held_out == expected.held_out
    assert found.measures == expected.measures
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def stopping(steps):
    """A tick that is told of the first step done, and stops there."""

    def tick(share):
        steps.append(share)
        raise KeyboardInterrupt

    return tick


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / f".{FILE}.abc").write_bytes(b"half")
    train_images(model(), data(), steps=1, out=tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flip": True}, "recipe.flip was False there and is True"),
        ({"steps": 3}, "recipe.steps was 2 there and is 3"),
        ({"about": {"model": "b"}}, "about.model was None there and is 'b'"),
    ],
)
def test_another_training_is_refused(tmp_path, change, words):
    train_images(model(), data(), steps=2, out=tmp_path, **SMALL)
    with pytest.raises(RegardError, match=words):
        train_images(model(), data(), **{"steps": 2, "out": tmp_path, **SMALL, **change})


def test_the_config_says_how_images_are_prepared_and_what_classes_are():
    torch.manual_seed(0)
    made = image_model("nat-nano", num_labels=3)
    train_images(made, data(), steps=1, **SMALL)
    mean, std = data().statistics()
    assert made.config.image_mean == list(mean) and made.config.image_std == list(std)
    assert made.config.id2label == {0: "dots", 1: "stripes", 2: "grain"} and made.config.image_size == [8, 8]
    torch.testing.assert_close(made.prepared(data().train), normalized(data().train, mean, std))
    other = image_model("nat-nano", num_labels=3, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    train_images(other, data(), steps=1, **SMALL)
    assert other.config.image_mean == [0.0] * 3, "a model keeps the normalisation it was trained with"


class TestConfusion:
    def test_it_counts_what_was_taken_for_what(self):
        made = Net()
        made.forward = lambda x: torch.eye(3)[[0, 0, 1, 1]].repeat(3, 1) * 9
        found = confusion(made, data())
        assert found.matrix.tolist() == [[2, 2, 0]] * 3 and found.accuracy == pytest.approx(4 / 12)
        assert found.worst(2) == [("dots", "stripes", 2), ("stripes", "dots", 2)]
        assert found.loss == pytest.approx(
            float(nn.functional.cross_entropy(made(None), data().held_out_labels)), abs=1e-6
        )

    @pytest.mark.parametrize("count", [2, 30, 70])
    def test_a_picture_for_few_and_many_classes(self, tmp_path, count):
        from PIL import Image

        names = tuple(f"class number {i}" for i in range(count))
        Confusion(names, torch.eye(count).long() * 3, 0.1).save(tmp_path / "c.png", "a title")
        with Image.open(tmp_path / "c.png") as picture:
            assert picture.width > 300 and len(picture.convert("L").getcolors()) > 10

    def test_without_matplotlib_it_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(RegardError, match="matplotlib, which is missing"):
            Confusion(("a", "b"), torch.eye(2).long(), 0.0).save(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train_images(model(), [1]), "data must be Images"),
        (lambda: train_images(model(), data(), epochs=1, steps=1), "both epochs and steps"),
        (lambda: train_images(model(), data(), epochs=0), "epochs is 0"),
        (lambda: train_images(model(), data(), steps=0), "steps is 0"),
        (lambda: train_images(model(), data(), speed=1), "takes no 'speed'"),
        (lambda: train_images(model(), data(), smoothing=1.0), "smoothing is 1.0"),
        (lambda: train_images(model(), data(), precision="fp8"), "precision is 'fp8'"),
        (lambda: train_images(model(), data(), batch=4, accumulate=5), "accumulate is 5, and a batch has 4"),
        (lambda: train_images(model(), data(), batch=4, accumulate=4), "batch norms of Net need two"),
        (lambda: train_images(model(), data(), shift=-1), "shift is -1"),
        (lambda: train_images(model(), data(), steps=1, evaluate_every=0), "evaluate_every is 0"),
        (lambda: train_images(Net(4), data(), steps=1), "gives 4 logits, and there are 3 classes"),
        (lambda: train_images(nn.Flatten(0), data(), steps=1), "no parameter to train"),
        (lambda: train_images(nn.Conv2d(3, 3, 1), data(), steps=1), r"must return logits \[batch, classes\]"),
        (lambda: train_images(image_model("nat-nano", num_labels=4), data()), "has 4 classes"),
        (lambda: train_images(image_model("nat-nano", num_channels=1), data()), "takes 1 channels"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(RegardError, match=words):
        call()


def test_images_too_small_for_the_model_are_refused(tmp_path):
    made = model()
    made.smallest_image = 16
    with pytest.raises(ShapeMismatch, match="images of textures are 8 x 8 pixels; Net needs 16 x 16"):
        train_images(made, data(), steps=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = model()
    nn.init.constant_(broken.line.weight, math.inf)
    with pytest.raises(RegardError, match=r"the loss of step 0 is (nan|inf)"):
        train_images(broken, data(), steps=2, out=tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []
