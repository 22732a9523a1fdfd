"""The study of attention calibration: its controls do what they say, and what would make its claims fail."""

from dataclasses import replace

import pytest
import torch

import regard
from regard.studies import attention_calibration_parts as parts
from regard.studies import find_study
from regard.studies.base import by_name
from regard.studies.outcome import read_outcome
from regard.studies.picture import save_picture
from regard.studies.verdict import judge
from tests.edit.plain import changed, close, logits
from tests.edit.test_act import by_hand
from tests.edit.test_act_filter import model  # noqa: F401
from tests.support.families import FAMILIES

SLUG = "attention-calibration"
HEADS = [("text.0", 2), ("text.1", 1)]
PLACE = {0: 2, 1: 1}


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["llama"].build()


@pytest.fixture
def inputs(tiny):
    return FAMILIES["llama"].inputs(tiny, "left")


def test_the_first_token_in_place_of_sinks(tiny, inputs):
    starts = (~inputs["attention_mask"].bool()).sum(1).tolist()

    def change(layer, weights, module):
        for row, start in enumerate(starts):
            part = weights[row, PLACE[layer], start:, start:]
            for i in range(1, len(part)):
                freed = 0.6 * part[i, 0].item()
                rest = part[i, 1:].sum().item()
                part[i, 1:] *= 1 + freed / rest
                part[i, 0] *= 0.4
        return weights

    with changed(tiny, weights=change):
        expected = logits(tiny, inputs)
    with regard.steer(tiny, parts.FirstSink(heads=HEADS)):
        assert close(logits(tiny, inputs), expected)


def test_a_temperature_a_head(tiny, inputs):
    wanted = {("text.0", 2): 2.0, ("text.1", 1): 3.0}

    def change(layer, scores, module):
        scores[:, PLACE[layer]] /= wanted[(f"text.{layer}", PLACE[layer])]
        return scores

    with changed(tiny, scores=change):
        expected = logits(tiny, inputs)
    with regard.steer(tiny, parts.Tempered(temperatures=wanted)):
        assert close(logits(tiny, inputs), expected)


def test_the_temperature_moves_as_much_weight_as_act(tiny, inputs):
    head = ("text.0", 2)
    [found] = parts.temperatures(tiny, inputs, [head], alpha=1.3).values()
    moved = torch.zeros(1 + len(parts.TEMPERATURES))
    dense = tiny(**inputs, output_attentions=True).attentions[0][:, 2]
    for weights, mask in zip(dense, inputs["attention_mask"].bool(), strict=True):
        part = weights[mask][:, mask].detach()
        now = [by_hand(part, alpha=1.3)[0]]
        now += [torch.softmax(part.log() / t, -1) for t in parts.TEMPERATURES]
        moved += torch.stack([(x - part).abs().sum() for x in now])
    assert moved[0] > 0 and found == parts.TEMPERATURES[int((moved[1:] >= moved[0]).nonzero()[0])] > 1


def test_label_bias_is_taken_from_the_loss_and_not_from_accuracy():
    margins = [3.0, 1.0, 2.9, 1.1]
    run = {
        "sign": [1.0, -1.0, 1.0, -1.0],
        "margins": {"plain": margins, **{f"random {n}": [n, n, n, n] for n in range(3)}},
        "centre": {"plain": 2.0, **{f"random {n}": float(n) for n in range(3)}},
    }
    found = parts.scores(run)
    assert found["plain"][0] == [1.0, 0.0, 1.0, 0.0]
    assert found["plain"][1] == pytest.approx([0.3133, 0.3133, 0.3412, 0.3412], abs=1e-3)
    assert found["random"][0] == pytest.approx([2 / 3, 0, 2 / 3, 0])
    assert found["random"][1] == pytest.approx([0.6931] * 4, abs=1e-3)
    assert parts.middle(torch.tensor(margins), torch.tensor(run["sign"])) == pytest.approx(2.0)


def test_no_head_kept_leaves_the_model_as_it_is(model, inputs):  # noqa: F811
    some = parts.treatments(model, inputs, HEADS, [], 0)
    assert some["filtered"] == some["temperature"] == some["first"] == some["random 0"] == []
    assert some["all"] and some["delete_hidden"][0].beta == 0


@pytest.fixture(scope="module")
def committed():
    return read_outcome(f"docs/results/{SLUG}.json")


def told(kind, values):
    return {
        claim["name"]: claim["verdict"] for claim in judge(kind.claims, by_name(kind.quantities), values)[1]
    }


def test_rules_can_come_out_either_way(committed):
    kind = find_study(SLUG)
    values = {name: list(found["values"]) for name, found in committed.measures.items()}
    count = len(values["plain"])
    better = {**values, "plain": [0.0] * count, "random": [0.1] * count, "temperature": [0.1] * count}
    better = {**better, "filtered": [1.0] * count, "loss_filtered": [0.1] * count}
    better = {**better, **{f"loss_{n}": [1.0] * count for n in ("random", "temperature", "plain", "first")}}
    assert {told(kind, better)[n] for n in ("helps", "specific", "gains", "unbiased", "hidden")} == {"holds"}
    worse = {**better, "filtered": [0.0] * count, "loss_filtered": [2.0] * count, "plain": [1.0] * count}
    assert "holds" not in {told(kind, worse)[n] for n in ("helps", "specific", "gains", "unbiased", "hidden")}
    same = {**values, "loss_delete_first": values["loss_delete_hidden"]}
    assert told(kind, same)["first"] != "holds"
    assert told(kind, {**values, "hidden": [0.1] * len(values["hidden"])})["sinks"] == "does not hold here"
    assert told(kind, {**values, "kept": values["chance"]})["chance"] != "holds"


def test_the_picture_is_drawn_from_the_outcome(committed, tmp_path):
    kind = find_study(SLUG)
    path = save_picture(kind(kind.full, 0), committed, tmp_path)
    assert path is not None and path.stat().st_size > 20_000


@pytest.mark.real
def test_one_seed_of_the_real_model_measures_everything():
    kind = find_study(SLUG)
    study = kind(replace(kind.quick, calibration=2, test=2, layers=(28,)), 0)
    study.prepare()
    result = {"seed 0": study.one(0), "sinks": {"hidden": [0.5], "hidden_random": [0.0]}}
    assert set(study.measure(result)) == {quantity.name for quantity in kind.quantities}
    assert result["seed 0"]["tried"] == 9 and len(result["seed 0"]["margins"]["all"]) == 2
