"""Names of lenses."""

import sys

import pytest

from regard.errors import RegardError
from regard.lens import LENSES, Entropy, find_lens, lens
from regard.lens.base import Measure
from regard.runtime.protocol import Lens


def test_find_lens_by_name():
    assert find_lens("entropy") is Entropy
    assert len(LENSES) == 15


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RegardError, match="did you mean entropy"):
        find_lens("entropie")
    with pytest.raises(RegardError, match="the lenses are column-mass, duplicate-token"):
        find_lens("qqq")


def test_a_name_is_taken_once():
    with pytest.raises(RegardError, match="registered already, as Entropy"):
        lens("entropy")(Lens)


@pytest.mark.parametrize("name", sorted(LENSES))
def test_every_lens_says_what_it_measures(name):
    kind = LENSES[name]
    assert issubclass(kind, Measure) and kind.definition and kind.source
    page = sys.modules[kind.__module__].__doc__
    assert page and "Status:" in page and ("arXiv" in page or name == "patterns")
