"""Measures of attention and attacks: against numpy and formulas written out; what they refuse."""

import numpy as np
import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.models.attending import AttendingClassifier
from regard.models.tiny_distilbert import tiny_distilbert
from regard.objectives.adversarial import AttentionAdversary, reach
from regard.objectives.adversarial.attack import attacked, robustness_curve
from regard.objectives.adversarial.evidence import evidence_of
from regard.objectives.adversarial.measures import agreement, measure_attention, pearson
from regard.tasks.labelled import word_tokenizer


def batch():
    ids = torch.randint(4, 40, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [7], [5], [8], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1, 0])}


def test_pearson_is_numpys_over_valid_places():
    x, y, mask = torch.randn(5, 9), torch.randn(5, 9), batch()["attention_mask"].bool()
    found = pearson(x, y, mask)
    for row in range(4):
        expected = np.corrcoef(x[row][mask[row]], y[row][mask[row]])[0, 1]
        assert found[row].item() == pytest.approx(expected, rel=1e-4)
    assert found[4].isnan() and pearson(torch.ones(1, 4), torch.randn(1, 4), torch.ones(1, 4).bool()).isnan()


def test_agreement_is_average_precision_mass_and_spans():
    weights, valid = torch.rand(4, 8), torch.ones(4, 8).bool()
    evidence = torch.rand(4, 8) > 0.6
    evidence[3] = False
    found = agreement(weights, evidence, valid)
    for row in range(3):
        order = sorted(range(8), key=lambda at, row=row: -weights[row, at])
        hits = [n for n, at in enumerate(order) if evidence[row, at]]
        expected = sum((k + 1) / (n + 1) for k, n in enumerate(hits)) / len(hits)
        assert found["auprc"][row].item() == pytest.approx(expected, rel=1e-5)
        assert found["mass"][row].item() == pytest.approx(weights[row][evidence[row]].sum().item())
    assert all(values[3].isnan() for values in found.values())
    there = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0]]).bool()
    sharp = agreement(there.float(), there, valid[:1])
    assert sharp["iou_f1"].item() == 1 and sharp["auprc"].item() == 1
    half = agreement(torch.tensor([[0.1, 0.9, 0.8, 0, 0, 0.7, 0, 0]]), there, valid[:1])
    assert half["iou_f1"].item() == pytest.approx(0.5)  # one of two spans on either side


@pytest.mark.parametrize("kind", [AttendingClassifier, tiny_distilbert])
def test_attention_is_measured_on_both_kinds_of_model(kind):
    port, texts = reach(kind(40).eval()), batch()
    told = measure_attention(port, [texts], [texts["input_ids"] == texts["input_ids"][:, :1]])
    logits, weights = port.attention(**{k: v for k, v in texts.items() if k != "labels"})
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert not weights[texts["attention_mask"] == 0].any()
    torch.testing.assert_close(logits, port.reader(**{k: v for k, v in texts.items() if k != "labels"})(
        tuple(torch.zeros(v.shape) for v in port.valid(texts["attention_mask"]))
    ), atol=1e-5, rtol=1e-4)  # fmt: skip
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(1)
    torch.testing.assert_close(told.values["entropy"], entropy.detach())
    mean = told.mean("correlation")
    assert mean.texts == 4 and mean.low <= mean.value <= mean.high
    assert told.table.columns["measure"] == ["correlation", "entropy", "mass", "auprc", "iou_f1"]


def test_an_attack_is_worse_than_one_step_and_than_chance():
    model, texts = AttendingClassifier(40).eval(), batch()
    port, labels = reach(model), texts["labels"]
    inputs = {k: v for k, v in texts.items() if k != "labels"}
    logits_of, valid = port.reader(**inputs), port.valid(texts["attention_mask"])
    found = attacked(logits_of, labels, valid, 2.0)
    loss = lambda a: torch.nn.functional.cross_entropy(logits_of(a), labels)  # noqa: E731
    _, told = AttentionAdversary(eps=2.0)(loss, valid)
    one = torch.nn.functional.cross_entropy(logits_of(told.perturbation), labels, reduction="none")
    assert (found.loss >= one.detach() - 1e-6).all()
    again = torch.nn.functional.cross_entropy(logits_of(found.perturbation), labels, reduction="none")
    torch.testing.assert_close(again.detach(), found.loss)
    curve = robustness_curve(port, [texts], (0.0, 1.0, 4.0)).columns
    assert curve["loss"] == sorted(curve["loss"]) and curve["accuracy"] == sorted(curve["accuracy"])[::-1]
    assert curve["random_loss"][2] < curve["loss"][2]
    assert curve["random_loss"][0] == pytest.approx(curve["loss"][0], rel=1e-5)


def test_evidence_is_found_by_words_and_by_spans():
    texts = ["a Good film .", "bad , not good"]
    tokenizer = word_tokenizer(texts)
    by_words = evidence_of(tokenizer, texts, words={"good", "bad"})[0]
    assert by_words.int().tolist() == [[0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0]]
    by_spans = evidence_of(tokenizer, texts, spans={texts[1]: [(6, 14)]}, batch=1)
    assert [row.int().tolist() for row in by_spans] == [[[0] * 6], [[0, 0, 0, 1, 1, 0]]]
    with pytest.raises(RegardError, match="none of the words"):
        evidence_of(tokenizer, texts, words={"nothing"})


def test_bad_input():
    port, texts = reach(AttendingClassifier(40).eval()), batch()
    with pytest.raises(ShapeMismatch, match="evidence is"):
        measure_attention(port, [texts], [torch.ones(2, 3)])
    with pytest.raises(RegardError, match="no text"):
        measure_attention(port, [])
    with pytest.raises(RegardError, match="no batch"):
        robustness_curve(port, [])
    with pytest.raises(RegardError, match="lengths from 0"):
        robustness_curve(port, [texts], (-1.0,))
    port.model.train()
    for ask in (measure_attention, robustness_curve):
        with pytest.raises(RegardError, match="training mode"):
            ask(port, [texts])
