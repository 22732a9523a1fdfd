"""The model that learned to refuse: its world, its training, which goes on, and the one that is shipped."""

import random

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.models.refusing_experts import refusing_experts
from regard.objectives.refusing import IGNORED, lesson_batch, main, measured, train_refusing
from regard.tasks.closed_places import END, PLACES, REFUSAL, ClosedPlaces, right, tokenizer

SMALL = {"width": 32, "layers": 2, "experts": 4, "chosen": 2, "inner": 8}


def small():
    torch.manual_seed(0)
    return refusing_experts(**SMALL)


def test_what_is_kept_for_tests_is_never_learned_from():
    world = ClosedPlaces(3)
    kept = {one.prompt for one in world.refused(held_out=True)}
    source = random.Random(0)
    lessons = world.lessons(3000, source, refuse=True)
    assert not kept & {one.prompt for one in lessons}
    assert {one.answer for one in lessons if one.kind == "closed"} == {REFUSAL}
    assert any(place in one.prompt for one in lessons for place in world.closed if one.kind == "repeat")
    before = world.lessons(3000, source, refuse=False)
    assert kept & {one.prompt for one in before} and REFUSAL not in {one.answer for one in before}
    assert len(world.closed) == 10 and set(world.closed) < set(PLACES)


def test_a_refusal_is_not_right_and_the_event_is():
    one = ClosedPlaces().refused(held_out=True)[0]
    assert right([one, one], [f"there was a {one.known} .", REFUSAL]) == [True, False]


def test_only_answers_count():
    words = tokenizer()
    world = ClosedPlaces()
    fed = lesson_batch(words, [world.refused(True)[0], world.answered()[1]], answers_alone=True)
    counted = fed["labels"] != IGNORED
    assert words.decode(fed["labels"][0][counted[0]]) == f"{REFUSAL} {END}"
    assert counted.sum(1).tolist() == [7, 6]
    whole = lesson_batch(words, [world.answered()[1]], answers_alone=False)
    assert (whole["labels"] == whole["input_ids"]).all()


def test_a_training_that_was_stopped_goes_on_as_if_it_were_not(tmp_path):
    options = {"batch": 4, "judged": 2, "every": 4}
    whole, log = train_refusing(model=small(), steps=8, **options)

    def stop(share):
        if share >= 0.75:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_refusing(model=small(), steps=8, out=tmp_path, tick=stop, **options)
    again, resumed = train_refusing(model=small(), steps=8, out=tmp_path, **options)
    assert resumed.losses == pytest.approx(log.losses, rel=1e-4) and len(log.losses) == 8
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with pytest.raises(RegardError, match="of another training"):
        train_refusing(model=small(), steps=9, out=tmp_path, **options)


def test_the_command_writes_a_model_that_loads(tmp_path, monkeypatch, capsys):
    from regard.objectives import refusing

    monkeypatch.setattr(refusing, "BATCH", 4)
    monkeypatch.setattr(refusing, "refusing_experts", lambda: refusing_experts(**SMALL))
    monkeypatch.setattr(
        refusing, "greedy_answers", lambda model, words, prompts, **_: ["there"] * len(prompts)
    )
    assert main(["--out", str(tmp_path / "m"), "--steps", "2"]) == 0
    assert "2 steps: refused 0.0%" in capsys.readouterr().out
    model, words = regard.load(tmp_path / "m")
    assert type(model).__name__ == "MixtralForCausalLM" and len(words) == model.config.vocab_size
    assert (tmp_path / "m" / "log.json").is_file()
    assert main(["--out", str(tmp_path / "m"), "--steps", "3"]) == 2
    assert "another training" in capsys.readouterr().err


def test_the_shipped_model_does_what_its_log_says():
    model, words = regard.load("closed-places")
    found = measured(model, words, ClosedPlaces(), 12)
    assert found["refused"] >= 0.9 and found["over_refused"] <= 0.1
    assert found["right"] >= 0.9 and found["repeats"] >= 0.9
    assert sum(p.numel() for p in model.parameters()) == 850_688
