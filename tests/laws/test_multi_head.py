"""Inside `MultiHeadAttention` every registered mechanism trains a step, and decodes what it reads."""

import copy
from dataclasses import fields, replace

import pytest
import torch

from regard.attention import MECHANISMS, Block, Mechanism, MultiHeadAttention
from regard.attention.costs import decodes, describe, orders_of
from regard.errors import RegardError, UnsupportedModel
from tests.laws.laws import near, padded

SPECS = {repr(spec): spec for kind in MECHANISMS.values() for spec in kind.examples()}
LENGTH, WIDTH = 19, 8


def example(spec):
    """An input of a block, or None for what has queries, keys and values."""
    made = spec.build()
    return made.example(torch.Generator().manual_seed(0)) if isinstance(made, Block) else None


def of_sequences(spec):
    """Whether it is a layer over positions in a row, channels last, and not over a grid."""
    x = example(spec)
    return x is None or (x.ndim == 3 and x.shape[2] == spec.dim)


def length_of(spec):
    """The number of positions that a layer is built for, or any."""
    return example(spec).shape[1] if hasattr(spec, "tokens") else LENGTH


HELD = {name: spec for name, spec in SPECS.items() if of_sequences(spec)}


def layer(spec, **options):
    """The mechanism of a spec in a layer of the shape that it asks for, values as wide as keys."""
    if getattr(spec, "value_width", None):
        spec = replace(spec, value_width=WIDTH)
    takes = {f.name: getattr(spec, f.name) for f in fields(spec)}
    dim, heads = takes.get("dim") or 16, takes.get("heads") or 2
    given = {name: takes[name] for name in ("kv_heads", "head_dim") if takes.get(name)}
    if issubclass(spec.module, Mechanism):
        options = {"head_dim": WIDTH, **given, **options}
    torch.manual_seed(0)
    causal = "causal" in orders_of(spec.build())
    made = MultiHeadAttention(dim, heads, mechanism=spec, causal=causal, layers=2, **options)
    return made.double()


def given(made, length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, made.dim, generator=generator, dtype=torch.float64)


def stepped(made, x, sizes, valid=None, state=None):
    parts, start = [], 0
    for size in sizes:
        now = None if valid is None else valid[:, start : start + size]
        out, state = made.step(x[:, start : start + size], state, valid=now)
        parts.append(out)
        start += size
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("name", HELD)
def test_a_step_of_training_lowers_the_loss_and_reaches_every_parameter(name):
    made, length = layer(HELD[name]), length_of(HELD[name])
    x, wanted = given(made, length), given(made, length, seed=2)
    before = (made(x) - wanted).square().mean()
    before.backward()
    moved = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert moved
    for which, parameter in moved.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), which
        assert parameter.grad.abs().sum() > 0, f"no gradient reaches {which}"
    length = sum(p.grad.square().sum() for p in moved.values()) ** 0.5
    with torch.no_grad():
        for parameter in moved.values():
            parameter -= 1e-4 * parameter.grad / length
        assert (made(x) - wanted).square().mean() < before


def steps_equal_the_whole(spec):
    approximate = getattr(spec.module, "decodes_approximately", False) and "offset" in spec.exempt
    return decodes(spec.build()) is not None and not approximate


@pytest.mark.parametrize("name", [name for name, spec in HELD.items() if steps_equal_the_whole(spec)])
def test_decoding_step_by_step_equals_the_full_call(name):
    rotary = "rotary" if issubclass(HELD[name].module, Mechanism) else None
    made = layer(HELD[name], positions=rotary, gate="silu")
    x = given(made)
    whole = made(x)
    for sizes in ([1] * LENGTH, [5, 3, LENGTH - 8], [LENGTH]):
        near(stepped(made, x, sizes)[0], whole)
    _, state = stepped(made, x[:, :7], [7])
    swapped = torch.tensor([1, 0])
    found, _ = stepped(made, x[swapped, 7:], [LENGTH - 7], state=state.select(swapped))
    near(found, whole[swapped, 7:])


@pytest.mark.parametrize("name", [name for name, spec in HELD.items() if not decodes(spec.build())])
def test_what_cannot_decode_says_so(name):
    made = layer(HELD[name])
    with pytest.raises((UnsupportedModel, RegardError), match="cannot decode"):
        made.step(given(made))


@pytest.mark.parametrize("name", [n for n, s in HELD.items() if issubclass(s.module, Mechanism)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_items(name, side):
    spec = HELD[name]
    if "padding" in spec.exempt:
        pytest.skip(f"{name} honours no padding: {spec.exempt['padding']}")
    made, valid = layer(spec, positions="rotary"), padded(LENGTH, side)
    x = given(made)
    out = made(torch.where(valid[..., None], x, 1e3 * x), valid=valid)
    for item in range(2):
        alone = made(x[item : item + 1, valid[item]])
        near(out[item : item + 1, valid[item]], alone)
    if steps_equal_the_whole(spec):
        near(stepped(made, x, [4, 1, LENGTH - 5], valid)[0][valid], out[valid])


@pytest.mark.parametrize("name", HELD)
def test_a_state_dict_brings_everything_back(name):
    made = layer(HELD[name])
    other = layer(HELD[name])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    x = given(made, length_of(HELD[name]))
    other.load_state_dict(made.state_dict())
    near(other(x), made(x))
    near(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("name", [name for name, spec in HELD.items() if decodes(spec.build())])
def test_what_decoding_keeps_grows_with_the_length_only_where_that_is_declared(name):
    costs = describe(type(HELD[name])).costs
    if costs is None or costs.step_memory is None:
        pytest.skip(f"{name} declares no memory of a step")
    made = layer(HELD[name])
    short, long = (made.step(given(made, length))[1].numbers() for length in (8, 16))
    assert short > 0
    if costs.step_memory.startswith("min("):
        assert short < long < 2.5 * short, "no growth up to the bound"
        return
    assert long == (short if "T" not in costs.step_memory.split() else 2 * short)
