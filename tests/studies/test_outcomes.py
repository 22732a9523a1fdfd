"""The outcomes that are committed: judged by the rules of today's code, and all on the page."""

from pathlib import Path

import pytest

from regard.studies import Quantity, all_studies, outcomes_in
from regard.studies.base import by_name
from regard.studies.table import page
from regard.studies.verdict import judge

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
OUTCOMES = outcomes_in(RESULTS)


def test_the_page_of_outcomes_is_current():
    assert "attention-sink-emergence" in OUTCOMES
    assert (RESULTS / "README.md").read_text("utf-8") == page(OUTCOMES, RESULTS)


@pytest.mark.parametrize("slug", sorted(OUTCOMES))
def test_a_committed_outcome_is_what_its_rules_make_of_its_values(slug):
    found, kind = OUTCOMES[slug], all_studies()[slug]
    values = {name: told["values"] for name, told in found.measures.items()}
    verdict, claims, measures = judge(kind.claims, by_name(kind.quantities), values)
    assert verdict == found.verdict
    for now, told in zip(claims, found.claims, strict=True):
        assert {k: now[k] for k in ("name", "text", "paper", "main", "verdict")} == {
            k: told[k] for k in ("name", "text", "paper", "main", "verdict")
        }
        rules = zip(now["rules"] + now["needs"], told["rules"] + told["needs"], strict=True)
        for rule, said in rules:
            assert (rule["text"], rule["verdict"]) == (said["text"], said["verdict"])
            assert rule["value"] == pytest.approx(said["value"])
    for name, told in measures.items():
        assert told["value"] == pytest.approx(found.measures[name]["value"])


@pytest.mark.parametrize("slug", sorted(OUTCOMES))
def test_a_committed_outcome_is_of_a_full_run_with_its_rules_first(slug):
    found = OUTCOMES[slug]
    assert not found.quick and found.rules_first
    assert found.command == f"regard study {slug} --seed {found.seed}"
    assert (RESULTS / f"{slug}.png").is_file()


def test_other_values_would_be_judged_otherwise():
    """The control: values that are turned around turn a verdict around."""
    found, kind = OUTCOMES["attention-sink-emergence"], all_studies()["attention-sink-emergence"]
    values = {name: told["values"] for name, told in found.measures.items()}
    swapped = {**values, "natural": values["later"], "later": values["natural"]}
    quantities: dict[str, Quantity] = by_name(kind.quantities)
    assert judge(kind.claims, quantities, swapped)[0] == "does not hold here"
