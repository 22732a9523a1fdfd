"""What the Triton kernels must give; run by `test_scan_triton.py`, in the interpreter or on a GPU."""

import pytest
import torch

from regard.engines.scan import scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["none", "head", "step", "channel"]
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def draw(kind, length, heads=2, kv_heads=1, width=6, values=5, dtype=torch.float32, strength=1.0, batch=1):
    generator = torch.Generator().manual_seed(length)
    sizes = [(batch, heads, length, width), *((batch, kv_heads, length, x) for x in (width, values))]
    q, k, v = (torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes)
    state = torch.randn(batch, kv_heads, width, values, generator=generator).to(DEVICE)
    shape = {"head": (kv_heads,), "step": (batch, kv_heads, length)}
    shape["channel"] = (batch, kv_heads, length, width)
    if kind == "none":
        return q, k, v, None, state
    return q, k, v, -strength * torch.rand(shape[kind], generator=generator).to(DEVICE), state


def outcome(given, backend, **options):
    """Output, last state, and the gradients of all that is given."""
    given = [x if x is None else x.clone().requires_grad_() for x in given]
    out, last = scan(*given, backend=backend, **options)
    wanted = [x for x in given if x is not None]
    return [
        out,
        last,
        *torch.autograd.grad((out.double() / 5).sin().sum() + last.double().cos().sum(), wanted),
    ]


def compare(given, **options):
    dtype = given[0].dtype
    found = outcome(given, "triton", **options)
    exact = outcome([x if x is None else x.double() for x in given], "torch", **options)
    for index, (one, other) in enumerate(zip(found, exact, strict=True)):
        assert one.shape == other.shape and one.isfinite().all()
        off = ((one.double() - other).abs().max() / other.abs().max()).item()
        assert off < BOUND[dtype] * (1 if index < 2 else 5), (index, off)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert [x.dtype for x in found[2:5]] == [dtype] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 16, 65])
def test_it_is_the_torch_path_with_all_gradients(length, kind):
    compare(draw(kind, 33 if kind == "channel" and length == 65 else length))  # its chunks are short


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded(kind):
    length = 35 if kind == "channel" else 70
    starts = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    starts[0, [20, 21, length - 1]] = True
    starts[1, [0, length - 6]] = True
    valid = torch.rand(2, length, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.3
    compare(draw(kind, length, 1, batch=2), valid=valid if kind != "none" else None, starts=starts)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "channel"), (torch.float16, "head")])
def test_half_precision_adds_up_in_float32(dtype, kind):
    compare(draw(kind, 34, dtype=dtype, strength=0.1))
    ones = torch.ones(1, 1, 64 * 40, 1, dtype=dtype, device=DEVICE)
    assert scan(ones / 8, ones / 8, ones / 8, backend="triton")[1].item() == 40


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_heads_may_share_keys(heads, kv_heads):
    compare(draw("step", 40, heads, kv_heads))


@pytest.mark.parametrize(("width", "values"), [(1, 1), (16, 70), (130, 5)])
def test_any_width(width, values):
    compare(draw("head", 40, width=width, values=values))


@pytest.mark.parametrize("strength", [80.0, torch.inf])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_no_decay_overflows(kind, strength):
    q, k, v, decay, state = draw(kind, 70)
    decay = torch.full_like(decay, -torch.inf) if strength == torch.inf else decay * strength
    if kind == "channel":
        decay = torch.where((torch.arange(70, device=DEVICE) % 3 == 0)[:, None], decay, -0.1)
    out, last = scan(q, k, v, decay, state, backend="triton")
    exact, end = scan(q.double(), k.double(), v.double(), decay, state, backend="torch")
    assert (out - exact).abs().max() < 5e-5 * exact.abs().max()
    assert (last - end).abs().max() < 5e-5 * end.abs().max().clamp(min=1)


def test_inputs_of_any_layout():
    q, k, v, decay, state = draw("step", 20, 2, 2)
    layout = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    mirrored = [x.mT.contiguous().mT for x in (q, k, v)]
    expected = scan(q, k, v, decay, state, backend="triton")
    for given in (layout, mirrored):
        for one, other in zip(scan(*given, decay, state, backend="triton"), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_wrong_kernel_would_be_caught():
    """The control: with the decay of another head the bound is far exceeded."""
    given = list(draw("head", 70, 2, 2))
    found = outcome(given, "triton")
    given[3] = given[3].flip(0)
    exact = outcome(given, "torch")
    for one, other in zip(found, exact, strict=True):
        assert (one - other).abs().max() > 100 * BOUND[torch.float32] * other.abs().max()


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_a_gpu_uses_it_by_itself(monkeypatch):
    from regard.engines import scan as engine

    used = []
    monkeypatch.setattr(engine, "scan_triton", lambda *given: used.append(given) or (given[0], given[4]))
    q, k, v, decay, state = draw("head", 8)
    scan(q, k, v, decay, state)
    assert len(used) == 1
    scan(q, k, v, decay, state, backend="torch")
    assert len(used) == 1
