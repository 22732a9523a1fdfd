"""Training a tiny language model: it learns, goes on where it was killed, and refuses what will not do."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from torch import nn

from regard.errors import RegardError
from regard.models.decoder import Decoder
from regard.objectives import Recipe, evaluate, train
from regard.objectives.checkpoint import FILE
from regard.tasks.corpus import Corpus, corpus, novels

SMALL = {"batch": 4, "length": 16, "windows": 4, "evaluate_every": 4, "checkpoint_every": 4}


@lru_cache(maxsize=1)
def chapter():
    """The beginning of a packaged novel, in bytes."""
    return corpus([novels()["sherlock-holmes"][:40000]], 256)


def model(mechanism="linear", dropout=0.0):
    torch.manual_seed(0)
    made = Decoder(256, dim=16, layers=1, heads=2, mechanism=mechanism)
    made.norm = nn.Sequential(made.norm, nn.Dropout(dropout))
    return made


def counting(shuffled=False):
    """Tokens 0 to 15 over and over, which can be foretold; or the same in no order."""
    tokens = torch.arange(16).repeat(200)
    if shuffled:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    return Corpus(tokens[:2400], tokens[2400:], 256)


def test_it_learns_what_can_be_learned_and_no_more():
    learned, noise = (train(model(), counting(s), steps=60, rate=1e-2, **SMALL) for s in (False, True))
    assert learned.held_out[0][1] > 4 and learned.held_out[-1][1] < 0.5, learned.held_out
    assert noise.held_out[-1][1] > 0.9 * math.log(16)
    assert len(learned.losses) == 60 and [step for step, _ in learned.held_out] == [*range(0, 61, 4)]


def test_the_same_seed_gives_the_same_losses_whatever_was_drawn_before():
    first = train(model(dropout=0.2), chapter(), steps=5, **SMALL).losses
    torch.rand(7)
    assert train(model(dropout=0.2), chapter(), steps=5, **SMALL).losses == first
    assert train(model(dropout=0.2), chapter(), steps=5, seed=1, **SMALL).losses != first


def test_chance_outside_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.random.fork_rng():
        made = model(dropout=0.2)
    train(made, chapter(), steps=2, **SMALL)
    assert torch.equal(torch.rand(2), expected)


KILLED = """
import os, signal, sys
from regard.objectives import train
from tests.objectives.test_language import SMALL, chapter, model
def measure(model):
    measure.calls += 1
    if measure.calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"norm": float(model.embed.weight.norm())}
measure.calls = 0
train(model(dropout=0.2), chapter(), steps=15, out=sys.argv[1], measure=measure, **SMALL)
"""


def test_a_killed_run_goes_on_with_the_losses_of_one_that_was_not(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [FILE]

    def norm(model):
        return {"norm": float(model.embed.weight.norm())}

    whole, again = model(dropout=0.2), model(dropout=0.2)
    expected = train(whole, chapter(), steps=15, measure=norm, **SMALL)
    steps = []
    found = train(
        again,
        chapter(),
        steps=15,
        measure=norm,
        out=tmp_path,
        tick=lambda share: steps.append(share),
        **SMALL,
    )
    assert len(steps) == 15 - 8
    assert found.losses == expected.losses and found.held_out == expected.held_out
    assert found.measures == expected.measures
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train(model(), chapter(), steps=3, out=tmp_path, **SMALL)
    written = (tmp_path / FILE).stat().st_mtime_ns
    again = model()
    assert train(again, chapter(), steps=3, out=tmp_path, **SMALL) == first
    assert (tmp_path / FILE).stat().st_mtime_ns == written
    assert evaluate(again, chapter(), 16, 4) == first.held_out[-1][1]
    anew = train(model(), chapter(), steps=2, out=tmp_path, resume=False, **SMALL)
    assert len(anew.losses) == 2 and anew.losses[0] == first.losses[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "recipe.seed was 0 there and is 1"),
        ({"steps": 9}, "recipe.steps was 3 there and is 9"),
        ({"about": {"dim": 8}}, "about.dim was None there and is 8"),
    ],
)
def test_another_training_is_refused(tmp_path, change, words):
    train(model(), chapter(), steps=3, out=tmp_path, **SMALL)
    with pytest.raises(RegardError, match=words):
        train(model(), chapter(), **{"steps": 3, "out": tmp_path, **SMALL, **change})


def test_another_model_and_a_damaged_file_are_refused(tmp_path):
    train(model(), chapter(), steps=1, out=tmp_path, **SMALL)
    with pytest.raises(RegardError, match="is of another model"):
        train(Decoder(256, dim=8, layers=1, heads=2), chapter(), steps=1, out=tmp_path, **SMALL)
    whole = (tmp_path / FILE).read_bytes()
    for content in (whole[:100], b"", b"\x08\0\0\0\0\0\0\0{}      "):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(RegardError, match="cannot be read|is no file of a training"):
            train(model(), chapter(), steps=1, out=tmp_path, **SMALL)
    train(model(), chapter(), steps=1, out=tmp_path, resume=False, **SMALL)
    assert (tmp_path / FILE).read_bytes()[:8] == whole[:8]


class WithLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, tokens):
        return type("Output", (), {"logits": self.inner(tokens)})()


def test_a_model_may_give_its_logits_in_an_object():
    assert (
        train(WithLogits(), chapter(), steps=2, **SMALL).losses
        == train(model(), chapter(), steps=2, **SMALL).losses
    )


def test_another_loss_is_lowered_where_one_is_given():
    def squares(made, tokens):
        return made.embed.weight.square().sum()

    log = train(model(), chapter(), steps=8, rate=1e-2, loss=squares, **SMALL)
    assert log.losses[-1] < 0.8 * log.losses[0]


def test_the_rate_rises_then_falls_to_a_tenth():
    recipe = Recipe(steps=100, rate=1.0, warmup=0.1)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 < rates[99] < 0.101


def test_the_gradient_is_clipped():
    losses = [
        train(model(), counting(), steps=3, rate=1e-3, clip=clip, **SMALL).losses for clip in (1.0, 1e-9)
    ]
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train(model(), chapter(), steps=0), "steps is 0"),
        (lambda: train(model(), chapter(), rate=-1.0), "rate is -1.0"),
        (lambda: train(model(), chapter(), rate=math.nan), "rate is nan"),
        (lambda: train(model(), chapter(), speed=3), "takes no 'speed'"),
        (lambda: train(model(), [1, 2, 3]), "data must be a Corpus"),
        (lambda: train(nn.Flatten(), chapter()), "no parameter to train"),
        (lambda: train(model(), chapter(), length=10**6), "the held-out text|the training text"),
        (lambda: train(model(), chapter(), steps=1, windows=-1), "windows is -1"),
        (
            lambda: train(nn.Embedding(256, 4).half(), chapter(), steps=1, out="/proc/no"),
            "cannot be written",
        ),
        (lambda: train(nn.Linear(1, 1), chapter(), steps=1, **SMALL), "mat1|dtype|must return logits"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises((RegardError, RuntimeError), match=words):
        call()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = model()
    nn.init.constant_(broken.norm[0].weight, math.inf)
    with pytest.raises(RegardError, match=r"the loss of step 0 is (nan|inf)"):
        train(broken, chapter(), steps=2, out=tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_plain(tmp_path):
    log = train(model(), chapter(), steps=2, measure=lambda m: {"one": 1}, **SMALL)
    assert json.loads(json.dumps(log.measures)) == [[0, {"one": 1.0}], [2, {"one": 1.0}]]
    assert os.listdir(tmp_path) == []
