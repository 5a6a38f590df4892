"""Folders of images: which file is an image of which split and class, and how one is opened.

pets/cat/1.jpg             a folder for each class, split 80/20 here; or
pets/train/cat/1.jpg       train/ and val/ (or test/) of such folders; or
pets/1.jpg                 images without classes, with or without train/ and val/
"""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError, one_line
from utils.files import digest

if TYPE_CHECKING:
    from torch import Tensor

Sample = tuple[str, int]  # an image's path and label

SIZES = (28, 32, 64, 128, 256)  # pixels that the networks are made for
TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")
IGNORED = {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
IGNORED |= {"system volume information", "__pycache__"}
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them and cannot draw them by itself
BY_CONTENT = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}  # told by their first bytes
DARK = 16384  # 16-bit images below it hold 14 bits or fewer


@dataclass(frozen=True)
class Folder:
    """What a folder of images holds."""

    root: str
    train: list[Sample]
    test: list[Sample]
    classes: list[str]  # of both splits; none: images without classes, whose labels are 0
    skipped: Counter = field(default_factory=Counter)  # files by kind
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of the list of files, below the folder: the same wherever it lies, and whatever it is called."""
        start = len(os.path.join(self.root, ""))
        lines = [
            f"{split} {label} {path[start:].replace(os.sep, '/')}"
            for split, samples in (("train", self.train), ("test", self.test))
            for path, label in samples
        ]
        return digest("\n".join(lines).encode(errors="surrogateescape"))


def printable(text: str) -> str:
    """The text, whatever a file may be called, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def listed(names: Sequence, most: int = 10) -> str:
    """Names with commas between; of long lists the first ones and the last."""
    names = list(map(str, names))
    return printable(", ".join([*names[: most - 1], f"... {names[-1]}"] if len(names) > most else names))


