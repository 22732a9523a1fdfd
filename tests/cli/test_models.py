"""`regard models`: every image model has a row, and the row is true."""

import json

from regard.models import images
from regard.models.images import Cost, cost, image_model, image_models


def test_the_table_and_json(regard, tmp_path):
    names = ("nat-nano", "dinat-nano")
    code, out, err = regard("models", *names, "--image-size", "32", "--json", tmp_path / "m.json")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "m.json").read_text())
    assert [row["model"] for row in rows] == list(names)
    found = cost(image_model("nat-nano", num_labels=1000), 32)
    assert rows[0]["parameters"] == found.parameters and rows[0]["multiply_adds"] == found.multiply_adds
    assert "operations at 32 x 32" in out and "nat-nano" in out and "1000 classes" in out


def test_every_model_has_a_row(regard, monkeypatch):
    monkeypatch.setattr(images, "cost", lambda model, size: Cost(1, 7, (size, size)))
    rows = json.loads(regard("models", "--image-size", "64", "--json", "-")[1])
    assert [row["model"] for row in rows] == image_models()
    assert all(row["parameters"] > 0 and row["multiply_adds"] in (7, None) for row in rows)


def test_a_family_is_chosen_by_its_beginning(regard, monkeypatch):
    monkeypatch.setattr(images, "cost", lambda model, size: Cost(1, 7, (size, size)))
    rows = json.loads(regard("models", "van-b0", "dinat", "van-b0", "--json", "-")[1])
    assert [row["model"] for row in rows] == [
        "van-b0",
        *(n for n in image_models() if n.startswith("dinat-")),
    ]


def test_a_model_that_takes_no_such_image_has_no_operations(regard):
    code, out, _ = regard("models", "vit-nano", "nat-nano", "--image-size", "30")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert code == 0 and rows["vit-nano"][-2] == "-" and rows["nat-nano"][-2] == "M"


def test_wrong_input_is_refused(refusal):
    assert "no image model 'nat-minni'; did you mean nat-mini" in refusal("models", "nat-nano", "nat-minni")
    assert "image size is 0" in refusal("models", "--image-size", "0")
    assert "--classes is 0" in refusal("models", "--classes", "0")
