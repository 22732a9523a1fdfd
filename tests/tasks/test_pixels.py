"""Images of random colours: labels are what they are said to be."""

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.pixels import IGNORE, Pixels


def test_every_pixel_of_a_marked_image_has_the_colour_of_the_mark():
    task = Pixels(kind="marker", height=3, width=5, colours=4)
    images, labels, parts = task.batch(200, torch.Generator().manual_seed(0))
    assert images.shape == labels.shape == parts.shape == (200, 3, 5)
    marked = images >= 4
    assert (marked.sum((1, 2)) == 1).all() and int(images.max()) < task.symbols
    colour = images[marked] - 4
    assert (labels == colour[:, None, None]).all() and colour.unique().tolist() == [0, 1, 2, 3]
    place = marked.flatten(1).int().argmax(1)
    assert (parts.flatten(1).sum(1) == 15 - place).all() and place.unique().tolist() == list(range(15))


def test_a_label_is_the_colour_above():
    images, labels, parts = Pixels(kind="above").batch(5, torch.Generator().manual_seed(0))
    assert torch.equal(labels[:, 1:], images[:, :-1])
    assert (labels[:, 0] == IGNORE).all() and (parts == 1).all()
    images, labels, _ = Pixels(kind="above", distance=3).batch(5, torch.Generator().manual_seed(0))
    assert torch.equal(labels[:, 3:], images[:, :-3]) and (labels[:, :3] == IGNORE).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [({"kind": "below"}, "kind is 'below'"), ({"kind": "above", "height": 1}, "height is 1"),
     ({"kind": "above", "colours": 1}, "colours is 1"), ({"kind": "above", "distance": 8}, "from 1 to 7")],
)  # fmt: skip
def test_wrong_options_are_refused(options, told):
    with pytest.raises(RegardError, match=told):
        Pixels(**options)
