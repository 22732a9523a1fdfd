"""Images that are one call each, as Qwen2-VL makes them: each is a sequence of its own to a lens."""

import pytest
import torch

import regard
from regard.errors import NothingObserved
from regard.lens import LENSES
from regard.runtime.edits import ScaleHeads
from tests.lens.dense import assert_same
from tests.support.families import FAMILIES

GRIDS = torch.tensor([[1, 4, 4], [1, 4, 8]])
PIXELS = torch.randn(16 + 32, 96, generator=torch.Generator().manual_seed(0))
NOT_FOR_THESE = {"duplicate-token", "induction", "outliers", "residual-norm", "image-maps"}
APART = ((PIXELS[:16], GRIDS[:1]), (PIXELS[16:], GRIDS[1:]))


@pytest.fixture(scope="module")
def tower():
    return FAMILIES["qwen2-vl"].build().model.visual


@pytest.mark.parametrize("name", sorted(LENSES))
def test_two_images_at_once_are_two_sequences(tower, name):
    def seen(*fed):
        with torch.no_grad(), regard.watch(tower, LENSES[name]()) as session:
            for pixels, grid in fed:
                tower(pixels, grid_thw=grid)
        try:
            return session[LENSES[name]]
        except NothingObserved:
            return None

    together, apart = seen((PIXELS, GRIDS)), seen(*APART)
    if together is None:
        assert apart is None and name in NOT_FOR_THESE
    else:
        assert_same(together, apart)


def test_each_image_has_its_own_mean(tower):
    edit = ScaleHeads(heads=[(0, 1)], mode="mean")
    with torch.no_grad(), regard.steer(tower, edit):
        together = tower(PIXELS, grid_thw=GRIDS).pooler_output
        apart = torch.cat([tower(pixels, grid_thw=grid).pooler_output for pixels, grid in APART])
    torch.testing.assert_close(together, apart)
