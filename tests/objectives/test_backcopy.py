"""Bigram-Backcopy: the task as its paper draws it, the small model, and training that can be gone on with."""

import numpy as np
import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.models.backcopy import BackcopyModel
from regard.objectives.backcopy import BackcopyRecipe, look_inside, train_backcopy
from regard.tasks import bigram_backcopy


def drawn_one_by_one(task, rng):
    """A sequence as the official code draws it, one numpy choice a token."""
    ids = np.arange(task.vocabulary)
    begun = task.unigram.copy()
    begun[list(task.triggers)] = 0
    found = [task.front, rng.choice(ids, p=begun / begun.sum())]
    while len(found) <= task.length:
        drawn = rng.choice(ids, p=task.following[found[-1]])
        found.append(found[-2] if found[-1] in task.triggers else drawn)
    return found


def test_sequences_are_those_of_the_paper_for_one_generator():
    task = bigram_backcopy(length=40)
    rng, other = (np.random.default_rng(3) for _ in range(2))
    expected = [drawn_one_by_one(task, rng) for _ in range(6)]
    assert task.draw(6, other).tolist() == expected
    assert rng.random() == other.random()


def test_the_packaged_table_is_tiny_shakespeare():
    task = bigram_backcopy()
    assert task.vocabulary == 67 and [task.symbols[i] for i in task.triggers] == ["t", "e", " "]
    assert [round(float(task.unigram[i]), 3) for i in task.triggers] == [0.060, 0.085, 0.152]
    tokens = task.draw(32, 0)
    assert not (tokens[:, 1:] >= task.front).any()
    assert 2.1 < task.oracle(tokens).other < 2.4 and task.oracle(tokens).trigger == 0


def test_any_text_can_be_given():
    task = bigram_backcopy("abacabad" * 3, triggers=1, length=6)
    assert task.symbols == ("a", "b", "c", "d", "<s>", "<d>") and task.triggers == (0,)
    assert task.following[2, 0] == 1
    tokens = task.draw(4, 1)
    calls = tokens[:, :-1] == 0
    assert torch.equal(tokens[:, 2:][calls[:, 1:]], tokens[:, :-2][calls[:, 1:]])
    logits = torch.full((4, 6, 6), -30.0)
    logits.scatter_(2, tokens[:, 1:, None], 0.0)
    assert max(task.losses(logits, tokens)) < 1e-6


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("attention", ["softmax", "relu"])
def test_the_model_is_its_formula(attention, heads):
    torch.manual_seed(0)
    model = BackcopyModel(9, dim=8, heads=heads, attention=attention, longest=7).double()
    tokens = torch.randint(9, (2, 7))
    layer, attend = model.layers[0], model.layers[0].attention
    h = model.tok_embeddings(tokens) + model.pos_embeddings.weight
    x = layer.attention_norm(h)
    mixed = []
    for q, k, v in zip(*(w(x).chunk(heads, -1) for w in (attend.wq, attend.wk, attend.wv)), strict=True):
        scores = q @ k.mT / (8 // heads) ** 0.5
        if attention == "softmax":
            weights = (scores + torch.full((7, 7), float("-inf")).triu(1)).softmax(-1)
        else:
            weights = scores.relu().tril() / torch.arange(1, 8)[:, None]
        mixed.append(weights @ v)
    h = h + torch.cat(mixed, -1) @ attend.wo.weight.T
    h = h + layer.ff.w2(layer.ff.w1(layer.ff_norm(h)).relu())
    expected = model.norm(h) @ model.output.weight.T
    torch.testing.assert_close(model(tokens), expected)
    trace = model.trace(tokens)
    torch.testing.assert_close(trace.logits, expected)
    torch.testing.assert_close(trace.residual[0], h.norm(dim=-1))
    by_head = attend.wv(x).unflatten(-1, (heads, -1))
    norms = torch.einsum("ohd,bthd->bhto", attend.wo.weight.unflatten(1, (heads, -1)), by_head).norm(dim=-1)
    torch.testing.assert_close(trace.written[0], norms)


def test_what_is_measured_on_a_planted_head():
    task = bigram_backcopy(length=16)
    model = BackcopyModel(task.vocabulary, dim=8, longest=16)
    tokens = task.draw(4, 0)
    given = tokens[:, :-1]

    class Planted:
        """Weights that rest on <s>, and on the token before at triggers."""

        def __call__(self, x):
            _, _, v = type(model.layers[0].attention).parts(model.layers[0].attention, x)
            weights = torch.zeros(4, 1, 16, 16)
            weights[..., 0] = 1
            calls = task.is_trigger(given)
            weights[:, 0][calls] = torch.eye(16).roll(-1, 1)[None].expand(4, 16, 16)[calls]
            return torch.zeros_like(weights), weights, v

    model.layers[0].attention.parts = Planted()
    found = look_inside(model, task, tokens)
    assert found["sink.0"] == 1 and found["copy.0"] == 1 and found["median_column.0"] < 0.2
    assert found["delta.0"] == 0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_training_lowers_the_loss_and_goes_on_from_its_file(tmp_path, name):
    task = bigram_backcopy(length=16)
    rate = 1e-2 if name == "adamw" else 0.3

    def train(steps, out=None):
        torch.manual_seed(0)
        model = BackcopyModel(task.vocabulary, dim=16, longest=16)
        recipe = BackcopyRecipe(steps=40, batch=16, rate=rate, optimiser_name=name)
        return train_backcopy(
            model, task, recipe, out=out, checkpoint_every=20, evaluate_every=20, held_out=8, tick=steps
        )

    whole = train(lambda share: None)
    assert whole.held_out[-1][1] < whole.held_out[0][1] - 0.5
    assert {"trigger_loss", "bigram_loss", "sink.0", "delta.0", "value.0", "residual.0"} <= set(
        whole.measures[0][1]
    )

    def stop(share):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stop, tmp_path)
    again = train(lambda share: None, tmp_path)
    assert again.losses == whole.losses


def test_refusals():
    task = bigram_backcopy(length=16)
    for make, said in [
        (lambda: bigram_backcopy("aaaa"), "one character that is none"),
        (lambda: bigram_backcopy("a"), "two at least"),
        (lambda: bigram_backcopy(length=1), "at least 2"),
        (lambda: BackcopyModel(9, attention="linear"), "softmax, relu"),
        (lambda: BackcopyModel(9, dim=9, heads=2), "heads must divide dim"),
        (lambda: train_backcopy(BackcopyModel(9, dim=8), task), "knows 9 tokens"),
        (lambda: BackcopyRecipe(optimiser_name="lion"), "adamw, sgd"),
    ]:
        with pytest.raises(RegardError, match=said):
            make()
    with pytest.raises(ShapeMismatch, match="up to 16"):
        BackcopyModel(9, dim=8, longest=16)(torch.zeros(1, 17, dtype=torch.long))
