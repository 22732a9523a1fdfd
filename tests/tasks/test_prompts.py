"""Prompt pairs: answers are what the texts say, corrupt sides differ as stated, split words are left out."""

import re

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regard.errors import RegardError, ShapeMismatch
from regard.tasks import colored_objects as colours
from regard.tasks import docstring as doc
from regard.tasks import greater_than as later
from regard.tasks import ioi as given
from regard.tasks import multiple_choice as choice
from regard.tasks.prompts import Prompts, single_token

PIECES = r"""'s| ?[A-Za-z]+|\d| ?[^\sA-Za-z0-9]+|\n+|\s+(?!\S)|\s+"""


def tokenizer(without=(), numbers="digits"):
    """One token for each word with its space, but for those in `without`, whose first letters are apart."""
    words = sorted({w for text in _texts() for w in re.findall("[A-Za-z]+", text)} - set(without))
    marks = ["):", ' """', "\n\n", "   ", "    ", " :", " (", ":\n"]
    ids = [f"{n:02d}" for n in range(100)] if numbers == "pairs" else list("0123456789")
    known = ["<?>", "\n", *(chr(c) for c in range(32, 127)), *marks, *ids, *words, *(f" {w}" for w in words)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(known))}, "<?>"))
    pattern = PIECES.replace("\\d", "\\d\\d" if numbers == "pairs" else "\\d")
    halves = [pre_tokenizers.Split(Regex(f"{word[:-1]}(?={word[-1]})"), "isolated") for word in without]
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), *halves])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<?>")


def _texts():
    yield from (*given.TEMPLATES, *given.NAMES, *given.PLACES, *given.OBJECTS, *doc.WORDS, *doc.SAID)
    yield from (*later.NOUNS, *colours.OBJECTS, *colours.COLOURS, *colours.SURFACES, *colours.VERBS)
    yield from (c.title() for c in colours.COLOURS)
    for kind, members in choice.KINDS.items():
        yield from (kind, *members)
    yield "def self param Question Which of these is Answer Q A What color the On an and year I In"
    yield "The lasted from to a " + " ".join(choice.LETTERS)


TASKS = {
    "ioi": given.ioi,
    "greater_than": later.greater_than,
    "docstring": doc.docstring,
    "colored_objects": colours.colored_objects,
    "multiple_choice": choice.multiple_choice,
}


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_aligned_prompts(name):
    made = [TASKS[name](tokenizer(), 12, seed=3) for _ in range(2)]
    assert [p.clean for p in made[0].pairs] == [p.clean for p in made[1].pairs]
    assert [p.clean for p in TASKS[name](tokenizer(), 12, seed=4).pairs] != [p.clean for p in made[0].pairs]
    made[0].require_aligned()
    assert made[0].task == name and len(made[0]) == 12 and not made[0].left_out
    for pair in made[0].pairs:
        assert pair.clean != pair.corrupt and set(pair.correct).isdisjoint(pair.wrong)
        assert pair.places["END"] == len(pair.clean_ids) - 1
        assert 0 not in pair.clean_ids.tolist()


@pytest.mark.parametrize("corrupt", given.CORRUPTIONS)
def test_the_indirect_object_is_the_name_said_once(corrupt):
    words = tokenizer()
    for pair in given.ioi(words, 24, corrupt=corrupt).pairs:
        names = re.findall("|".join(rf"\b{n}\b" for n in given.NAMES), pair.clean)
        once = [n for n in names if names.count(n) == 1]
        assert pair.correct == (single_token(words, f" {once[0]}"),)
        at = {k: words.decode([int(pair.clean_ids[v])]).strip() for k, v in pair.places.items()}
        assert at["IO"] == once[0] and at["S1"] == at["S2"] != once[0] and at["END"] == "to"
        assert pair.places["S1+1"] == pair.places["S1"] + 1
        other = re.findall("|".join(rf"\b{n}\b" for n in given.NAMES), pair.corrupt)
        if corrupt == "swap":
            assert other[:2] == names[:2] and other[2] == once[0]
        else:
            assert len(set(other)) == 3
        assert set(other).isdisjoint(names) == (corrupt == "abc")
    orders = given.ioi(words, 8, order="ABBA")
    assert bool((orders.places("IO") < orders.places("S1")).all())


