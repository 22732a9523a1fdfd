"""Filtering of heads for ACT: equal to a forward a head, resumable, and it refuses what cannot tell."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.edit import ACT
from regard.edit.act import filter_heads
from regard.errors import RegardError

PLAIN = ACT(alpha=1.3, beta=0.1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return made


def prompts():
    ids = torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def margin(logits):
    return logits[:, 7] - logits[:, 8]


def test_gains_are_those_of_a_forward_a_head(model, tmp_path):
    inputs = prompts()
    found = filter_heads(model, inputs, margin, edit=PLAIN, save=tmp_path / "kept.json")
    assert found.heads.names == [(f"text.{layer}", head) for layer in (2, 3) for head in range(4)]
    with torch.no_grad():
        plain = margin(model(**inputs).logits[:, -1])
        for site, head in found.heads.names:
            with regard.steer(model, ACT([(site, head)], alpha=1.3, beta=0.1)):
                gain = margin(model(**inputs).logits[:, -1]) - plain
            assert found.heads.at(site, head)["gain"] == pytest.approx(float(gain.mean()), abs=1e-4)
    assert found.heads.about["plain"] == pytest.approx(float(plain.mean()), abs=1e-4)
    assert max(abs(found.heads["gain"])) > 1e-2
    best = found.chosen()
    assert [found.heads.at(*head)["gain"] for head in best] == sorted(
        [gain for gain in found.heads["gain"] if gain > 0], reverse=True
    )
    assert found.act().heads == best and found.act().alpha == 1.3
    calls = []  # recorded, checked, and searched for sinks: no head is run again
    handle = model.model.layers[4].register_forward_hook(lambda *_: calls.append(1))
    again = filter_heads(model, inputs, margin, edit=PLAIN, save=tmp_path / "kept.json")
    handle.remove()
    assert len(calls) == 3 and (again.heads["gain"] == found.heads["gain"]).all()
    with pytest.raises(RegardError, match="no head gains more than 1000"):
        found.act(1000)


def test_heads_named_are_those_tried(model):
    found = filter_heads(model, prompts(), margin, edit=PLAIN, heads=[(0, 1), (4, 2)])
    assert found.heads.names == [("text.0", 1), ("text.4", 2)]


def test_one_prompt_is_refused(model):
    with pytest.raises(RegardError, match="give two at least"):
        filter_heads(model, {"input_ids": torch.ones(1, 5, dtype=torch.long)}, margin)
