"""MEAP while it trains: a ramp, clean evaluation, packed rows, mixed precision, accumulation, going on."""

import itertools
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from regard.errors import RegardError
from regard.objectives.meap import mask_inputs
from regard.objectives.meap_data import IGNORED, MEAPCollator
from regard.objectives.meap_objective import MEAP, Ramp, documents_of, placeholders
from regard.objectives.meap_trainer import MEAPCallback
from tests.objectives.test_meap import HIDDEN, tiny, words

ROWS = [
    {"input_ids": torch.randint(2, 60, (16,), generator=torch.Generator().manual_seed(n)).tolist()}
    for n in range(24)
]


class Seen(TrainerCallback):
    """Writes down what the model is fed while it trains and while it is evaluated."""

    def __init__(self, die_at=None):
        self.trained, self.evaluated, self.die_at = [], [], die_at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        (self.trained if model.training else self.evaluated).append(kwargs["input_ids"].clone())

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(folder, *callbacks, collator=None, resume=None, rows=ROWS, **options):
    options = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "seed": 1,
        "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True, "logging_steps": 1000, **options,
    }  # fmt: skip
    model = tiny()
    collator = collator or DataCollatorForLanguageModeling(words(), mlm=False)
    trainer = Trainer(
        model=model, args=TrainingArguments(**options), train_dataset=rows, eval_dataset=rows[:2],
        data_collator=collator, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def shares(seen):
    return [float((ids == HIDDEN).sum()) / len(ids) for ids in seen]


def test_the_callback_follows_a_ramp_and_leaves_evaluation_clean(tmp_path):
    seen = Seen()
    objective = MEAP(mask_id=HIDDEN, ratio=Ramp(start=0.0, end=0.5, steps=4))
    trainer = trained(
        tmp_path, MEAPCallback(objective), seen, eval_strategy="steps", eval_steps=3, save_strategy="no"
    )
    counts = [max(1, int(16 * objective.ratio_at(step))) if step else 0 for step in range(6)]
    assert shares(seen.trained) == [float(n) for n in counts for _ in range(2)]
    assert seen.evaluated and not any((ids == HIDDEN).any() for ids in seen.evaluated)
    masks = [(ids == HIDDEN).tolist() for ids in seen.trained[-6:]]
    assert all(a != b for a, b in itertools.combinations(masks, 2))
    assert not trainer.model._forward_pre_hooks, "the hook is gone"


def test_labels_stay_clean_and_ratio_0_is_plain_training(tmp_path):
    plain = weights(trained(tmp_path / "a", save_strategy="no"))
    none = weights(trained(tmp_path / "b", MEAPCallback(MEAP(mask_id=HIDDEN, ratio=0.0)), save_strategy="no"))
    assert all(torch.equal(x, none[name]) for name, x in plain.items())
    objective, losses = MEAP(mask_id=HIDDEN, ratio=0.3), []
    ids = torch.tensor([row["input_ids"] for row in ROWS[:2]])
    for model in (tiny(), tiny()):
        given = ids if losses else objective.hide(ids, step=0)[0]
        if losses:
            callback = MEAPCallback(objective)
            callback.on_train_begin(SimpleNamespace(process_index=0, world_size=1), None, None, model=model)
        losses.append(model.train()(given, labels=ids).loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["callback", "collator"])
def test_going_on_from_a_checkpoint_is_bit_identical(tmp_path, kind):
    def once(name, resume=None, seen=None):
        callback = [MEAPCallback(MEAP(mask_id=HIDDEN, ratio=Ramp(end=0.3, steps=5)))]
        collator = MEAPCollator(words(), HIDDEN, 0.2) if kind == "collator" else None
        extra = callback if kind == "callback" else []
        return trained(tmp_path / name, *extra, *([seen] if seen else []), collator=collator, resume=resume)

    first, second = Seen(), Seen()
    whole = weights(once("a", seen=first))
    again = weights(once("a", resume=str(tmp_path / "a" / "checkpoint-3"), seen=second))
    assert all(torch.equal(a, b) for a, b in zip(first.trained[6:], second.trained, strict=True))
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    assert any((ids == HIDDEN).any() for ids in second.trained)


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    child = os.fork()
    if not child:
        try:
            trained(tmp_path / "a", MEAPCallback(MEAP(mask_id=HIDDEN)), Seen(die_at=5))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / "a" / "checkpoint-3").is_dir()
    callback = MEAPCallback(MEAP(mask_id=HIDDEN))
    again = weights(trained(tmp_path / "a", callback, resume=str(tmp_path / "a" / "checkpoint-3")))
    whole = weights(trained(tmp_path / "b", MEAPCallback(MEAP(mask_id=HIDDEN)), save_strategy="no"))
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


