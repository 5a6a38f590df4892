"""Small files in exactly the formats of the data sets, of random images."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from datasets.loading import Data, load_data
from utils.config import Config
from utils.errors import UserError

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
MNIST = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load(name, root="data", **settings) -> Data:
    return load_data(Config(dataset=name, **settings), root, CPU)


def refused(name, *words, **settings) -> None:
    """Loading the data set is refused in one line that has these words in it."""
    with pytest.raises(UserError) as e:
        load(str(name), **settings)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), e.value


def write_idx(path: Path, values: np.ndarray, zipped=False) -> None:
    kind = {"uint8": 8, "int32": 12}[values.dtype.name]
    header = struct.pack(">HBB", 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.astype(values.dtype.newbyteorder(">")).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if zipped else data)


def write_mnist(root: Path, n=20, below="MNIST/raw", names=MNIST, zipped=False) -> np.ndarray:
    images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for images_name, labels_name in (names[:2], names[2:]):
        write_idx(root / below / images_name, images, zipped)
        write_idx(root / below / labels_name, (np.arange(n) % 10).astype(np.uint8), zipped)
    return images


def write_cifar10(root: Path, n=20, protocol=2, labels=list, keys=str.encode, data=lambda rows: rows) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    rows = RNG.integers(0, 256, (n, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": data(rows), "labels": labels(np.arange(n) % 10), "batch_label": name, "filenames": ["a"] * n}
        (folder / name).write_bytes(pickle.dumps({keys(k): v for k, v in batch.items()}, protocol=protocol))
    return rows


def write_svhn(root: Path, n=20) -> np.ndarray:
    root.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
    for part in ("train", "test"):
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": images, "y": labels})
    return images


def write_image(path: Path, size=(40, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def write_folder(root: Path, size=(40, 50), classes=("cat", "dog"), n=5) -> None:
    for name in classes:
        for i in range(n):
            write_image(root / name / f"{i}.png", size)
