"""MEAP: what is hidden and what is not, labels stay clean, rows for fine-tuning, training in `Trainer`."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.meap import add_mask_token, mask_inputs, shared_positions
from regard.objectives.meap_data import IGNORED, MEAPCollator, meap_sft

HIDDEN = 63


def words():
    known = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, 60)}, "ask": 60}
    made = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def tiny(vocab=64):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize("ratio", [0.15, 0.05, 0.5])
def test_each_row_hides_so_many_distinct_positions_and_never_the_last(ratio):
    ids = torch.randint(2, 60, (64, 40))
    kept = ids.clone()
    hidden, where = mask_inputs(ids, HIDDEN, ratio, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, kept) and (where.sum(1) == max(1, int(40 * ratio))).all()
    assert (hidden[where] == HIDDEN).all() and torch.equal(hidden[~where], ids[~where])
    assert not where[:, -1].any() and where[:, 0].any() and len(set(map(tuple, where.tolist()))) > 60
    again, _ = mask_inputs(ids, HIDDEN, ratio, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, hidden)


def test_every_position_is_hidden_as_often_as_any():
    _, where = mask_inputs(
        torch.full((20_000, 11), 5), HIDDEN, 0.3, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(where[:, :-1].float().mean(0), torch.full((10,), 0.3), atol=0.02, rtol=0)


def test_padding_and_protected_tokens_are_never_hidden():
    ids = torch.randint(2, 50, (32, 20))
    valid = torch.arange(20) >= torch.arange(32)[:, None] % 8
    _, where = mask_inputs(ids, HIDDEN, 0.4, valid=valid, protect=[7, 8, 9])
    assert not where[~valid].any() and not (where & torch.isin(ids, torch.tensor([7, 8, 9]))).any()
    plain = mask_inputs(ids, HIDDEN, 0.4, valid=valid)[1]
    assert (plain.sum(1) == (valid.sum(1) * 0.4).int()).all() and not plain[:, -1].any()
    right = mask_inputs(ids, HIDDEN, 0.4, valid=valid.flip(1))[1]
    lasts = valid.flip(1).int().cumsum(1).argmax(1)
    assert not right.gather(1, lasts[:, None]).any()
    only = torch.zeros_like(ids, dtype=torch.bool)
    only[:, 1:] = True
    assert mask_inputs(ids, HIDDEN, 0.4, protect=only)[1][:, 0].all()


def test_shared51_is_the_official_draw():
    ids = torch.randint(2, 60, (3, 40))
    _, where = mask_inputs(ids, HIDDEN, 0.15, scheme="shared51", step=7)
    random.seed(50 + 7)
    expected = sorted(random.sample(range(39), 6))
    assert [row.nonzero()[:, 0].tolist() for row in where] == [expected] * 3
    assert len({tuple(shared_positions(40, 0.15, step)) for step in range(200)}) == 51


def test_nothing_is_hidden_at_ratio_0():
    ids = torch.randint(2, 60, (2, 9))
    hidden, where = mask_inputs(ids, HIDDEN, 0.0)
    assert hidden is ids and not where.any()


def test_bad_input():
    ids = torch.randint(2, 60, (2, 9))
    for ratio in (1.0, -0.1):
        with pytest.raises(RegardError, match="ratio is"):
            mask_inputs(ids, HIDDEN, ratio)
    for wrong in (ids[0], ids[:, :1]):
        with pytest.raises(RegardError, match="two tokens at least"):
            mask_inputs(wrong, HIDDEN)
    with pytest.raises(RegardError, match="the embedding has 60 rows; resize it before"):
        mask_inputs(ids, HIDDEN, rows=60)
    with pytest.raises(RegardError, match="take another token"):
        mask_inputs(ids, int(ids[0, 0]))
    with pytest.raises(RegardError, match="scheme is 'other'"):
        mask_inputs(ids, HIDDEN, scheme="other")
    with pytest.raises(RegardError, match="knows no padding"):
        mask_inputs(ids, HIDDEN, scheme="shared51", protect=[3])
    with pytest.raises(ShapeMismatch, match="they must be alike"):
        mask_inputs(ids, HIDDEN, valid=torch.ones(2, 8, dtype=torch.bool))


def test_a_token_is_added_with_the_mean_of_the_others():
    model, tokenizer = tiny(61), words()
    before = model.get_input_embeddings().weight.detach().clone()
    mask_id = add_mask_token(model, tokenizer)
    assert mask_id == 61 == len(tokenizer) - 1 and model.config.vocab_size == 62
    torch.testing.assert_close(model.get_input_embeddings().weight[61], before.mean(0))
    assert add_mask_token(model, tokenizer) == 61 and model.config.vocab_size == 62
    assert add_mask_token(model, tokenizer, "ask") == 60
    with pytest.raises(RegardError, match="no token 'nothing'"):
        add_mask_token(model, tokenizer, "nothing")


def test_labels_of_a_batch_are_clean():
    rows = [{"input_ids": list(range(2, 42))}, {"input_ids": list(range(10, 30))}]
    batch = MEAPCollator(words(), HIDDEN, 0.2)(rows)
    ids, valid, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
    assert labels[0].tolist() == rows[0]["input_ids"] and labels[1][valid[1]].tolist() == rows[1]["input_ids"]
    assert (labels[~valid] == IGNORED).all() and (ids == HIDDEN).sum(1).tolist() == [8, 4]
    assert (ids[(ids != HIDDEN) & valid] == labels[(ids != HIDDEN) & valid]).all()


def test_rows_for_fine_tuning():
    long, brief = " ".join(f"w{2 + i % 50}" for i in range(60)), "w5 w6"
    examples = [
        {"instruction": "ask w2", "output": long},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": brief},
                           {"from": "human", "value": "w9"}, {"from": "gpt", "value": brief}]},
    ]  # fmt: skip
    found = meap_sft(examples, words(), HIDDEN)
    assert len(found.rows) == 4 and found.short == 2
    said = [2 + i % 50 for i in range(60)]
    assert found.rows[0] == {"input_ids": [60, 2, *said, 1], "labels": [IGNORED] * 2 + [*said, 1]}
    second = found.rows[1]
    places = [i for i, label in enumerate(second["labels"]) if label != IGNORED]
    assert len(places) == 6 and min(places) >= 2 and len(second["input_ids"]) == 62
    assert all(second["input_ids"][i] == HIDDEN and second["labels"][i] == said[i - 2] for i in places)
    assert [x for i, x in enumerate(second["input_ids"]) if i not in places] == [
        x for i, x in enumerate([60, 2, *said]) if i not in places
    ]
    assert found.rows[3]["input_ids"] == [60, 5, 6, 9, 5, 6, 1]
    assert found.rows[3]["labels"] == [IGNORED] * 4 + [5, 6, 1]
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}ask {{ m['content'] }} {% endfor %}w3"
    assert meap_sft(examples[1:], tokenizer, HIDDEN).rows[0]["input_ids"] == [60, 60, 3, 5, 6, 1]


def test_bad_examples():
    for wrong in ({"text": "w2"}, {"conversations": [{"from": "gpt", "value": "w2"}] * 2}):
        with pytest.raises(RegardError, match="example 0"):
            meap_sft([wrong], words(), HIDDEN)
    with pytest.raises(RegardError, match="ratio is 0"):
        meap_sft([], words(), HIDDEN, ratio=0)


def test_it_trains_in_the_trainer_and_ratio_0_is_plain_training(tmp_path):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    rows = [{"input_ids": torch.randint(2, 60, (16,)).tolist()} for _ in range(16)]

    def trained(collator, name):
        options = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=4, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, seed=1,
            save_strategy="no", disable_tqdm=True, logging_steps=1000,
        )  # fmt: skip
        model = tiny()
        Trainer(model=model, args=options, train_dataset=rows, data_collator=collator).train()
        return model.state_dict()

    tokenizer = words()
    plain = trained(DataCollatorForLanguageModeling(tokenizer, mlm=False), "plain")
    none, some = (trained(MEAPCollator(tokenizer, HIDDEN, ratio), str(ratio)) for ratio in (0.0, 0.2))
    for name, weight in plain.items():
        assert torch.equal(weight, none[name]), name
    assert any(not torch.equal(weight, some[name]) for name, weight in plain.items())
