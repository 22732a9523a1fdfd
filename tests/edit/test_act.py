"""ACT against its definition on whole matrices, under padding, in decoding, and in chunks."""

import pytest
import torch

import regard
from regard.edit import ACT
from regard.errors import NoSuchSite, RegardError
from regard.runtime import pipeline
from tests.edit.plain import changed, close, logits
from tests.support.families import FAMILIES


def by_hand(weights, alpha=5.0, threshold=None, beta=0.4, min_rows=1, rows=None):
    """The equations on one head [T, T], one row at a time; sinks from the first `rows` rows."""
    size = rows or len(weights)
    found, sinks = weights.clone(), []
    for t in range(1, size):
        mean = float(weights[t:size, t].sum()) / (size - t)
        if mean > (alpha / size if threshold is None else threshold) and size - t >= min_rows and size >= 3:
            sinks.append(t)
    for i in range(1, len(weights)):
        freed = (1 - beta) * sum(float(weights[i, s]) for s in sinks)
        rest = sum(float(weights[i, u]) for u in range(len(weights)) if u not in sinks)
        for t in range(len(weights)):
            found[i, t] = weights[i, t] * (beta if t in sinks else 1 + freed / rest)
    return found, sinks


def plainly(starts, heads, seen=None, **options):
    """A change for `tests.edit.plain`: ACT in the heads {layer: [head]}, after `starts` of padding."""

    def change(layer, weights, module):
        for row, start in enumerate(starts):
            for head in heads.get(layer, ()):
                part = weights[row, head, start:, start:]
                new, sinks = by_hand(part, **options)
                part.copy_(new)
                if seen is not None:
                    seen.append(sinks)
        return weights

    return change


HEADS = {0: [0, 2], 1: [1]}
DECODERS = ("LlamaAttention", "Qwen2VLAttention")
PAIRS = [(layer, head) for layer, heads in HEADS.items() for head in heads]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize(
    "options", [{"alpha": 1.3}, {"threshold": 0.1}, {"alpha": 1.5, "beta": 0.0, "min_rows": 4}]
)
def test_equals_the_definition_under_left_padding(name, options):
    family = FAMILIES[name]
    model = family.build()
    inputs, seen = family.inputs(model, "left"), []
    starts = (~inputs["attention_mask"].bool()).sum(1).tolist()
    with changed(model, weights=plainly(starts, HEADS, seen, **options)):
        expected = logits(model, inputs)
    assert any(seen) and not close(logits(model, inputs), expected)
    with regard.steer(model, ACT(PAIRS, **options)):
        assert close(logits(model, inputs), expected)
    assert not any(0 in sinks for sinks in seen)


def test_beta_1_and_no_sinks_change_nothing():
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model)
    plain = logits(model, inputs)
    for edit in (
        ACT(PAIRS, beta=1.0, alpha=1.3),
        ACT(PAIRS, alpha=100.0),
        ACT(PAIRS, alpha=1.3, min_rows=99),
    ):
        with regard.steer(model, edit):
            assert close(logits(model, inputs), plain)


def test_a_hand_made_map():
    weights = torch.tensor(
        [[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.1, 0.6, 0.3, 0], [0.1, 0.5, 0.2, 0.2]], dtype=torch.float64
    )
    found, sinks = by_hand(weights, threshold=0.5)
    assert sinks == [1]
    assert found[3].tolist() == pytest.approx([0.1 * 1.6, 0.2, 0.2 * 1.6, 0.2 * 1.6])
    assert found.sum(1).tolist() == pytest.approx([1, 1, 1, 1])


def test_decoding_keeps_the_sinks_of_the_prompt():
    family = FAMILIES["llama"]
    model = family.build()
    ids = family.inputs(model)["input_ids"]
    more = torch.randint(3, 90, (2, 3))
    with torch.no_grad(), regard.steer(model, ACT(PAIRS, alpha=1.3)):
        out = model(ids, use_cache=True)
        steps = [out.logits[:, -1]]
        for column in range(3):
            out = model(more[:, column : column + 1], past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    whole = torch.cat([ids, more], 1)
    with torch.no_grad(), changed(model, weights=plainly([0, 0], HEADS, alpha=1.3, rows=ids.shape[1])):
        expected = model(whole).logits
    for n, step in enumerate(steps):
        assert close(step, expected[:, ids.shape[1] - 1 + n])


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"heads": "all"}, {0: range(4), 1: range(4)}),
        ({"heads": {0: [2], "text.1": [1, 3]}}, {0: [2], 1: [1, 3]}),
        ({"layers": [1]}, {1: range(4)}),
    ],
)
def test_other_ways_to_name_heads(options, meant):
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model)
    with changed(model, weights=plainly([0, 0], meant, alpha=1.3)):
        expected = logits(model, inputs)
    with regard.steer(model, ACT(alpha=1.3, **options)):
        assert close(logits(model, inputs), expected)


