"""Options are scored as a loop over whole sequences scores them, edits and all."""

import inspect

import pytest
import torch

import regard
from regard import Prompt, score_options
from regard.errors import RegardError
from regard.runtime.edits.bias import ScoreBias
from regard.runtime.option_scores import OptionScores
from tests.support.characters import characters

CITIES = [
    Prompt(question="The capital of France is the city of", options=["Paris", "Rome", "Oslo"], right=0),
    Prompt(question="Rome lies in the country", options=["Spain", "Italy", "France"], right=1),
]
LONG = [
    Prompt(
        facts="Ann has a red kite.", question="What does Ann have?", options=["a red kite", "a cat"], right=0
    ),
    Prompt(question="Snow is", options=["white", "as black as coal", "green"], right=0),
]


def by_hand(model, tokenizer, prompt, chat=False, edit=None):
    """Log-probability of each option, from all logits of one unpadded sequence at a time."""
    text = prompt.rendered(tokenizer if chat else None)[0]
    front = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    found = []
    for answer in prompt.answers:
        gap = "" if text.endswith(("\n", "(", " ")) else " "
        ids = tokenizer(text + gap + answer, add_special_tokens=not chat)["input_ids"]
        with torch.no_grad():
            if edit is None:
                logits = model(torch.tensor([ids])).logits
            else:
                mask = torch.zeros(1, len(ids), dtype=torch.bool)
                mask[0, : len(tokenizer(prompt.facts[0])["input_ids"])] = True
                with regard.steer(model, edit, spans={"facts": mask}):
                    logits = model(torch.tensor([ids])).logits
        said = logits[0].float().log_softmax(-1)
        found.append(sum(float(said[at - 1, ids[at]]) for at in range(len(front), len(ids))))
    return found


@pytest.mark.real
@pytest.mark.parametrize("prompts, chat", [(CITIES, False), (LONG, False), (LONG[1:], True)])
def test_it_is_what_a_loop_finds(smollm, prompts, chat):
    model, tokenizer = smollm
    found = score_options(model, tokenizer, prompts, chat=chat, batch_size=3)
    for row, prompt in enumerate(prompts):
        wanted = torch.tensor(by_hand(model, tokenizer, prompt, chat))
        torch.testing.assert_close(found.log_probs[row, : len(wanted)], wanted, atol=2e-3, rtol=1e-4)
        assert (found.log_probs[row, len(wanted) :] == -torch.inf).all()


@pytest.mark.real
def test_single_tokens_need_one_position_and_one_row(smollm, monkeypatch):
    model, tokenizer = smollm
    seen = []
    forward = model.forward

    def spy(*args, **kwargs):
        seen.append((kwargs["input_ids"].shape[0], kwargs["logits_to_keep"]))
        return forward(*args, **kwargs)

    spy.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", spy)
    found = score_options(model, tokenizer, CITIES, chat=False)
    assert seen == [(2, 1)] and found.correct().tolist() == [True, True]
    assert (found.tokens == 1).all()


@pytest.mark.real
def test_edits_find_the_parts(smollm):
    model, tokenizer = smollm
    edit = ScoreBias(3.0, span="facts")
    found = score_options(model, tokenizer, LONG[:1], chat=False, edits=[edit])
    wanted = torch.tensor([by_hand(model, tokenizer, LONG[0], edit=edit)])
    torch.testing.assert_close(found.log_probs, wanted, atol=2e-3, rtol=1e-4)
    plain = score_options(model, tokenizer, LONG[:1], chat=False)
    assert (found.log_probs - plain.log_probs).abs().max() > 0.01


def test_what_is_read_from_scores():
    scores = OptionScores(
        torch.tensor([[-1.0, -2.0], [-4.0, -3.0]]), torch.tensor([[1, 4], [4, 1]]), torch.tensor([0, 0])
    )
    assert scores.chosen().tolist() == [0, 1] and scores.chosen(per_token=True).tolist() == [1, 0]
    assert scores.correct().tolist() == [True, False]
    assert scores.margin().tolist() == [1.0, -1.0]
    torch.testing.assert_close(scores.log_loss(), torch.tensor([0.31326, 1.31326]), atol=1e-4, rtol=0)
    unknown = OptionScores(scores.log_probs, scores.tokens, None)
    with pytest.raises(RegardError, match="not known which options are right"):
        unknown.correct()


@pytest.mark.real
@pytest.mark.parametrize(
    "prompt, message",
    [
        (Prompt(question="Who?", options=["me"]), "has 1 options; a choice needs 2"),
        (Prompt(question="Who?", options=["me", "me"]), "are the same tokens"),
    ],
)
def test_refusals(smollm, prompt, message):
    with pytest.raises(RegardError, match=message):
        score_options(*smollm, [prompt], chat=False)
    with pytest.raises(RegardError, match="batch_size is 0"):
        score_options(*smollm, CITIES, batch_size=0)


def test_an_option_that_is_one_token_with_what_stands_before_it():
    tokenizer = characters(joined=["(A"])
    asked = Prompt(question="Which?", options=["me", "you"], labels="AB", begun="(")
    with pytest.raises(RegardError, match=r"the option 'A' does not begin with a token of its own after"):
        score_options(None, tokenizer, [asked])