def count(n: int, word: str) -> str:
    """`1 file`, `3 files`, `2 classes`."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}{'es' if word.endswith('s') else 's'}"


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Indices of a fixed 80/20 split, and whether every class is in it in proportion: classes may be too small."""
    from sklearn.model_selection import train_test_split

    index, sizes = np.arange(len(labels)), np.bincount(labels)
    sizes = sizes[sizes > 0]
    possible = sizes.min() > 1 and len(sizes) <= min(-(-len(index) // 5), len(index) * 4 // 5)
    parts = train_test_split(index, test_size=0.2, random_state=0, stratify=labels if possible else None)
    return np.sort(parts[0]), np.sort(parts[1]), bool(possible)


@functools.cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions().items()
    return frozenset(ext for ext, kind in known if kind in Image.OPEN and kind not in NOT_PICTURES)


def _is_image(path: str) -> bool:
    """By its extension if that is an image's, else by its content."""
    if os.path.splitext(path)[1].lower() in _extensions():
        return True
    try:
        with Image.open(path, formats=sorted(BY_CONTENT & Image.OPEN.keys())):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # the libraries' parsers raise anything
        return False


def _walk(root: str) -> tuple[list[str], list[str], Counter]:
    """All folders and images below, and what else there is, by kind; hidden ones are left out.

    Each real folder and file comes once, under its own name rather than a link's.
    """
    folders, files, skipped, seen, links, tops = {}, [], Counter(), set(), [], [root]
    while tops:
        todo, tops = tops, []
        while todo:
            folder = todo.pop()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                skipped["repeated link"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[folder] = os.path.realpath(folder)
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    if entry.name[0] == "." or entry.name.lower() in IGNORED:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    elif entry.is_symlink():
                        (tops if os.path.isdir(entry.path) else links).append(entry.path)
                    elif entry.is_file():
                        files.append(entry.path)
                    else:
                        skipped["no file"] += 1  # a pipe or a device
    real = {os.path.join(folders[os.path.dirname(p)], os.path.basename(p)) for p in files} if links else set()
    for path in sorted(links):
        target = os.path.realpath(path)
        if not os.path.isfile(path):
            skipped["broken link"] += 1
        elif target in real:
            skipped["repeated link"] += 1
        else:
            real.add(target)
            files.append(path)
    images = []
    for path in files:
        if _is_image(path):
            images.append(path)
        else:
            suffix = os.path.splitext(path)[1].lower()
            skipped[suffix if 1 < len(suffix) <= 10 else "no extension"] += 1
    return sorted(folders), sorted(images), skipped


class _Part:
    """The images below a folder by class: those of its folders; its own ones are loose."""

    def __init__(self, root: str, top: str, folders: list[str], images: list[str]):
        self.top, start = top, os.path.join(top, "")
        images = [p for p in images if p.startswith(start)]
        if not images:
            raise UserError(f"{top}: no images there that can be read")
        self.classes, self.loose = {}, []
        for path in images:
            names = path[len(start) :].split(os.sep)
            wrong = next((n for n in names[:-1][:2] if n.lower() in TRAIN + TEST), None)
            if wrong:
                raise UserError(
                    f"{top}: the name of a split, {wrong}, in place of a class (in {os.path.dirname(path)}): "
                    "give the folder that holds train/ and val/, which hold the class folders"
                )
            (self.classes.setdefault(names[0], []) if len(names) > 1 else self.loose).append(path)
        if len(self.classes) == 1 and not self.loose:
            inner = os.path.commonpath([os.path.dirname(p) for p in images])
            if inner not in map(os.path.dirname, images):
                how = f"give --dataset {inner}" if top == root else f"move them up, into {top}"
                raise UserError(f"{top}: its class folders lie deeper, in {inner}; {how}")
        n = sum(map(len, self.classes.values()))
        if 0 < n < len(self.loose):
            raise UserError(f"{top}: {count(len(self.loose), 'image')} beside class folders that hold {n:,}: which?")
        self.empty = [
            f[len(start) :]
            for f in folders
            if f.startswith(start) and os.sep not in f[len(start) :] and f[len(start) :] not in self.classes
        ]

    def samples(self, classes: list[str]) -> list[Sample]:
        by_class = enumerate(self.classes.get(c, []) for c in classes) if classes else [(0, self.loose)]
        return [(path, label) for label, paths in by_class for path in sorted(paths, key=os.path.split)]


def _split_folders(root: str, folders: list[str], notes: list[str]) -> list[str] | None:
    """The folders of the training and the test split; None if there are none by such names."""
    names = [f[len(os.path.join(root, "")) :] for f in folders if os.path.dirname(f) == root and f != root]
    found = [[n for name in kind for n in names if n.lower() == name] for kind in (TRAIN, TEST)]
    if not any(found):
        return None
    for kind, there, other in zip((TRAIN, TEST), found, reversed(found), strict=True):
        if not there:
            missing, alone = "train/" if kind == TRAIN else "val/ or test/", os.path.join(root, other[0])
            raise UserError(f"{root}: has {other[0]}/, but no {missing}; --dataset {alone} would be split 80/20")
        if len(there) > 1 and (kind == TRAIN or there[0].lower() == there[1].lower()):
            raise UserError(f"{root}: has {listed(there)}: which is it?")
    chosen = [found[0][0], found[1][0]]
    if others := sorted(set(names) - set(chosen)):
        notes.append(f"beside {chosen[0]}/ and {chosen[1]}/, {listed(others)} is not used")
    return [os.path.join(root, name) for name in chosen]


def scan(root: Path) -> Folder:
    """What the folder holds.

    Raises FileNotFoundError if it does not exist, and UserError if it is not laid out as a folder of images is.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
    root, notes = os.path.abspath(root), []
    if not os.path.exists(root):
        raise FileNotFoundError(root)
    if not os.path.isdir(root):
        raise UserError(f"{root}: a file, not a folder of images; if it is an archive, unpack it")
    folders, images, skipped = _walk(root)
    left_out = f" ({listed_counts(skipped)})" if skipped else ""
    if not images:
        raise UserError(f"{root}: no images there that can be read{left_out}")
    splits = _split_folders(root, folders, notes)
    parts = [_Part(root, top, folders, images) for top in splits or [root]]
    if any(p.classes for p in parts) and not all(p.classes for p in parts):
        flat, other = sorted(parts, key=lambda p: bool(p.classes))
        raise UserError(f"{flat.top}: holds images without class folders, unlike {other.top}")
    classes = sorted({c for p in parts for c in p.classes})
    for part in parts:
        where = os.path.relpath(part.top, os.path.dirname(root))
        if classes and part.loose:
            notes.append(f"{where}: {count(len(part.loose), 'image')} beside the class folders: not used")
        if empty := [name for name in part.empty if name not in classes]:
            notes.append(f"{where}: no images in {listed(empty)}")
        if missing := [c for c in classes if c not in part.classes]:
            notes.append(f"{where}: no images of {listed(missing)}")
    samples = [p.samples(classes) for p in parts]
    if not splits:
        (every,) = samples
        if len(every) < 2:
            raise UserError(f"{root}: one image alone cannot be split into training and test images")
        *indices, in_proportion = stratified_split(np.array([label for _, label in every]))
        samples = [[every[i] for i in index] for index in indices]
        if not in_proportion:
            notes.append("classes too small to have a share of the test images each: split without regard to classes")
    return Folder(root, *samples, classes, skipped, notes)


def listed_counts(kinds: Counter) -> str:
    """`.gif 2, .txt 1`."""
    return listed([f"{kind} {n:,}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))])


@functools.cache  # all cells of a grid ask
def nearest_size(root: str) -> int:
    """The one of SIZES nearest to the median of the images' shorter sides; of a hundred of the training images."""
    samples = scan(Path(root)).train
    sides = []
    for path, _ in samples[:: -(-len(samples) // 100)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except Exception:  # told of when it is read
            continue
    if not sides:
        raise UserError(f"{root}: no image there can be read; give --image_size {listed(SIZES)}")
    middle = sorted(sides)[(len(sides) - 1) // 2]
    return min(SIZES, key=lambda size: abs(size - middle))


def open_image(path: str, channels: int) -> Image.Image:
    """The image, the first of several, upright, on white where it is transparent, in grey (1 channel) or RGB (3).

    `info` has what `notes_of` reads. Raises UserError for what is damaged or has another range than it should.
    """
    try:
        with Image.open(path) as image:
            info = {"several": getattr(image, "is_animated", False) and image.format != "MPO"}
            sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":
                values = np.asarray(image).astype(np.float64)
                if isinstance(clear := image.info.get("transparency"), int):
                    values[values == clear] = 65535
                low, high = values.min(), values.max()
                top = 65535 if sixteen else next((t for t in (1, 255, 65535) if low >= 0 and high <= t), None)
                if top is None:
                    raise UserError(f"{path}: pixels from {low:g} to {high:g}: not in [0, 1], [0, 255] or [0, 65535]")
                info |= {"16 bits": sixteen, "top": top, "high": high}
                image = Image.fromarray((values * 255 / top).round().astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image.info = info
            return image
    except UserError:
        raise
    except Image.DecompressionBombError as e:
        raise UserError(f"{path}: too many pixels ({one_line(e)}); make it smaller") from e
    except Exception as e:  # the libraries' parsers raise anything on damaged files
        raise UserError(f"{path}: damaged image ({one_line(e)})") from e


def notes_of(opened: Iterable[tuple[str, dict]]) -> list[str]:
    """What should be known of images' ranges and frames, from the path and `info` of each."""
    notes, opened = [], [(os.path.basename(path), info) for path, info in opened]
    if several := [name for name, info in opened if info["several"]]:
        notes.append(f"of animations and pages only the first is used ({listed(several)})")
    deep = [(info["high"], name) for name, info in opened if info.get("16 bits")]
    if deep and 0 < max(deep)[0] < DARK:
        which = listed([name for _, name in deep])
        notes.append(f"16-bit images reach only {max(deep)[0]:,.0f} of 65,535, so they are dark ({which})")
    tops = {info["top"]: name for name, info in opened if "top" in info and not info["16 bits"] and info["high"] > 0}
    if len(tops) > 1:
        ranges = listed([f"{name} [0, {top}]" for top, name in sorted(tops.items())])
        notes.append(f"float or 32-bit images of different ranges, each scaled by its own: {ranges}")
    return notes


def threads() -> int:
    """How many images to decode at a time: 16 at most, and no more than there are cores for this process."""
    from joblib import cpu_count  # those of its affinity, within a container's quota

    return min(16, cpu_count())


def decode(samples: list[Sample], channels: int, size: int) -> tuple["Tensor", list[tuple[str, dict]], list[str]]:
    """Images (N, C, H, W) uint8, resized and cropped in the centre to size x size; their `info`; and what is wrong."""
    import torch
    from torchvision.transforms import v2

    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    images = torch.empty(len(samples), channels, size, size, dtype=torch.uint8)

    def one(i: int) -> tuple[str, dict] | str:
        path = samples[i][0]
        try:
            image = open_image(path, channels)
        except UserError as e:
            return str(e)
        images[i] = fit(image)
        return path, image.info

    with ThreadPoolExecutor(threads()) as pool:
        results = list(pool.map(one, range(len(samples))))
    return images, [r for r in results if not isinstance(r, str)], [r for r in results if isinstance(r, str)]


def look(samples: list[Sample], channels: int) -> list[str]:
    """Notes of a few of the images that are to be decoded one by one, later."""
    opened = []
    for path, _ in samples[:: -(-len(samples) // 20)]:
        try:
            opened.append((path, open_image(path, channels).info))
        except UserError:  # raised again when it is its turn
            continue
    return notes_of(opened)
