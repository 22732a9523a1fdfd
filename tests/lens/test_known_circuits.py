"""Published circuits: as many heads as their sources say, all of them in their models."""

import pytest

from regard.errors import RegardError
from regard.lens.circuits import known_circuit
from regard.lens.circuits.truth import KNOWN


def test_sizes_and_differences():
    sizes = {(c.task, c.version): len(c.heads) for c in KNOWN}
    assert sizes == {
        ("ioi", "wang"): 26, ("ioi", "oneill"): 26, ("ioi", "merullo"): 11,
        ("colored_objects", "merullo"): 12,
        ("greater_than", "acdc"): 9, ("greater_than", "hanna"): 7,
        ("docstring", "acdc"): 6, ("docstring", "oneill"): 6, ("docstring", "heimersheim"): 8,
    }  # fmt: skip
    first, second = (set(known_circuit("ioi", v).heads) for v in ("wang", "oneill"))
    assert (first - second, second - first) == ({(9, 0)}, {(11, 3)})
    assert known_circuit("ioi").version == "wang" and known_circuit("docstring").version == "acdc"
    assert known_circuit("ioi").roles_of((10, 7)) == ["negative mover"]


def test_all_heads_are_in_their_model_and_in_one_role():
    for circuit in KNOWN:
        layers, heads = circuit.shape
        assert all(0 <= layer < layers and 0 <= head < heads for layer, head in circuit.heads)
        assert sum(map(len, circuit.roles.values())) == len(circuit.heads)
        assert all(0 <= layer < layers for layer in circuit.mlps) and circuit.source


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(RegardError, match="there is ioi, colored_objects, greater_than, docstring"):
        known_circuit("chess")
    with pytest.raises(RegardError, match="it has acdc, hanna"):
        known_circuit("greater_than", "wang")