def test_new_sinks_are_admitted_by_the_mean_over_all_rows_so_far():
    family = FAMILIES["llama"]
    model = family.build()
    ids = family.inputs(model)["input_ids"]
    more = torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), regard.steer(model, ACT(PAIRS, alpha=1.3, admit_new=True)):
        out = model(ids, use_cache=True)
        steps = []
        for column in range(3):
            out = model(more[:, column : column + 1], past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    length, seen = ids.shape[1], []

    def change(layer, weights, module):
        for row in range(2):
            for head in HEADS[layer]:
                part, size = weights[row, head].clone(), weights.shape[-1]
                weights[row, head, :length] = by_hand(part, alpha=1.3, rows=length)[0][:length]
                for last in range(length, size):
                    new, sinks = by_hand(part[: last + 1, : last + 1], alpha=1.3)
                    weights[row, head, last, : last + 1] = new[-1]
                    seen.append(any(sink >= length for sink in sinks))
        return weights

    whole = torch.cat([ids, more], 1)
    with torch.no_grad(), changed(model, weights=change):
        expected = model(whole).logits
    assert any(seen)
    for n, step in enumerate(steps):
        assert close(step, expected[:, length + n])


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_it_calibrates_the_decoder_of_an_image_text_model(name):
    family = FAMILIES[name]
    model = family.build()
    inputs, seen = family.inputs(model, "left"), []
    starts = (~inputs["attention_mask"].bool()).sum(1).tolist()
    change = plainly(starts, HEADS, seen, alpha=1.3)

    def of_decoder(layer, weights, module):
        return change(layer, weights, module) if type(module).__name__ in DECODERS else weights

    with regard.steer(model, ACT(PAIRS, alpha=1.3)):
        found = logits(model, inputs)
    language = model.model.language_model
    with torch.no_grad():
        embedded = model.get_input_embeddings()(inputs["input_ids"])
    assert not close(found, logits(model, inputs)) and embedded.shape[1] == found.shape[1]
    kept = {}
    handle = language.register_forward_pre_hook(lambda _, args, kwargs: kept.update(kwargs), with_kwargs=True)
    logits(model, inputs)
    handle.remove()
    kept.pop("past_key_values", None)
    with torch.no_grad(), changed(language, weights=of_decoder):
        states = language(**{**kept, "use_cache": False}).last_hidden_state
        expected = model.lm_head(states) * inputs["attention_mask"][:, :, None]
    assert any(seen) and close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model)
    with regard.steer(model, ACT(PAIRS, alpha=1.3)):
        expected = logits(model, inputs)
        found = logits(model.to(dtype), inputs)
    assert found.dtype == dtype
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 0.05


def test_a_decoded_token_opens_its_row_once(monkeypatch):
    model = FAMILIES["llama"].build()
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    opened = []
    original = pipeline._run_block
    monkeypatch.setattr(pipeline, "_run_block", lambda *given: (opened.append(1), original(*given)))
    with torch.no_grad(), regard.steer(model, ACT([(1, 2)], alpha=1.3)):
        out = model(ids, use_cache=True)
        assert len(opened) == 2, "once to find the sinks, once to calibrate"
        model(ids[:, :1], past_key_values=out.past_key_values)
    assert len(opened) == 3


def test_a_static_cache_gives_the_same():
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with regard.steer(model, ACT(PAIRS, alpha=1.3)):
        grown = model.generate(**inputs, **options)
        fixed = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(grown, fixed)


def test_it_generates_with_beams_and_left_padding():
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with regard.steer(model, ACT(PAIRS, alpha=1.3)):
        together = model.generate(**inputs, **options, num_beams=3)
        for row, start in enumerate((~inputs["attention_mask"].bool()).sum(1).tolist()):
            alone = model.generate(inputs["input_ids"][row : row + 1, start:], **options, num_beams=3)
            assert torch.equal(together[row, start:], alone[0])


def test_by_default_the_middle_layers_are_calibrated():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    inputs = {"input_ids": torch.randint(3, 50, (2, 12))}
    middle = {layer: range(4) for layer in (2, 3)}
    with changed(model, weights=plainly([0, 0], middle, alpha=1.3)):
        expected = logits(model, inputs)
    with regard.steer(model, ACT(alpha=1.3)):
        assert close(logits(model, inputs), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"beta": 1.2}, "beta is 1.2"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"min_rows": 0}, "min_rows is 0"),
        ({"heads": []}, "no heads"),
        ({"heads": {}}, "no heads"),
        ({"heads": "some"}, "heads is 'some'"),
        ({"heads": [(0, 1)], "layers": [1]}, "heads or layers"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(RegardError, match=said):
        ACT(**options)


def test_bad_models():
    model = FAMILIES["llama"].build()
    with pytest.raises(NoSuchSite, match="no head 9"):
        regard.steer(model, ACT([(0, 9)]))
    with pytest.raises(RegardError, match="leaves out the first two layers and the last, and there are 2"):
        regard.steer(model, ACT())
