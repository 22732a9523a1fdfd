"""Fresh tensors are ordinary tensors, on huge pages or not."""

import gc
import mmap
import weakref

import pytest
import torch

from regard.engines.fresh import HUGE, LEAST, fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0, 10, LEAST // 4 + 3])
def test_it_is_filled_like_any_other(size, dtype):
    made = fresh((2, size), dtype, torch.device("cpu"))
    assert made.shape == (2, size) and made.dtype == dtype and made.is_contiguous()
    made.fill_(3)
    assert made.sum(dtype=torch.float64) == 6 * size
    again = made.clone().requires_grad_()
    (made * again).sum().backward()
    assert torch.equal(again.grad, made)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_large_ones_start_at_a_huge_page_and_are_given_back(monkeypatch):
    maps, made = [], mmap.mmap

    class Noted(made):
        pass

    def noted(*given, **named):
        found = Noted(*given, **named)
        maps.append(weakref.ref(found))
        return found

    monkeypatch.setattr(mmap, "mmap", noted)
    large = fresh((LEAST,), torch.uint8, torch.device("cpu"))
    assert large.data_ptr() % HUGE == 0 and len(maps) == 1
    part = large[-5:].fill_(7)
    del large
    gc.collect()
    assert part.tolist() == [7] * 5 and maps[0]() is not None
    del part
    gc.collect()
    assert maps[0]() is None
    fresh((LEAST - 1,), torch.uint8, torch.device("cpu"))
    assert len(maps) == 1


def test_a_refusal_of_the_system_is_no_error(monkeypatch):
    def refused(*given, **named):
        raise OSError("no more maps")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert fresh((LEAST,), torch.uint8, torch.device("cpu")).fill_(1)[-1] == 1
