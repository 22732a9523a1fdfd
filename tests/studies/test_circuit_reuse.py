"""The study of circuit reuse: a quick run, its parts, and its picture."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.edit import ForceAttention
from regard.runtime import HeadTable
from regard.studies import find_study, run
from regard.studies.circuit_reuse_parts import End, chosen, leading, weekday
from regard.studies.picture import save_picture
from regard.tasks.ioi import TEMPLATES, ioi
from tests.tasks.test_prompts import tokenizer

SLUG = "circuit-reuse"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


@pytest.mark.real
def test_a_quick_run_finds_circuits_and_forces_heads(outcome, tmp_path):
    assert outcome.quick and outcome.value("second") >= outcome.value("third") > 0
    assert outcome.value("ld") != outcome.value("ld_io") and 0 < outcome.value("random") < 0.2
    assert len(outcome.details["effects"][0]) == 12 and outcome.details["heads"][0]["leaders"]
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000


def test_the_last_token_after_a_prefix_is_the_whole_prompt():
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, prompts = LlamaForCausalLM(config).eval(), ioi(words, 4, templates=TEMPLATES[:1])
    end, io = End(model, prompts), prompts.places("IO")
    heads = [("text.0", 1), ("text.1", 3)]
    with torch.no_grad():
        plain = model(prompts.ids()).logits[:, -1]
        edit = ForceAttention(heads, to=io[:, None], rows=prompts.places("END")[:, None])
        with regard.steer(model, edit):
            forced = model(prompts.ids()).logits[:, -1]
    torch.testing.assert_close(end.logits([], io), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end.logits(heads, io), forced, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, forced, atol=1e-4)


def test_leaders_suppressor_and_mover_are_told_apart():
    effects = HeadTable.from_columns(
        {"text.0": {"normalised": [0.1, -0.6, 0.0]}, "text.1": {"normalised": [0.4, 0.0, 0.0]}}
    )
    columns = {
        "END>IO": [0.0, 0.0, 0.9],
        "END>S1": [0.0, 0.1, 0.0],
        "END>S2": [0.5, 0.6, 0.0],
        "direct": [1.0, 0.0, 0.3],
    }
    roles = HeadTable.from_columns({"text.0": columns, "text.1": {**columns, "direct": [2.0, 0.0, 0.2]}})
    heads = chosen(effects, roles)
    assert heads["leaders"] == [("text.0", 1), ("text.1", 0)]
    assert heads["suppressor"] == [("text.1", 0)] and heads["mover"] == [("text.0", 2)]
    found = leading(effects, roles, heads["leaders"])
    assert (found["second"], found["third"], found["leaders_s2"]) == (0.4, 0.1, 0.5)
    assert found["others_s2"] == pytest.approx((0.5 + 0.0 + 0.6 + 0.0) / 4)


def test_days_follow_each_other():
    class Words:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [hash(word) % 10**6 for word in text.replace(".", " .").split()]}

    prompts = weekday(Words(), 9, seed=1)
    for pair in prompts.pairs:
        assert pair.places["END"] == len(pair.clean_ids) - 1 and pair.correct != pair.wrong
        assert len(pair.clean_ids) == len(pair.corrupt_ids) and pair.clean != pair.corrupt
    monday = next(p for p in weekday(Words(), 60, seed=0).pairs if "Monday" in p.clean)
    assert monday.correct == (hash("Tuesday") % 10**6,)
