"""Pass keys: length, place and words of the prompt, and what a model's answer scores."""

from types import SimpleNamespace

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.passkey import Passkey, log_probability


class Words:
    """A tokenizer with a token a word."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_stands_where_it_is_said(depth):
    words = Words()
    task = Passkey(length=300, depth=depth, seed=3)
    prompt, answer = task.ids(words)
    assert prompt.shape == (1, 300) and answer.tolist() == [[words.known[task.key]]]
    places = (prompt[0] == words.known[f"{task.key}."]).nonzero()
    assert len(places) == 1 and abs(int(places) - depth * 300) < 30
    assert not torch.equal(prompt, Passkey(length=300, depth=depth, seed=4).ids(words)[0])
    assert torch.equal(prompt, task.ids(words)[0])


def test_an_answer_is_scored_by_its_own_tokens():
    def model(ids, logits_to_keep):
        logits = torch.zeros(1, logits_to_keep, 9)
        logits[0, 0, 4] = 5.0
        return SimpleNamespace(logits=logits)

    answers = [torch.tensor([[4]]), torch.tensor([[5]])]
    model.device = "cpu"
    right, wrong = (log_probability(model, torch.tensor([[1, 2]]), answer) for answer in answers)
    assert right[1] and not wrong[1] and right[0] > wrong[0] + 4.9


def test_what_cannot_be_made_is_refused():
    for options in ({"length": 0}, {"depth": 1.5}):
        with pytest.raises(RegardError, match="it must be"):
            Passkey(**options)
    with pytest.raises(RegardError, match="the key and the question take"):
        Passkey(length=5).ids(Words())
    with pytest.raises(RegardError, match="the novel has"):
        Passkey(length=10**7).ids(Words())
