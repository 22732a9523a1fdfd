"""`regard diff` on tiny models: two checkpoints, an edit, a swap, and what it refuses."""

import csv
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import folders
from tests.support.folders import TEXT

LONG = " ".join([TEXT] * 3)


@pytest.fixture
def diff(regard, models):
    """Run `regard diff`, and return what it printed."""

    def run(*words, text=LONG):
        code, out, err = regard("diff", *words, "--text", text, "--no-report")
        assert (code, err) == (0, "")
        return out

    return run


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory):
    """The tiny Llama with one head's output taken out of the projection."""
    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
    model.save_pretrained(folder)
    folders.add_tokenizer(folder)
    return folder


def told(diff, *words):
    return json.loads(diff(*words, "--json", "-"))


def heads(found, lens, column):
    rows = found["on_text"][lens]["heads"]
    return {(r["site"], r["head"]): r[f"{column} change"] for r in rows}


def test_two_checkpoints_and_the_same_change_as_an_edit(diff, models, tuned):
    """Weights of zero behind a head are that head ablated: the rest of the model sees the same."""
    by_weights = told(diff, models / "llama", tuned)
    by_edit = told(diff, models / "llama", "--edit", "scale-heads heads=0.1")
    assert by_weights["prediction"] == pytest.approx(by_edit["prediction"], abs=1e-5)
    assert by_weights["prediction"]["divergence"] > 0.001
    for lens, column in (("entropy", "entropy"), ("sinks", "alpha")):
        one, other = heads(by_weights, lens, column), heads(by_edit, lens, column)
        assert one == pytest.approx(other, abs=1e-5)
        assert all(abs(v) < 1e-6 for (site, _), v in one.items() if site == "text.0")
        assert any(abs(v) > 1e-3 for (site, _), v in one.items() if site == "text.1")


def test_a_model_beside_itself_has_not_changed(diff, models):
    out = diff(models / "llama", models / "llama")
    assert "No head changed beyond the control" in out
    assert "changed by more" not in out
    found = told(diff, models / "llama", models / "llama")
    assert found["prediction"]["divergence"] == 0 and found["prediction"]["agreement"] == 1
    assert all(row["heads"] == 0 for lens in found["on_text"].values() for row in lens["quantities"])


def test_the_loss_is_the_models_own(diff, models):
    found = told(diff, models / "llama", "--edit", "scale-heads heads=0.1")["prediction"]
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(models / "llama")(LONG, return_tensors="pt").input_ids
    with torch.no_grad():
        assert found["loss_before"] == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-4)
    assert found["positions"] == ids.shape[1]


def test_a_swap(diff, models):
    out = diff(models / "llama", "--swap", "sliding-window window=2 layers=1", "--lens", "mean-distance")
    assert "with sliding-window window=2 layers=1" in out
    found = told(
        diff, models / "llama", "--swap", "sliding-window window=2 layers=1", "--lens", "mean-distance"
    )
    change = heads(found, "mean-distance", "distance")
    assert all(v == 0 for (site, _), v in change.items() if site == "text.0")
    assert all(v < 0 for (site, _), v in change.items() if site == "text.1")


def test_csv_has_a_line_a_head(diff, models):
    rows = list(csv.DictReader(io.StringIO(diff(models / "llama", "--edit", "scale-heads heads=0.1", "--csv",
                                                "-"))))  # fmt: skip
    assert len(rows) == 8
    row = rows[5]
    parts = [float(row[f"entropy.entropy {part}"]) for part in ("before", "after", "change")]
    assert parts[2] == pytest.approx(parts[1] - parts[0])


def test_the_page_holds_both_sides(regard, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = regard(
        "diff", models / "llama", "--edit", "force-attention heads=0.1 to=0", "--text", LONG
    )
    page = (tmp_path / "regard-diff.html").read_text(encoding="utf-8")
    assert code == 0 and "Open regard-diff.html" in out
    assert "with force-attention heads=0.1 to=0" in page and "after" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "diff needs two models, or one and an --edit, --edits or --swap."),
        (("{llama}",), "diff needs two models"),
        (("{llama}", "{llama}", "{llama}"), "got 3"),
        (("{llama}", "{llama}", "--edit", "scale-heads heads=0.1"), "give either"),
        (("{llama}", "{bert}"), "cut the text into other tokens"),
        (("{llama}", "--edit", "scale-head heads=0.1"), "did you mean scale-heads"),
        (("{llama}", "--edit", "scale-heads head=0.1"), "takes no 'head'; its options are"),
        (("{llama}", "--edit", "scale-heads heads"), "key=value"),
        (("{llama}", "--edit", "scale-heads heads=0.1 heads=0.2"), "twice"),
        (("{llama}", "--edit", "scale-heads heads=0.9"), "head 9"),
        (("{llama}", "--edit", "edit-weights heads=0.1"), "needs fn"),
        (("{llama}", "--swap", "sliding-window"), "needs 'window'"),
        (("{llama}", "--swap", "slidingwindow window=3"), "did you mean sliding-window"),
        (("{llama}", "--swap", "sliding-window window=3 layers=7"), "7"),
        (("{llama}", "--edit", "scale-heads heads=0.1", "--lens", "patterns"), "numbers per head"),
        (("{llama}", "nowhere/at/all"), "There is no model folder"),
    ],
)
def test_refusals(regard, models, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    given = [str(word).format(llama=models / "llama", bert=models / "bert") for word in words]
    code, out, err = regard("diff", *given, "--text", LONG)
    assert code == 2 and said in err, err
    assert err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert not list(tmp_path.iterdir())


def test_models_of_other_sizes(regard, models, tmp_path):
    wide = folders.llama(tmp_path / "wide", num_hidden_layers=3)
    code, _, err = regard("diff", models / "llama", wide, "--text", LONG, "--no-report")
    assert code == 2 and "must have the same layers and heads" in err
