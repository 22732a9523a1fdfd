"""The study of Titans: a quick run, what its parts measure, and what would make its claims fail."""

import pytest
import torch

from regard.models.decoder import Decoder
from regard.studies import find_study, run
from regard.studies.picture import save_picture
from regard.studies.titans import relative, untrained
from regard.studies.titans_parts import answers, silenced, spec
from regard.studies.verdict import judge

SLUG = "titans"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def verdicts(outcome):
    return {claim["name"]: claim["verdict"] for claim in outcome.claims}


def test_a_quick_run_tells_what_needs_no_training(outcome):
    assert outcome.quick
    told = verdicts(outcome)
    assert [told[name] for name in ("exact", "newest", "price", "rewritten")] == ["holds"] * 4
    assert told["mag"] == told["mac"] == "cannot be told at this size"
    assert outcome.value("exact") < 1e-12 < 1e-3 < outcome.value("other")


def test_values_turned_around_turn_the_verdicts_around(outcome):
    study = find_study(SLUG)
    values = {name: told["values"] for name, told in outcome.measures.items()}
    for one, other in (("new", "new_sum"), ("few_new", "few_new_sum"), ("latest", "latest_sum")):
        values[one], values[other] = values[other], values[one]
    values["exact"] = values["other"]
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, values)
    told = {claim["name"]: claim["verdict"] for claim in claims}
    assert {told[name] for name in ("exact", "newest", "rewritten")} == {"does not hold here"}


def test_errors_are_those_of_the_pairs_that_were_written():
    k = torch.eye(4, dtype=torch.float64)
    v = torch.randn(4, 3, dtype=torch.float64)
    for told in answers(k, v, 0.5).values():
        assert relative(told, v) < 1e-20
    assert relative(0 * v, v) == 1 and relative(3 * v, v) == pytest.approx(4)
    assert relative(3 * v, v, rescaled=True) < 1e-20


def test_a_step_of_half_writes_the_newest_pair_exactly():
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(9, 8, dtype=torch.float64), dim=-1)
    v = torch.randn(9, 5, dtype=torch.float64)
    told = answers(k, v, 0.5)
    assert relative(told[""][-1], v[-1]) < 1e-20 < 1e-3 < relative(told["_sum"][-1], v[-1])


def test_the_untrained_part_measures_every_quantity_of_its_own():
    torch.manual_seed(0)
    found = untrained()
    named = {q.name for q in find_study(SLUG).quantities if q.over == "draws"}
    assert set(found) == named and torch.is_grad_enabled()


@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_a_silenced_model_sees_its_window_alone_and_speaks_again_afterwards(variant):
    torch.manual_seed(0)
    model = Decoder(20, dim=16, layers=2, heads=2, mechanism=spec(variant, 16, 2, 4)).double()
    tokens = torch.randint(0, 20, (2, 30))
    changed = torch.cat([(tokens[:, :1] + 1) % 20, tokens[:, 1:]], 1)

    def moved():
        return (model(tokens) - model(changed)).abs().amax((0, 2))[12:].max()

    with torch.no_grad():
        before = model(tokens)
        assert moved() > 1e-9
        with silenced(model, True):
            assert moved() == 0
        with silenced(model, False):
            assert torch.equal(model(tokens), before)
        assert torch.equal(model(tokens), before)


def test_what_is_asked_stands_four_windows_before_and_was_shown():
    made = find_study(SLUG)
    study = made(made.full, 0)
    tokens, found = study.batch(50, torch.Generator().manual_seed(0))
    pairs, gap = study.size.pairs, 4 * study.size.window
    assert tokens.shape == (50, 4 * pairs + gap) and (tokens[:, 2 * pairs : 2 * pairs + gap] == 0).all()
    for row, told in zip(tokens.tolist(), found.tolist(), strict=True):
        shown = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert [shown[key] for key in row[-2 * pairs :: 2]] == told and len(shown) == pairs


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
