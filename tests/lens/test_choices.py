"""Multiple choice: what a model says of labels and content, what heads do to labels, and where they look."""

import numpy as np
import pytest
import torch

from regard.errors import RegardError
from regard.lens.circuits import Answered, ChoiceHeads, answer_choices, categorise
from regard.models.tiny_llama import random_llama
from regard.runtime import HeadTable, attribute_logits
from regard.runtime.node_effects import node_effects
from regard.tasks.questions import choices, simple_questions
from tests.support.characters import characters


@pytest.fixture(scope="module")
def words():
    return characters()


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    made = random_llama(len(words), width=16, layers=2, heads=4, mlp=24)
    made.set_attn_implementation("eager")
    made.config.max_position_embeddings = 512
    for p in made.parameters():
        torch.nn.init.normal_(p, 0.0, 0.25)
    return made.eval()


@pytest.fixture(scope="module")
def asked(words):
    return choices(words, simple_questions(12, seed=1))


@torch.no_grad()
def test_answers_are_those_of_the_labels_and_of_the_words(model, words, asked):
    found = answer_choices(model, asked, tokenizer=words)
    for number, (ids, question) in enumerate(zip(asked.ids, asked.questions, strict=True)):
        logits = model(ids[None]).logits[0, -1][asked.label_ids[number]]
        torch.testing.assert_close(found.labels[number], logits, rtol=1e-4, atol=1e-5)
        front = len(words(f"Question: {question.text}\nAnswer:")["input_ids"])
        for place, option in enumerate(question.options):
            whole = torch.tensor(words(f"Question: {question.text}\nAnswer: {option}")["input_ids"])
            said = model(whole[None]).logits[0].log_softmax(-1)
            expected = torch.stack([said[i - 1, whole[i]] for i in range(front, len(whole))]).mean()
            torch.testing.assert_close(found.content[number, place], expected, rtol=1e-4, atol=1e-5)
    hits = found.labels.argmax(1) == asked.right
    assert found.by_label == pytest.approx(float(hits.float().mean())) and found.chance == 0.25
    own = found.labels.gather(1, asked.right[:, None])[:, 0]
    torch.testing.assert_close(found.net, own - (found.labels.sum(1) - own) / 3)


def test_who_does_no_better_than_chance_is_told():
    right = torch.arange(40) % 4
    good = torch.nn.functional.one_hot(torch.where(torch.arange(40) < 20, right, 0), 4).float()
    same = torch.nn.functional.one_hot(torch.zeros(40, dtype=torch.int64), 4).float()
    assert Answered(good, None, right).does_task and not Answered(same, None, right).does_task
    assert Answered(same, None, right).favourite == 1.0 and np.isnan(Answered(same, None, right).by_content)
    assert "does not do the task" in Answered(same, None, right).said()


@torch.no_grad()
def test_matrices_are_effects_by_right_place(model, asked):
    found = categorise(model, asked, totals=True, progress=False)
    effects = torch.zeros(12, 2, 4, 4)
    looks = torch.zeros(12, 2, 4, 3)
    for number, ids in enumerate(asked.ids):
        parts = attribute_logits(model, {"input_ids": ids[None]}, asked.label_ids[number])
        effects[number] = parts.heads[:, :, 0].float()
        c = int(asked.right[number])
        places = [int(asked.label_places[number, c]), int(asked.option_places[number, c]), len(ids) - 1]
        rows = model(ids[None], output_attentions=True).attentions
        looks[number] = torch.stack([row[0, :, -1, places] for row in rows])
    centred = effects - effects.mean(-1, keepdim=True)
    expected = torch.stack([centred[asked.right == c].mean(0) for c in range(4)], 2).flatten(0, 1)
    np.testing.assert_allclose(found.matrices, expected, rtol=1e-3, atol=1e-5)
    diagonal = expected.diagonal(dim1=1, dim2=2).mean(1)
    np.testing.assert_allclose(found.table["diagonal"], diagonal, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.table["uniform"], effects.mean((0, 3)).flatten(), rtol=1e-3, atol=1e-5)
    own = effects.gather(3, asked.right[:, None, None, None].expand(-1, 2, 4, 1))[..., 0]
    net = (own - (effects.sum(3) - own) / 3).mean(0).flatten()
    np.testing.assert_allclose(found.table["net"], net, rtol=1e-3, atol=1e-5)
    for column, name in enumerate(("to_label", "to_option", "to_self")):
        expected = looks[..., column].mean(0).flatten()
        np.testing.assert_allclose(found.table[name], expected, rtol=1e-3, atol=1e-6)
    assert found.total == pytest.approx(float(answer_choices(model, asked).net.mean()), rel=1e-3, abs=1e-5)
    assert found.nodes and (np.abs(found.table["total"]) > 0).any() and "shuffled" in found.table.columns


def test_totals_are_those_of_patched_nodes(model, words):
    asked = choices(words, simple_questions(8, seed=2))
    found = categorise(model, asked, totals=True, progress=False)
    lost, lengths = 0.0, [len(ids) for ids in asked.ids]
    for i, ids in enumerate(asked.ids):
        c = int(asked.right[i])
        later = [(i + step) % 8 for step in range(1, 8)]
        other = [j for j in later if asked.right[j] != c]
        j = next((j for j in other if lengths[j] == lengths[i]), other[0])
        answers = torch.tensor(
            [[asked.label_ids[i, c], *(asked.label_ids[i, k] for k in range(4) if k != c)]]
        )
        one = node_effects(model, {"input_ids": ids[None]}, {"input_ids": asked.ids[j][None]}, answers)
        lost = lost - one.heads["total"] / 8
    np.testing.assert_allclose(found.table["total"], lost, rtol=1e-3, atol=1e-5)
    assert np.abs(lost).max() > 1e-4


def heads(**columns):
    base = dict(diagonal=0.0, off=0.0, shuffled=0.0, single=0.0, rest=0.0, letter=0.0, uniform=0.0, size=0.0,
                net=0.0, to_label=0.0, to_option=0.0, to_self=0.0, total=0.0)  # fmt: skip
    return HeadTable.from_columns({"text.0": {name: [x] for name, x in (base | columns).items()}})


def roles(knows=True, **columns):
    right = torch.arange(40) % 4
    labels = torch.nn.functional.one_hot(right if knows else right * 0, 4).float()
    made = ChoiceHeads(heads(**columns), np.zeros((1, 4, 4)), Answered(labels, None, right), (), 0.0)
    return {role for role, found in made.roles().items() if found}


def test_roles():
    carries = dict(diagonal=1.0, off=0.3, to_label=0.9, net=1.3)
    assert roles(**carries) == {"correct letter"} and roles(knows=False, **carries) == set()
    assert roles(**carries | {"off": 0.6}) == roles(**carries | {"to_label": 0.1}) == set()
    assert roles(single=0.5, rest=0.1) == roles(False, single=0.5, rest=0.1) == {"single letter"}
    assert roles(uniform=-2.0, size=0.3) == {"uniform"} and roles(uniform=0.5, size=0.3) == set()
    assert roles(to_self=0.8, net=0.4) == {"amplifier"} and roles(to_self=0.8, net=0.01) == set()
    assert roles(to_option=0.5, total=0.6, net=0.05) == {"gatherer"}
    assert roles(to_option=0.5, total=0.6, net=0.5) == set()


def test_places_that_are_never_right(model, words):
    with pytest.raises(RegardError, match="option 3 is never the right one"):
        categorise(model, choices(words, simple_questions(2)))
