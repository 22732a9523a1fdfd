"""Shared by all tests: one seed, one thread, no network, poisoned buffers, the default model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one thread each, their children's too
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.support.outcomes import (  # noqa: F401  (hooks and a fixture)
    outcomes_of,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_configure_node,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_xdist_make_scheduler,
)

_real_empty, _real_empty_like = torch.empty, torch.empty_like
with torch.device("meta"):  # torch looks its own constructors up once, and must find the real ones
    torch.empty(0)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Fill an uninitialised floating tensor with NaN, so that reading it before writing shows."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) or tensor.is_meta:
        return tensor
    with torch.no_grad():
        return tensor.fill_(float("nan"))


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """`torch.empty` and `torch.empty_like` give NaN instead of whatever lay in memory."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(_real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poisoned(_real_empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Use the threads that OMP_NUM_THREADS allows, or two."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def smollm():
    """The real default model and its tokenizer; a test that asks for it fails without."""
    from regard.weights import load

    model, tokenizer = load()
    return model.eval(), tokenizer
