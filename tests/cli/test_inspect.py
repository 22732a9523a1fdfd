"""`regard inspect` on tiny models: every kind of model and every option, alone and together."""

import csv
import io
import itertools
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from regard.cli import looking, shown
from regard.lens import LENSES
from regard.runtime.difference import heads_of
from tests.support.folders import TEXT

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

READ_TEXT = [name for name in LENSES if name != "image-maps"]


@pytest.fixture
def inspect(regard, models):
    """Run `regard inspect` on a tiny model; returns what it printed."""

    def run(*words, model="llama", text=TEXT):
        code, out, err = regard("inspect", models / model, "--text", text, *words)
        assert (code, err) == (0, "")
        return out

    return run


@pytest.mark.parametrize(
    ("model", "tokens", "kind"),
    [
        ("llama", 12, "LlamaForCausalLM"),
        ("bert", 14, "BertForMaskedLM"),
        ("roberta", 14, "RobertaForMaskedLM"),
        ("gguf/tiny.gguf", 58, "LlamaForCausalLM"),
        ("gguf", 58, "LlamaForCausalLM"),
    ],
)
def test_every_kind_of_model(inspect, models, model, tokens, kind):
    out = inspect(model=model)
    first, _, second = out.splitlines()[:3]
    assert first == f"{models / model}, 2 layers, 8 heads in all ({kind})"
    assert second == f"On the words given ({tokens} tokens)"
    assert "of 8 heads put over 80% of their attention on the first token" in out
    assert "random tokens, twice in a row (seed 0)" in out
    table = out.partition("attention on the first token, in per cent\n")[2].splitlines()
    assert table[0].split() == ["layer", "h0", "h1", "h2", "h3"]
    assert [len(line.split()) for line in table[1:]] == [5, 5]


def test_each_lens_by_its_name(inspect):
    for name in READ_TEXT:
        out = inspect("--lens", name)
        assert len(out.splitlines()) > 3, name
        titles = [title for lens, (_, title) in shown.MAPS.items() if title in out]
        assert titles == [title for lens, (_, title) in shown.MAPS.items() if lens == name], name


def test_lenses_in_either_spelling(inspect):
    together = inspect("--lens", "entropy", "sinks")
    assert inspect("--lens", "entropy", "--lens", "sinks") == together
    assert "entropy, in per cent of the greatest possible" in together
    assert "attention on the first token, in per cent" in together
    assert inspect("--lens", "sinks", "sinks") == inspect("--lens", "sinks")


def test_a_map_holds_the_numbers_of_the_lens(inspect):
    rows = json.loads(inspect("--lens", "sinks", "--json", "-"))["on_text"]["sinks"]["rows"]
    table = inspect("--lens", "sinks").partition("in per cent\n")[2].splitlines()[1:]
    told = [int(cell) for line in table for cell in line.split()[1:]]
    assert told == [round(row["first"] * 100) for row in rows]


def test_layers_limit_what_is_seen(inspect):
    for spelling in ("1", "1-1", " 1 "):
        rows = json.loads(inspect("--layers", spelling, "--json", "-"))
        for results in (rows["on_text"], rows["on_probe"]):
            for name, result in results.items():
                sites = {row.get("site", row.get("block")) for row in result["rows"]}
                assert sites == {"text.1"}, name
    out = inspect("--layers", "1", "--lens", "sinks")
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["layer", "1"]


def test_heads_of_patterns(inspect):
    told = json.loads(inspect("--lens", "patterns", "--heads", "1.2,0.1,1.0", "--json", "-"))
    kept = told["on_text"]["patterns"]["patterns"]
    assert [(p["site"], p["heads"]) for p in kept] == [("text.0", [1]), ("text.1", [0, 2])]


