"""`regard lm-eval`: a task of one's own, offline, on a tiny model, plain and steered.

The harness is a heavy extra (`regard[lm-eval]`, which brings pyarrow and more) and no part of `dev`; where it
is missing, the tests that run it are skipped, and say so.
"""

import importlib.util
import json

import pytest

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (regard[lm-eval])"
)
QUESTIONS = [
    {"asked": "the cat sat on", "options": [" the mat", " a dog"], "answer": 0},
    {"asked": "a dog ran to", "options": [" the cat", " on on"], "answer": 1},
    {"asked": "the mat sat", "options": [" on a", " cat the dog"], "answer": 0},
]
TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_choice: options
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "mine.yaml").write_text(TASK.format(data=data))
    return folder


def _number(told):
    """The log-likelihood in a sample's response, however deep it stands."""
    return _number(told[0]) if isinstance(told, list) else float(told)


@pytest.fixture
def evaluate(regard, tasks, tmp_path, monkeypatch):
    """Run the harness; returns the log-likelihoods of every option."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(model, arguments):
        out_folder = tmp_path / f"out-{model}-{abs(hash(arguments))}"
        code, out, _ = regard(
            "lm-eval", "--model", model, "--model_args", f"{arguments},prefix_token_id=1", "--tasks", "mine",
            "--include_path", tasks, "--device", "cpu", "--log_samples", "--output_path", out_folder,
        )  # fmt: skip
        assert code == 0 and "mine" in out and "Metric" in out
        [samples] = out_folder.rglob("samples_mine_*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        return [_number(told) for row in rows for told in row["resps"]]

    return run


@harness
def test_without_edits_it_is_the_harness_own_model_and_with_them_another(evaluate, models, tmp_path):
    from transformers import AutoModelForCausalLM

    import regard
    from regard.edit import ScaleHeads

    own = evaluate("hf", f"pretrained={models / 'llama'},dtype=float32")
    plain = evaluate("regard", f"pretrained={models / 'llama'}")
    assert plain == pytest.approx(own, abs=1e-5) and len(plain) == 6
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    regard.save_edits(tmp_path / "edit.json", model, ScaleHeads({(0, 1): 0.0, (1, 2): 0.0}))
    steered = evaluate("regard", f"pretrained={models / 'llama'},edits={tmp_path / 'edit.json'}")
    assert max(abs(a - b) for a, b in zip(plain, steered, strict=True)) > 1e-4
    swapped = evaluate("regard", f"pretrained={models / 'llama'},swap=sliding-window window=2")
    assert max(abs(a - b) for a, b in zip(plain, swapped, strict=True)) > 1e-4


@harness
@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        ("pretrained=nowhere/at/all", (), "no model folder"),
        ("pretrained={llama},edits=none.json", (), "cannot read none.json"),
        ("pretrained={llama},swap=sliding", (), "sliding-window"),
        ("pretrained={llama},swap=sliding-window window=2", ("--batch_size", "4"), "must be 1"),
    ],
)
def test_refusals(regard, models, tasks, arguments, more, said):
    arguments = arguments.format(llama=models / "llama")
    code, _, err = regard(
        "lm-eval",
        "--model",
        "regard",
        "--model_args",
        arguments,
        "--tasks",
        "mine",
        "--include_path",
        tasks,
        *more,
    )
    assert code == 2 and said in err.splitlines()[-1]


def test_help_and_a_missing_harness(regard, monkeypatch):
    code, out, _ = regard("lm-eval", "--help")
    assert code == 0 and "pretrained=default" in out and "edits=FILE" in out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = regard("lm-eval", "--tasks", "mine")
    assert code == 2 and 'pip install "regard[lm-eval]"' in err
