"""`regard papers` lists, shows and searches; nothing heavy is loaded, and bad input is one sentence."""

import json
import re
import subprocess
import sys

import pytest

from regard.cli import main
from regard.papers import AREAS, papers


def shown(capsys, *words):
    """Exit status, standard output and standard error of `regard papers WORDS`."""
    code = main(["papers", *words])
    out, err = capsys.readouterr()
    return code, out, err


def systems(out):
    """The lines about systems in what was printed, by slug."""
    return {line.split()[2]: line for line in out.splitlines() if re.match(r" [ \d]\d  ", line)}


def test_all_are_listed_within_80_characters(capsys):
    code, out, _ = shown(capsys)
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80 and "\x1b" not in out
    told = {slug: line.split()[1] for slug, line in systems(out).items()}
    assert told == {paper.slug: paper.state for paper in papers().values()}
    assert [line for line in lines if line.startswith(tuple(h.capitalize() for h in AREAS.values()))]


def test_a_choice_is_listed(capsys):
    _, out, _ = shown(capsys, "--state", "planned", "--area", "prompting")
    assert set(systems(out)) == {
        p.slug for p in papers().values() if p.state == "planned" and p.area == "tasks"
    }


@pytest.mark.parametrize("slug", ["attention-sink-emergence", "titans"])
def test_one_is_shown_in_full(capsys, slug):
    code, out, _ = shown(capsys, slug)
    paper, text = papers()[slug], " ".join(out.split())
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for value in (
        paper.title,
        paper.authors,
        str(paper.year),
        paper.link,
        paper.gives,
        paper.state,
        *paper.code,
    ):
        assert value in text
    assert ("regard run" in text) == (paper.command is not None)


def test_what_is_not_known_is_said(capsys, monkeypatch):
    from dataclasses import replace

    unknown = replace(papers()["titans"], authors=None, year=None, arxiv=None)
    monkeypatch.setattr("regard.cli.papers.find", lambda name: unknown)
    _, out, _ = shown(capsys, "titans")
    assert "authors not known, year not known, arXiv not known" in out and "None" not in out


def test_a_search_shows_the_best_first(capsys):
    _, out, _ = shown(capsys, "--about", "where a sink is", "--area", "lens")
    assert list(systems(out)) == ["attention-sink-emergence", "active-dormant-heads"]


def test_json_holds_all_fields(capsys, tmp_path):
    _, out, _ = shown(capsys, "--json", "-")
    rows = json.loads(out)
    assert len(rows) == 62 and rows[28] == papers()["attention-sink-emergence"].row()
    code, out, _ = shown(capsys, "29", "--json", str(tmp_path / "row.json"))
    assert code == 0 and "Gu et al." in out
    assert json.loads((tmp_path / "row.json").read_text("utf-8")) == rows[28]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["attention-sink-emergense"], "did you mean attention-sink-emergence"),
        (["attention"], "is part of"),
        ([""], "no system ''"),
        (["--about", "qqq"], "No system is about 'qqq'"),
        (["--about", ""], "No system is about ''"),
        (["--about", "halucination"], "near it is hallucination"),
        (["--state", "done"], "--state"),
        (["--area", "zoo"], "--area: 'zoo' names no area"),
        (["--area", "t"], "areas; they are attention"),
        (["29", "--about", "sink"], "not both"),
        (["--json", "/nowhere/x.json"], "--json"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, told):
    code, out, err = shown(capsys, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and told in err


def test_colour_is_for_terminals(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = shown(capsys, "--area", "lens")
    assert "\x1b[" in out
    monkeypatch.delenv("FORCE_COLOR")
    _, out, _ = shown(capsys, "--area", "lens")
    assert "\x1b[" not in out


@pytest.mark.parametrize(
    "words", [["papers"], ["papers", "29"], ["papers", "--about", "sink"], ["run"], ["run", "x"]]
)
def test_nothing_heavy_is_loaded(words):
    code = f"""
import sys, regard.cli
regard.cli.main({words!r})
print([name for name in ("torch", "numpy", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