def test_patterns_of_all_heads_need_a_short_text(models, refusal, inspect, monkeypatch):
    monkeypatch.setattr("regard.lens.patterns.ALL_HEADS", 11)
    said = refusal("inspect", models / "llama", "--text", TEXT, "--lens", "patterns")
    assert "keeps all heads of up to 11 tokens, and the text has 12; name some heads" in said
    assert "text.0" in inspect("--lens", "patterns", "--heads", "0.0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(inspect, dtype):
    told = json.loads(inspect("--dtype", dtype, "--device", "cpu", "--lens", "sinks", "--json", "-"))
    plain = json.loads(inspect("--lens", "sinks", "--json", "-"))
    assert told["model"]["dtype"] == dtype
    for got, row in zip(told["on_text"]["sinks"]["rows"], plain["on_text"]["sinks"]["rows"], strict=True):
        assert got["first"] == pytest.approx(row["first"], abs=0.03)


def test_options_alone_in_pairs_and_all_together(inspect, tmp_path):
    options = [
        ["--layers", "0-1"],
        ["--lens", "sinks", "induction"],
        ["--json", tmp_path / "x.json"],
        ["--csv", tmp_path / "x.csv"],
        ["--device", "cpu"],
        ["--dtype", "bfloat16"],
    ]
    for count in (0, 1, 2, len(options)):
        for chosen in itertools.combinations(options, count):
            for path in tmp_path.iterdir():
                path.unlink()
            assert "attention on the first token" in inspect(*itertools.chain(*chosen))
            wanted = {words[1] for words in chosen if words[0] in ("--json", "--csv")}
            assert set(tmp_path.iterdir()) == wanted
            if tmp_path / "x.json" in wanted:
                document = json.loads((tmp_path / "x.json").read_text())
                assert ("entropy" in document["on_text"]) == (options[1] not in chosen)
            if tmp_path / "x.csv" in wanted:
                assert len(list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))) == 8


def test_text_from_a_file_and_from_standard_input(regard, models, tmp_path, monkeypatch):
    (tmp_path / "t").write_text(TEXT)
    code, out, _ = regard("inspect", models / "llama", "--text", tmp_path / "t", "--lens", "sinks")
    assert code == 0 and f"On {tmp_path}/t (12 tokens)" in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    code, other, _ = regard("inspect", models / "llama", "--text", "-", "--lens", "sinks")
    assert code == 0 and other == out.replace(f"On {tmp_path}/t", "On standard input")


def test_the_probe_is_left_out_of_a_model_that_takes_too_little(regard, models, tmp_path):
    folder = shutil.copytree(models / "llama", tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 3}))
    code, out, _ = regard(
        "inspect", folder, "--text", "the keeper wrote", "--lens", "induction", "--json", "-"
    )
    assert code == 0
    assert json.loads(out)["probe"] is None and json.loads(out)["on_probe"] == {}


def test_names_with_brackets_are_printed_as_they_are(regard, models, tmp_path):
    folder = shutil.copytree(models / "llama", tmp_path / "[bold]model[/red]")
    code, out, _ = regard("inspect", folder, "--text", TEXT, "--lens", "sinks")
    assert code == 0 and out.startswith(f"{folder}, 2 layers")


def test_nothing_is_written_when_the_second_output_cannot_be(regard, models, tmp_path, monkeypatch):
    def full(path, text):
        from regard.errors import RegardError

        raise RegardError(f"cannot write {path}: No space left on device.")

    monkeypatch.setattr("regard.runtime.table.write_text", full)
    code, out, err = regard("inspect", models / "llama", "--text", TEXT, "--csv", tmp_path / "x.csv")
    assert (code, out) == (2, "")
    assert err == f"regard: cannot write {tmp_path}/x.csv: No space left on device.\n"
    assert list(tmp_path.iterdir()) == []


def test_lenses_without_numbers_per_head_are_known_beforehand(models):
    lenses = {name: LENSES[name](name=name) for name in READ_TEXT}
    look = looking.Look.of(str(models / "llama"), TEXT, "here", lenses=lenses)
    results = look.at_text(lenses, None, True)
    assert {name for name, r in results.items() if heads_of(r) is None} == set(looking.NOT_PER_HEAD)


def test_on_a_narrow_terminal(models):
    words = ["inspect", str(models / "llama"), "--text", TEXT, "--lens", "sinks", "--no-report"]
    code = (
        "import fcntl, struct, sys, termios, regard.cli\n"
        "fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('4H', 50, 20, 0, 0))\n"
        f"sys.exit(regard.cli.main({words!r}))"
    )
    env = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        env.pop(name, None)
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    raw = b"".join(iter(lambda: _part(ours), b"")).decode()
    os.close(ours)
    assert process.wait(60) == 0, raw
    bars, _, page = raw.rpartition("\x1b[1A\x1b[2K")
    assert "Reading" in bars
    assert "48;5;" in page
    page = ESCAPE.sub("", page).replace("\r\n", "\n")
    assert max(map(len, page.splitlines())) <= 20
    assert "\n layer  h0 h1 h2 h3\n     0 " in page


def _part(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_away_from_a_terminal_nothing_is_broken(inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    above = inspect().partition("\nattention on the first token")[0].splitlines()
    sentences = [line for line in above if line.startswith("  ")]
    assert len(sentences) >= 9
    assert all(line.endswith(".") for line in sentences)
    assert max(map(len, sentences)) > 100
