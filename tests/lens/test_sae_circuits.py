"""Sparse codes of heads: planted circuits are found, counts are counts, vectors are what hooks see."""

import re

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss, normalize
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from regard.errors import NoSuchSite, RegardError
from regard.lens.circuits import (
    Codes,
    HeadResults,
    baseline_scores,
    evaluate,
    head_results,
    sae_scores,
    score_results,
)
from regard.lens.circuits.dictionary import train_dictionary
from regard.models.tiny_llama import random_llama
from regard.runtime import HeadTable
from regard.studies.sae_circuits_parts import planted, planted_aucs, shuffled
from tests.tasks.test_prompts import tokenizer

NONE = dict(bos_token_id=None, eos_token_id=None)


def llama():
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **NONE,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, **NONE))


def made(family=llama):
    torch.manual_seed(0)
    model = family().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.25)
    return model


def prompts(count, seed, lengths=(5, 9)):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(*lengths, (count,), generator=generator).tolist()
    return [torch.randint(3, 60, (n,), generator=generator) for n in drawn]


@pytest.mark.parametrize(("kind", "missed"), [("means", False), ("signs", True)])
def test_planted_circuits_are_found_also_where_means_are_equal(kind, missed):
    found = [planted_aucs(kind, 100, seed) for seed in (0, 1)]
    assert min(f["sae"] for f in found) > 0.95
    assert max(f["shuffled"] for f in found) < 0.75
    means = [f["diff"] for f in found]
    assert max(means) <= 0.65 if missed else min(means) > 0.97


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize(("pool", "skip"), [("mean", False), ("mean", True), ("last", False)])
def test_vectors_are_what_a_head_writes_without_padding(family, pool, skip):
    model, sides = made(family), (prompts(6, 1), prompts(6, 2))
    found = head_results(model, *sides, pool=pool, skip_first=skip, progress=False)
    name = "model.layers.1.self_attn.o_proj" if family is llama else "transformer.h.1.attn.c_proj"
    projection, kept = model.get_submodule(name), {}
    projection.register_forward_pre_hook(lambda _, x: kept.__setitem__("z", x[0]))
    weight = projection.weight if family is llama else projection.weight.T
    for number, ids in enumerate([*sides[0], *sides[1]]):
        with torch.no_grad():
            model(ids[None])
        z = kept["z"][0, :, 16:24]
        z = z[-1] if pool == "last" else z[int(skip) :].mean(0)
        at = found.names.index(("text.1", 2))
        torch.testing.assert_close(found.vectors[number, at], weight[:, 16:24] @ z, rtol=1e-4, atol=1e-5)
    assert found.positive.tolist() == [True] * 6 + [False] * 6


def reference_training(x, n_codes, l1, epochs, norm, seed):
    """The official modules in our own words: tied bias, unit norms set each time, parallel parts removed."""
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = (
        torch.randn(n_codes, x.shape[1], generator=g),
        torch.randn(x.shape[1], n_codes, generator=g),
    )
    offset = (2 * torch.rand(n_codes, generator=g) - 1) / x.shape[1] ** 0.5
    encoder, decoder, offset, bias = (
        p.requires_grad_() for p in (encoder, decoder, offset, torch.zeros(x.shape[1]))
    )
    optimizer, axis = torch.optim.Adam([encoder, decoder, offset, bias], 1e-3), int(norm == "official")
    for _ in range(epochs):
        with torch.no_grad():
            encoder.copy_(normalize(encoder, dim=1))
            decoder.copy_(normalize(decoder, dim=axis))
        c = torch.relu((x - bias) @ encoder.T + offset)
        loss = mse_loss(c @ decoder.T + bias, x) + l1 * c.abs().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        for p, d in ((encoder, 1), (decoder, axis)):
            p.grad -= (p.grad * p.detach()).sum(d, keepdim=True) * p.detach()
        optimizer.step()
    with torch.no_grad():
        return normalize(encoder, dim=1), offset, normalize(decoder, dim=axis), bias


