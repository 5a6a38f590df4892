"""Folders of images: which file is an image of which split and class, and how one is opened; arrays.py has others.

pets/cat/1.jpg             a folder for each class, split 80/20 here; or
pets/train/cat/1.jpg       train/ and val/ (or test/) of such folders; or
pets/1.jpg                 images without classes, with or without train/ and val/
"""

import contextlib
import hashlib
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.errors import UserError, one_line
from utils.files import digest, write_text

if TYPE_CHECKING:
    from torch import Tensor


class Row(NamedTuple):
    """An image in an array of a file, in place of a path."""

    name: str
    pixels: np.ndarray  # (H, W) or (H, W, 3), uint8

    def __str__(self) -> str:
        return self.name


Sample = tuple[str | Row, int]  # where an image is, and its label

SIZES = (28, 32, 64, 128, 256)  # pixels that the networks are made for
TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")
IGNORED = {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
IGNORED |= {"system volume information", "__pycache__"}
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them and cannot draw them by itself
BY_CONTENT = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}  # told by their first bytes


class Folder(NamedTuple):
    """What a folder of images holds, or a file of arrays."""

    root: str
    train: list[Sample]
    test: list[Sample]
    classes: list[str]  # of both splits; none: images without classes, whose labels are 0
    skipped: Counter  # files by kind
    notes: list[str]

    @property
    def is_file(self) -> bool:
        return os.path.isfile(self.root)

    @property
    def digest(self) -> str | None:
        """Of the list of files: the same wherever the folder lies, and whatever it is called; None of arrays."""
        if self.is_file:
            return None
        lines = [
            f"{split} {label} {path.removeprefix(self.root).lstrip(os.sep)}"
            for split in ("train", "test")
            for path, label in getattr(self, split)
        ]
        return digest("\n".join(lines).encode(errors="surrogateescape"))

    def names(self, split: str) -> dict[str, np.ndarray]:
        """The `filename` (N,) of each image of a split, below the folder, and the `classes` (K,), if there are some.

        In an array, an image is called `images[3]`.
        """
        above = self.root + (": " if self.is_file else os.sep)
        files = [str(path).removeprefix(above) for path, _ in getattr(self, split)]
        texts = {"filename": files, "classes": self.classes}
        return {name: np.array(values) for name, values in texts.items() if values}


def enumeration(names: Iterable) -> str:
    """Names with commas between; of more than ten the first nine and the last."""
    names = list(map(str, names))
    return ", ".join([*names[:9], f"... {names[-1]}"] if len(names) > 10 else names)


def count(n: int, word: str) -> str:
    """`1 file`, `3 files`, `2 classes`."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}{'es' if word.endswith('s') else 's'}"


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Indices of a fixed 80/20 split, and whether it has every class in proportion: some are too small."""
    from sklearn.model_selection import train_test_split

    split = partial(train_test_split, np.arange(len(labels)), test_size=0.2, random_state=0)
    try:
        parts, in_proportion = split(stratify=labels), True
    except ValueError:
        parts, in_proportion = split(), False
    return np.sort(parts[0]), np.sort(parts[1]), in_proportion


def _is_image(path: str) -> bool:
    """By its extension if that is an image's, else by its content."""
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if kind in Image.OPEN and kind not in NOT_PICTURES:
        return True
    try:
        with Image.open(path, formats=sorted(BY_CONTENT & Image.OPEN.keys())):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # the libraries' parsers raise anything
        return False


def _walk(root: str) -> tuple[list[str], list[str], Counter]:
    """The folders and the images below, and how many other files of each kind, without hidden ones.

    Links are followed, but no folder is entered twice.
    """
    folders, images, skipped, entered = [], [], Counter(), set()

    def fail(e: OSError):
        raise e

    for folder, inner, files in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            skipped["repeated link"] += 1
            inner.clear()
            continue
        entered.add(real)
        folders.append(folder)
        inner[:] = sorted(filter(_is_ours, inner))
        for path in (os.path.join(folder, name) for name in files if _is_ours(name)):
            suffix = os.path.splitext(path)[1].lower()
            if not os.path.isfile(path):
                skipped["broken link"] += 1
            elif _is_image(path):
                images.append(path)
            else:
                skipped[suffix if 1 < len(suffix) <= 10 else "no extension"] += 1
    return sorted(folders), sorted(images), skipped


