"""Training of classifiers of texts: batches, mixing, going on after a stop, pieces, precision, refusals."""

import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.models.attending import AttendingClassifier
from regard.models.attending_pretrained import AttendingConfig, AttendingModel
from regard.objectives.adversarial import AttentionAdversary, AttentionVirtualAdversary
from regard.objectives.mixed_batches import MixedBatches, MixedLoader
from regard.objectives.texts import held_out, train_texts
from regard.tasks.cue_words import cue_sentences
from regard.tasks.labelled import word_tokenizer

DATA = cue_sentences(24, 10, unlabelled=20, noise=0.0)
WORDS = word_tokenizer([text for text, _ in DATA.train], framed=False)
VAT = AttentionVirtualAdversary(eps=1.0)


def trained(adversary=None, seed=0, **options):
    torch.manual_seed(seed)
    model = AttendingClassifier(len(WORDS), dim=8, hidden=8)
    options = {"epochs": 2, "batch": 8, "rate": 1e-2, "device": "cpu", **options}
    return model, train_texts(model, WORDS, DATA, adversary=adversary, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_says_how_well():
    model, log = trained(AttentionAdversary(eps=1.0), epochs=14, rate=3e-2)
    assert log.losses[-1] < 0.2 * log.losses[0]  # the sum of two losses
    loss, right = held_out(model, WORDS, DATA)
    assert log.held_out[-1][1] == pytest.approx(loss, rel=1e-4)
    assert log.measures[-1][1] == {"accuracy": right}


def test_an_epoch_has_every_text_once_and_the_others_take_turns():
    lengths = [n % 7 + 1 for n in range(10)] + [n % 5 + 1 for n in range(6)]
    batches = MixedBatches(lengths, 10, 4, ratio=1.0, seed=3)
    epochs = [batches.of(epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch if row < 10) == list(range(10))
        assert all([row >= 10 for row in batch] == sorted(row >= 10 for row in batch) for batch in epoch)
    others = [row for epoch in epochs for batch in epoch for row in batch if row >= 10]
    assert len(others) == 36 and all(others.count(row) == 6 for row in range(10, 16))
    assert epochs[0] != epochs[1] and batches.of(0) == epochs[0] and batches.at(4) == epochs[1][1]
    assert not MixedBatches(lengths[:10], 10, 4).more, "an empty pool falls back to labels alone"
    with pytest.raises(RegardError, match="no text with a label"):
        MixedBatches([3], 0, 4)
    with pytest.raises(RegardError, match="ratio is -1"):
        MixedBatches([3], 1, 4, ratio=-1)


def test_labels_given_as_unlabelled_are_left_out_with_a_notice():
    rows = [{"input_ids": [5, 6], "labels": n % 2} for n in range(4)]
    with pytest.warns(UserWarning, match="4 texts given as unlabelled have labels"):
        loader = MixedLoader(rows, rows, batch=4)
    batch = next(iter(loader))
    assert batch["labels"][4:].tolist() == [-100] * 4 and sorted(batch["labels"][:4].tolist()) == [0, 0, 1, 1]
    assert next(iter(MixedLoader(rows, (), batch=2)))["labels"].min() >= 0


def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path):
    whole, log = trained(VAT, unlabelled=DATA.unlabelled)

    def stop(share):
        if share >= 0.6:
            raise KeyboardInterrupt

    kept = {"unlabelled": DATA.unlabelled, "out": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trained(VAT, tick=stop, **kept)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    model, again = trained(VAT, seed=9, **kept)
    assert again.losses == pytest.approx(log.losses, rel=1e-5)
    torch.testing.assert_close(weights(model), weights(whole))
    with pytest.raises(RegardError, match=r"adversary.eps was 1.0 there and is 2.0"):
        trained(AttentionVirtualAdversary(eps=2.0), **kept)


def test_pieces_of_a_batch_give_the_same_step_and_bfloat16_trains():
    whole, _ = trained(AttentionAdversary(eps=1.0, lam=0.0), steps=2, epochs=None)
    pieces, _ = trained(AttentionAdversary(eps=1.0, lam=0.0), steps=2, epochs=None, accumulate=4)
    torch.testing.assert_close(weights(pieces), weights(whole), rtol=1e-3, atol=1e-4)
    for adversary in (AttentionAdversary(eps=1.0), VAT):
        model, log = trained(adversary, precision="bf16")
        assert torch.isfinite(weights(model)).all() and log.losses[-1] < log.losses[0] + 0.5


def test_the_model_of_the_paper_is_saved_and_opened(tmp_path):
    import regard
    from regard.weights.classifier import save_classifier

    torch.manual_seed(0)
    model = AttendingModel(
        AttendingConfig(len(WORDS), dim=8, hidden_size=8, scoring="dot", num_labels=2)
    ).eval()
    save_classifier(model, WORDS, tmp_path)
    again, tokenizer = regard.load(tmp_path)
    coded = tokenizer(["plus1 word2 minus3"], return_tensors="pt")
    ids, mask = coded["input_ids"], coded["attention_mask"]
    torch.testing.assert_close(again(ids, mask).logits, model(ids, mask).logits)
    assert again.config.scoring == "dot"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unlabelled": ["a text"]}, "AttentionVirtualAdversary alone"),
        ({"epochs": 1, "steps": 1}, "both epochs and steps"),
        ({"longest": 0}, "longest is 0"),
        ({"ratio": -1.0}, "ratio is -1.0"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"spice": 1}, "takes no 'spice'"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(RegardError, match=said):
        trained(**options)


def test_a_model_of_other_classes():
    model = AttendingModel(AttendingConfig(50, num_labels=3))
    with pytest.raises(ShapeMismatch, match="3 classes .* and the data 2: minus, plus"):
        train_texts(model, WORDS, DATA, device="cpu")
