"""Readers of the data sets' own file formats: images (N, C, H, W) and labels (N,) of both splits.

Each takes the folder to look in, raises FileNotFoundError if none of the data set's files is there, and
UserError naming the first one that is missing if others are. Nothing here runs code found in a file:
pickles may hold arrays only. What the files hold is checked behind the readers, in loading.py.
"""

import functools
import gzip
import io
import math
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy import ndarray

from utils.errors import UserError

from .folders import TEST, TRAIN, Folder, scan, stratified_split

Split = tuple[ndarray, ndarray]

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
DEFLATE = 1032  # to one, at most
MOST = 2**30  # bytes of an idx file's data: more than of any of these data sets
# The first labels of the training files, which are called alike.
FIRST_LABELS = {"MNIST": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "FashionMNIST": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}


def locate(folders: list[Path], names: list[tuple[str, ...]]) -> list[Path]:
    """The files, each by the first of its names that is there, in the first folder that has any of them.

    Raises FileNotFoundError if no folder has, and UserError if that folder lacks one.
    """
    for folder in folders:
        found = [next((folder / n for n in alike if (folder / n).is_file()), None) for alike in names]
        if all(found):
            return found
        if any(found):
            missing, there = folder / names[found.index(None)][0], next(filter(None, found))
            raise UserError(f"{missing}: missing, while {there.name} is there")
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
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            if zeros or kind not in IDX_TYPES or not 1 <= dims <= 3:
                raise ValueError("not an idx file")
            shape, dtype = struct.unpack(f">{dims}I", file.read(4 * dims)), np.dtype(IDX_TYPES[kind])
            size, data = math.prod(shape) * dtype.itemsize, bytearray()
            if size > min(MOST, os.path.getsize(path) * (DEFLATE if zipped else 1)):
                raise ValueError(f"promises {size:,} bytes, which it cannot hold")
            while part := file.read(min(2**20, size + 1 - len(data))):
                data += part
            if len(data) != size:
                raise ValueError(f"holds {'more' if len(data) > size else 'fewer'} than the {size:,} bytes it promises")
    except (EOFError, OSError, struct.error, zlib.error, ValueError) as e:
        raise ValueError(f"{path}: {e}") from e
    return np.frombuffer(data, dtype).reshape(shape)


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
    both = [(s, s.replace("-idx", ".idx")) for s in stems]
    names = [tuple(n + ending for n in alike for ending in ("", ".gz")) for alike in both]
    paths = locate([root / family / "raw", root / family, root / "raw", root / "gzip", root], names)
    arrays = [read_idx(path) for path in paths]
    first, alike = arrays[1][:10].tolist(), "t10k" in parts
    if other := next((n for n, start in FIRST_LABELS.items() if alike and first == start and n != family), None):
        raise UserError(f"{paths[1]}: holds {other}, not {family}; put each into a folder of its name")

    def split(images: ndarray, y: ndarray) -> Split:
        images = images.swapaxes(1, 2) if transposed else images
        images = (images >= 128).astype(np.uint8) * 255 if binary else images
        return images[:, None], (y if y.ndim == 1 else y[:, 0]).astype(np.int64) - first_label

    return split(*arrays[:2]), split(*arrays[2:])


class _ArraysOnly(pickle._Unpickler):
    """Loads containers and numpy arrays; refuses everything else that a pickle could call.

    Python's own, since the one in C makes room for as many entries as a damaged file numbers.
    """

    allowed = {
        *("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer"),
        *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
    }

    def find_class(self, module, name):
        module = module.replace("numpy.core.", "numpy._core.")  # before numpy 2
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not data: refused")
        found = super().find_class(module, name)
        return functools.partial(_empty, found) if name == "_reconstruct" else found

    def load_bytearray8(self):
        """Python's makes room for as many bytes as a damaged file says, before it reads them."""
        size = int.from_bytes(self.read(8), "little")
        held = self.read(size)
        if len(held) < size:
            raise pickle.UnpicklingError(f"it ends within an array of {size:,} bytes")
        self.append(bytearray(held))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}


def _empty(reconstruct, subtype, shape, dtype):
    if shape != (0,):  # as numpy writes it; another one would ask for memory
        raise pickle.UnpicklingError(f"an array begins with the shape {shape!r}, not (0,)")
    return reconstruct(subtype, shape, dtype)


def cifar(root: Path, folder: str, parts: tuple[list[str], list[str]], labels: str) -> tuple[Split, Split]:
    """CIFAR's python batches: rows of 3 x 32 x 32 bytes, or images."""
    paths = iter(locate([root / folder, root], [(name,) for names in parts for name in names]))

    def batch(path: Path) -> Split:
        try:
            held = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
            held = {k.decode() if isinstance(k, bytes) else k: v for k, v in held.items()}
            images, y = np.asarray(held["data"]), np.asarray(held[labels])
        except Exception as e:  # pickle raises anything on damaged files
            raise ValueError(f"{path}: {e if isinstance(e, pickle.UnpicklingError) else repr(e)}") from e
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
        if content.startswith((b"MATLAB 7.3", b"\x89HDF")):
            raise UserError(
                f"{path}: MATLAB's format 7.3; rename it to {path.stem}.h5 and convert that (pip install h5py): python "
                f"-c \"import h5py, scipy.io; f = h5py.File('{path.with_suffix('.h5')}'); "
                f"scipy.io.savemat('{path}', {{k: f[k][()].T for k in 'Xy'}})\""
            )
        if not content.startswith(b"MATLAB 5.0"):
            raise ValueError(f"{path} is not a MATLAB 5.0 file")
        try:
            data = loadmat(io.BytesIO(content))  # of a path it would read as many bytes as a damaged header says
        except Exception as e:  # scipy raises anything on damaged files
            raise ValueError(f"{path}: {e!r}") from e
        if not {"X", "y"} <= data.keys():
            raise ValueError(f"{path} has no arrays X and y")
        images, y = data["X"], data["y"].ravel()
        return images.transpose(3, 2, 0, 1) if images.shape[:3] == (32, 32, 3) else images, np.where(y == 10, 0, y)

    train, test = locate([root], [("train_32x32.mat",), ("test_32x32.mat",)])
    return split(train), split(test)


def imagenet(root: Path) -> Folder:
    """ImageNet's folders `train/` and `val/`, each with a folder for every class."""
    if not root.is_dir() or not any(p.is_dir() and p.name.lower() in TRAIN + TEST for p in root.iterdir()):
        raise FileNotFoundError(root / "train")
    return scan(root)
