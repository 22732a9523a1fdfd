"""The study of attention sinks: its parts against dense attention, and a quick run on the real model."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.studies import attention_sink_emergence as parts
from regard.studies import find_study, run
from regard.studies.picture import save_picture
from regard.tasks.passages import passages

EPS = 0.3


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run("attention-sink-emergence", quick=True)


@pytest.mark.real
def test_a_quick_run_finds_the_sink_and_not_where_there_is_none(outcome):
    assert outcome.value("natural") > 0.4 > 0.1 > outcome.value("second")
    assert outcome.value("random") > 0.4 and outcome.value("repeated") < 0.05
    assert outcome.value("untrained") < 0.05
    assert outcome.value("peak") > 20 and outcome.value("peak_repeated") == pytest.approx(1, abs=0.01)
    assert outcome.quick and len(outcome.measures["natural"]["values"]) == 3


@pytest.mark.real
def test_details_are_those_of_the_measures(outcome):
    told = outcome.details
    assert told["places"]["natural"][0][0] == pytest.approx(outcome.value("natural"), abs=1e-3)
    assert told["by_eps"]["random"][told["eps"].index(EPS)] == told["places"]["random"][0]
    assert told["by_length"]["0.3"][2][0] == pytest.approx(outcome.value("natural_128"), abs=1e-3)
    assert torch.tensor(told["alpha"]).shape == (30, 9)
    assert "0 of 3 passages began with one" in told["remarks"][0]


@pytest.mark.real
def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study("attention-sink-emergence")
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(3, 60, (1, 20))


def dense(model, ids, hide=None):
    """Alpha [layers, heads, T] and the loss, from the whole attention matrices; `hide` by the mask."""
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    if hide is not None:
        mask[hide + 1 :, hide] = float("-inf")
    done = model(ids, attention_mask=mask[None, None], output_attentions=True)
    counts = torch.arange(length, 0, -1)
    alpha = torch.cat(done.attentions).sum(2) / counts
    return alpha, torch.nn.functional.cross_entropy(done.logits[0, :-1], ids[0, 1:])


@torch.no_grad()
@pytest.mark.parametrize("hide", [None, 0, 4])
def test_sinks_equal_the_dense_computation(hide):
    model, ids = tiny()
    alpha, loss = dense(model, ids, hide)
    found = parts.sinks(model, ids, hide=hide)
    expected = [(alpha[..., k] > EPS).double().mean() for k in range(parts.PLACES)]
    torch.testing.assert_close(torch.tensor(found["places"]).double(), torch.stack(expected))
    assert 0 < sum(found["places"]) < parts.PLACES
    torch.testing.assert_close(torch.tensor(found["alpha"]), alpha[..., 0], atol=2e-5, rtol=0)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_hiding_a_token_changes_what_it_should():
    model, ids = tiny()
    plain, hidden = parts.sinks(model, ids), parts.sinks(model, ids, hide=0)
    assert torch.tensor(hidden["alpha"]).max() <= 1 / ids.shape[1] + 1e-5 < torch.tensor(plain["alpha"]).max()


def test_rates_at_a_length_are_those_of_the_shorter_text():
    model, _ = tiny()
    ids = torch.randint(3, 60, (1, 150))
    for length, found in parts.rates(model, ids).items():
        assert found == parts.sinks(model, ids[:, : int(length)], places=1)["eps"]


def test_random_tokens_are_never_special():
    study = find_study("attention-sink-emergence")
    made = study(study.quick, 0)

    class Words(list):
        all_special_ids = (0, 1, 7)

    made.tokenizer = Words(range(10))
    found = partial(made.random_tokens, 2000)()
    assert found.shape == (1, 2000) and set(found[0].tolist()) == {2, 3, 4, 5, 6, 8, 9}


def test_passages_are_long_enough_and_of_different_kinds():
    found = passages()
    assert len({p.name for p in found}) == len({p.kind for p in found}) == len(found) == 12
    assert all(110 < len(p.text.split()) < 190 and "\n" not in p.text for p in found)


def test_a_sink_emerges_in_training_behind_a_token_that_is_always_first():
    from regard.studies.attention_sink_emergence_training import trained

    found = trained("softmax", 0, 80, lambda share: None)
    assert found.sink[0] == 0 and found.sink[-1] > 0.18 and found.loss[-1] < found.loss[0] - 1
    assert found.steps[0] == 0 and found.steps[-1] == 80 and not any(found.taken)


def test_what_is_looked_at_is_the_formula():
    from regard.models.decoder import Decoder
    from regard.studies.attention_sink_emergence_training import looked_at

    torch.manual_seed(0)
    tokens = torch.randint(30, (3, 17))
    for spec in ("similarity", "key-value-bias"):
        model, kept = Decoder(30, dim=16, layers=1, heads=2, mechanism=spec), []
        layer = model.layers[0].attention.mechanism
        with torch.no_grad():
            model.layers[0].attention.queries.weight.mul_(30)
            hook = layer.register_forward_hook(lambda m, given, out, to=kept: to.append(given))
            found = looked_at(model, tokens)
            hook.remove()
            q, k, _, ctx = kept[-1]
            weights = layer.matrix(q, k, ctx)
        sums = weights.sum(-1, keepdim=True)
        shares = weights / sums if spec == "similarity" else weights
        taken = 0.0 if spec == "similarity" else float((1 - sums).mean())
        assert found["sink"] == pytest.approx(float((shares[..., 0].mean(-1) > EPS).float().mean()))
        assert found["taken"] == pytest.approx(taken, abs=1e-5)