def _is_ours(name: str) -> bool:
    return name[0] != "." and name.lower() not in IGNORED


def _by_class(top: str, images: list[str], is_root: bool) -> dict[str, list[str]]:
    """The images below a folder by the name of the folder directly in it; its own ones by ""."""
    start, classes = os.path.join(top, ""), {}
    images = [path for path in images if path.startswith(start)]
    if not images:
        raise UserError(f"{top}: no images there that can be read")
    for path in sorted(images, key=os.path.split):
        name, _, below = unicodedata.normalize("NFC", path.removeprefix(start)).partition(os.sep)
        classes.setdefault(name if below else "", []).append(path)
    inner = os.path.commonpath([os.path.dirname(path) for path in images])
    if len(classes) == 1 and inner != top and inner not in map(os.path.dirname, images):
        how = f"give --dataset {inner}" if is_root else f"move them up, into {top}"
        raise UserError(f"{top}: its class folders lie deeper, in {inner}; {how}")
    return classes


def _split_folders(root: str, folders: list[str]) -> list[str]:
    """The folders of the training and the test split; none if there are none by such names."""
    names = {os.path.basename(f).lower(): f for f in folders if os.path.dirname(f) == root}
    train, test = ([names[name] for name in kind if name in names] for kind in (TRAIN, TEST))
    if bool(train) != bool(test):
        (alone, *_), missing = train or test, "val/ or test/" if train else "train/"
        raise UserError(f"{root}: has {alone}, but no {missing}; --dataset {alone} would be split 80/20")
    return [train[0], test[0]] if train else []


def _check_classes(parts: dict[str, dict[str, list[str]]], classes: list[str], folders: list[str]) -> list[str]:
    """Notes on the images by class of each part of a folder, whose own images are left out."""
    names = {unicodedata.normalize("NFC", os.path.basename(f)) for f in folders if os.path.dirname(f) in parts}
    notes, names = [], names | {*classes}
    for top, part in parts.items():
        own, others = len(part.pop("", [])), sum(map(len, part.values()))
        if own > others:
            raise UserError(f"{top}: {count(own, 'image')} beside class folders that hold {others:,}: which?")
        if own:
            notes.append(f"{top}: {count(own, 'image')} beside the class folders: not used")
        if missing := sorted(names - {*part}):
            notes.append(f"{top}: no images of {enumeration(missing)}")
    return notes


