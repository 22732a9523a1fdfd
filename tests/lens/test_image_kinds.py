"""Maps that are probabilities or factors, against their formulas; gates are in test_image_maps."""

import pytest
import torch
from torch import nn

from regard.attention.block import Maps
from regard.lens import ImageMaps
from tests.lens.test_image_maps import Gate, images, watched


class Weighted(Gate):
    """A gate that is a probability, or a factor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def maps(self, x):
        values = super().maps(x).values
        if self.kind == "factor":
            return Maps(values.sigmoid(), "factor", "channel")
        return Maps(values[:, :2].flatten(2).softmax(-1).view_as(values[:, :2]), "probability", "group")


@pytest.mark.parametrize(("kind", "head"), [("factor", "channel"), ("probability", "group")])
def test_what_is_not_signed_has_no_share_below_zero(kind, head):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), Weighted(kind)).eval()
    found = watched(model, images(2))
    columns = {"entropy", "sharpness", "border", "varies"} | ({"size"} if kind == "factor" else set())
    assert (found.site(0).kind, found.site(0).head, set(found.heads.columns)) == (kind, head, columns)
    with torch.no_grad():
        maps = model[1].maps(model[0](images(2))).values
    if kind == "factor":
        assert found.heads["size"] == pytest.approx(maps.mean((0, 2, 3)).numpy(), rel=1e-5)
    else:
        assert found.heads["sharpness"] == pytest.approx(36 * maps.amax((2, 3)).mean(0).numpy(), rel=1e-5)
    assert f"layer 0 {head}" in " ".join(f.text for f in ImageMaps.findings(found)).lower()
