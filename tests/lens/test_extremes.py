"""Sinks, drains and peaks of texts in one table, and their contrast between two domains."""

import numpy as np
import pytest
import torch
import transformers as tf

import regard
from regard.errors import RegardError, ShapeMismatch
from regard.lens import ColumnMass, ResidualNorm, SinkLogit, Sinks, ValueNorm, compare_sinks, measure_sinks
from regard.lens.extremes.pieces import cut
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def texts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 97, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("sink", ["first", 3])
def test_the_table_is_what_the_lenses_say_of_each_text(family, sink):
    model = FAMILIES[family].build("sdpa")
    some = texts(12, 9, 12)
    found = measure_sinks(model, None, some, sink=sink)
    place = 0 if sink == "first" else sink
    lenses = (Sinks(position=place), ValueNorm(position=place), SinkLogit(position=place), ColumnMass())
    with torch.no_grad(), regard.watch(model, *lenses, ResidualNorm(position=place)) as seen:
        for ids in (some[0], some[2], some[1]):
            model(input_ids=ids[None])
    assert found.sinks == (place,) * 3 and found.pieces == 3
    for column, lens, name in [
        ("mass", Sinks, "alpha"), ("first", Sinks, "first"), ("drain", ValueNorm, "drain"),
        ("delta", SinkLogit, "delta"), ("plain", SinkLogit, "plain"),
    ]:  # fmt: skip
        np.testing.assert_allclose(found.heads[column], seen[lens][name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.residual.table["peak"], seen[ResidualNorm].table["peak"], rtol=1e-4)
    mass = seen[ColumnMass].of("text.1", 2)
    row = found.heads.at("text.1", 2)
    assert [row["top_1"], row["top_2"]] == np.argsort(-mass, kind="stable")[:2].tolist()
    assert row["other"] == pytest.approx(np.delete(mass, place).max())
    assert bool(found.windowed) == (family == "mistral")


def test_sinks_by_bos_and_by_the_most_attention(llama):
    some = texts(10, 10)
    some[0][2] = llama.config.bos_token_id
    with pytest.raises(RegardError, match="piece 1 has no BOS token"):
        measure_sinks(llama, None, some, sink="bos")
    some[1][4] = llama.config.bos_token_id
    assert measure_sinks(llama, None, some, sink="bos").sinks == (2, 4)
    found = measure_sinks(llama, None, some, sink="argmax")
    for ids, place in zip(some, found.sinks, strict=True):
        with torch.no_grad(), regard.watch(llama) as seen:
            llama(input_ids=ids[None])
        each = [seen.weights(layer, head).sum(0) for layer in range(2) for head in range(4)]
        assert place == int(torch.stack(each).sum(0)[:-1].argmax())


def test_layers_without_attention_are_absent():
    small = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 8)
    config = tf.Qwen3NextConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        linear_num_value_heads=4, linear_num_key_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, **small,
    )  # fmt: skip
    found = measure_sinks(tf.Qwen3NextForCausalLM(config).eval(), None, texts(9))
    assert found.absent == tuple(f"model.layers.{n}" for n in range(3))
    assert set(found.heads.sites) == {"text.3"}
    assert "Without attention that can be read: model.layers.0" in str(found)


def test_the_contrast_is_the_difference_and_its_halves(llama):
    a, b = texts(12, 12, 12, 12), texts(12, 12, 12, seed=1)
    table = compare_sinks(llama, None, a, b)
    whole = [measure_sinks(llama, None, some).heads["first"] for some in (a, b)]
    np.testing.assert_allclose(table["contrast"], whole[0] - whole[1], atol=1e-6)
    halves = [measure_sinks(llama, None, some[i::2]).heads["first"] for i in (0, 1) for some in (a, b)]
    np.testing.assert_allclose(table["contrast_1"], halves[0] - halves[1], atol=1e-6)
    np.testing.assert_allclose(table["noise_a"], halves[0] - halves[2], atol=1e-6)
    sizes = [abs(value) for _, _, value in table.ranked()]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 8
    assert set(table.dormant("a", 0.01)).isdisjoint(table.dormant("b", 0.01))
    assert table.about["stability"] == pytest.approx(table.stability)
    assert "contrast_1" not in compare_sinks(llama, None, a, b[:1]).columns


def test_texts_are_cut_as_the_tokenizer_begins_them(smollm):
    _, tokenizer = smollm
    words = "one two three four five six seven eight nine ten"
    assert [len(piece) for piece in cut([words], tokenizer, 4)] == [4, 4]
    assert [len(piece) for piece in cut([words, words], tokenizer, 64)] == [10, 10]

    class WithBos:
        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": [1] * add_special_tokens + list(range(5, 15))}

    assert [piece.tolist() for piece in cut([words], WithBos(), 4)] == [
        [1, 5, 6, 7], [1, 8, 9, 10], [1, 11, 12, 13],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([torch.tensor([5])], {}, "text 0 has 1 tokens, and a sink takes at least 2"),
        ([], {}, "a list of one or more texts"),
        ("words", {}, "a list of one or more texts"),
        ([torch.arange(5, 14)], {"sink": 8}, "the shortest text has 9 tokens"),
        ([torch.arange(5, 14)], {"sink": "last"}, "must be one of first, bos, argmax"),
        ([torch.arange(5, 14)], {"threshold": 2}, "threshold between 0 and 1"),
        ([torch.arange(5, 14).repeat(20)], {}, "a piece has 180 tokens, and the model takes 128"),
        (["words"], {}, "there is no tokenizer"),
    ],
)
def test_refusals(llama, given, options, said):
    with pytest.raises(RegardError, match=said):
        measure_sinks(llama, None, given, **options)


def test_refuses_token_ids_of_another_shape(llama):
    with pytest.raises(ShapeMismatch, match="token ids int64"):
        compare_sinks(llama, None, [torch.ones(1, 9, dtype=torch.long)], texts(9))