@pytest.mark.parametrize("numbers", ["digits", "pairs"])
def test_later_years_are_correct(numbers):
    words = tokenizer(numbers=numbers)
    for pair in later.greater_than(words, 20).pairs:
        begun = int(re.search(r"year \d\d(\d\d) to", pair.clean)[1])
        said = [[int(words.decode([i])) for i in side] for side in (pair.correct, pair.wrong)]
        if numbers == "pairs":
            assert said == [list(range(begun + 1, 100)), list(range(begun + 1))]
        else:
            assert said == [list(range(begun // 10 + 1, 10)), list(range(begun // 10))]
        assert re.search(r"year \d\d01 to", pair.corrupt)


def test_the_next_argument_is_the_answer():
    words = tokenizer()
    for pair in doc.docstring(words, 10).pairs:
        head = re.search(r"self, (.*)\):", pair.clean)[1].split(", ")
        described = re.findall(r":param (\w+)", pair.clean)
        after = head[head.index(described[-1]) + 1]
        assert pair.correct == (single_token(words, f" {after}"),) and len(pair.wrong) == 5
        at = {k: words.decode([int(pair.clean_ids[v])]).strip() for k, v in pair.places.items()}
        assert at["B_head"] == at["B_doc"] == described[-1] and at["C_head"] == after


def test_the_colour_is_that_of_the_thing_asked_for():
    words = tokenizer()
    for pair in colours.colored_objects(words, 10).pairs:
        question = pair.clean.rpartition("Q:")[2]
        listed = dict((b, a) for a, b in re.findall(r"an? (\w+) (\w+)", question))
        asked = re.search(r"is the (\w+)\?", question)[1]
        assert pair.correct == (single_token(words, f" {listed[asked].title()}"),)
        assert re.search(r"is the (\w+)\?\nA:$", pair.corrupt)[1] in set(listed) - {asked}


@pytest.mark.parametrize("corrupt", choice.CORRUPTIONS)
def test_the_letter_is_that_of_the_kind_asked_for(corrupt):
    words = tokenizer()
    prompts = choice.multiple_choice(words, 16, corrupt=corrupt)
    for side in ("clean", "corrupt"):
        answers = []
        for pair in prompts.pairs:
            text = getattr(pair, side)
            kind = re.search(r"is (.*)\?", text)[1]
            right = [a for a, b in re.findall(r"([A-D])\. (\w+)", text) if b in choice.KINDS[kind]]
            assert len(right) == 1
            answers.append(single_token(words, f" {right[0]}"))
        if side == "clean":
            assert answers == [pair.correct[0] for pair in prompts.pairs]
            assert sorted(answers.count(a) for a in set(answers)) == [4] * 4
        else:
            assert all(a in pair.wrong for a, pair in zip(answers, prompts.pairs, strict=True))


def test_split_names_are_left_out_and_told():
    words = tokenizer(without=("Mary", "Peter"))
    prompts = given.ioi(words, 40)
    assert set(prompts.left_out) == {"Mary", "Peter"} and "Mary" in repr(prompts)
    assert not any(re.search("Mary|Peter", pair.clean + pair.corrupt) for pair in prompts.pairs)
    with pytest.raises(RegardError, match="0 of 2 names and the task needs 6"):
        given.ioi(words, 4, names=("Mary", "Peter"))


def test_metrics_compare_correct_with_wrong():
    prompts = later.greater_than(tokenizer(), 3)
    logits = torch.zeros(3, 4000)
    logits[0, list(prompts.pairs[0].correct)] = 50.0
    logits[1, list(prompts.pairs[1].wrong)] = 50.0
    score = prompts.score(logits)
    assert score[0] > 0.99 and score[1] < -0.99 and abs(score[2]) < 0.01
    assert prompts.accuracy(logits).tolist() == [True, False, False]
    names = given.ioi(tokenizer(), 2)
    found = names.score(torch.arange(4000.0).repeat(2, 1))
    assert found.tolist() == [p.correct[0] - p.wrong[0] for p in names.pairs]
    with pytest.raises(ShapeMismatch, match=r"must be \[2, vocabulary\]"):
        names.score(logits)


def test_lengths_are_parted_and_refused():
    prompts = given.ioi(tokenizer(), 12)
    parts = prompts.by_length()
    assert sum(map(len, parts)) == 12 and all(isinstance(part, Prompts) for part in parts) and len(parts) > 1
    assert parts[0].ids().shape[0] == len(parts[0]) and parts[0].ids("corrupt").shape == parts[0].ids().shape
    with pytest.raises(ShapeMismatch, match="by_length"):
        prompts.ids()
    with pytest.raises(RegardError, match="has no place 'S3'; it has IO, S1"):
        prompts.places("S3")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: given.ioi(t, 0), "count is 0"),
        (lambda t: given.ioi(t, order="AB"), "order is 'AB'"),
        (lambda t: given.ioi(t, corrupt="noise"), "corrupt is 'noise'"),
        (lambda t: given.ioi(t, templates=["{A} and {B}"]), "lacks {S}"),
        (lambda t: choice.multiple_choice(t, options=1), "options is 1"),
        (lambda t: choice.multiple_choice(t, corrupt="x"), "corrupt is 'x'"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(RegardError, match=re.escape(said)):
        make(tokenizer())