def scan(root: Path) -> Folder:
    """What the folder holds. Raises FileNotFoundError without one, UserError for another layout."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
    root, notes = os.path.abspath(root), []
    if not os.path.exists(root):
        raise FileNotFoundError(root)
    if not os.path.isdir(root):
        raise UserError(f"{root}: a file, not a folder of images or an .npz; if it is an archive, unpack it")
    folders, images, skipped = _walk(root)
    if not images:
        raise UserError(f"{root}: no images there that can be read, among {count(skipped.total(), 'other file')}")
    splits = _split_folders(root, folders)
    if others := sorted(f for f in folders if splits and os.path.dirname(f) == root and f not in splits):
        notes.append(f"beside {' and '.join(splits)}, {enumeration(others)} is not used")
    parts = {top: _by_class(top, images, not splits) for top in splits or [root]}
    classes = sorted({name for part in parts.values() for name in part if name})
    if classes:
        notes += _check_classes(parts, classes, folders)
    labels = list(enumerate(classes or [""]))
    samples = [[(path, i) for i, name in labels for path in part.get(name, [])] for part in parts.values()]
    if not splits:
        samples = split_samples(root, samples[0], notes)
    return Folder(root, *samples, classes, skipped, notes)


def split_samples(root: str, every: list[Sample], notes: list[str]) -> list[list[Sample]]:
    """Both splits of images that are in none; adds a note if classes are too small. Raises UserError for one image."""
    if len(every) < 2:
        raise UserError(f"{root}: one image alone cannot be split into training and test images")
    *indices, in_proportion = stratified_split(np.array([label for _, label in every]))
    if not in_proportion:
        why = "classes too small to have a share of the test images each"
        notes.append(f"{why}: split without regard to classes")
    return [[every[i] for i in index] for index in indices]


def open_image(path: str | Row, channels: int) -> Image.Image:
    """The first image of a file, upright, on white, in grey or RGB (3 channels). Raises UserError if damaged."""
    if isinstance(path, Row):
        return Image.fromarray(path.pixels).convert("L" if channels == 1 else "RGB")
    try:
        with Image.open(path) as image:
            sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
            ImageOps.exif_transpose(image, in_place=True)
            if sixteen:
                values = np.asarray(image).astype(np.float64)
                if isinstance(clear := image.info.get("transparency"), int):
                    values[values == clear] = 65535
                image = Image.fromarray((values * 255 / 65535).round().astype(np.uint8))
            elif image.mode[0] in "IF":
                raise UserError(f"{path}: pixels of 32 bits, whose range is not known; save it with 8 or 16 bits")
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("L" if channels == 1 else "RGB")
    except UserError:
        raise
    except Image.DecompressionBombError as e:
        raise UserError(f"{path}: too many pixels ({one_line(e)}); make it smaller") from e
    except Exception as e:  # the libraries' parsers raise anything on damaged files
        if _begins_with(path, b"version https://git-lfs"):
            raise UserError(f"{path}: a pointer of git-LFS; `git lfs pull` fetches the image itself") from e
        raise UserError(f"{path}: damaged image ({one_line(e)})") from e


def _begins_with(path: str, start: bytes) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(start)) == start
    return False


def content_digest(samples: list[Sample]) -> str:
    """Of the files and labels of images, in their order; kept in the user's cache, as it takes as long as reading all.

    What is kept is of files of the same names, sizes and times.
    """
    stats = [(path, label, os.stat(path)) for path, label in samples]
    lines = [f"{path} {label} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for path, label, s in stats]
    name = digest("\n".join(lines).encode(errors="surrogateescape"))
    kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hit", name)
    with contextlib.suppress(OSError, RuntimeError):  # it is not there yet, or there is no home
        return kept.expanduser().read_text()

    def of_file(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor(decoders()) as pool:
        digests = pool.map(of_file, (path for path, _ in samples))
        of_files = b"".join(tqdm(digests, total=len(samples), unit="image", desc="digest of the images", disable=None))
    result = digest(of_files + f"{[label for _, label in samples]}".encode())
    with contextlib.suppress(OSError, RuntimeError):
        kept.expanduser().parent.mkdir(parents=True, exist_ok=True)
        write_text(kept.expanduser(), result)
    return result


def decoders() -> int:
    """How many images to decode at a time: at most 16, and the cores of this process."""
    from joblib import cpu_count  # those of its affinity, within a container's quota

    return min(16, cpu_count())


def centre_crop(size: int) -> Callable[[Image.Image], "Tensor"]:
    """Turns an image into its centre, resized: (C, size, size) uint8."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])


def decode(samples: list[Sample], channels: int, size: int) -> "Tensor":
    """The centres of images, (N, C, size, size) uint8. Raises UserError naming those that are damaged."""
    import torch

    images, crop = torch.empty(len(samples), channels, size, size, dtype=torch.uint8), centre_crop(size)

    def read(i: int) -> str | None:
        try:
            images[i] = crop(open_image(samples[i][0], channels))
        except UserError as e:
            return str(e)

    with ThreadPoolExecutor(decoders()) as pool:
        problems = list(filter(None, pool.map(read, range(len(samples)))))
    if len(problems) > 1:
        problems = [*problems[:10], f"{len(problems)} images in all"]
    if problems:
        raise UserError("; ".join(problems))
    return images