def test_mixed_precision_and_workers_hide_the_same(tmp_path):
    plain, mixed, workers = Seen(), Seen(), Seen()
    for name, seen, options in (
        ("a", plain, {}), ("b", mixed, {"bf16": True}), ("c", workers, {"dataloader_num_workers": 2})
    ):  # fmt: skip
        collator = MEAPCollator(words(), HIDDEN, 0.2)
        trained(tmp_path / name, seen, collator=collator, save_strategy="no", max_steps=3, **options)
    for other in (mixed, workers):
        assert all(torch.equal(a, b) for a, b in zip(plain.trained, other.trained, strict=True))


@pytest.mark.parametrize("kind", ["callback", "collator"])
def test_packed_documents_are_hidden_as_rows_and_have_their_loss(tmp_path, kind):
    rows = [{"input_ids": row["input_ids"][: 6 + n % 9]} for n, row in enumerate(ROWS)]
    flat = DataCollatorWithFlattening()
    seen = Seen()
    if kind == "callback":
        trained(tmp_path, MEAPCallback(MEAP(mask_id=HIDDEN, ratio=0.3)), seen, collator=flat, rows=rows,
                save_strategy="no")  # fmt: skip
        batch = flat(rows[:4])
        documents = documents_of(batch["position_ids"])
        hidden, where = MEAP(mask_id=HIDDEN, ratio=0.3).hide(batch["input_ids"], step=0, documents=documents)
    else:
        collator = MEAPCollator(None, HIDDEN, 0.3, inner=flat)
        trained(tmp_path, seen, collator=collator, rows=rows, save_strategy="no")
        batch = collator(rows[:4])
        hidden = batch["input_ids"]
        where = hidden == HIDDEN
    assert all(len(ids) == 1 for ids in seen.trained)
    parts = where[0].split([len(row["input_ids"]) for row in rows[:4]])
    assert [int(part.sum()) for part in parts] == [max(1, int(len(part) * 0.3)) for part in parts]
    assert not any(part[-1] for part in parts)
    model = tiny().eval()
    with torch.no_grad():
        whole = model(
            hidden, position_ids=batch["position_ids"], labels=batch["labels"], use_cache=False
        ).loss
        total, begin = 0.0, 0
        for row in rows[:4]:
            stop = begin + len(row["input_ids"])
            one = model(hidden[:, begin:stop], labels=torch.tensor([row["input_ids"]])).loss
            total, begin = total + float(one) * (len(row["input_ids"]) - 1), stop
    assert float(whole) == pytest.approx(total / int((batch["labels"] != IGNORED).sum()), rel=1e-5)


def test_an_image_text_model_keeps_its_placeholders():
    config = SimpleNamespace(image_token_id=5, video_token_id=None, audio_token_id=6)
    assert placeholders(config) == (5, 6)
    objective = MEAP(mask_id=HIDDEN, ratio=0.5)
    ids = torch.randint(4, 8, (8, 30))
    _, where = objective.hide(ids, step=0, protect=placeholders(config))
    assert where.any() and not where[(ids == 5) | (ids == 6)].any()
    made = MEAPCollator(None, HIDDEN, 0.5, protect=[5], inner=lambda rows: {"input_ids": ids, "labels": ids})(
        []
    )
    assert int((made["input_ids"] == 5).sum()) == int((ids == 5).sum()) and (made["labels"] == ids).all()


def test_a_loop_of_ones_own():
    objective = MEAP(mask_id=HIDDEN, ratio=0.2, protect=[2])
    ids = torch.randint(3, 60, (4, 30))
    ids[:, 0] = 2
    first, where = objective.hide(ids, step=3)
    assert torch.equal(first, objective(ids, 3)) and not where[:, 0].any()
    assert not torch.equal(first, objective.hide(ids, step=3, part=1)[0])
    assert not torch.equal(first, objective.hide(ids, step=4)[0])
    official = MEAP(mask_id=HIDDEN, ratio=0.2, scheme="shared51")
    valid = torch.ones_like(ids, dtype=torch.bool)
    one, two = (official.hide(ids, step=3, part=part, valid=valid)[1] for part in range(2))
    assert torch.equal(one, two) and torch.equal(
        one, mask_inputs(ids, HIDDEN, 0.2, scheme="shared51", step=3)[1]
    )


