"""Continue-tuning to mixture of heads: two stages, a balanced loss, going on, and what is refused."""

import copy

import pytest
import torch

from regard.attention import balance_loss
from regard.attention.moh import apply_moh, head_usage
from regard.errors import RegardError
from regard.objectives import next_token_loss, train
from regard.objectives.head_tuning import balanced, tune_heads
from regard.tasks.corpus import Corpus
from tests.attention.models import outputs
from tests.support.families import FAMILIES

SMALL = {"batch": 4, "length": 12, "windows": 4, "rate": 1e-2}


def text(seed=0):
    """Rounds of 16 tokens, which can be foretold."""
    tokens = torch.arange(5, 21).repeat(60)
    return Corpus(tokens[:800], tokens[800:], 99)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_stages_are_training_then_training_with_routed_heads():
    model = FAMILIES["llama"].build()
    twin = copy.deepcopy(model)
    told = tune_heads(model, text(), 1, 2, "learned", steps=5, dense_steps=3, **SMALL)
    dense = train(twin, text(), steps=3, evaluate_every=3, **SMALL)
    apply_moh(twin, 1, 2, "learned")
    routed = train(twin, text(), steps=5, evaluate_every=5, loss=balanced(), **SMALL)
    assert same(model, twin)
    assert told.dense.losses == dense.losses and told.routed.losses == routed.losses
    assert [step for step, _ in told.routed.held_out] == [0, 5]
    assert any(p.abs().sum() > 0 for p in model.model.layers[0].self_attn.head_router.parameters())


@pytest.mark.parametrize("kind", ["query_norm", "learned"])
def test_tuning_lowers_what_routing_cost(kind):
    model = FAMILIES["llama"].build()
    told = tune_heads(model, text(), 1, 1, kind, steps=24, dense_steps=24, **SMALL)
    (_, before), (_, after) = told.routed.held_out
    assert told.dense.held_out[0][1] > 4 and after < min(before, 2.0)
    with head_usage(model) as usage:
        outputs(model, FAMILIES["llama"].inputs(model))
    assert (usage.heads.grid("on").sum(1) == 2).all()


def test_the_balanced_loss_adds_the_balance_in_training_alone():
    model = FAMILIES["llama"].build()
    apply_moh(model, 1, 2, "learned")
    tokens = torch.randint(5, 90, (2, 9))
    model.train()
    plain = next_token_loss(model, tokens)
    balance = balance_loss(model)
    torch.testing.assert_close(balanced(beta=0.5)(model, tokens), plain + 0.5 * balance)
    assert balanced(beta=0.0)(model, tokens) == plain
    model.eval()
    assert balanced(beta=0.5)(model, tokens) == next_token_loss(model, tokens)


def test_it_goes_on_from_its_files(tmp_path):
    whole, half = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    tune_heads(whole, text(), 1, 2, steps=4, dense_steps=2, **SMALL)
    again = copy.deepcopy(half)
    tune_heads(half, text(), 1, 2, steps=4, dense_steps=2, out=tmp_path, **SMALL)
    assert same(half, whole)
    shares = []
    tune_heads(again, text(), 1, 2, steps=4, dense_steps=2, out=tmp_path, tick=shares.append, **SMALL)
    assert same(again, whole) and not shares
    with pytest.raises(RegardError, match="another"):
        tune_heads(FAMILIES["llama"].build(), text(), 1, 1, steps=4, dense_steps=2, out=tmp_path, **SMALL)


def test_progress_goes_from_the_first_stage_to_the_second():
    shares = []
    tune_heads(FAMILIES["llama"].build(), text(), 1, 2, steps=2, dense_steps=2, tick=shares.append, **SMALL)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_wrong_arguments_are_refused_before_anything_is_trained():
    model = FAMILIES["llama"].build()
    before = copy.deepcopy(model)
    for options, words in (
        ({"shared": 4, "active": 1}, "more than the 4 heads"),
        ({"shared": 1, "active": 1, "kind": "norm"}, "kind is 'norm'"),
        ({"shared": 1, "active": 1, "beta": -1}, "beta is -1; it must be a number from 0"),
        ({"shared": 1, "active": 1, "dense_steps": 1.5}, "dense_steps is 1.5"),
        ({"shared": 1, "active": 1, "steps": 0}, "steps is 0"),
    ):
        with pytest.raises(RegardError, match=words):
            tune_heads(model, text(), **{"steps": 2, "dense_steps": 2, **SMALL, **options})
    assert same(model, before) and not hasattr(model.model.layers[0].self_attn, "head_router")
