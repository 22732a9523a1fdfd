"""MEAP: what is hidden and what is not, labels stay clean, rows for fine-tuning, training in `Trainer`."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regard.errors import RegardError, ShapeMismatch
from regard.objectives.meap import add_mask_token, mask_inputs, shared_positions
from regard.objectives.meap_data import IGNORED, MEAPCollator, meap_sft, read_examples

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


def test_counts_are_those_of_python_for_every_length():
    for ratio in (0.05, 0.1, 0.15, 0.2):
        for length in (7, 20, 40, 60, 100, 140, 380, 4096):
            _, where = mask_inputs(torch.full((1, length), 5), HIDDEN, ratio)
            assert int(where.sum()) == max(1, int(length * ratio)), (length, ratio)


def test_documents_of_a_packed_row_are_hidden_as_rows_of_their_own():
    lengths = [[20, 9, 1, 2, 8], [40]]
    ids = torch.randint(2, 60, (2, 40))
    documents = torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in lengths])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, where = mask_inputs(ids, HIDDEN, 0.3, generator=generator, documents=documents, protect=[7])
        for row, sizes in enumerate(lengths):
            begin = 0
            for size in sizes:
                part, stop = where[row, begin : begin + size], begin + size
                free = (ids[row, begin : stop - 1] != 7).sum()
                assert int(part.sum()) == min(int(free), max(1, int(size * 0.3))) and not part[-1]
                begin = stop
    assert not (where & (ids == 7)).any()
    valid = torch.arange(40) < 38
    padded = mask_inputs(ids, HIDDEN, 0.3, documents=documents, valid=valid.expand(2, -1))[1]
    assert not padded[:, 38:].any() and not padded[1, 37] and int(padded[1].sum()) == int(38 * 0.3)
    for seed in range(3):
        one, two = (
            mask_inputs(ids, HIDDEN, 0.3, generator=torch.Generator().manual_seed(seed), documents=given)[1]
            for given in (None, torch.zeros_like(ids))
        )
        assert torch.equal(one, two)


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
    again, where = mask_inputs(ids, int(ids[0, 0]), allow=True)
    assert (again[where] == ids[0, 0]).all()
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
    torch.testing.assert_close(model.get_input_embeddings().weight[60], before[60])
    spare = tiny(64)
    before = spare.get_input_embeddings().weight.detach().clone()
    assert add_mask_token(spare, words()) == 61 and spare.config.vocab_size == 64
    torch.testing.assert_close(spare.get_input_embeddings().weight[61], before[:61].mean(0))
    torch.testing.assert_close(spare.get_input_embeddings().weight[62:], before[62:])
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
    assert len(places) == 6 and min(places) >= 2 and max(places) < 62
    assert len(second["input_ids"]) == len(second["labels"]) == 63 and second["labels"][-1] == IGNORED
    assert all(second["input_ids"][i] == HIDDEN and second["labels"][i] == said[i - 2] for i in places)
    assert [x for i, x in enumerate(second["input_ids"]) if i not in places] == [
        x for i, x in enumerate([60, 2, *said, 1]) if i not in places
    ]
    assert found.rows[3]["input_ids"] == [60, 5, 6, 9, 5, 6, 1]
    assert found.rows[3]["labels"] == [IGNORED] * 4 + [5, 6, 1]
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}ask {{ m['content'] }} {% endfor %}w3"
    assert meap_sft(examples[1:], tokenizer, HIDDEN).rows[0]["input_ids"] == [60, 60, 3, 5, 6, 1]


def test_copies_are_those_of_the_official_code():
    """Its loop, written out: after `random.seed`, over all pairs, positions in the whole row."""
    answers = [
        [2 + (i * step) % 50 for i in range(size)] for step, size in ((1, 60), (3, 50), (7, 81), (9, 200))
    ]
    random.seed(5)
    expected = []
    for said in answers:
        full, start = [60, 2, *said], 2
        if len(said) > 50:
            places = random.sample(range(start, len(full)), max(1, int(len(said) * 0.1)))
            ids, labels = list(full), [IGNORED] * len(full)
            for place in places:
                ids[place], labels[place] = HIDDEN, full[place]
            expected.append({"input_ids": [*ids, 1], "labels": [*labels, IGNORED]})
    examples = [{"instruction": "ask w2", "output": " ".join(f"w{i}" for i in said)} for said in answers]
    rows = meap_sft(examples, words(), HIDDEN, seed=5).rows
    assert [row for row in rows if HIDDEN in row["input_ids"]] == expected


def test_a_masked_copy_may_follow_its_original_in_one_row():
    long = " ".join(f"w{2 + i % 50}" for i in range(60))
    examples = [{"instruction": "ask w2", "output": long}, {"instruction": "ask", "output": "w5"}]
    one, two = (meap_sft(examples, words(), HIDDEN, layout=layout) for layout in ("concat", "rows"))
    assert (len(one.rows), len(two.rows), one.short, one.answers) == (2, 3, 1, 2)
    for name in ("input_ids", "labels"):
        assert one.rows[0][name] == two.rows[0][name] + two.rows[1][name]
        assert one.rows[1][name] == two.rows[2][name]


def test_what_is_too_long_is_cut_off_the_labels_too():
    long = " ".join(f"w{2 + i % 50}" for i in range(60))
    found = meap_sft([{"instruction": "ask w2", "output": long}], words(), HIDDEN, max_length=20)
    assert found.cut == 1 and [len(row["input_ids"]) for row in found.rows] == [20, 20]
    assert found.rows[0]["labels"] == [IGNORED] * 2 + [2 + i for i in range(17)] + [1]
    assert sum(label != IGNORED for label in found.rows[1]["labels"]) == 1
    none = meap_sft([{"instruction": long, "output": long}], words(), HIDDEN, max_length=20)
    assert none.rows == [] and (none.answers, none.cut) == (1, 1)


def test_examples_are_read_from_lines_or_a_list_and_rows_written(tmp_path):
    one = {"instruction": "ask", "output": "w5"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(one)}\n\n{json.dumps(one)}\n")
    (tmp_path / "b.json").write_text(json.dumps([one]))
    assert read_examples(tmp_path / "a.jsonl") == [one, one] and read_examples(tmp_path / "b.json") == [one]
    made = meap_sft([one], words(), HIDDEN)
    made.save(tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == made.rows
    for text, sentence in (("{", "line 1 of .* is no JSON"), ("[1", "no JSON list"), ("", "no examples"),
                           ("[3]", "no examples")):  # fmt: skip
        (tmp_path / "bad").write_text(text)
        with pytest.raises(RegardError, match=sentence):
            read_examples(tmp_path / "bad")
    with pytest.raises(RegardError, match="cannot be read"):
        read_examples(tmp_path / "nowhere")


def test_bad_examples():
    for wrong in ({"text": "w2"}, {"conversations": [{"from": "gpt", "value": "w2"}] * 2}):
        with pytest.raises(RegardError, match="example 0"):
            meap_sft([wrong], words(), HIDDEN)
    one = [{"instruction": "ask", "output": "w2"}]
    for options, sentence in (
        ({"ratio": 0}, "ratio is 0"), ({"layout": "columns"}, "layout is 'columns'; it must be one of rows"),
        ({"max_length": 2}, "max_length is 2"),
    ):  # fmt: skip
        with pytest.raises(RegardError, match=sentence):
            meap_sft(one, words(), HIDDEN, **options)
    with pytest.raises(RegardError, match="no examples"):
        meap_sft([], words(), HIDDEN)


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
