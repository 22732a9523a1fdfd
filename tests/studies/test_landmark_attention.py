"""The study of landmark attention runs, asks what it says, and its rules can come out either way."""

import json

import pytest
import torch

from regard.attention import Landmark
from regard.studies import find_study, read_outcome, run
from regard.studies.base import by_name
from regard.studies.landmark_attention import BLOCKS, exactness
from regard.studies.landmark_attention_parts import Finder, attending, memory
from regard.studies.picture import have_matplotlib
from regard.studies.texts import late_loss, windows
from regard.studies.verdict import judge
from regard.tasks.tagged import LANDMARK, QUESTION, Tagged

SLUG = "landmark-attention"


@pytest.fixture(scope="module")
def outcome_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landmark")
    run(SLUG, out=folder, quick=True)
    return folder


@pytest.fixture(scope="module")
def outcome(outcome_folder):
    return read_outcome(outcome_folder / f"{SLUG}.quick.json")


def told(values):
    """The verdicts of the claims on some values."""
    study = find_study(SLUG)
    filled = {name: [1.0, 1.0, 1.0] for name in by_name(study.quantities)}
    _, claims, _ = judge(study.claims, by_name(study.quantities), {**filled, **values})
    return {claim["name"]: claim["verdict"] for claim in claims}


def test_a_quick_run_measures_everything(outcome, outcome_folder):
    assert outcome.quick and set(outcome.measures) == set(by_name(find_study(SLUG).quantities))
    json.dumps(outcome.details)
    assert not have_matplotlib() or (outcome_folder / f"{SLUG}.quick.png").stat().st_size > 10_000


def test_rules_can_come_out_either_way():
    good = {"full_8": [1.0, 0.99, 1.0], "full_64": [0.99, 0.98, 0.99], "top2_64": [0.97, 0.96, 0.98]}
    poor = {"random_64": [0.1, 0.11, 0.12], "recent_64": [0.1, 0.09, 0.1]}
    assert told({**good, **poor})["retrieval"] == "holds"
    assert told({**good, "random_64": [0.9, 0.91, 0.9], "recent_64": [0.1, 0.1, 0.1]})["retrieval"] != "holds"
    assert told({**good, **poor, "full_8": [0.1, 0.1, 0.12]})["retrieval"] == "cannot be told at this size"
    texts = {"long_landmark": [3.0, 3.1, 3.0], "long_none": [3.5, 3.6, 3.5], "long_random": [3.3, 3.4, 3.3]}
    assert told(texts)["language"] == "holds"
    swapped = {**texts, "long_random": texts["long_landmark"], "long_landmark": texts["long_random"]}
    assert told(swapped)["language"] == "does not hold here"


def test_exactness_is_exact_and_its_control_is_not():
    torch.manual_seed(0)
    found = exactness()
    assert found["error"] < 1e-12 < 0.1 < found["unlike"]


def test_every_question_has_its_answer_in_the_block_it_names():
    task = Tagged(block=6, tags=20, symbols=5, questions=4)
    text = task.batch(8, 7, torch.Generator().manual_seed(0))
    length = 7 * 6
    assert (text.kinds[:, :length].unflatten(1, (7, 6))[:, :, -1] == LANDMARK).all()
    assert (text.kinds[:, length:] == QUESTION).all()
    for row in range(8):
        for number in range(4):
            asked = [x[row, length + number] for x in (text.tags, text.slots)]
            hit = (text.tags[row, :length] == asked[0]) & (text.slots[row, :length] == asked[1])
            assert hit.sum() == 1 and int(hit.nonzero()) // 6 == text.places[row, number]
            assert text.values[row, :length][hit] == text.answers[row, number]


def test_a_finder_learns_and_any_blocks_will_not_do():
    task = Tagged(block=8, tags=16, symbols=4, questions=7)
    generator = torch.Generator().manual_seed(0)
    model = Finder(task)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(150):
        loss = model.loss(task.batch(16, 4, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = task.batch(32, 12, generator)
    with torch.no_grad():
        found = {}
        for way in ("landmark", "recent"):
            with attending(model, memory(8, 1, way)):
                found[way] = model.accuracy(text)
        assert model.found(text, 12) == 1.0
    assert found["landmark"] > 0.8 and found["recent"] < 0.6
    assert model.layers[0].mechanism.block == Landmark(8).block  # put back


def test_losses_are_of_what_stands_late():
    rows = windows(torch.arange(50) % 3, 8, 4)
    assert rows.shape == (4, 9) and torch.equal(rows[1, :3], torch.arange(10, 13) % 3)

    class Sure(torch.nn.Module):
        def forward(self, tokens):
            """The token that follows, but for the first four."""
            right = torch.nn.functional.one_hot((tokens + 1) % 3, 3) * 50.0
            right[:, :4] = right[:, :4].roll(1, -1)
            return right

    assert late_loss(Sure(), rows, 4) < 1e-6 < 10 < late_loss(Sure(), rows, 0)
    assert BLOCKS[0] < BLOCKS[-1]
