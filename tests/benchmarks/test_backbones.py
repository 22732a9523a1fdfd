"""The table of image models runs, and tells no speed where a batch is not its images."""

import pytest
import torch

from benchmarks import backbones, machine
from regard.models.patches import MLPMixerForImageClassification


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_model(capsys):
    assert backbones.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*backbones.QUICK, "32 x 32", "8 x 8", "vit_time_over_model"))


def test_only_models_that_are_asked_for_and_not_too_large(capsys):
    assert backbones.main(["--quick", "--only", "nat"]) == 0
    assert "mixer-digits" not in capsys.readouterr().out
    assert backbones.main(["--quick", "--most", "0.1", "--only", "mixer"]) == 0
    assert "mixer-digits" not in capsys.readouterr().out


def test_a_vit_of_equal_size_is_set_beside():
    for wanted, size in ((800_000, (32, 32)), (6_000_000, (224, 224))):
        vit = backbones.vit_beside(wanted, size)
        assert abs(sum(p.numel() for p in vit.parameters()) - wanted) < 0.1 * wanted
        assert vit.config.grid == ((8, 8) if size == (32, 32) else (14, 14))


def test_it_tells_no_speed_where_a_batch_is_not_its_images(monkeypatch, capsys):
    classify = MLPMixerForImageClassification.classify

    def mixed(model, maps):
        return classify(model, maps) + maps[-1][0, 0, 0, 0]

    monkeypatch.setattr(MLPMixerForImageClassification, "classify", mixed)
    assert backbones.main(["--quick", "--only", "mixer"]) == 1
    assert "a batch differs from its images" in capsys.readouterr().err
