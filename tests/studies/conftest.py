"""The toy study, registered for one test."""

import pytest

from regard.studies import STUDIES, all_studies, study
from tests.studies import toy


@pytest.fixture
def dice():
    """The class of the study `dice`, which has run nothing yet."""
    all_studies()
    before = dict(STUDIES)
    yield study("dice")(type("Dice", (toy.Dice,), {"ran": [], "__module__": toy.__name__}))
    STUDIES.clear()
    STUDIES.update(before)
