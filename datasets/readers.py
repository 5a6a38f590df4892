"""Readers of the data sets' own file formats: images (N, C, H, W) and labels (N,) of both splits.

Each takes the folder to look in, raises FileNotFoundError if none of the data set's files is there, and UserError
naming the first missing one if others are. No code in a file is run: pickles may hold arrays only. What the files hold
is checked behind the readers, in loading.py.
"""

import gzip
import io
import math
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy import ndarray

from utils.errors import UserError

from .folders import TEST, TRAIN, Folder, scan, stratified_split

Split = tuple[ndarray, ndarray]

ARRAYS = {  # what pickles of arrays call
    *(f"numpy._core.{name}" for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
}
# The first labels of training files that are called alike.
FIRST_LABELS = {"MNIST": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "FashionMNIST": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def locate(folders: list[Path], names: list[tuple[str, ...]]) -> list[Path]:
    """The files, each by its first name, in the first folder that has any. Raises as the module says."""
    for folder in folders:
        paths = [next(filter(Path.is_file, (folder / n for n in alike)), None) for alike in names]
        if all(paths):
            return paths
        if any(paths):
            raise UserError(f"{folder / names[paths.index(None)][0]}: missing, while others of its set are there")
    raise FileNotFoundError(folders[0] / names[0][0])


def digits(root: Path, binary: bool = False) -> tuple[Split, Split]:
    """scikit-learn's bundled 8x8 handwritten digits, enlarged bilinearly to 28x28; `binary` as of `idx`."""
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()

    def split(index):
        images = torch.tensor(data.images[index], dtype=torch.float32).unsqueeze(1) * (255 / 16)
        images = torch.nn.functional.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)
        images = (images >= 128).to(torch.uint8) * 255 if binary else images
        return images.numpy(), data.target[index]

    train, test, _ = stratified_split(data.target)
    return split(train), split(test)


def read_idx(path: Path) -> ndarray:
    """The array of an idx file, gzipped or not, whatever its name. Raises ValueError if it holds anything else."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        zeros, kind, dims = struct.unpack_from(">HBB", content)
        if zeros or kind not in IDX_TYPES or not 1 <= dims <= 3:
            raise ValueError("not an idx file")
        shape = struct.unpack_from(f">{dims}I", content, 4)
        values = np.frombuffer(bytearray(content), IDX_TYPES[kind], offset=4 + 4 * dims)  # which may be written
        if len(values) != math.prod(shape):
            raise ValueError(f"holds {len(values):,} values, not the {math.prod(shape):,} that it promises")
    except (EOFError, OSError, struct.error, zlib.error, ValueError) as e:
        raise ValueError(f"{path}: {e}") from e
    return values.reshape(shape)


def idx(
    root: Path,
    family: str,
    parts: tuple[str, str] = ("train", "t10k"),
    labels: str = "labels-idx1-ubyte",
    first_label: int = 0,
    transposed: bool = False,
    binary: bool = False,
) -> tuple[Split, Split]:
    """Images and labels in the format of MNIST: `family` is torchvision's folder, `parts` begin the files' names.

    Where a label has several columns, the first counts. Some files number the classes from 1 (`first_label`), or
    hold images column by column (`transposed`). `binary` sets pixels of 0.5 and above to 1, the others to 0.
    """
    stems = [f"{part}-{what}" for part in parts for what in ("images-idx3-ubyte", labels)]
    names = [tuple(n + end for n in (s, s.replace("-idx", ".idx")) for end in ("", ".gz")) for s in stems]
    paths = locate([root / family / "raw", root / family, root / "raw", root / "gzip", root], names)
    arrays = [read_idx(path) for path in paths]
    for other, first in FIRST_LABELS.items():
        if parts[1] == "t10k" and other != family and arrays[1][:10].tolist() == first:
            raise UserError(f"{paths[1]}: holds {other}, not {family}; put each into a folder of its name")

    def split(images: ndarray, y: ndarray) -> Split:
        images = images.swapaxes(1, 2) if transposed else images
        images = (images >= 128).astype(np.uint8) * 255 if binary else images
        return images[:, None], (y if y.ndim == 1 else y[:, 0]).astype(np.int64) - first_label

    return split(*arrays[:2]), split(*arrays[2:])


class _ArraysOnly(pickle.Unpickler):
    """Loads containers and numpy arrays; refuses everything else that a pickle could call."""

    def find_class(self, module, name):
        module = module.replace("numpy.core.", "numpy._core.")  # before numpy 2
        if f"{module}.{name}" not in ARRAYS:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not data: refused")
        return super().find_class(module, name)


def cifar(root: Path, folder: str, parts: tuple[list[str], list[str]], labels: str) -> tuple[Split, Split]:
    """CIFAR's python batches: rows of 3 x 32 x 32 bytes, or images."""
    paths = iter(locate([root / folder, root], [(name,) for names in parts for name in names]))

    def batch(path: Path) -> Split:
        try:
            content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
            content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
            images, y = np.asarray(content["data"]), np.asarray(content[labels])
        except Exception as e:  # pickle raises anything on damaged files
            raise ValueError(f"{path}: {e!r}") from e
        return images.reshape(-1, 3, 32, 32) if images.ndim == 2 and images.shape[1] == 3072 else images, y.ravel()

    def split(names: list[str]) -> Split:
        images, y = zip(*(batch(next(paths)) for _ in names), strict=True)
        return np.concatenate(images), np.concatenate(y)

    return split(parts[0]), split(parts[1])


def svhn(root: Path) -> tuple[Split, Split]:
    """SVHN's cropped digits: images (32, 32, 3, N), and labels in which 10 stands for the digit 0."""
    from scipy.io import loadmat

    def split(path: Path) -> Split:
        content = path.read_bytes()
        try:
            if not content.startswith(b"MATLAB 5.0"):
                raise ValueError("not a MATLAB 5.0 file")
            data = loadmat(io.BytesIO(content))  # of a path it would read as many bytes as a damaged header says
            images, y = data["X"], data["y"].ravel()
        except Exception as e:  # scipy raises anything on damaged files
            raise ValueError(f"{path}: {e!r}") from e
        return images.transpose(3, 2, 0, 1) if images.shape[:3] == (32, 32, 3) else images, np.where(y == 10, 0, y)

    train, test = locate([root], [("train_32x32.mat",), ("test_32x32.mat",)])
    return split(train), split(test)


def imagenet(root: Path) -> Folder:
    """ImageNet's folders `train/` and `val/`, each with a folder for every class."""
    if not root.is_dir() or not any(p.is_dir() and p.name.lower() in TRAIN + TEST for p in root.iterdir()):
        raise FileNotFoundError(root / "train")
    return scan(root)
