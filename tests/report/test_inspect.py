"""`regard inspect` writes its page, where and when it is asked to."""

import pytest

from regard.cli import main

TEXT = "The keeper wrote one line a day. The keeper wrote one line a night."


@pytest.mark.real
def test_the_page_says_what_the_terminal_says(smollm, tmp_path, monkeypatch, capsys, data_of):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--text", TEXT, "--layers", "16-18"]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "regard-report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    data = data_of(text)
    said = [f["text"] for section in data["sections"] for f in section["findings"]]
    assert len(said) > 5
    for sentence in said:
        assert sentence in printed
    assert "regard-report.html" in printed
    assert {site["alias"] for site in data["sites"]} == {"text.16", "text.17", "text.18"}
    assert (
        "".join(t if isinstance(t, str) else "".join(t).replace("·", " ") for t in data["texts"][0]) == TEXT
    )


@pytest.mark.real
def test_no_page_where_none_is_wanted(smollm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--text", TEXT, "--layers", "0", "--lens", "entropy", "--no-report"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--report", "none/page.html"], "--report"),
        (["--report", "a.html", "--no-report"], "exclude each other"),
        (["--report", "a.json", "--json", "a.json"], "give two files"),
    ],
)
def test_bad_paths_are_refused_before_any_work(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regard.weights.Source.find", lambda *_: pytest.fail("work was begun"))
    assert main(["inspect", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_names_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regard-report.html").mkdir()
    assert main(["inspect"]) == 2
    assert "--no-report" in capsys.readouterr().err
