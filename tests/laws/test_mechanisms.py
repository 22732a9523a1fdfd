"""Every registered mechanism satisfies the laws, and really breaks those that it says it breaks."""

import pytest
import torch

from regard.attention import MECHANISMS, Block, Mechanism, from_dict
from regard.attention.mechanism import LAWS as NAMED
from regard.errors import RegardError
from tests.laws.laws import LAWS, applies

SPECS = {
    repr(s): s for kind in MECHANISMS.values() if issubclass(kind.module, Mechanism) for s in kind.examples()
}


def hold(law, spec):
    """Raise where a spec breaks a law that it does not except, or keeps one that it does."""
    reason = spec.exempt.get(law)
    if reason is None:
        LAWS[law](spec)
        return
    assert reason, f"{spec!r} says that it breaks the law {law!r} and not why"
    with pytest.raises((AssertionError, RegardError)):
        LAWS[law](spec)


@pytest.mark.parametrize(
    ("law", "name"), [(law, name) for name, spec in SPECS.items() for law in LAWS if applies(law, spec)]
)
def test_law(law, name):
    hold(law, SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_exemptions_name_laws_that_apply(name):
    spec = SPECS[name]
    for law in spec.exempt:
        assert law in LAWS and applies(law, spec), f"{name} excepts {law!r}, which says nothing about it"


def test_the_laws_are_those_that_mechanisms_can_name():
    assert set(LAWS) == set(NAMED)


@pytest.mark.parametrize("name", MECHANISMS)
def test_specs_are_values(name):
    kind = MECHANISMS[name]
    assert issubclass(kind.module, Mechanism | Block)
    assert kind.__doc__ and kind.module.__doc__
    for spec in kind.examples():
        assert from_dict(spec.to_dict()) == spec and hash(spec) == hash(from_dict(spec.to_dict()))
        assert not any(p.dtype == torch.float64 for p in spec.build().parameters())
        with pytest.raises(AttributeError):
            spec.registered = "other"
            object.__getattribute__(spec, "nothing")
