"""The catalogue is complete and well formed, and whatever it says works is there and has run."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from regard import papers as catalogue
from regard.errors import RegardError
from regard.papers import AREAS, about, as_page, find, main, papers
from regard.studies import STUDIES, run, study
from tests.studies.toy import Dice
from tests.support import evidence
from tests.support.outcomes import run_files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAPERS = list(papers().values())
CLAIMED = [paper for paper in PAPERS if paper.state != "planned"]
SINKS = papers()["attention-sink-emergence"]
each = pytest.mark.parametrize("paper", CLAIMED, ids=lambda paper: paper.slug)


def test_all_systems_are_there_in_order():
    assert [paper.number for paper in PAPERS] == list(range(1, 63))
    for field in ("title", "arxiv", "gives"):
        assert Counter(getattr(p, field) for p in PAPERS if getattr(p, field)).most_common(1)[0][1] == 1, (
            field
        )


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
def test_a_row_is_well_formed(paper):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.slug)
    assert paper.area in AREAS and paper.kind in evidence.kinds()
    assert re.fullmatch(r"[A-Z0-9].{20,148}[^.]\.", paper.gives) and ". " not in paper.gives
    assert paper.keywords and len(set(paper.keywords)) == len(paper.keywords)
    if paper.arxiv is not None:
        form = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.(\d{4}|\d{5})", paper.arxiv)
        assert form and len(form[3]) == (5 if int(form[1]) >= 15 else 4)
        assert 2000 + int(form[1]) in (paper.year, paper.year + 1)  # sent in late in December: Titans
    assert list(evidence.row_faults(paper)) == []
    assert list(evidence.page_faults(paper, ROOT)) == []


@each
def test_its_code_is_there(paper):
    assert list(evidence.code_faults(paper)) == []


@each
def test_its_study_has_run(paper):
    assert list(evidence.study_faults(paper, RESULTS)) == []


@each
def test_its_tests_pass(paper, outcomes_of):
    assert list(evidence.test_faults(paper, outcomes_of, ROOT)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"state": "ready"}, "is none of works"),
        ({"state": "planned"}, "is planned, and names"),
        ({"state": "works"}, "missing if and only if"),
        ({"state": "works", "missing": None, "study": None}, "lacks code, a study or tests"),
        ({"code": ()}, "lacks code or tests"),
        ({"tests": ()}, "lacks code or tests"),
        ({"missing": None}, "missing if and only if"),
    ],
)
def test_a_row_that_contradicts_itself_is_caught(change, fault):
    assert any(fault in found for found in evidence.row_faults(replace(SINKS, **change)))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"code": ["regard.lens.sinks:Sink"]}, "does not import"),
        ({"code": ["regard.lens.sink:Sinks"]}, "does not import"),
        ({"code": ["regard.lens.sinks.Sinks"]}, "not of the form"),
        ({"code": ["os.path:join"]}, "not of the form"),
        ({"code": ["regard.lens.sinks:PLACES"]}, "no class or function"),
        ({"code": ["regard.lens.sinks:SinkTable"]}, "is a measurement"),
        ({"kind": "edit"}, "is a edit"),
        ({"area": "edit"}, "in regard/edit/"),
        ({"command": "regard.lens.sinks:commands"}, "does not import"),
        ({"command": "regard.lens.sinks:_pieces"}, "is no command"),
    ],
)
def test_a_wrong_name_is_caught(change, fault):
    found = list(evidence.code_faults(replace(SINKS, **change)))
    assert any(fault in sentence for sentence in found), found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A study that has run, and the row of a system that has it."""
    registry = dict(STUDIES)
    folder = tmp_path_factory.mktemp("results")
    study("dice")(type("Dice", (Dice,), {"__module__": Dice.__module__}))
    run("dice", out=folder)
    run("dice", out=folder, quick=True)
    yield replace(SINKS, study="dice"), folder
    STUDIES.clear()
    STUDIES.update(registry)


def test_a_study_that_has_run_is_no_fault(ran):
    assert list(evidence.study_faults(*ran)) == []


def test_a_missing_study_or_outcome_is_caught(ran, tmp_path):
    row, results = ran
    assert "no study 'dices'" in next(evidence.study_faults(replace(row, study="dices"), results))
    assert "dice.json cannot be read" in next(evidence.study_faults(row, tmp_path))
    (tmp_path / "dice.json").write_text("{}")
    assert "is no outcome" in next(evidence.study_faults(row, tmp_path))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"study": "cards"}, "an outcome of cards"),
        ({"quick": True}, "no outcome of a full run"),
        ({"size": {"dice": 3, "throws": 200}}, "no outcome of a full run"),
        ({"rules_first": False}, "the rules were changed"),
        ({"verdict": "cannot be told at this size"}, "other verdicts"),
        ({"claims": []}, "other verdicts"),
        ({"measures": {}}, "other verdicts"),
    ],
)
def test_an_outcome_that_is_not_the_studys_own_is_caught(ran, tmp_path, change, fault):
    row, results = ran
    told = json.loads((results / "dice.json").read_text("utf-8"))
    (tmp_path / "dice.json").write_text(json.dumps({**told, **change}))
    assert fault in next(evidence.study_faults(row, tmp_path))


