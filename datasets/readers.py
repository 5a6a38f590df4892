"""Readers of the data sets' own file formats: uint8 images (N, C, H, W) and int64 labels (N,).

Each takes the folder to look in and which split to read, and raises FileNotFoundError naming the first
file that is missing. Nothing here runs code found in a file: CIFAR10's pickles may hold arrays only.
"""

import io
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError

Split = tuple[Tensor, Tensor]


def stratified_split(labels: np.ndarray, train: bool) -> np.ndarray:
    """Indices of a fixed 80/20 split with every class in proportion."""
    from sklearn.model_selection import train_test_split

    index = np.arange(len(labels))
    return np.sort(train_test_split(index, test_size=0.2, random_state=0, stratify=labels)[0 if train else 1])


def digits(root: Path, train: bool) -> Split:
    """scikit-learn's bundled 8x8 handwritten digits, enlarged bilinearly to 28x28."""
    from sklearn.datasets import load_digits

    data = load_digits()
    index = stratified_split(data.target, train)
    images = torch.tensor(data.images[index], dtype=torch.float32).unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)
    return images, torch.tensor(data.target[index])


def _existing(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(path)


def mnist(root: Path, train: bool) -> Split:
    """MNIST's idx files."""
    part = "train" if train else "t10k"
    raw = root / "MNIST" / "raw"
    _existing(raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte")
    import torchvision

    data = torchvision.datasets.MNIST(root, train=train)
    return data.data.unsqueeze(1), data.targets.long()


def binary_mnist(root: Path, train: bool) -> Split:
    """MNIST with pixels of 0.5 and above set to 1, the others to 0."""
    images, labels = mnist(root, train)
    return (images >= 128).to(torch.uint8) * 255, labels


class _ArraysOnly(pickle.Unpickler):
    """Loads containers and numpy arrays; refuses everything else that a pickle could call."""

    allowed = frozenset(
        {
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not data: refused")
        return super().find_class(module, name)


def cifar10(root: Path, train: bool) -> Split:
    """CIFAR10's python batches: rows of 3 x 32 x 32 bytes."""
    folder = root / "cifar-10-batches-py"
    paths = [folder / f"data_batch_{i}" for i in range(1, 6)] if train else [folder / "test_batch"]
    _existing(*paths)
    images, labels = [], []
    for path in paths:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels += batch["labels"]
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels)


def svhn(root: Path, train: bool) -> Split:
    """SVHN's cropped digits: images (32, 32, 3, N), and labels in which 10 stands for the digit 0."""
    from scipy.io import loadmat

    path = root / f"{'train' if train else 'test'}_32x32.mat"
    _existing(path)
    content = path.read_bytes()
    if not content.startswith(b"MATLAB 5.0"):
        raise ValueError(f"{path.name} is no MATLAB 5.0 file")
    data = loadmat(io.BytesIO(content))  # not the path: of a file it reads as many bytes as a damaged header says
    images = np.ascontiguousarray(data["X"].transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(data["y"].astype(np.int64).ravel() % 10)


def folder(root: Path, train: bool):
    """A folder of class folders of images: `train/` and `val/` (or `test/`), or one fixed 80/20 split."""
    import torchvision

    parts = [root / "train"] if train else [root / "val", root / "test"]
    if not (root / "train").is_dir():
        data = torchvision.datasets.ImageFolder(root)
        keep = stratified_split(np.array(data.targets), train)
        data.samples = [data.samples[i] for i in keep]
        data.targets = [data.targets[i] for i in keep]
        return data
    found = next((p for p in parts if p.is_dir()), None)
    if found is None:
        raise FileNotFoundError(parts[0])
    return torchvision.datasets.ImageFolder(found)


def imagenet(root: Path, train: bool):
    """ImageNet's folders `train/` and `val/`, each with a folder for every class."""
    _existing(root / "train", root / "val")
    return folder(root, train)


def open_image(path: str, channels: int) -> Image.Image:
    """The decoded image in grey (1 channel) or RGB (3). Raises UserError for a damaged file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scaling
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"{path}: damaged image ({e})") from e


def read_folder(root: Path, train: bool, channels: int, size: int) -> Split:
    """All images of a `folder`, resized and cropped in the centre to size x size, in memory."""
    from torchvision.transforms import v2

    data = folder(root, train)
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    images = torch.stack([fit(open_image(path, channels)) for path, _ in data.samples])
    return images, torch.tensor(data.targets)
