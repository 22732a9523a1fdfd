"""`regard mechanisms`: every registered mechanism has a row, and the row is true."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from regard.attention import MECHANISMS, LinearAttention, SlidingWindow, Spec, mechanism
from regard.attention.costs import CARRIES_STATE, READS_CACHE, Costs, describe


def test_every_mechanism_has_a_row(regard):
    code, out, err = regard("mechanisms")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    for name in MECHANISMS:
        assert any(row[:1] == [name] for row in rows), name
    window = next(line for line in out.splitlines() if line.split()[:1] == ["sliding-window"])
    assert "T w D" in window and "cache" in window and "both" in window


def test_json_has_all_fields(regard, tmp_path):
    told = json.loads(regard("mechanisms", "--json", "-")[1])
    assert [row["name"] for row in told] == sorted(MECHANISMS)
    rows = {row["name"]: row for row in told}
    assert rows["linear"]["decodes"] == "state" and rows["linear"]["costs"]["step_memory"] == "D^2"
    assert rows["qlstm"]["kind"] == "layer" and not rows["qlstm"]["swaps"] and rows["qlstm"]["parameters"]
    assert rows["softmax"]["swaps"] and not rows["softmax"]["parameters"]
    assert rows["sliding-window"]["options"] == {"window": "required"}
    path = tmp_path / "one.json"
    code, out, _ = regard("mechanisms", "linear", "--json", path)
    assert code == 0 and json.loads(path.read_text()) == rows["linear"] and "LinearAttention" in out


def test_a_new_mechanism_lists_itself_with_what_it_declares():
    before = dict(MECHANISMS)
    try:

        @mechanism("declared")
        @dataclass(frozen=True)
        class Declared(Spec):
            """Says what it costs."""

            module: ClassVar = LinearAttention.module
            costs: ClassVar = Costs(time="T", memory="1")
            use: ClassVar = "inference"

        @mechanism("silent")
        @dataclass(frozen=True)
        class Silent(Spec):
            """Says nothing."""

            module: ClassVar = SlidingWindow.module
            window: int = 2

        said, unsaid = describe(Declared), describe(Silent)
    finally:
        MECHANISMS.clear()
        MECHANISMS.update(before)
    assert (said.costs, said.use, said.about) == (
        Costs(time="T", memory="1"),
        "inference",
        "Says what it costs.",
    )
    assert (unsaid.costs, unsaid.use) == (READS_CACHE, "training and inference")
    assert describe(LinearAttention).costs == CARRIES_STATE


def test_an_unknown_name_and_a_folder_for_json_are_refused(refusal, tmp_path):
    assert "did you mean linear?" in refusal("mechanisms", "linaer")
    assert "is a folder" in refusal("mechanisms", "--json", tmp_path)


@pytest.mark.parametrize("name", MECHANISMS)
def test_one_in_full(regard, name):
    code, out, err = regard("mechanisms", name)
    assert (code, err) == (0, "") and out.startswith(f"{name} (") and "costs" in out