def test_a_rule_changed_after_the_run_is_caught(ran, monkeypatch):
    row, results = ran
    first, *others = STUDIES["dice"].claims
    harder = replace(first, rules=[replace(first.rules[0], threshold=0.6)])
    monkeypatch.setattr(STUDIES["dice"], "claims", (harder, *others))
    assert "other verdicts" in next(evidence.study_faults(row, results))


FILES = {
    "test_passing.py": "def test_a(): pass\n",
    "test_empty.py": "",
    "test_skipped.py": "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n",
    "test_expected.py": "import pytest\n@pytest.mark.xfail\ndef test_a(): assert False\n",
    "test_failing.py": "def test_a(): pass\ndef test_b(): assert False\n",
    "test_broken.py": "import nothing_of_that_name\ndef test_a(): pass\n",
    "test_teardown.py": (
        "import pytest\n@pytest.fixture\ndef f():\n    yield\n    assert False\ndef test_a(f): pass\n"
    ),
}


def test_test_files_that_prove_nothing_are_caught(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    plugin = ["-p", "tests.support.outcomes", "-c", "/dev/null", "--rootdir", "."]

    def look(files):
        found = run_files(files, tmp_path, tmp_path, *plugin)
        return {file: found.get(file, Counter()) for file in files}

    row = replace(SINKS, tests=[*FILES, "test_absent.py"])
    caught = [re.search(r"test_\w+\.py", fault)[0] for fault in evidence.test_faults(row, look, tmp_path)]
    assert sorted(caught) == sorted({*FILES, "test_absent.py"} - {"test_passing.py"})


def test_the_docs_page_is_current():
    page = (ROOT / "docs" / "systems.md").read_text("utf-8")
    assert page == as_page(), "run `python -m regard.papers --write docs/systems.md`"


def test_the_page_is_written(tmp_path, capsys):
    assert main(["--write", str(tmp_path / "systems.md")]) == 0
    assert (tmp_path / "systems.md").read_text("utf-8") == as_page()
    assert main(["--write", str(tmp_path / "nowhere" / "systems.md")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_change_of_a_row_changes_the_page(monkeypatch):
    before = as_page()
    changed = {**papers(), SINKS.slug: replace(SINKS, arxiv=None, state="planned", missing=None)}
    monkeypatch.setattr(catalogue, "papers", lambda: changed)
    assert as_page() != before
    assert "arXiv not known" in as_page()
    assert f"systems/{SINKS.slug}.md" in before and f"systems/{SINKS.slug}.md" not in as_page()


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("attention-sink-emergence", "attention-sink-emergence"),
        ("29", "attention-sink-emergence"),
        ("05", "ar-seg"),
        ("2501.00663", "titans"),
        ("When  attention SINK emerges", "attention-sink-emergence"),
        ("halo", "halonet"),
        ("The Consciousness Prior", "consciousness-prior"),
    ],
)
def test_a_system_is_found(name, slug):
    assert find(name).slug == slug


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("atention-sink-emergense", "did you mean attention-sink-emergence"),
        ("attention", "is part of"),
        ("63", "`regard papers` lists"),
        ("", "`regard papers` lists"),
        ("zzz", "`regard papers` lists"),
    ],
)
def test_an_unknown_system_is_refused(name, told):
    with pytest.raises(RegardError, match=re.escape(told)):
        find(name)


def test_a_search_goes_by_stems():
    forms = ("hallucination", "Hallucinations", "hallucinate", "hallucinating")
    assert len({tuple(paper.slug for paper in about(form)) for form in forms}) == 1
    assert about("quantization")[0].slug == about("quantised")[0].slug == "quantizable-transformers"


def test_a_search_puts_the_best_first():
    found = [paper.slug for paper in about("hallucination")]
    assert "hallucination" in papers()[found[0]].title.lower()
    assert {"vision-aware-heads", "self-familiarity", "concentric-causal-attention"} <= set(found[:6])
    assert "titans" not in found and "halonet" not in found
    assert about("sink")[0].slug == "attention-sink-emergence"
    both = [paper.slug for paper in about("long memory")]
    assert both[0] in {"titans", "landmark-attention"}


@pytest.mark.parametrize("words", ["xyzzy", "", "the of", "?"])
def test_a_search_without_result_is_refused(words):
    with pytest.raises(RegardError, match="No system is about"):
        about(words)


def test_a_misspelt_word_is_answered_with_the_nearest():
    with pytest.raises(RegardError, match="near it is hallucination"):
        about("halucination")
