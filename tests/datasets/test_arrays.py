"""NPZ files of images: they become what a folder of the same images is, and what else they hold is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_beta_grid
import train
import train_classifier
from datasets.arrays import scan
from datasets.batches import Streamed
from tests.conftest import TINY, all_weights
from tests.datasets.files import RNG, load, refused
from utils.config import Config

IMAGES = RNG.integers(0, 256, (50, 30, 34), dtype=np.uint8)
LABELS = np.arange(50) // 10
BOTH = {"images": IMAGES, "labels": LABELS}


def write(**arrays) -> str:
    """Its path."""
    np.savez("a.npz", **arrays)
    return "a.npz"


@pytest.mark.parametrize("size", [28, 32, 256])
def test_arrays_sorted_by_class_are_as_a_folder_of_the_same_pngs(size, passes):
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = Path("pngs", f"class {label}", f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    write(images=IMAGES[..., None], labels=np.array([f"class {label}" for label in LABELS]))
    a, b = (load(name, image_size=size, image_channels=1) for name in ("pngs", "a.npz"))
    for one, other in ((a.train, b.train), (a.test, b.test)):
        pairs = zip(one.batches(16, shuffle=(2, 1)), other.batches(16, shuffle=(2, 1)), strict=True)
        assert all(torch.equal(*tensors) for batches in pairs for tensors in zip(*batches, strict=True))
    assert scan(Path("pngs")).classes == scan(Path("a.npz")).classes and isinstance(b.train, Streamed) == (size == 256)
    if size == 28:
        assert a.digest == b.digest
        for flags in (["pngs", "--image_channels", "1"], ["a.npz"]):
            passes(train.main, *TINY, "--image_size", "28", "--dataset", *flags)
        assert len(all_weights()) == 2 and len(set(all_weights().values())) == 1


def test_arrays_in_any_order_are_split_by_class_and_keep_their_order():
    order = RNG.permutation(50)
    write(images=IMAGES[order], labels=LABELS[order] + 3)
    folder = scan(Path("a.npz"))
    assert folder.classes == ["3", "4", "5", "6", "7"]
    for samples, n in ((folder.train, 8), (folder.test, 2)):
        assert np.bincount([label for _, label in samples]).tolist() == [n] * 5
        rows = [int(str(row).rpartition("[")[2][:-1]) for row, _ in samples]
        assert rows == sorted(rows) and [label for _, label in samples] == LABELS[order][rows].tolist()
        assert all((row.pixels == IMAGES[order][i]).all() for i, (row, _) in zip(rows, samples, strict=True))


def test_a_test_split_of_their_own_and_what_is_missing_in_a_split(capfd):
    write(**BOTH, test_images=IMAGES[:15], test_labels=LABELS[:15].astype(float) + 4)
    data = load("a.npz")
    assert capfd.readouterr().out.splitlines() == [
        "a.npz: train 50 images, test 15, 6 classes: 0, 1, 2, 3, 4, 5",
        "note: a.npz: images: no images of 5",
        "note: a.npz: test_images: no images of 0, 1, 2, 3",
    ]
    assert (len(data.train), data.n_classes) == (50, 6) and data.test.labels.tolist() == [4] * 10 + [5] * 5
    assert Config(dataset="a.npz").data_name == "a.npz_1x28x28"


def test_size_and_channels_are_by_default_their_own():
    shapes = {"grey": (28, 30, 1), "colour": (60, 70, 3), "small": (8, 8)}
    for name, shape in shapes.items():
        write(images=np.zeros((5, *shape), np.uint8), others=np.array([None]))
        Path("a.npz").rename(f"{name}.NPZ")
    of = {name: Config(dataset=f"{name}.NPZ").image_shape for name in shapes}
    assert of == {"grey": (1, 28, 28), "colour": (3, 64, 64), "small": (1, 28, 28)}
    assert not load("small.NPZ").labelled
    for channels in (1, 3):
        assert load("colour.NPZ", image_channels=channels).train.images.shape == (4, channels, 64, 64)


WRONG = [  # arrays, and what is said of them
    ({"x_train": IMAGES}, "no array `images` there; it holds x_train"),
    ({"images": IMAGES / 255}, 'float64 from 0 to 1, not bytes from 0 to 255; save (images * 255).round().astype("ui'),
    ({"images": IMAGES.astype(int)}, 'int64 from 0 to 255, not bytes from 0 to 255; save images.round().astype("uint8'),
    ({"images": IMAGES.astype(str)}, "images of <U3, not bytes"),
    ({"images": np.array([IMAGES[0], None], object)}, "allow_pickle=False"),
    ({"images": IMAGES[0]}, "images (30, 34), not N x H x W"),
    ({"images": IMAGES[None, :, None]}, "images (1, 50, 1, 30, 34), not N x H x W"),
    ({"images": IMAGES[:48].reshape(12, -1, 34, 4)}, "34, 4), not N x H x W or N x H x W x C of 1 or 3 channels"),
    ({"images": IMAGES[:48].reshape(16, 3, 30, 34)}, "save images.transpose(0, 2, 3, 1)"),
    ({"images": IMAGES[:0]}, "images (0, 30, 34)"),
    ({"images": IMAGES[:1]}, "one image alone"),
    (BOTH | {"labels": LABELS[1:]}, "labels (49,) of int64, not a whole number or a name for each of 50"),
    (BOTH | {"labels": LABELS.astype(object)}, "allow_pickle=False"),
    (BOTH | {"labels": LABELS - 1}, "labels must be whole numbers >= 0 or names, got -1"),
    (BOTH | {"labels": LABELS + 0.5}, "got 0.5"),
    (BOTH | {"labels": LABELS * np.nan}, "got nan"),
    (BOTH | {"test_images": IMAGES}, "has `labels`, but no `test_labels`"),
    (BOTH | {"test_labels": LABELS}, "has `test_labels`, but no `test_images`"),
    ({"images": IMAGES, "test_images": IMAGES, "test_labels": LABELS}, "has `test_labels`, but no `labels`"),
    ({"images": IMAGES, "test_images": IMAGES[:, 1:]}, "test_images are of shape (29, 34), images of (30, 34)"),
]


def test_other_arrays_are_refused_saying_what_is_there():
    for i, (arrays, *words) in enumerate(WRONG):
        shutil.move(write(**arrays), f"{i}.npz")
        for settings in ({}, {"image_size": 32, "image_channels": 1}):
            refused(f"{i}.npz", f"{i}.npz: ", *words, **settings)
    Path("no.npz").write_bytes(b"no zip")
    refused("no.npz", "no.npz: missing or damaged")
    refused("./nowhere.npz", "nowhere.npz not found")


def test_arrays_that_moved_are_evaluated_once_they_are_told_of(passes, refused):
    write(**BOTH)
    passes(train.main, *TINY, "--dataset", "a.npz")
    passes(train_classifier.main, "--dataset", "a.npz", "--num_epochs", "1", "--device", "cpu")
    Path("a.npz").rename("b.npz")
    step = [eval_beta_grid.main, "--run_batch_name", "singles", "--exclude_fid", "--n_samples", "20"]
    step += ["--with_classifier", "--device", "cpu"]
    assert "a.npz for a folder of images" in refused(*step)
    passes(*step, "--dataset", "b.npz")
    write(images=IMAGES[::-1], labels=LABELS)
    assert "does not hold the images that the run was trained on" in refused(*step, "--force")
