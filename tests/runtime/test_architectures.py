"""A sample of all architectures that call the interface; `python -m benchmarks.architectures` runs them all.

None of these is among the families of `tests/support/families.py`.
"""

import json

import pytest
import torch

import regard
from benchmarks.architectures import RESULTS
from regard.runtime import Edit
from tests.support.architectures.build import tiny
from tests.support.architectures.examine import examine
from tests.support.architectures.listing import architectures
from tests.support.architectures.sweep import sweep

torch.set_num_threads(1)
SAMPLE = {
    "bamba": "Mamba layers between attention",
    "qwen3_next": "delta-rule layers between attention",
    "granite_swa": "sinks beside sliding windows",
    "kimi_linear": "linear attention, compressed keys",
    "t5gemma": "encoder and decoder of decoder layers",
    "bigbird_pegasus": "only a part of the attention calls the interface",
    "idefics3": "several images of a text",
    "qwen2_5_vl": "one call per image and layer",
    "detr": "queries that look at an image",
    "vivit": "video",
    "wav2vec2": "sound",
    "seamless_m4t": "relative positions in the encoder of speech",
    "time_series_transformer": "series of numbers",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_as_it_is_alone(name):
    row = examine(name)
    assert (row["verdict"], row["reason"]) == ("works", ""), row.get("trace")
    assert row["sites"] > len(row["silent"])
    assert row["calls"] > 0
    assert {"idle", "opened", "weights"} <= set(row["off"])


def test_the_sparse_indexers_are_refused_by_name():
    row = examine("deepseek_v32")
    assert row["verdict"] == "refused"
    assert "DeepseekV32Attention" in row["reason"]


class Shift(Edit):
    """Moves every head's output a little: what the sweep must notice."""

    def head_outputs(self, call):
        return call.head_outputs * 1.001


@pytest.mark.parametrize("name", ["cohere2", "beit", "whisper"])
def test_a_small_change_of_attention_is_wrong(name, monkeypatch):
    """The control: with heads a thousandth off, the verdict is not `works`."""
    watch = regard.watch

    def crooked(model, *lenses):
        return regard.steer(model, Shift(), *lenses)

    monkeypatch.setattr(regard, "watch", crooked)
    row = examine(name)
    monkeypatch.setattr(regard, "watch", watch)
    assert row["verdict"] == "wrong"
    assert "differs" in row["reason"]


@pytest.mark.parametrize("name", ["cohere2", "timesfm"])
def test_attention_is_neither_uniform_nor_all_on_one_key(name):
    from tests.support.architectures.compare import Rows

    case = tiny(architectures()[name])
    with regard.watch(case.model, Rows()) as seen, torch.no_grad():
        case.model(**case.fit())
    for calls in seen[Rows].values():
        weights = calls[0][0]
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
        visible = (weights > 0).sum(-1)
        inner = visible > 2
        share = (entropy[inner] / visible[inner].log()).mean()
        assert 0.1 < share < 0.99


def test_every_modeling_file_of_the_interface_is_listed():
    committed = json.loads((RESULTS / "architectures.json").read_text("utf-8"))
    assert {row["name"] for row in committed["rows"]} == set(architectures())
    assert all(row["verdict"] != "wrong" for row in committed["rows"])


def test_a_stopped_sweep_goes_on(tmp_path):
    lines = tmp_path / "rows.jsonl"
    done = {"name": "llama", "class": "", "verdict": "works", "seconds": 0}
    lines.write_text(json.dumps(done) + "\n", encoding="utf-8")
    new = []
    rows = sweep(["llama", "beit"], lines, jobs=1, report=new.append)
    assert [row["name"] for row in new] == ["beit"]
    assert rows["llama"] == done
    assert rows["beit"]["verdict"] == "works"
    assert len(lines.read_text("utf-8").splitlines()) == 2


def test_an_architecture_that_hangs_is_given_up(tmp_path):
    rows = sweep(["beit"], tmp_path / "rows.jsonl", jobs=1, timeout=0.0)
    assert rows["beit"]["verdict"] == "not built"
    assert "not done after 0 s" in rows["beit"]["reason"]
