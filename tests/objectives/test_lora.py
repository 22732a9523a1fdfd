"""LoRA fine-tuning on answers: the loss written out, what is trained, replaying, and going on from a file."""

import pytest
import torch
import torch.nn.functional as F

from regard.errors import NoSuchSite, RegardError
from regard.objectives.lora import add_lora, tune_answers
from tests.support.characters import characters
from tests.support.families import FAMILIES

PAIRS = [("ab", "cd"), ("a", "e"), ("abc", "d"), ("b", "ef"), ("cc", "c"), ("da", "bb")]


@pytest.fixture
def model():
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def tokenizer():
    return characters()


def tune(model, tokenizer, **options):
    given = {"steps": 4, "batch": 2, "rate": 1e-2, "tick": lambda share: None, **options}
    return tune_answers(model, tokenizer, PAIRS, PAIRS[:3], **given)


def test_the_loss_is_that_of_the_answers_alone(model, tokenizer):
    losses = []
    for prompt, answer in PAIRS[:3]:
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        begin = ids.shape[1] - len(answer)
        losses.append(F.cross_entropy(logits[begin - 1 : -1], ids[0, begin:], reduction="none"))
    log = tune(add_lora(model), tokenizer, steps=1, batch=3)
    assert log.held_out[0][1] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_adapters_alone_are_trained_and_come_out_again(model, tokenizer):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.randint(3, 90, (1, 7))
    plain = model(ids).logits
    wrapped = add_lora(model, layers=[1])
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all("layers.1." in name and "lora" in name for name in trained)
    log = tune(wrapped, tokenizer, steps=12)
    assert log.held_out[-1][1] < log.held_out[0][1]
    assert not torch.allclose(wrapped(ids).logits, plain, atol=1e-3)
    back = wrapped.unload()
    assert torch.equal(back(ids).logits, plain)
    assert all(torch.equal(x, before[name]) for name, x in back.state_dict().items())


def test_replaying_gives_the_same_losses(model, tokenizer):
    wrapped = add_lora(model, layers=[1])
    one = tune(wrapped, tokenizer, steps=5).losses
    wrapped.unload()
    wrapped = add_lora(model, layers=[1])
    assert tune(wrapped, tokenizer, steps=5, replay=True).losses == pytest.approx(one, rel=2e-3)


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(tokenizer, tmp_path):
    whole = tune(add_lora(FAMILIES["llama"].build()), tokenizer, steps=6)

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(
            add_lora(FAMILIES["llama"].build()),
            tokenizer,
            steps=6,
            out=tmp_path,
            checkpoint_every=2,
            tick=stop,
        )
    again = tune(add_lora(FAMILIES["llama"].build()), tokenizer, steps=6, out=tmp_path, checkpoint_every=2)
    assert again.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (tmp_path / "checkpoint.safetensors").stat().st_size < 200_000, "adapters alone"
    with pytest.raises(RegardError, match="is of another training"):
        tune(add_lora(FAMILIES["llama"].build()), tokenizer, steps=6, out=tmp_path, rate=2e-2)


def test_what_cannot_be_tuned_is_refused(model, tokenizer):
    with pytest.raises(NoSuchSite):
        add_lora(model, layers=[7])
    with pytest.raises(RegardError, match="rank is 0"):
        add_lora(model, rank=0)
    with pytest.raises(RegardError, match="no linear map"):
        add_lora(model, layers=[])
    wrapped = add_lora(model)
    with pytest.raises(RegardError, match="has adapters already"):
        add_lora(wrapped)
    with pytest.raises(RegardError, match="neither may be empty"):
        tune_answers(wrapped, tokenizer, [("a", "")], PAIRS)
    with pytest.raises(RegardError, match="pairs is empty"):
        tune_answers(wrapped, tokenizer, [], PAIRS)
    with pytest.raises(RegardError, match="takes no 'epochs'"):
        tune(wrapped, tokenizer, epochs=3)
