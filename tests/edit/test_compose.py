"""Every lens beside every edit: one run watched before the edit and after it, also in decoding."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.edit import ACT, EDITS, EditWeights, ForceAttention, ScaleHeads, ScoreBias
from regard.errors import NothingObserved, RegardError
from regard.lens import LENSES
from regard.runtime.difference import heads_of

EXAMPLES = {
    "act": ACT([(1, 0)], alpha=0.1, beta=0.0),
    "edit-weights": EditWeights(lambda weights, block: weights**2, layers=[1], heads=[0]),
    "force-attention": ForceAttention([(1, 0)], to="first", strength=0.7),
    "scale-heads": ScaleHeads({(1, 0): 0.3}),
    "score-bias": ScoreBias(2.0, layers=[1], heads=[0], positions=[2]),
}
ELSEWHERE = {"add-vector", "tune-experts"}
"""Edits of points outside attention, whose own tests watch them."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    half = torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(1))
    return torch.cat([half, half], 1)


@pytest.fixture(scope="module")
def plain(model, ids):
    """Name of each lens that has numbers per head of this model -> those of the plain run."""
    found = {}
    for name, kind in LENSES.items():
        try:
            with torch.no_grad(), regard.watch(model, kind()) as seen:
                model(ids)
            table = heads_of(seen[kind])
        except NothingObserved:
            continue
        except RegardError as refused:
            assert "image" in str(refused) or "mixture" in str(refused).lower(), (name, refused)
            continue
        if table is not None:
            found[name] = table
    assert len(found) >= 8
    return found


def test_every_edit_has_an_example():
    assert set(EDITS) <= set(EXAMPLES) | ELSEWHERE, "add it to EXAMPLES, with an effect in layer 1, head 0"


@pytest.mark.parametrize("edit", EXAMPLES)
def test_the_same_run_is_seen_before_and_after(model, ids, plain, edit):
    """The edit is in the last layer, so that before it everything is as in the plain run."""
    lenses = [LENSES[name](name=f"{name} {side}", before=side == "before")
              for name in plain for side in ("before", "after")]  # fmt: skip
    with torch.no_grad():
        untouched = model(ids).logits
        with regard.steer(model, EXAMPLES[edit], *lenses) as seen:
            edited = model(ids).logits
        with regard.steer(model, EXAMPLES[edit]):
            alone = model(ids).logits
    torch.testing.assert_close(edited, alone, rtol=1e-4, atol=2e-5)
    assert float((edited - untouched).abs().max()) > 1e-4
    moved = set()
    for name, table in plain.items():
        before, after = heads_of(seen[f"{name} before"]), heads_of(seen[f"{name} after"])
        for column in table.columns:
            np.testing.assert_allclose(before[column], table[column], rtol=1e-4, atol=1e-5, err_msg=name)
            changed = ~np.isclose(after[column], table[column], rtol=1e-4, atol=1e-5, equal_nan=True)
            moved |= {table.names[i] for i in np.flatnonzero(changed)}
    assert moved == {("text.1", 0)}, moved


@pytest.mark.parametrize("edit", EXAMPLES)
def test_generate_is_the_same_watched_or_not(model, ids, plain, edit):
    def continued():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)

    with regard.steer(model, EXAMPLES[edit]):
        alone = continued()
    lenses = [LENSES[name](name=f"{name} {side}", before=side == "before")
              for name in plain for side in ("before", "after")]  # fmt: skip
    with regard.steer(model, EXAMPLES[edit]), regard.watch(model, *lenses) as seen:
        assert torch.equal(continued(), alone)
    assert all(heads_of(seen[f"{name} {side}"]) is not None for name in plain for side in ("before", "after"))
