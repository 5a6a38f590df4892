"""Own images: those of a folder (folders.py), or arrays in an NPZ file, which become the same.

images                     N x H x W or N x H x W x C bytes, C = 1 or 3; alone they are split 80/20, as a folder is
labels                     a whole number or a name for each
test_images, test_labels   the same of a test split
"""

import contextlib
import functools
import os
import statistics
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from utils.errors import UserError
from utils.files import read_arrays

from . import folders
from .folders import SIZES, Folder, Row, enumeration, split_samples

NAMES = ("images", "labels", "test_images", "test_labels")


def scan(root: Path) -> Folder:
    """What a folder or an NPZ file holds. Raises FileNotFoundError without one, UserError for other content."""
    if not _is_npz(root):
        return folders.scan(root)
    name, notes = os.path.abspath(root), []
    arrays = read_arrays(root, NAMES)
    if "images" not in arrays:
        with zipfile.ZipFile(root) as file:
            there = enumeration(Path(entry).stem for entry in file.namelist())
        raise UserError(f"{name}: no array `images` there; it holds {there or 'nothing'}")
    try:
        parts = _checked(arrays)
    except ValueError as e:
        raise UserError(f"{name}: {e}") from e
    every = np.concatenate([labels for _, labels in parts.values()])
    classes, codes = np.unique(every, return_inverse=True)  # of both splits
    samples = []
    for array, (images, _) in parts.items():
        of_part, codes = codes[: len(images)], codes[len(images) :]
        rows = [Row(f"{name}: {array}[{i}]", image) for i, image in enumerate(images)]
        samples.append([*zip(rows, of_part.tolist(), strict=True)])
        if missing := np.delete(classes, of_part).tolist():
            notes.append(f"{array}: no images of {enumeration(missing)}")
    if len(samples) == 1:
        samples = split_samples(name, samples[0], notes)
    return Folder(name, *samples, [*map(str, classes)] if "labels" in arrays else [], Counter(), notes)


def _is_npz(root: str | Path) -> bool:
    return Path(root).suffix.lower() == ".npz" and os.path.isfile(root)


def _checked(arrays: dict[str, ndarray]) -> dict[str, tuple[ndarray, ndarray]]:
    """Images (N, H, W) or (N, H, W, 3) and labels (N,), 0 if there are none, by the name of the images.

    Raises ValueError with what is wrong.
    """
    needs = [("test_labels", "test_images"), ("test_labels", "labels"), ("labels", "test_labels")]
    for name, other in needs if "test_images" in arrays else needs[:2]:
        if name in arrays and other not in arrays:
            raise ValueError(f"has `{name}`, but no `{other}`")
    parts = {}
    for name in (name for name in ("images", "test_images") if name in arrays):
        images = _checked_images(name, arrays[name])
        if images.shape[1:] != (expected := parts.get("images", [images])[0].shape[1:]):
            raise ValueError(f"{name} are of shape {images.shape[1:]}, images of {expected}")
        of_labels = name.replace("images", "labels")
        labels = arrays.get(of_labels, np.zeros(len(images), int))
        parts[name] = images, _checked_labels(of_labels, labels, len(images))
    return parts


def _checked_images(name: str, images: ndarray) -> ndarray:
    shape, how = images.shape, ""
    if len(shape) not in (3, 4) or len(shape) == 4 and shape[3] not in (1, 3) or 0 in shape:
        if len(shape) == 4 and shape[1] in (1, 3):
            how = f"; save {name}.transpose(0, 2, 3, 1)"
        raise ValueError(f"{name} {shape}, not N x H x W or N x H x W x C of 1 or 3 channels{how}")
    if images.dtype != np.uint8:
        what = f"{name} of {images.dtype}"
        if images.dtype.kind in "biuf":
            what += f" from {images.min():g} to {images.max():g}"
            scaled = f"({name} * 255)" if images.max() <= 1 else name
            fits = images.min() >= 0 and images.max() <= 255
            how = f'; save {scaled}.round().astype("uint8")' if fits else "; scale them to these first"
        raise ValueError(f"{what}, not bytes from 0 to 255{how}")
    return images[..., 0] if shape[3:] == (1,) else images


def _checked_labels(name: str, labels: ndarray, n: int) -> ndarray:
    """Whole numbers or names."""
    if labels.shape != (n,) or labels.dtype.kind not in "iufU":
        what = f"{labels.shape} of {labels.dtype}"
        raise ValueError(f"{name} {what}, not a whole number or a name for each of {n:,} images")
    if labels.dtype.kind == "U":
        return labels
    wrong = labels[~(np.isfinite(labels) & (labels == np.floor(labels)) & (labels >= 0) & (labels < 2**53))]
    if len(wrong):
        raise ValueError(f"{name} must be whole numbers >= 0 or names, got {wrong[0]:g}")
    return labels.astype(np.int64)


@functools.cache
def _shape(root: str) -> tuple[int, ...]:
    """That of each image in an NPZ file, as Pillow sees it: (H, W) or (H, W, 3)."""
    (row, _) = scan(Path(root)).train[0]
    return row.pixels.shape


def usual_channels(root: str) -> int:
    """Those of arrays; 3 of a folder, whose files may differ."""
    return 3 if not _is_npz(root) or len(_shape(root)) == 3 else 1


@functools.cache  # all cells of a grid ask
def nearest_size(root: str) -> int:
    """The one of SIZES nearest to the median of the shorter sides of a hundred training images."""
    if _is_npz(root):
        sides = [min(_shape(root)[:2])]
    else:
        samples, sides = scan(Path(root)).train, []
        for path, _ in samples[:: -(-len(samples) // 100)]:
            with contextlib.suppress(Exception), Image.open(path) as image:  # damaged ones are named when they are read
                sides.append(min(image.size))
    middle = statistics.median_low(sides or SIZES)
    return min(SIZES, key=lambda size: abs(size - middle))
