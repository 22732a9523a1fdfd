"""Facts in filler: where they stand, what is asked, held-out filler, and what is refused."""

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.filler_facts import FillerFacts, _filler

TASK = FillerFacts(length=40, symbols=8, facts=4, keys=6, values=5, questions=2, text=600)


def made(count=200, **options):
    return TASK.batch(count, torch.Generator().manual_seed(0), **options)


def test_every_question_has_its_fact_once_in_the_filler():
    batch = made()
    tokens = batch.tokens
    assert tokens.shape == (200, 41) and int(tokens.max()) == TASK.mark < TASK.vocabulary
    assert (tokens == TASK.mark).sum(1).tolist() == [2] * 200 and TASK.body == 35
    keys = (tokens >= 8) & (tokens < 14)
    assert (keys.sum(1) == 6).all() and (keys[:, :35].sum(1) == 4).all()
    for row in range(200):
        body = tokens[row, :35].tolist()
        for answer, place in zip(batch.answers[row].tolist(), batch.places[row].tolist(), strict=True):
            key, value = tokens[row, answer - 1].item(), tokens[row, answer].item()
            assert (
                body.index(key) == place - 1 and body[place] == value and tokens[row, answer - 2] == TASK.mark
            )
            assert value >= 14
    torch.testing.assert_close(batch.depths, batch.places / 34)
    assert 0.3 < float(batch.depths.mean()) < 0.7
    assert torch.equal(made().tokens, tokens)


def test_filler_goes_on_around_facts_and_is_held_out():
    corpus = _filler(8, 600, 0.05, 0)
    for held_out, text in ((False, corpus.train), (True, corpus.held_out)):
        windows = text.unfold(0, TASK.body - 2 * TASK.facts, 1)
        for row in made(5, held_out=held_out).tokens[:, : TASK.body]:
            assert bool((windows == row[row < 8]).all(1).any())


def test_right_answers_are_counted():
    batch = made(3)
    logits = torch.nn.functional.one_hot(batch.tokens[:, 1:], TASK.vocabulary + 1).float()
    assert TASK.right(logits, batch).all()
    at = int(batch.answers[1, 0]) - 1
    logits[1, at] = 0
    logits[1, at, 0] = 1.0
    assert TASK.right(logits, batch).tolist() == [[True, True], [False, True], [True, True]]
    assert TASK.chance == 0.25


def test_bad_sizes():
    for options, sentence in (
        ({"facts": 0}, "facts is 0"), ({"questions": 5}, "questions is 5, facts 4 and keys 6"),
        ({"length": 12}, "need a length of 13"), ({"text": 50}, "a text twice as long"),
    ):  # fmt: skip
        with pytest.raises(RegardError, match=sentence):
            FillerFacts(
                **{**dict(length=40, symbols=8, facts=4, keys=6, values=5, questions=2, text=600), **options}
            )
