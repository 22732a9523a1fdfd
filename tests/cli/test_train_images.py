"""`regard train --images`: what it prints and writes, that it goes on, and what it refuses."""

import json

import pytest
import torch
from PIL import Image

SMALL = ("--model", "nat-nano", "--steps", "4", "--every", "2", "--batch", "8")


@pytest.fixture
def shapes(tmp_path):
    """A folder of two classes, dark and bright, 16 x 16 grey, JPEG and PNG."""
    for word, level in (("bright", 220), ("dark", 30)):
        (tmp_path / "shapes" / word).mkdir(parents=True)
        for number in range(10):
            picture = Image.new("L", (16, 16), level + number)
            picture.save(tmp_path / "shapes" / word / f"{number}.{'png' if number % 2 else 'jpg'}")
    return tmp_path / "shapes"


def test_it_trains_on_a_folder_writes_everything_and_goes_on(regard, tmp_path, monkeypatch, shapes):
    monkeypatch.chdir(tmp_path)
    code, out, err = regard("train", "--images", "shapes", *SMALL, "--rate", "0.01")
    assert (code, err) == (0, "")
    assert "shapes: 2 classes, 16 images to train on, 4 held out, 16 x 16 grey" in out
    assert "nat-nano: 108 k parameters" in out and "multiply-adds at 16 x 16" in out and "step      4" in out
    folder = tmp_path / "regard-train" / "nat-nano-shapes"
    names = ["checkpoint.safetensors", "config.json", "confusion.png", "log.json", "model.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    told = json.loads((folder / "log.json").read_text())
    assert len(told["losses"]) == 4 and [row["step"] for row in told["held_out"]] == [0, 2, 4]
    assert sum(map(sum, told["confusion"])) == told["held_out_images"] == 4
    assert told["classes"] == ["bright", "dark"] and told["parameters"] == 108_014
    assert regard("train", "--images", "shapes", *SMALL, "--rate", "0.01")[:2] == (code, out)
    anew = regard("train", "--images", "shapes", *SMALL, "--rate", "0.02", "--no-resume")
    assert anew[0] == 0 and anew[1] != out


def test_what_it_wrote_classifies_as_it_said(regard, tmp_path, shapes):
    from regard.models.images import load_image_model
    from regard.tasks.image_folder import image_folder

    regard("train", "--images", shapes, *SMALL, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "log.json").read_text())
    model, data = load_image_model(tmp_path / "out"), image_folder(shapes)
    with torch.no_grad():
        found = model(model.prepared(data.held_out)).logits.argmax(1)
    right = float((found == data.held_out_labels).double().mean())
    assert right == told["accuracy"] and model.config.id2label == {0: "bright", 1: "dark"}


def test_textures_json_and_options(regard, tmp_path):
    words = ("--images", "textures", "--image-size", "8", "--channels", "1", "--flip", "--shift", "2")
    more = ("--accumulate", "2", "--precision", "bf16", "--smoothing", "0", "--device", "cpu")
    code, out, err = regard("train", *words, *more, *SMALL, "--out", tmp_path / "out", "--json", "-")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["channels"] == 1 and told["image_size"] == [8, 8] and len(told["classes"]) == 8
    recipe = told["recipe"]
    assert recipe["flip"] and recipe["shift"] == 2 and recipe["smoothing"] == 0 and recipe["accumulate"] == 2
    assert json.loads((tmp_path / "out" / "log.json").read_text()) == told


def test_without_matplotlib_there_is_no_picture_and_it_says_so(regard, tmp_path, monkeypatch, shapes):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    code, out, _ = regard("train", "--images", shapes, *SMALL, "--out", tmp_path / "out")
    assert code == 0 and "no confusion.png: matplotlib is missing" in out
    assert not (tmp_path / "out" / "confusion.png").exists()


@pytest.mark.parametrize("name", ["vit-nano", "mixer-digits"])
def test_a_model_of_one_size_is_built_for_the_images(regard, tmp_path, shapes, name):
    words = ("train", "--images", shapes, "--model", name, "--steps", "1", "--out", tmp_path / "out")
    assert json.loads(regard(*words, "--json", "-")[1])["image_size"] == [16, 16]
    again = json.loads(regard(*words, "--image-size", "8", "--no-resume", "--json", "-")[1])
    assert again["image_size"] == [8, 8]


def test_what_has_no_size_is_as_large_as_the_model_is_for(regard, tmp_path):
    words = ("train", "--images", "digits", "--steps", "1", "--batch", "2", "--out", tmp_path, "--json", "-")
    assert json.loads(regard(*words, "--model", "mixer-digits")[1])["image_size"] == [8, 8]


def test_a_share_of_textures_is_held_out(regard, tmp_path):
    words = ("--images", "textures", "--image-size", "8", "--held-out", "0.01", *SMALL, "--out", tmp_path)
    told = json.loads(regard("train", *words, "--json", "-")[1])
    assert told["held_out_images"] == 2 * 8 and told["train"] == 198 * 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--images needs --model NAME"),
        (("--model", "nat-nona"), "no image model 'nat-nona'; did you mean nat-nano"),
        (("--model", "nat-nano", "--images", "nowhere"), "there is no folder nowhere"),
        (("--model", "nat-nano", "--images", "one"), "one holds one class, only; there must be two"),
        (("--model", "nat-nano", "--images", "mixed"), "mixed size: mixed/a/0.png is 4 x 4 pixels and "),
        (("--model", "nat-nano", "--images", "broken"), "broken/b/1.png cannot be read as an image"),
        (("--model", "nat-nano", "--epochs", "0"), "epochs is 0"),
        (("--model", "nat-nano", "--epochs", "1", "--steps", "1"), "both epochs and steps"),
        (("--model", "nat-nano", "--batch", "0"), "batch is 0"),
        (("--model", "nat-nano", "--every", "0"), "every is 0"),
        (("--model", "nat-nano", "--image-size", "0"), "image size is 0"),
        (("--model", "nat-nano", "--held-out", "2"), "held_out is 2.0"),
        (("--model", "nat-nano", "--channels", "3"), "the digits are grey"),
        (("--model", "nat-nano", "--device", "abacus"), "abacus"),
        (("--model", "vit-nano", "--image-size", "30"), "which patches of 4 do not divide"),
        (("--model", "nat-nano", "--vocabulary", "300"), "--vocabulary is an option of a language model"),
        (("--model", "nat-nano", "--head-norm"), "--head-norm is an option of a language model"),
        (("--model", "nat-nano", "--json", "no/where.json"), "there is no folder no"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(refusal, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one" / "only").mkdir(parents=True)
    for folder, sizes in (("mixed", (4, 5)), ("broken", (4, 4))):
        for word, size in zip("ab", sizes, strict=True):
            (tmp_path / folder / word).mkdir(parents=True)
            for number in range(2):
                Image.new("L", (size, size)).save(tmp_path / folder / word / f"{number}.png")
    (tmp_path / "broken" / "b" / "1.png").write_bytes(b"\x89PNG")
    before = sorted(tmp_path.rglob("*"))
    images = () if "--images" in words else ("--images", "digits")
    assert sentence in refusal("train", *images, *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_images_are_refused_for_a_language_model(refusal):
    assert "--epochs is an option of an image classifier" in refusal("train", "--epochs", "3")
    assert "--model is an option of an image classifier" in refusal("train", "--model", "nat-nano")