def test_bad_input(tmp_path):
    for make, sentence in (
        (lambda: Ramp(steps=0), "steps is 0"), (lambda: Ramp(end=1.0, steps=3), "end is 1.0"),
        (lambda: MEAP(mask_id=-1), "mask_id is -1"), (lambda: MEAP(mask_id=1, ratio=1.5), "ratio is 1.5"),
        (lambda: MEAPCallback(HIDDEN), "takes a MEAP, and got int"),
        (lambda: MEAPCollator(words(), HIDDEN, -0.1), "ratio is -0.1"),
        (lambda: MEAPCollator(SimpleNamespace(pad_token_id=None), HIDDEN), "no padding token"),
        (lambda: MEAPCollator(None, HIDDEN, inner=lambda rows: {"pixels": 1})([]), "made pixels; it must"),
    ):  # fmt: skip
        with pytest.raises(RegardError, match=sentence):
            make()
    with pytest.raises(RegardError, match="mask_id is 99, and the embedding has 64 rows; resize it before"):
        trained(tmp_path, MEAPCallback(MEAP(mask_id=99)))
    callback = MEAPCallback(MEAP(mask_id=HIDDEN))
    model = tiny().train()
    callback.on_train_begin(SimpleNamespace(process_index=0, world_size=1), None, None, model=model)
    with pytest.raises(RegardError, match="was fed no input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 16))


def test_the_training_of_tiny_models_takes_it():
    from regard.models.decoder import Decoder
    from regard.objectives import train
    from regard.tasks.markov import markov

    data = markov(symbols=8, length=400, held_out=60)

    def losses(**options):
        torch.manual_seed(0)
        model = Decoder(9, dim=16, layers=1, heads=2)
        return train(model, data, steps=4, batch=4, length=12, windows=2, evaluate_every=2, **options)

    plain, none = losses(), losses(inputs=MEAP(mask_id=8, ratio=0.0))
    assert plain.losses == none.losses
    some = losses(inputs=MEAP(mask_id=8, ratio=0.3))
    assert some.losses != plain.losses and some.held_out[0] == plain.held_out[0]
    pieces = losses(inputs=MEAP(mask_id=8, ratio=0.3), accumulate=3)
    assert pieces.losses == pytest.approx(some.losses, rel=1e-4)
    half = losses(inputs=MEAP(mask_id=8, ratio=0.3), precision="bf16")
    assert half.losses == pytest.approx(some.losses, rel=0.03) and half.losses != some.losses
    with pytest.raises(RegardError, match="both loss and inputs"):
        losses(inputs=MEAP(mask_id=8), loss=lambda model, tokens: None)


def test_a_loop_that_was_stopped_goes_on_with_the_same_masks(tmp_path):
    from regard.models.decoder import Decoder
    from regard.objectives import train
    from regard.tasks.markov import markov

    data = markov(symbols=8, length=400, held_out=60)

    def run(out, stop=False, **options):
        torch.manual_seed(0)
        model = Decoder(9, dim=16, layers=1, heads=2)
        ticks = iter(range(3))
        tick = (lambda share: next(ticks)) if stop else None
        inputs = MEAP(mask_id=8, ratio=Ramp(end=0.4, steps=5), seed=options.pop("seed", 0))
        log = train(model, data, steps=6, batch=4, length=12, windows=2, evaluate_every=2, checkpoint_every=2,
                    out=out, tick=tick, inputs=inputs, **options)  # fmt: skip
        return log.losses, model.state_dict()

    losses, weights_ = run(tmp_path / "a")
    with pytest.raises(StopIteration):
        run(tmp_path / "b", stop=True)
    again, others = run(tmp_path / "b")
    assert again == losses and all(torch.equal(x, others[name]) for name, x in weights_.items())
    with pytest.raises(RegardError, match=r"inputs.seed was 0 there and is 1"):
        run(tmp_path / "b", seed=1)
