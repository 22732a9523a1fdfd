"""Texts from files, folders and rows; what is refused; made sentences; a tokenizer of any text."""

import json

import pytest

from regard.errors import RegardError
from regard.tasks.cue_words import CUES, cue_sentences
from regard.tasks.labelled import text_tokenizer
from regard.tasks.text_files import labelled_rows, read_labelled, read_lexicon, read_unlabelled

ROWS = [{"text": f"text {n}, and more", "label": ("good", "bad")[n % 2]} for n in range(20)]


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def as_csv(rows):
    return "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)


def test_every_kind_gives_the_same_texts(tmp_path):
    for row, n in zip(ROWS, range(20), strict=True):
        written(tmp_path, f"folder/{row['label']}/{n:02}.txt", row["text"])
    found = [
        labelled_rows(ROWS),
        read_labelled(written(tmp_path, "a.csv", as_csv(ROWS))),
        read_labelled(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, ROWS)))),
    ]
    assert found[0].names == ("bad", "good") and len(found[0].train) == 16 and len(found[0].held_out) == 4
    assert sorted(label for _, label in found[0].held_out) == [0, 0, 1, 1]
    assert found[0] == found[1] == found[2]
    folder = read_labelled(tmp_path / "folder")
    assert sorted(folder.train + folder.held_out) == sorted(found[0].train + found[0].held_out)


def test_a_folder_with_a_test_part_and_a_data_set_with_named_classes(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for n in range(count):
            written(tmp_path, f"{part}/{'ab'[n % 2]}/{n}.txt", f"{part} {n}")
    found = read_labelled(tmp_path)
    assert {text for text, _ in found.held_out} == {"test 0", "test 1"} and len(found.train) == 4

    rows = type("Dataset", (list,), {})({"text": f"t{n}", "label": n % 2} for n in range(6))
    rows.features = {"label": type("ClassLabel", (), {"names": ["neg", "pos"]})()}
    told = labelled_rows(rows)
    assert told.names == ("neg", "pos")
    numbers = labelled_rows([{"text": f"t{n}", "label": (2, 10)[n % 2]} for n in range(6)])
    assert numbers.names == ("2", "10")


def test_evidence_stands_beside_its_text(tmp_path):
    rows = [*ROWS, {"text": "a good one", "label": "good", "evidence": [[2, 6]]}]
    assert labelled_rows(rows).evidence == {"a good one": ((2, 6),)}
    for wrong in ([[2, 60]], "no", [[3, 2]], [1]):
        with pytest.raises(RegardError, match="evidence of row 21"):
            labelled_rows([*ROWS, {"text": "a good one", "label": "good", "evidence": wrong}])


def test_texts_without_labels(tmp_path):
    lines = written(tmp_path, "a.txt", "one\n\n two \n")
    assert read_unlabelled(lines) == (["one", "two"], False)
    assert read_unlabelled(written(tmp_path, "a.csv", as_csv(ROWS))).labels_ignored
    assert read_unlabelled(written(tmp_path, "b.txt", "\n")) == ([], False)
    assert read_lexicon(written(tmp_path, "w.txt", "Good 1.5\nbad\n")) == {"good", "bad"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,kind\na,b\n", "no column 'label'; its columns are text, kind"),
        ("a.csv", "text,label\na,b\nc,b\n", "one class, 'b'; a classifier needs two"),
        ("a.csv", "text,label\na,b\nc,b\nd,e\n", "the class 'e' of .* has one text"),
        ("a.csv", "text,label\n,b\n", "row 1 of .* has no text"),
        ("a.csv", "text,label\na,\n", "row 1 of .* has no label"),
        ("a.csv", "text,label\n", "has no text; a classifier"),
        ("a.jsonl", "{", "line 1 of .* is no JSON"),
        ("a.jsonl", "[1]", "line 1 of .* is list"),
        ("a.jsonl", '{"words": "a"}', "row 1 of .* has no 'text'; it has words"),
        ("a.parquet", "x", "of no kind that is read"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, said):
    with pytest.raises(RegardError, match=said):
        read_labelled(written(tmp_path, name, content))


def test_what_else_is_refused(tmp_path):
    with pytest.raises(RegardError, match="there is no file"):
        read_labelled(tmp_path / "none.csv")
    with pytest.raises(RegardError, match="holds no texts"):
        read_labelled(tmp_path)
    with pytest.raises(RegardError, match="held_out is 1"):
        labelled_rows(ROWS, held_out=1)
    with pytest.raises(RegardError, match="class 'other', which no other text has"):
        labelled_rows(ROWS, [{"text": "x", "label": "other"}])
    (tmp_path / "latin.csv").write_bytes("text,label\né,a\n".encode("latin-1"))
    with pytest.raises(RegardError, match="not UTF-8"):
        read_labelled(tmp_path / "latin.csv")
    with pytest.raises(RegardError, match="no word"):
        read_lexicon(written(tmp_path, "none.txt", "\n"))


def test_made_sentences_are_told_apart_by_their_cues():
    made = cue_sentences(400, 200, unlabelled=50, plain=50, seed=3)
    words = [set(cues) for cues in CUES]

    def counted(text, label):
        found = text.split()
        return sum(w in words[label] for w in found), sum(w in words[1 - label] for w in found), len(found)

    for text, label in made.held_out:
        own, other, length = counted(text, label)
        assert other <= 1 and own > other and 8 <= length <= 24
    wrong = sum(counted(text, label)[0] < counted(text, label)[1] for text, label in made.train)
    assert 8 <= wrong <= 34
    assert not any(made.evidence & set(text.split()) for text in made.plain)
    assert all(made.evidence & set(text.split()) for text in made.unlabelled)
    assert cue_sentences(4, 2, seed=1) == cue_sentences(4, 2, seed=1) != cue_sentences(4, 2, seed=2)
    for wrong_options in ({"train": 0}, {"noise": 2.0}):
        with pytest.raises(RegardError):
            cue_sentences(**wrong_options)


def test_a_tokenizer_of_any_text():
    found = text_tokenizer(["Good, in 1999!", "good in 7 ways!"])
    assert found.convert_ids_to_tokens(found("GOOD 12 ways!")["input_ids"]) == ["good", "qqq", "[UNK]", "!"]
    assert found.pad_token_id == 0 and len(text_tokenizer(["a b c d", "a b c d"], size=6)) == 6
