"""The command of `quantizable-transformers`: what it prints, its JSON, and what it refuses."""

import json

import pytest

from regard.cli import main

WORDS = "one two three four five six seven eight nine ten " * 4


@pytest.mark.real
def test_it_prints_outliers_and_the_price_of_eight_bits(capsys, tmp_path):
    path = tmp_path / "found.json"
    arguments = ["run", "quantizable-transformers", "--text", WORDS, "--length", "16", "--int8"]
    assert main([*arguments, "--json", str(path)]) == 0
    printed, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "highest kurtosis" in printed and "16 bits (control)" in printed
    worst = max(row["kurtosis"] for row in found["outliers"])
    assert worst > 100 and f"{worst:,.0f}" in printed and found["length"] == 16
    price = found["perplexity"]
    assert price["8 bits"] > 5 * price["as it is"] and price["16 bits (control)"] < 2 * price["as it is"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", "1"], "at least 2"),
        (["--length", "99"], "smaller --length"),
        (["--int8"], "there is one"),
    ],
)
def test_wrong_options_are_refused(options, words, capsys):
    text = ["--text", "one two three four five six seven eight nine ten eleven twelve " * 6]
    assert main(["run", "quantizable-transformers", *text, *options]) == 2
    assert words in capsys.readouterr().err
