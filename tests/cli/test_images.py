"""`regard inspect --image`: image models of regard and of transformers, as Python measures them; refusals."""

import base64
import csv
import io
import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import regard as library
from regard.cli import main
from regard.lens import Entropy, ImageMaps
from regard.models.images import image_model
from regard.models.neighborhood import NATConfig, NATForImageClassification
from regard.weights import Source
from tests.support import folders
from tests.support.folders import TEXT


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Models that read images, one that reads words, and two images."""
    root = tmp_path_factory.mktemp("kept")
    torch.manual_seed(0)
    config = NATConfig(
        embed_dim=8, depths=[1, 2], num_heads=[2, 4], kernel_size=3, num_labels=3, num_channels=1
    )
    NATForImageClassification(config).save_pretrained(root / "nat")
    image_model("van-small", num_labels=3).save_pretrained(root / "van")
    for make in (folders.vit, folders.llama, folders.bert):
        make(root / make.__name__)
    for path in (root / "vit").glob("*token*"):
        path.unlink()
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(root / "a.png")
    Image.fromarray(255 - values).save(root / "b.png")
    (root / "text.png").write_text("no image")
    return root


def inspected(capsys, *words):
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def in_python(model, *pixels):
    with torch.no_grad(), library.watch(model, ImageMaps(images=4)) as seen:
        model(pixel_values=torch.cat(pixels))
    return seen[ImageMaps]


def test_numbers_are_those_of_python(kept, capsys, tmp_path):
    page, table = tmp_path / "page.html", tmp_path / "x.csv"
    words = [kept / "nat", "--image", kept / "a.png", "--image-size", 32]
    out = inspected(capsys, *words, "--report", page, "--csv", table)
    grey = torch.from_numpy(np.array(Image.open(kept / "a.png").convert("L"))).float()[None, None] / 255
    resized = torch.nn.functional.interpolate(
        grey, (32, 48), mode="bilinear", align_corners=False, antialias=True
    )
    model = NATForImageClassification.from_pretrained(kept / "nat").eval()
    found = in_python(model, (resized[..., 8:40] - 0.5) / 0.5)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(found.heads)
    for row in rows:
        known = found.heads.at(row["site"], int(row["head"]))
        for column, value in known.items():
            told = row[f"image-maps.{column}"]
            assert float(told) == pytest.approx(value, rel=1e-4) if told else np.isnan(value)
    for finding in ImageMaps.findings(found):
        assert finding.text in out
    far = re.search(r"^distance: .*\n.*\n +0 +([\d.]+) +([\d.]+)", out, re.MULTILINE)
    distances = [found.heads.at("image.0", head)["distance"] for head in range(2)]
    assert [float(x) for x in far.groups()] == pytest.approx(distances, rel=0.01)
    assert f"Open {page} in a browser" in out and "3 layers with maps, 10 heads" in out
    assert "32 x 32 pixels, mean 0.5 and deviation 0.5 (its folder says nothing of it)" in out
    assert page.stat().st_size < 1_000_000


def test_images_are_prepared_as_the_folder_says(kept, capsys, tmp_path):
    folder = shutil.copytree(kept / "vit", tmp_path / "vit")
    side = json.loads((folder / "config.json").read_text())["image_size"]
    told = {
        "size": {"height": side, "width": side}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    page = tmp_path / "page.html"
    words = [
        folder,
        "--image",
        kept / "a.png",
        "--image",
        kept / "b.png",
        "--lens",
        "entropy",
        "--report",
        page,
    ]
    document = json.loads(inspected(capsys, *words, "--json", "-"))
    assert document["images"]["height"] == side and document["images"]["std"] == [0.4, 0.5, 0.6]
    images = [_middle(kept / name, side) for name in ("a.png", "b.png")]
    mean, std = (torch.tensor(told[name])[:, None, None] for name in ("image_mean", "image_std"))
    model = Source.find(folder).read()
    found = in_python(model, *((image - mean) / std for image in images))
    rows = document["on_images"]["image-maps"]["rows"]
    assert len(rows) == len(found.heads)
    for row in rows:
        for column, value in found.heads.at(row["site"], row["head"]).items():
            assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-6), column
    with torch.no_grad(), library.watch(model, Entropy()) as seen:
        model(pixel_values=torch.cat([(image - mean) / std for image in images]))
    told = {(r["site"], r["head"]): r["entropy"] for r in document["on_images"]["entropy"]["rows"]}
    assert list(told.values()) == pytest.approx(seen[Entropy]["entropy"].tolist(), rel=1e-4)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])
    pictures = data["images"]["pictures"]
    codes = [np.frombuffer(zlib.decompress(base64.b64decode(p["data"])), np.uint8) for p in pictures]
    for image, shown in zip(images, codes, strict=True):
        expected = image[0].permute(1, 2, 0).numpy().ravel() * 255
        assert np.abs(shown.astype(float) - expected).max() <= 1


def test_images_are_prepared_as_the_config_says(kept, capsys, tmp_path):
    folder = shutil.copytree(kept / "nat", tmp_path / "nat")
    config = json.loads((folder / "config.json").read_text())
    told = {"image_size": 24, "image_mean": [0.25], "image_std": [0.125]}
    (folder / "config.json").write_text(json.dumps({**config, **told}))
    document = json.loads(inspected(capsys, folder, "--image", kept / "a.png", "--json", "-", "--no-report"))
    assert document["images"] == {
        "files": [str(kept / "a.png")], "height": 24, "width": 24, "mean": [0.25], "std": [0.125],
    }  # fmt: skip
    grey = _middle(kept / "a.png", 24, "L")
    found = in_python(Source.find(folder).read(), (grey - 0.25) / 0.125)
    for row in document["on_images"]["image-maps"]["rows"]:
        assert row["distance"] == pytest.approx(
            found.heads.at(row["site"], row["head"])["distance"], rel=1e-4
        )
    shown = inspected(capsys, folder, "--image", kept / "a.png", "--no-report")
    assert "24 x 24 pixels, mean 0.25 and deviation 0.125 (as its config.json says)" in shown


def _middle(path, side, mode="RGB"):
    pixels = np.array(Image.open(path).convert(mode)).reshape(40, 60, -1)
    image = torch.from_numpy(pixels).movedim(2, 0)[None].float() / 255
    width = round(60 * side / 40)
    found = torch.nn.functional.interpolate(
        image, (side, width), mode="bilinear", align_corners=False, antialias=True
    )
    left = (width - side) // 2
    return found[..., left : left + side]


def test_layers_of_channels_are_told_by_their_medians(kept, capsys):
    out = inspected(capsys, kept / "van", "--image", kept / "a.png", "--image-size", 64, "--no-report")
    assert "Median over the channels of each layer" in out and "24 channels" in out
    assert not re.search(r"^entropy: ", out, re.MULTILINE)
    found = in_python(Source.find(kept / "van").read(), (_middle(kept / "a.png", 64) - 0.5) / 0.5)
    values = [found.heads.at("image.0", c)["negative"] for c in range(len(found.site(0).mean))]
    line = next(line for line in out.splitlines() if line.startswith(" image.0"))
    assert f"{np.median(values):.3f}" in line


REFUSED = [
    (["llama", "--image", "a.png"], "(LlamaForCausalLM) takes input_ids, not images; leave --image out."),
    (["bert", "--image", "a.png"], "takes input_ids, not images"),
    (["vit", "--text", TEXT], "(ViTForImageClassification) takes images; give one with --image FILE."),
    (["nat"], "(NATForImageClassification) takes images; give one with --image FILE."),
    (["nat", "--image", "none.png"], "there is no file none.png"),
    (["nat", "--image", "text.png"], "text.png cannot be read as an image"),
    (["nat", "--image", "a.png", "--text", TEXT], "--text is for a model that reads text"),
    (["nat", "--image", "a.png", "--heads", "0.0"], "--heads is for a model that reads text"),
    (["nat", "--image", "a.png", "--image-size", "0"], "--image-size is 0; it must be from 1 to 2048"),
    (["nat", "--image-size", "32"], "give --image FILE with it"),
    (["llama", "--lens", "image-maps"], "--lens image-maps looks at images; give --image FILE with it."),
    (["nat", "--image", "a.png", "--layers", "7"], "no layer 7; its layers are 0 to 2"),
    (["nat", "--image", "a.png", "--lens", "entropy"], "look at it with regard.lens.ImageMaps"),
    (["nat", "--image", "a.png", "--lens", "entropie"], "did you mean entropy"),
    (["none", "--image", "a.png"], "There is no model 'none'"),
    (["--image", "a.png"], "--image needs a MODEL that reads images"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refused_before_weights_are_read(words, said, kept, refusal, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(kept)
    assert said in refusal("inspect", *words)


def test_an_image_that_the_model_does_not_take(kept, refusal, tmp_path):
    said = refusal("inspect", kept / "vit", "--image", kept / "a.png", "--image-size", 7)
    assert "does not take images of 7 x 7 pixels" in said and "give --image-size" in said
    folder = shutil.copytree(kept / "nat", tmp_path / "nat")
    (folder / "preprocessor_config.json").write_text("{")
    assert "preprocessor_config.json cannot be read" in refusal("inspect", folder, "--image", kept / "a.png")


def test_text_models_are_inspected_as_before(kept, capsys):
    out = inspected(capsys, kept / "llama", "--text", TEXT, "--no-report")
    assert "image" not in out and "attention on the first token" in out
    assert io.StringIO(out).readline().startswith(str(kept / "llama"))
