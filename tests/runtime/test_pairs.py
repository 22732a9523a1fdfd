"""Pairs: positions against the tokens themselves, batches against one prompt at a time."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import regard
from regard import Point
from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from regard.lens.entropy import Entropy
from regard.runtime import Pair, Replay, collect, logit_difference, resolve, run_pairs
from regard.runtime.pairs import last_logits, padded
from regard.runtime.patch import Patch
from tests.support.families import FAMILIES, VOCAB

WORDS = ["<unk>", "John", "Mary", "gave", "a", "drink", "to", "Ma", "##deleine", "Anna", ",", "When"]


@pytest.fixture(scope="module")
def tokenizer():
    """Words and pieces of words: Madeleine is two tokens."""
    vocab = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def ids(*numbers):
    return {"input_ids": torch.tensor([numbers])}


TEXT = "When John , Madeleine gave a drink to John"


@pytest.mark.parametrize(
    ("what", "occurrence", "expected"),
    [
        ("Madeleine", None, [3, 4]), ("deleine", None, [4]), ("gave a", None, [5, 6]), (" drink ", None, [7]),
        ("John", 0, [1]), ("John", 1, [9]), ("John", -1, [9]), ("John", -2, [1]), ("When", None, [0]),
        ("to John", None, [8, 9]), (-1, None, [9]), (0, None, [0]), (4, None, [4]),
    ],
)  # fmt: skip
def test_positions_of_a_part_of_a_text(tokenizer, what, occurrence, expected):
    assert resolve(tokenizer, TEXT, what, occurrence) == expected


def test_parts_that_are_not_there_or_not_clear(tokenizer):
    with pytest.raises(RegardError, match="occurs 2 times; give occurrence"):
        resolve(tokenizer, TEXT, "John")
    with pytest.raises(NoSuchSite, match="no occurrence 2"):
        resolve(tokenizer, TEXT, "John", 2)
    for part in ("Peter", "", "  "):
        with pytest.raises(NoSuchSite, match="has no"):
            resolve(tokenizer, TEXT, part)
    for token in (10, -11):
        with pytest.raises(NoSuchSite, match="the text has 10"):
            resolve(tokenizer, TEXT, token)
    with pytest.raises(UnsupportedModel, match="where its tokens are"):
        resolve(object(), TEXT, "Mary")


def test_positions_count_the_tokens_that_the_tokenizer_adds(smollm):
    """In a real vocabulary a token holds the space before it."""
    tokenizer = smollm[1]
    text = "When Mary and John went to the store, John gave a drink to"
    tokens = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
    johns = [i for i, token in enumerate(tokens) if token == " John"]
    assert len(johns) == 2
    for part in ("John", " John", "John "):
        assert [resolve(tokenizer, text, part, n) for n in (0, -1)] == [[johns[0]], [johns[1]]]
    assert resolve(tokenizer, text, -1) == [len(tokens) - 1]


def test_a_pair_from_text(tokenizer):
    pair = Pair.from_text(tokenizer, "John gave Mary", "John gave Anna", "Mary", 9)
    assert pair.clean["input_ids"].tolist() == [[1, 3, 2]] and pair.corrupt["input_ids"].tolist() == [
        [1, 3, 9]
    ]
    assert (pair.correct, pair.wrong) == (2, 9)
    with pytest.raises(RegardError, match=r"2 tokens, \['Ma', '##deleine'\]"):
        Pair.from_text(tokenizer, "John", "John", "Madeleine")


def test_where_the_two_sides_differ():
    pair = Pair(ids(1, 3, 5, 7), ids(1, 4, 5, 8))
    assert pair.differing() == [1, 3] and pair.first_difference() == 1
    pair.require_aligned()
    longer = Pair(ids(1, 3, 5), ids(1, 3, 4, 5))
    assert longer.first_difference() == 2
    assert Pair(ids(1, 3), ids(1, 3, 4, 5)).first_difference() == 2
    with pytest.raises(ShapeMismatch, match=r"3 tokens and the corrupt side 4 .*from token 2 on"):
        longer.differing()
    with pytest.raises(RegardError, match="the same 2 tokens"):
        Pair(ids(1, 3), ids(1, 3)).first_difference()
    assert Pair(ids(1, 3), ids(1, 3)).differing() == []


@pytest.mark.parametrize(
    "wrong", [{}, {"input_ids": [1, 2]}, ids(1, 2)["input_ids"], {"input_ids": torch.ones(2, 3)}]
)
def test_a_pair_is_of_single_sequences(wrong):
    with pytest.raises(ShapeMismatch, match="corrupt has input_ids"):
        Pair(ids(1), wrong)


def test_logit_differences_by_hand():
    logits = torch.randn(3, 5, 7)
    expected = torch.stack([logits[b, -1, [2, 0, 6][b]] - logits[b, -1, 4] for b in range(3)])
    assert torch.equal(logit_difference(logits, [2, 0, 6], 4), expected)
    assert torch.equal(logit_difference(logits[:, -1], torch.tensor([2, 0, 6]), torch.tensor(4)), expected)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    last = torch.stack([logits[0, 2], logits[1, 4], logits[2, 3]])
    assert torch.equal(last_logits(logits, mask), last)
    assert torch.equal(logit_difference(logits, 1, 2, mask), last[:, 1] - last[:, 2])
    assert logit_difference(logits.bfloat16(), 1, 2).dtype == torch.float32


def test_logit_differences_that_cannot_be():
    logits = torch.randn(3, 5, 7)
    with pytest.raises(ShapeMismatch, match="correct has shape"):
        logit_difference(logits, [1, 2], 0)
    for wrong in (7, -1):
        with pytest.raises(RegardError, match="wrong has a token id"):
            logit_difference(logits, 1, wrong)
    with pytest.raises(ShapeMismatch, match="last real positions"):
        last_logits(logits[:, -1:], torch.tensor([[1, 0]] * 3))


def made_pairs(answers=True):
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for number, (first, second) in enumerate([(5, 5), (8, 6), (3, 9), (7, 7), (4, 4)]):
        sides = [{"input_ids": torch.randint(5, VOCAB, (1, n), generator=generator)} for n in (first, second)]
        pairs.append(Pair(*sides, *((10 + number, 30 - number) if answers else ())))
    return pairs


def alone(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return (output.logits if "logits" in output else output.last_hidden_state)[0, -1]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "opt", "mistral", "bert", "modernbert", "falcon"]
)
@pytest.mark.parametrize("size", [2, 8])
def test_batches_are_one_prompt_at_a_time(name, size):
    model = FAMILIES[name].build("sdpa" if name == "falcon" else None)
    pairs = made_pairs()
    found = run_pairs(model, pairs, batch_size=size)
    for side in ("clean", "corrupt"):
        rows = [alone(model, getattr(pair, side)) for pair in pairs]
        expected = torch.stack([r[p.correct] - r[p.wrong] for r, p in zip(rows, pairs, strict=True)])
        assert torch.allclose(getattr(found, f"{side}_metric"), expected, atol=2e-5)
    assert torch.equal(found.difference, found.clean_metric - found.corrupt_metric)
    assert found.difference.abs().min() > 1e-3


def test_each_side_has_lenses_of_its_own():
    model = FAMILIES["llama"].build("sdpa")
    pairs = made_pairs(answers=False)
    found = run_pairs(model, pairs, Entropy(), batch_size=2)
    for session, side in ((found.clean, "clean"), (found.corrupt, "corrupt")):
        with regard.watch(model, Entropy()) as seen, torch.no_grad():
            for pair in pairs:
                model(**getattr(pair, side))
        for column, expected in seen[Entropy].table.columns.items():
            if column != "site":
                assert list(session[Entropy].table.columns[column]) == pytest.approx(list(expected), abs=1e-5)
    assert found.clean_metric is None and found.corrupt_metric is None
    with pytest.raises(RegardError, match="no metric"):
        _ = found.difference


def test_edits_apply_on_both_sides():
    model, pairs = FAMILIES["llama"].build("sdpa"), made_pairs()
    edit = Patch({Point("head", 1, head=0): 2.0})
    found = run_pairs(model, pairs, edit)
    with regard.steer(model, edit):
        rows = [alone(model, pair.corrupt) for pair in pairs]
    expected = torch.stack([r[p.correct] - r[p.wrong] for r, p in zip(rows, pairs, strict=True)])
    assert torch.allclose(found.corrupt_metric, expected, atol=2e-5)
    assert not torch.allclose(expected, run_pairs(model, pairs).corrupt_metric, atol=1e-2)


def test_two_checkpoints_on_the_same_prompts():
    first, second = FAMILIES["llama"].build(seed=0), FAMILIES["llama"].build(seed=5)
    pairs = [Pair(pair.clean, pair.clean, 10, 20) for pair in made_pairs()]
    found = run_pairs(first, pairs, Entropy(), against=second)
    other = run_pairs(second, pairs, Entropy())
    assert torch.equal(found.corrupt_metric, other.clean_metric)
    assert not torch.allclose(found.clean_metric, found.corrupt_metric, atol=1e-2)
    columns = found.corrupt[Entropy].table.columns
    assert all(list(columns[name]) == list(v) for name, v in other.clean[Entropy].table.columns.items())


def test_a_metric_of_ones_own():
    model, pairs = FAMILIES["gpt2"].build(), made_pairs(answers=False)
    found = run_pairs(model, pairs, metric=lambda logits, part: logits.logsumexp(-1), batch_size=3)
    expected = torch.stack([alone(model, pair.clean).logsumexp(-1) for pair in pairs])
    assert torch.allclose(found.clean_metric, expected, atol=1e-5)
    with pytest.raises(ShapeMismatch, match="for 2 pairs"):
        run_pairs(model, pairs, metric=lambda logits, part: logits.mean(), batch_size=2)
    with pytest.raises(ZeroDivisionError):
        run_pairs(model, pairs, metric=lambda logits, part: 1 / 0)
    assert "forward" not in model.__dict__


def test_with_and_without_an_image():
    family = FAMILIES["llava"]
    model = family.build()
    both = family.inputs(model)
    pairs = []
    for row in range(2):
        keep = both["input_ids"][row] != model.config.image_token_id
        words = both["input_ids"][row : row + 1, keep][:, row:]
        ids = both["input_ids"][row : row + 1, row:]
        image = {"input_ids": ids, "pixel_values": both["pixel_values"][row : row + 1]}
        pairs.append(Pair(image, {"input_ids": words}, 7, 9))
    found = run_pairs(model, pairs)
    for side in ("clean", "corrupt"):
        rows = [alone(model, getattr(pair, side)) for pair in pairs]
        expected = torch.stack([row[7] - row[9] for row in rows])
        assert torch.allclose(getattr(found, f"{side}_metric"), expected, atol=2e-5)


def test_padding_by_hand():
    items = [
        {**ids(4, 5), "token_type_ids": torch.tensor([[1, 1]]), "pixel_values": torch.ones(1, 3), "scale": 2},
        {**ids(6, 7, 8), "token_type_ids": torch.tensor([[0, 1, 1]]), "scale": 2},
    ]
    left, right = padded(items, "left", 9), padded(items, "right", 9)
    assert left["input_ids"].tolist() == [[9, 4, 5], [6, 7, 8]]
    assert right["input_ids"].tolist() == [[4, 5, 9], [6, 7, 8]]
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert right["token_type_ids"].tolist() == [[1, 1, 0], [0, 1, 1]]
    assert left["pixel_values"].shape == (1, 3) and left["scale"] == 2
    masked = {**ids(1, 2), "attention_mask": torch.tensor([[0, 1]])}
    assert padded([masked, ids(3, 4, 5)])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    with pytest.raises(ShapeMismatch, match="1 of 2 inputs have token_type_ids"):
        padded([items[0], ids(1, 2)])
    with pytest.raises(RegardError, match="scale differs"):
        padded([items[0], {**items[1], "scale": 3}])
    with pytest.raises(ShapeMismatch, match="cannot stand in one batch"):
        padded([items[0], {**items[1], "pixel_values": torch.ones(1, 4)}])


def test_what_run_pairs_refuses():
    model, pairs = FAMILIES["llama"].build(), made_pairs()
    for given, size in (([], 8), (pairs, 0)):
        with pytest.raises(RegardError, match="at least 1"):
            run_pairs(model, given, batch_size=size)
    with pytest.raises(RegardError, match="1 of 6 pairs lack"):
        run_pairs(model, [*pairs, Pair(ids(5), ids(6), 7)])
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        run_pairs(FAMILIES["t5"].build(), pairs)


def test_a_fact_moves_with_the_residual_stream(smollm):
    """The whole of it, in a real model: the last position of the last block carries the answer over."""
    model, tokenizer = smollm
    pair = Pair.from_text(
        tokenizer, "The capital of France is", "The capital of Italy is", " Paris", " Rome"
    )  # fmt: skip
    found = run_pairs(model, [pair])
    assert found.clean_metric > 1 and found.corrupt_metric < -1
    (subject,) = pair.differing()
    assert [subject] == resolve(tokenizer, "The capital of France is", "France")
    layers = (2, 15, 29)
    points = [Point("residual", layer, position=p) for layer in layers for p in (subject, -1)]
    values = collect(model, pair.clean, points)
    replay = Replay(model, {**pair.corrupt, "logits_to_keep": 1})
    effect = replay.sweep(
        points, values, lambda x: logit_difference(x, pair.correct, pair.wrong), progress=False
    )
    early, late = effect[:2], effect[-2:]
    assert early[0] == pytest.approx(found.clean_metric.item(), abs=1.0) and early[1] < 0
    assert late[1] == pytest.approx(found.clean_metric.item(), abs=1e-2)
    assert late[0] == pytest.approx(found.corrupt_metric.item(), abs=1e-2)