@pytest.mark.parametrize("norm", ["atom", "official"])
def test_training_is_that_of_autograd(norm):
    torch.manual_seed(0)
    x = torch.randn(30, 12)
    found = train_dictionary(
        x, 9, l1=0.05, epochs=60, decoder_norm=norm, generator=torch.Generator().manual_seed(3)
    )
    encoder, offset, decoder, bias = reference_training(x, 9, 0.05, 60, norm, 3)
    for mine, theirs in ((found.encoder, encoder), (found.decoder, decoder), (found.encoder_bias, offset)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    c = torch.relu((x - bias) @ encoder.T + offset)
    torch.testing.assert_close(found.activations(x), c, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.reconstruct(c), c @ decoder.T + bias, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.activations(x).argmax(1), c.argmax(1))


def codes(values, positive=(1, 1, 1, 0, 0, 0)):
    names = tuple((f"text.{i // 2}", i % 2) for i in range(len(values[0])))
    return Codes(np.array(values), np.array(positive, bool), names, 10)


def test_codes_are_counted_as_sets():
    rng = np.random.default_rng(0)
    found = codes(rng.integers(0, 4, (6, 4)))
    with_it, without = found.values[:3], found.values[3:]
    for head in range(4):
        alone = set(with_it[:, head]) - set(without[:, head])
        every = set(with_it[:, head]) | set(without[:, head])
        assert found.nodes()[head] == len(alone)
        assert found.nodes(normalise=True)[head] == len(alone) / len(every)
        for other in range(4):
            p, n = (set(zip(x[:, head], x[:, other], strict=True)) for x in (with_it, without))
            expected = 0 if other == head else len(p - n)
            assert found.edges()[head, other] == expected
            assert found.edges(normalise=True)[head, other] == pytest.approx(expected / (len(p) + len(n)))
    layers = found.nodes(within_layer=True).reshape(2, 2)
    np.testing.assert_allclose(layers.sum(1), 1)
    order = np.argsort(-found.edges().ravel(), kind="stable")
    ends = [end for i in order for end in (i // 4, i % 4)][:8]
    assert found.counted().tolist() == [ends.count(h) for h in range(4)]


def test_codes_are_kept(tmp_path):
    found = codes([[1, 2]] * 6)
    found.save(tmp_path / "codes.safetensors")
    again = Codes.load(tmp_path / "codes.safetensors")
    assert (again.names, again.n_codes) == (found.names, 10) and (again.values == found.values).all()
    assert again.degenerate and not codes([[1, 2]] * 5 + [[1, 3]]).degenerate
    HeadTable.from_columns({"text.0": {"x": [1.0]}}).save(tmp_path / "heads.json")
    for path, said in (("heads.json", "holds no codes"), ("none.safetensors", "cannot read|holds no codes")):
        with pytest.raises(RegardError, match=said):
            Codes.load(tmp_path / path)
    with pytest.raises(RegardError, match="cannot write"):
        found.save(tmp_path / "no" / "codes.safetensors")


def table(*rows):
    return HeadTable.from_columns({f"text.{n}": {"score": row} for n, row in enumerate(rows)})


@pytest.mark.parametrize(
    ("scores", "auc"), [([0.9, 0.8, 0.1, 0.2], 1.0), ([0.1, 0.2, 0.8, 0.9], 0.0), ([1, 1, 1, 1], 0.5),
                        ([0.9, 0.5, 0.2, 0.5], 0.875)],
)  # fmt: skip
def test_areas_of_known_cases(scores, auc):
    found = evaluate(table(scores[:2], scores[2:]), [(0, 0), (0, 1)])
    assert found.auc == auc and np.isnan(found.within_layer)
    assert found.roc[0].tolist() == [0, 0] and found.roc[-1].tolist() == [1, 1]


def test_a_hand_count():
    scores = table([0.9, 0.1, 0.8], [0.7, 0.6, 0.2])
    found = evaluate(scores, [(0, 0), (1, 0), (1, 1), (0, 1)], k=3)
    assert (found.precision, found.recall) == (2 / 3, 1 / 2)
    assert found.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found.balanced_score == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert found.best == (("text.0", 0), ("text.0", 2), ("text.1", 0))
    assert found.within_layer == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert found.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4 + 4 / 6) / 4)


def test_circuits_that_cannot_be_told():
    scores = table([0.9, 0.1], [0.7, 0.6])
    none, all_ = evaluate(scores, []), evaluate(scores, [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert np.isnan(none.auc) and "no head" in none.said and np.isnan(all_.auc) and "every head" in all_.said
    with pytest.raises(NoSuchSite, match="head 10 of text"):
        evaluate(scores, "ioi")
    with pytest.raises(NoSuchSite, match=re.escape("text.2")):
        evaluate(scores, [(2, 0)])
    with pytest.raises(RegardError, match="twice"):
        evaluate(scores, [(0, 0), ("text.0", 0)])
    with pytest.raises(RegardError, match="1 heads have no score"):
        evaluate(table([float("nan"), 1.0], [1.0, 1.0]), [(0, 0)])
    grid = HeadTable.from_columns({f"text.{n}": {"score": list(range(12))} for n in range(12)})
    assert evaluate(grid, "ioi").k == 26 and evaluate(grid, "greater_than").k == 9


def test_scores_stand_beside_simpler_ones():
    model = made()
    found = sae_scores(
        model,
        prompts(6, 1),
        prompts(6, 2),
        n_codes=12,
        epochs=20,
        trials=2,
        train_examples=4,
        l1=0.001,
        progress=False,
    )
    assert set(found.table.columns) >= {
        "sae",
        "edges",
        "mean_diff",
        "paired_diff",
        "norm",
        "layer",
        "random",
        "dead",
    }
    assert found.table["layer"].tolist() == [0.0] * 4 + [1.0] * 4 and len(found.codes) == 2
    np.testing.assert_allclose(found.table["sae"], np.mean([c.nodes() for c in found.codes], 0))
    assert found.edges.shape == (8, 8)
    again = sae_scores(
        model,
        prompts(6, 1),
        prompts(6, 2),
        n_codes=12,
        epochs=20,
        trials=2,
        train_examples=4,
        l1=0.001,
        progress=False,
    )
    assert (again.codes[1].values == found.codes[1].values).all()
    texts = (["Mary and John", "A line"], ["Tom gave", "A list"])
    words = tokenizer()
    small = random_llama(len(words), width=16, layers=1, heads=2, mlp=24).eval()
    told = head_results(small, *texts, tokenizer=words, progress=False)
    ids = [[words(t, return_tensors="pt")["input_ids"][0] for t in side] for side in texts]
    torch.testing.assert_close(told.vectors, head_results(small, *ids, progress=False).vectors)


def test_simple_scores():
    results, _ = planted("means", 5, 0)
    with_it, without = results.vectors[:5], results.vectors[5:]
    expected = (with_it.mean(0) - without.mean(0)).norm(dim=-1)
    np.testing.assert_allclose(baseline_scores(results, "mean_diff"), expected, rtol=1e-5)
    np.testing.assert_allclose(
        baseline_scores(results, "paired_diff"), (with_it - without).norm(dim=-1).mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(
        baseline_scores(results, "norm"), results.vectors.norm(dim=-1).mean(0), rtol=1e-5
    )
    assert (baseline_scores(results, "random", seed=1) != baseline_scores(results, "random", seed=2)).any()
    with pytest.raises(RegardError, match="kind is 'guess'"):
        baseline_scores(results, "guess")


def test_a_dead_dictionary_is_said_to_be_one():
    results, circuit = planted("means", 10, 0)
    quiet = HeadResults(0.01 * results.vectors, results.positive, results.names)
    found = score_results(quiet, n_codes=5, l1=50.0, epochs=300, trials=1, progress=False)
    assert found.degenerate == 1 and found.dead == 1.0 and "one code alone" in found.said()
    assert evaluate(found.table, circuit, column="sae").auc == 0.5


def test_standardised_vectors_forget_how_much_a_head_writes():
    results, _ = planted("means", 20, 0)
    loud = HeadResults(results.vectors * torch.linspace(1, 100, 40)[:, None], results.positive, results.names)
    options = dict(n_codes=20, epochs=30, trials=1, standardise="head", progress=False)
    one, two = (score_results(x, **options).codes[0].values for x in (results, loud))
    assert (one == two).mean() > 0.99


def test_shuffled_labels_keep_their_number():
    positive = torch.arange(40) < 20
    assert shuffled(positive, 1).sum() == 20 and not torch.equal(shuffled(positive, 1), positive)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(positives=prompts(1, 0)), "1 positive and 6 negative"),
        (dict(positives=prompts(5, 0)), "give as many of each"),
        (dict(positives=prompts(6, 2)), "the same prompts"),
        (dict(positives=["a"] * 6), "give the tokenizer"),
        (dict(positives=[torch.zeros(2, 2)] * 6), "token ids [T]"),
        (dict(n_codes=1), "n_codes is 1"),
        (dict(l1=-1.0), "l1 is -1"),
        (dict(epochs=0), "epochs is 0"),
        (dict(decoder_norm="rows"), "decoder_norm is 'rows'"),
        (dict(standardise="all"), "standardise is 'all'"),
        (dict(train_examples=13), "there are 12 prompts"),
        (dict(trials=0), "trials is 0"),
        (dict(pool="max"), "pool is 'max'"),
        (dict(positives=[torch.tensor([5])] * 6, skip_first=True), "a prompt has 1 tokens"),
    ],
)
def test_bad_input(options, said):
    given = {"positives": prompts(6, 1), "negatives": prompts(6, 2), "progress": False, **options}
    with pytest.raises(RegardError, match=re.escape(said)):
        sae_scores(made(), **given)
