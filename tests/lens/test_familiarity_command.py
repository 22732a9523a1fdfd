"""`regard run self-familiarity`: the table, the gate's word, thresholds on disk, and what it refuses."""

import json

import pytest

from regard.cli import main
from regard.tasks.concept7 import read_concept7
from tests.lens.test_familiarity import model, tokenizer  # noqa: F401

SMALL = ("--beams", 2, "--explain-tokens", 4, "--guess-tokens", 1)


@pytest.fixture
def regard(capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def run(*words):
        code = main(["run", "self-familiarity", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_concepts_of_an_instruction_are_tabled(regard, folder):
    words = ("--model", folder, *SMALL, "--text", "Did Zorblat know the Big Ben?")
    code, out, err = regard(*words)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith((" Big Ben", " Zorblat"))] == [
        "Big",
        "Zorblat",
    ]
    assert "the rarest first" in lines[-1]
    code, out, _ = regard(*words, "--json", "-")
    told = json.loads(out)
    assert code == 0 and [each["concept"] for each in told["concepts"]] == ["Big Ben", "Zorblat"]
    assert told["settings"]["beams"] == 2 and told["settings"]["template"] == "chat"
    scores = [each["score"] for each in told["concepts"]]
    assert told["score"] == pytest.approx((scores[0] + scores[1] / 2) / 1.5)


def test_a_threshold_decides_and_the_model_answers_or_not(regard, folder):
    words = ("--model", folder, *SMALL, "--text", "Where is Rome?", "--answer", "--new-tokens", 3)
    code, out, err = regard(*words, "--threshold", 1)
    assert code == 0, err
    assert "Withheld: familiarity" in out and 'I do not know "Rome" well enough' in out
    code, out, _ = regard(*words, "--threshold", 0, "--json", "-")
    told = json.loads(out)
    assert code == 0 and told["answered"] and told["reason"].startswith("answered: ")
    assert "I do not know" not in told["answer"]


def test_a_threshold_is_fitted_kept_and_used(regard, folder, tmp_path):
    known, unknown, kept = (tmp_path / name for name in ("known.txt", "unknown.txt", "h.json"))
    known.write_text("\n".join(f"town {i}" for i in range(10)))
    unknown.write_text("zorb\nquax\n")
    words = ("--model", folder, *SMALL)
    code, out, err = regard(*words, "--calibrate", kept, "--familiar", known, "--unfamiliar", unknown)
    assert code == 0 and "from 10 familiar and 2 unfamiliar concepts" in out, err
    assert [path.name for path in tmp_path.iterdir() if "scores" in path.name] == []
    code, out, _ = regard(*words, "--threshold", kept, "--concept", "Rome")
    assert code == 0 and out.splitlines()[-1].startswith(("Withheld", "Answered"))
    code, _, err = regard("--model", folder, "--threshold", kept, "--concept", "Rome")
    assert code == 2 and "other settings" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give an instruction"),
        (("--text", "Who are you?"), "no concept was found in 'Who are you?'"),
        (("--concept", " "), "has no letter"),
        (("--concept", "Rome", "--beams", 1), "beams is 1"),
        (("--concept", "Rome", "--threshold", 2), "--threshold is 2"),
        (("--concept", "Rome", "--threshold", "none.json"), "cannot read none.json"),
        (("--concept", "Rome", "--answer", "--threshold", 0.5), "--answer needs an instruction"),
        (("--concept", "Rome", "--familiar", "x"), "are for --calibrate"),
        (("--calibrate", "h.json", "--concept", "Rome"), "leave --text"),
        (("--calibrate", "nowhere/h.json"), "there is no folder"),
        (("--calibrate", "h.json", "--familiar", "none.txt"), "cannot read none.txt"),
        (("--concept", "Rome", "--new-tokens", 0), "--new-tokens is 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(regard, folder, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = regard("--model", folder, *words)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_papers_questions_are_read(tmp_path):
    path = tmp_path / "concept7.csv"
    path.write_text(
        "\ufeffDomain,Concept,Real,Label,Questions,Entities\n"
        "Legal,666th Amendment,FALSE,FALSE,\"['What is it?', 'Why?']\",\"[['666th Amendment', 'law'], []]\"\n"
        "Music,Fugue,TRUE,TRUE,\"['How is it made?']\",\"[['Fugue']]\"\n",
        encoding="utf-8",
    )
    found = read_concept7(path)
    assert [(q.concept, q.real, q.question) for q in found] == [
        ("666th Amendment", False, "What is it?"),
        ("666th Amendment", False, "Why?"),
        ("Fugue", True, "How is it made?"),
    ]
    assert found[0].entities == ("666th Amendment", "law") and found[1].entities == ()
    from regard.errors import RegardError

    for text, said in (
        ("Domain,Concept\nx,y\n", "no rows with the columns Real"),
        ("Domain,Concept,Real,Questions,Entities\nx,y,TRUE,\"['a']\",[]\n", "row 2: Questions and Entities"),
        ("Domain,Concept,Real,Questions,Entities\nx,y,maybe,[],[]\n", "row 2: Real is 'maybe'"),
    ):
        path.write_text(text)
        with pytest.raises(RegardError, match=said):
            read_concept7(path)
    with pytest.raises(RegardError, match="cannot read"):
        read_concept7(tmp_path / "none.csv")
