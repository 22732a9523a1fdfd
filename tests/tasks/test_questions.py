"""Questions as prompts: labels stand where they say, files are read as MMLU writes them."""

import re

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.multiple_choice import KINDS
from regard.tasks.questions import LABELS, Question, Style, choices, read_questions, simple_questions
from regard.tasks.symbolic_choice import LETTERS, SymbolicChoice
from tests.support.characters import characters


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("style", [Style(), Style("", ". ", False)])
def test_labels_stand_where_they_say(labels, style):
    words = characters()
    questions = simple_questions(8, seed=1)
    asked = choices(words, questions, labels=labels, style=style, shots=simple_questions(2, seed=5), seed=2)
    assert asked.right.tolist() == [q.right for q in questions] == [0, 1, 2, 3] * 2
    for number, (ids, own) in enumerate(zip(asked.ids, asked.labels, strict=True)):
        for place, label in enumerate(own):
            at = int(asked.label_places[number, place])
            assert words.decode(ids[at]) == label
            assert words.decode(asked.label_ids[number, place]) in (label, f" {label}")
            option = questions[number].options[place]
            end = int(asked.option_places[number, place]) + 1
            assert "".join(words.convert_ids_to_tokens(ids[end - len(option) : end])) == option
        assert len(set(own)) == 4 and int(asked.ends[number]) == len(ids) - 1
        assert asked.texts[number].endswith("Answer: (" if style.before else "Answer:")
    assert ("intelligent AI" in asked.texts[0]) == style.preamble
    kinds = {
        "ABCD": lambda own: own == tuple("ABCD"),
        "next": lambda own: own[0] != "A" and ord(own[3]) - ord(own[0]) == 3,
        "random": lambda own: all(label.isupper() for label in own),
        "1234": lambda own: own == tuple("1234"),
        "shuffled": lambda own: sorted(own) == list("ABCD") and own != tuple("ABCD"),
    }
    assert all(kinds[labels](own) for own in asked.labels)


def test_simple_questions_have_one_answer():
    for question in simple_questions(20, seed=3, options=5):
        kind = question.text.removeprefix("Which of these is ").removesuffix("?")
        assert [option in KINDS[kind] for option in question.options] == [
            n == question.right for n in range(5)
        ]


def test_prompts_are_corrupted_by_others():
    asked = choices(characters(), simple_questions(8))
    assert all(asked.right[i] != asked.right[j] for i, j in enumerate(asked.others()))
    assert sorted(i for rows in asked.by_length() for i in rows) == list(range(8))
    with pytest.raises(RegardError, match="at the same place"):
        choices(characters(), [simple_questions(1)[0]] * 2).others()


def test_files_of_questions(tmp_path):
    path = tmp_path / "high_school_physics_test.csv"
    path.write_text('"Which, of these?",a,b,"c, d",e,C\nAnd now?,p,q,r,s,A\n', encoding="utf-8")
    first, second = read_questions(path)
    assert first == Question("Which, of these?", ("a", "b", "c, d", "e"), 2, "high school physics")
    assert second.right == 0
    assert "questions about high school physics." in choices(characters(), [first]).texts[0]
    for text, said in (
        ("", "holds no question"),
        ("Q,a,b\n", "line 1 of"),
        ("Q,a,b,c,d,E\n", "says 'E' is right; it has options A to D"),
        ("Q,a,b,c,d,A\nQ,a,b,c,A\n", "questions have 3 to 4 options"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RegardError, match=said):
            read_questions(path)
    with pytest.raises(RegardError, match="cannot read"):
        read_questions(tmp_path / "none.csv")


def test_bad_questions():
    words, questions = characters(), simple_questions(4)
    for given, said in (
        (dict(labels="abc"), "labels is 'abc'"),
        (dict(shots=simple_questions(1, options=3)), "questions have 3 to 4 options"),
    ):
        with pytest.raises(RegardError, match=re.escape(said)):
            choices(words, questions, **given)
    with pytest.raises(RegardError, match="options is 1"):
        simple_questions(1, options=1)
    with pytest.raises(RegardError, match="the label 'A' is not one token"):
        choices(characters(joined=("(A",)), questions)


def test_symbols():
    task = SymbolicChoice()
    for kind in ("ordered", "random"):
        asked = task.batch(200, kind, torch.Generator().manual_seed(0))
        assert int(asked.ids.max()) < task.vocabulary and asked.ids.shape == (200, 12)
        labels, options = asked.ids[:, task.places], asked.ids[:, task.places + 1]
        assert (
            torch.equal(labels, asked.labels)
            and (labels < 3 + LETTERS).all()
            and (options >= 3 + LETTERS).all()
        )
        assert torch.equal(options == asked.ids[:, 1:2], torch.arange(4) == asked.right[:, None])
        assert torch.equal(asked.answers, labels.gather(1, asked.right[:, None])[:, 0])
        assert (labels == torch.arange(3, 7)).all() == (kind == "ordered")
        assert asked.right.bincount().min() > 30
    with pytest.raises(RegardError, match="kind is 'any'"):
        task.batch(1, "any", torch.Generator())
    with pytest.raises(RegardError, match="options is 1"):
        SymbolicChoice(options=1)
