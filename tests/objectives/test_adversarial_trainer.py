"""The Trainer of transformers with adversarial attention: that it trains, mixes, accumulates and goes on."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from regard.errors import RegardError
from regard.models.attending_pretrained import AttendingConfig, AttendingModel
from regard.models.tiny_distilbert import tiny_distilbert
from regard.objectives.adversarial import AttentionAdversary, AttentionVirtualAdversary
from regard.objectives.adversarial.trainer import AdversarialTrainer

ROWS = [{"input_ids": [4 + n % 2, *range(6, 9 + n % 3)], "labels": n % 2} for n in range(16)]
POOL = [{"input_ids": [4 + n % 2, 9, 10]} for n in range(10)]


def trainer(folder, adversary, model="bilstm", **options):
    torch.manual_seed(0)
    built = (
        AttendingModel(AttendingConfig(20, dim=8, hidden_size=8))
        if model == "bilstm"
        else tiny_distilbert(20, dim=16)
    )
    if model == "distilbert":  # as it starts, attention hardly moves what it says
        with torch.no_grad():
            for p in built.parameters():
                p.mul_(6.0 if p.ndim > 1 else 1.0)
    pool = options.pop("unlabelled", ())
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
        "report_to": [], "logging_steps": 2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        **options,
    }  # fmt: skip
    return AdversarialTrainer(
        built, TrainingArguments(**arguments), train_dataset=ROWS, eval_dataset=ROWS, adversary=adversary,
        unlabelled=pool,
    )  # fmt: skip


def weights(found):
    return torch.cat([p.detach().flatten() for p in found.model.parameters()])


@pytest.mark.parametrize("model", ["bilstm", "distilbert"])
def test_it_trains_with_both_adversaries_and_says_what_they_add(tmp_path, model):
    for adversary, pool in ((AttentionAdversary(eps=1.0), ()), (AttentionVirtualAdversary(eps=1.0), POOL)):
        found = trainer(tmp_path, adversary, model, unlabelled=pool, bf16=True)
        before = weights(found)
        found.train()
        assert torch.isfinite(weights(found)).all() and not torch.equal(before, weights(found))
        told = [log for log in found.state.log_history if "adversarial_added" in log]
        assert len(told) == 2 and told[0]["adversarial_added"] > 0 and told[0]["adversarial_still"] == 0
        if pool:
            labels = next(iter(found.get_train_dataloader()))["labels"]
            assert (labels == -100).sum() == 4 and len(labels) == 8
        assert found.evaluate()["eval_loss"] == pytest.approx(plain_loss(found), rel=1e-2)


def plain_loss(found):
    model = found.model.eval()
    batch = {k: v.to(model.device) for k, v in found.data_collator(ROWS).items()}
    with torch.no_grad():
        return model(**batch).loss.item()


def test_without_an_adversary_it_is_the_trainer_and_pieces_are_a_batch(tmp_path):
    plain = trainer(tmp_path, None)
    plain.train()
    whole = trainer(tmp_path, AttentionAdversary(eps=1.0, lam=0.0))
    whole.train()
    torch.testing.assert_close(weights(whole), weights(plain), atol=1e-4, rtol=1e-3)
    pieces = trainer(
        tmp_path, AttentionAdversary(eps=1.0, lam=0.0), per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    pieces.train()
    torch.testing.assert_close(weights(pieces), weights(plain), atol=1e-4, rtol=1e-3)
    assert isinstance(plain, Trainer)


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    options = {"unlabelled": POOL, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    virtual = AttentionVirtualAdversary(eps=1.0)
    whole = trainer(tmp_path, virtual, **options)
    whole.train()
    again = trainer(tmp_path, virtual, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(weights(again), weights(whole))


def test_what_is_refused(tmp_path):
    with pytest.raises(RegardError, match="AttentionVirtualAdversary alone"):
        trainer(tmp_path, AttentionAdversary(eps=1.0), unlabelled=POOL)
    with pytest.raises(RegardError, match="adversary is str"):
        trainer(tmp_path, "at")
