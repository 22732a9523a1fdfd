"""`regard run tunable-experts`: the numbers of Python, files that come back, and refusals."""

import json

import pytest

from regard.weights import load

RUN = ("run", "tunable-experts")
FEW = ("--prompts", 6, "--random", 2, "--count", 3, "--tokens", 6)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A short run on the packaged model, with all that it writes."""
    from regard.cli import main

    folder = tmp_path_factory.mktemp("experts")
    names = {name: folder / name for name in ("set.json", "page.html", "a.png", "all.json")}
    options = zip(("--save", "--report", "--picture", "--json"), names.values(), strict=True)
    words = [*RUN, *FEW, *(word for pair in options for word in pair)]
    assert main([str(word) for word in words]) == 0
    return names


def test_what_it_writes(ran):
    from regard.edit import TuneExperts
    from regard.edit.files import load_edits

    told = json.loads(ran["all.json"].read_text())
    names = [effect["name"] for effect in told["effects"]]
    assert names == ["as it is", "the 3 leading off", "the 3 least off", "random set 1", "random set 2"]
    plain = told["effects"][0]["behaviour"]
    assert (plain["count"], plain["total"]) == (6, 6) and plain["low"] == pytest.approx(0.61, abs=0.01)
    scores = {(layer, e): s for layer, row in enumerate(told["scores"]) for e, s in enumerate(row)}
    best = sorted(scores, key=scores.get, reverse=True)[:3]
    assert [tuple(expert) for expert in told["experts"]] == best
    model, _ = load("closed-places")
    (edit,) = load_edits(ran["set.json"], model)
    assert type(edit) is TuneExperts and list(edit.off) == best
    text = ran["page.html"].read_text()
    assert "random sets of as many experts" in text and "i cannot speak of that" in text
    assert ran["a.png"].stat().st_size > 10_000


def test_a_saved_set_is_tried_and_named_experts_are_scaled(regard, ran):
    code, out, err = regard(*RUN, *FEW, "--edits", ran["set.json"])
    assert code == 0, err
    assert "the chosen off" in out and "least" not in out
    code, out, _ = regard(
        *RUN, *FEW, "--experts", "0.1,3.2", "--action", "gain", "--strength", 1, "--json", "-"
    )
    told = json.loads(out)
    assert code == 0 and told["done"] == "gain" and told["experts"] == [[0, 1], [3, 2]]
    assert told["effects"][0]["loss"] == pytest.approx(told["effects"][1]["loss"], abs=1e-4)


def test_prompts_of_ones_own_are_sorted_by_their_answers(regard, tmp_path):
    from regard.tasks.closed_places import ClosedPlaces

    world = ClosedPlaces()
    asked = [*world.refused(held_out=True)[:4], *world.answered()[:6]]
    (tmp_path / "asked.txt").write_text("\n".join(one.prompt for one in asked))
    code, out, err = regard(*RUN, *FEW, "--behaviour", tmp_path / "asked.txt")
    assert code == 0, err
    assert "ranked on 2 prompts of the behaviour and 3 others" in out and "on 2 kept prompts of it" in out


def test_refusals(refusal, models, ran, tmp_path):
    lines = tmp_path / "two.txt"
    lines.write_text("the keeper\nthe sea\n")
    both = ("--behaviour", lines, "--others", lines)
    for words, said in (
        (("--model", models / "llama", *both), "LlamaForCausalLM has no router: it is no mixture of experts"),
        (("--experts", "0.40"), "layer 0 has no expert 40; it has experts 0 to 31"),
        (("--experts", "9.1"), "layer 9 has no router"),
        (("--experts", ""), "off takes LAYER.EXPERT"),
        (("--count", 0), "--count is 0"),
        (("--count", 100), "28 other experts are left"),
        (("--model", models / "llama"), "--behaviour FILE is needed"),
        (("--model", models / "llama", *both, "--edits", ran["set.json"]), "no router"),
        (("--shows", "("), "no regular expression"),
        (("--strength", 2), "--strength is for"),
        (("--save", tmp_path / "no" / "a.json"), "there is no folder"),
        (("--behaviour", lines, "--others", tmp_path / "none.txt"), "There is no file"),
    ):
        assert said in refusal(*RUN, *words), words
