"""Images with labels: digits, textures, a folder of classes; resizing, augmentation, refusals."""

import sys

import numpy
import pytest
import torch
from PIL import Image

from regard.errors import RegardError, ShapeMismatch
from regard.tasks.image_folder import image_folder, read_image
from regard.tasks.images import Images, augmented, digits, normalized, resized, split
from regard.tasks.textures import KINDS, textures


def painted(folder, colour, size=(8, 6), mode="RGB", suffix="png", count=4):
    """Write `count` pictures of one colour into a folder; size is width and height."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new(mode, size, colour).save(folder / f"{number}.{suffix}")


@pytest.fixture
def pets(tmp_path):
    """A folder of two classes, red cats and blue dogs, 6 high and 8 wide."""
    painted(tmp_path / "pets" / "cats", (250, 0, 0), count=5)
    painted(tmp_path / "pets" / "dogs", (0, 0, 250), count=5)
    return tmp_path / "pets"


def test_digits_are_those_of_scikit_learn_split_by_class():
    from sklearn.datasets import load_digits

    data, found = digits(), load_digits()
    assert data.channels == 1 and data.size == (8, 8) and data.classes == tuple("0123456789")
    assert len(data.train) + len(data.held_out) == len(found.images)
    counts = numpy.bincount(found.target)
    assert data.held_out_labels.bincount().tolist() == [round(0.2 * n) for n in counts.tolist()]
    whole = torch.cat([data.train, data.held_out]).flatten(1).double().mean(0) * 16 / 255
    assert numpy.abs(whole.numpy() - found.data.mean(0)).max() < 0.04
    assert digits(32).size == (32, 32) and digits(seed=1).digest() != data.digest()


def test_textures_depend_on_the_seed_and_can_be_told_apart():
    first = textures(16, train=20, held_out=10)
    assert first.digest() == textures(16, train=20, held_out=10).digest()
    assert first.digest() != textures(16, train=20, held_out=10, seed=1).digest()
    assert first.classes == tuple(KINDS) and first.train.shape == (160, 3, 16, 16)
    assert textures(24, 1, kinds=("dots", "grain"), train=2, held_out=1).train.shape == (4, 1, 24, 24)

    def spectrum(images):
        grey = images.double().mean(1)
        power = torch.fft.rfft2(grey - grey.mean((1, 2), True)).abs()
        return (power / power.norm(dim=(1, 2), keepdim=True)).flatten(1)

    data = textures(32, kinds=("stripes", "grain"), train=30, held_out=30, noise=0.0)
    peak = spectrum(data.held_out).amax(1)
    stripes, grain = peak[data.held_out_labels == 0], peak[data.held_out_labels == 1]
    assert stripes.median() > 1.2 * grain.median()


def test_a_folder_of_classes_is_split_by_seed(pets):
    (pets / ".thumbnails").mkdir()
    (pets / "cats" / "notes.txt").write_text("no image")
    (pets / "cats" / ".hidden.png").write_text("no image")
    data = image_folder(pets)
    assert (data.name, data.classes, data.size) == ("pets", ("cats", "dogs"), (6, 8))
    assert data.train_labels.bincount().tolist() == [4, 4] and len(data.held_out) == 2
    reds = data.train[data.train_labels == 0]
    assert reds.shape == (4, 3, 6, 8) and bool((reds[:, 0] == 250).all()) and not reds[:, 1:].any()
    assert image_folder(pets).digest() == data.digest()
    assert image_folder(pets, channels=1).channels == 1
    assert image_folder(pets, 4).size == (4, 4)


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    painted(tmp_path / "train" / "a", 10, mode="L", count=3)
    painted(tmp_path / "train" / "b", 20, mode="L", count=2)
    painted(tmp_path / "test" / "b", 30, mode="L", count=2)
    data = image_folder(tmp_path)
    assert data.channels == 1 and data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.held_out_labels.tolist() == [1, 1] and bool((data.held_out == 30).all())
    painted(tmp_path / "test" / "c", 30, mode="L")
    with pytest.raises(RegardError, match=r"test/c is a class that .*train does not have"):
        image_folder(tmp_path)


def test_modes_of_images(tmp_path):
    painted(tmp_path / "a", (9, 9, 9, 0), mode="RGBA", count=2)
    painted(tmp_path / "b", 128, mode="L", suffix="jpg", count=2)
    data = image_folder(tmp_path)
    assert data.channels == 3 and bool((data.train[data.train_labels == 0] == 255).all())
    assert bool((data.train[data.train_labels == 1] == 128).all())
    Image.fromarray(numpy.full((3, 5), 0x1234, dtype=numpy.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").unique().tolist() == [0x12]
    turned = Image.new("RGB", (5, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (1, 3, 5, 3)


def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path):
    wide = numpy.zeros((10, 30, 3), dtype=numpy.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = read_image(tmp_path / "wide.png", 10)
    assert found.shape == (1, 3, 10, 10) and bool((found == 200).all())


def test_resizing_keeps_flat_images_and_averages():
    flat = torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)
    assert resized(flat, 5).unique().tolist() == resized(flat, 20).unique().tolist() == [77]
    board = (torch.arange(64) % 2 * 200).view(1, 1, 8, 8).to(torch.uint8)
    assert abs(float(resized(board, 2).float().mean()) - 100) < 5


def test_normalised_by_the_training_part():
    data = textures(8, kinds=("dots", "rings"), train=6, held_out=3)
    x = normalized(data.train, *data.statistics())
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    with pytest.raises(ShapeMismatch, match=r"uint8 \[batch, 1, height, width\]"):
        normalized(data.train, (0.5,), (0.5,))


def test_augmentation_is_as_written_naively():
    images = torch.arange(3 * 2 * 5 * 4).view(3, 2, 5, 4)
    found = augmented(images, torch.Generator().manual_seed(5), shift=2, flip=True)
    generator = torch.Generator().manual_seed(5)
    moves = torch.randint(-2, 3, (2, 3, 1), generator=generator)[..., 0].tolist()
    flips = (torch.rand(3, 1, generator=generator) < 0.5)[:, 0].tolist()
    assert any(flips) and not all(flips)
    for n in range(3):
        for y in range(5):
            for x in range(4):
                # the column is mirrored, then moved
                row, column = y + moves[0][n], (3 - x if flips[n] else x) + moves[1][n]
                row, column = min(max(row, 0), 4), min(max(column, 0), 3)
                assert torch.equal(found[n, :, y, x], images[n, :, row, column])
    again = augmented(images, torch.Generator().manual_seed(5), shift=2, flip=True)
    assert torch.equal(found, again)
    assert torch.equal(augmented(images, torch.Generator().manual_seed(5)), images)


def blank(count=4, channels=1):
    return torch.zeros(count, channels, 4, 4, dtype=torch.uint8)


def labelled(labels, images=None):
    labels = torch.tensor(labels)
    return Images(
        "x", ("a", "b"), blank() if images is None else images, labels, blank(), torch.tensor([0, 1, 0, 1])
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: labelled([0, 1, 2, 0]), "labels of train are 0 to 2; there are 2 classes"),
        (lambda: labelled([0, 1]), r"labels of train must be int64 \[4\]"),
        (lambda: labelled([0, 1, 0, 1], blank().float()), "train must be uint8 .* and is float32"),
        (lambda: labelled([0, 1, 0, 1], blank(channels=3)), "all must be of one size"),
        (lambda: labelled([0, 1, 0, 1], blank(channels=2)), "1 or 3, height"),
        (lambda: split("x", ["a"], blank(), torch.zeros(4).long()), "classes are .*two at least"),
        (lambda: split("x", ["a", "b"], blank(), torch.tensor([0, 0, 0, 1])), "class 'b' has 1 images"),
        (lambda: split("x", ["a", "b"], blank(), torch.tensor([0, 1, 0, 1]), 1.0), "held_out is 1.0"),
        (lambda: digits(0), "image size is 0"),
        (lambda: digits(held_out=0), "held_out is 0"),
        (lambda: textures(4), "there must be 8 pixels"),
        (lambda: textures(kinds=("dots",)), "kinds are .*two at least of stripes"),
        (lambda: textures(kinds=("dots", "fur")), "kinds are"),
        (lambda: textures(channels=2), "1 or 3 channels"),
    ],
)
def test_wrong_input_is_refused(call, words):
    with pytest.raises(RegardError, match=words):
        call()


class TestRefusedFolders:
    def test_missing_and_of_one_class(self, tmp_path):
        with pytest.raises(RegardError, match="there is no folder .*nowhere"):
            image_folder(tmp_path / "nowhere")
        with pytest.raises(RegardError, match="holds no sub-folders; there must be two classes"):
            image_folder(tmp_path)
        painted(tmp_path / "cats", 1, mode="L")
        with pytest.raises(RegardError, match="holds one class, cats; there must be two"):
            image_folder(tmp_path)
        (tmp_path / "dogs").mkdir()
        with pytest.raises(RegardError, match=r"dogs holds no image \(bmp, gif, jpeg"):
            image_folder(tmp_path)

    def test_mixed_sizes_name_two(self, pets):
        painted(pets / "dogs", (0, 0, 1), size=(9, 9), count=1)
        with pytest.raises(
            RegardError, match=r"cats/0.png is 6 x 8 pixels and .*dogs/0.png 9 x 9; give a size"
        ):
            image_folder(pets)
        assert image_folder(pets, 6).size == (6, 6)

    @pytest.mark.parametrize("content", [b"", b"no image at all", None])
    def test_broken_files_are_named(self, pets, content):
        whole = (pets / "dogs" / "1.png").read_bytes()
        (pets / "dogs" / "1.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(RegardError, match=r"dogs/1.png cannot be read as an image: [^\n]*\.$"):
            image_folder(pets)

    def test_options(self, pets):
        with pytest.raises(RegardError, match="0.png is a file; it must be a folder of classes"):
            image_folder(pets / "cats" / "0.png")
        with pytest.raises(RegardError, match="channels is 2"):
            image_folder(pets, channels=2)
        with pytest.raises(RegardError, match="image size is -3"):
            image_folder(pets, -3)
        with pytest.raises(RegardError, match="there is no file .*cats/99.png"):
            read_image(pets / "cats" / "99.png")


@pytest.mark.parametrize(
    ("package", "call", "words"),
    [
        ("sklearn.datasets", lambda: digits(9), "scikit-learn, which is missing; pip install"),
        ("PIL", lambda: read_image("x.png"), "Pillow, which is missing; pip install"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, call, words):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RegardError, match=words):
        call()
