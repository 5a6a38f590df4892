"""The data sets: one table of what they are, and `load`, which puts one where training can batch it.

Images of up to 32 pixels live on the training device (`Resident`); larger ones stream (`Streamed`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

from utils.errors import UserError

from . import readers
from .batches import Resident, Streamed


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without having it."""

    shape: tuple[int, int, int]  # C, H, W
    likelihood: str  # the usual p(x|y)
    reader: Callable
    files: str  # what is expected under --data_dir
    fetch: Callable | None = None  # downloads it into a folder


def _fetch_mnist(root: Path) -> None:
    torchvision.datasets.MNIST(root, download=True)


def _fetch_cifar10(root: Path) -> None:
    torchvision.datasets.CIFAR10(root, download=True)


def _fetch_svhn(root: Path) -> None:
    for split in ("train", "test"):
        torchvision.datasets.SVHN(root, split, download=True)


GREY, COLOUR, LARGE = (1, 28, 28), (3, 32, 32), (3, 256, 256)
LEARNED = "GaussianLearnedSigma"
MNIST_FILES = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
CIFAR10_FILES = "cifar-10-batches-py/{data_batch_1..5,test_batch}"
DATASETS = {
    "Digits": DataSet(GREY, "Bernoulli", readers.digits, "nothing: it ships with scikit-learn"),
    "MNIST": DataSet(GREY, "Bernoulli", readers.mnist, MNIST_FILES, _fetch_mnist),
    "BinaryMNIST": DataSet(GREY, "Bernoulli", readers.binary_mnist, MNIST_FILES, _fetch_mnist),
    "CIFAR10": DataSet(COLOUR, LEARNED, readers.cifar10, CIFAR10_FILES, _fetch_cifar10),
    "SVHN": DataSet(COLOUR, LEARNED, readers.svhn, "{train,test}_32x32.mat", _fetch_svhn),
    "ImageNet": DataSet(LARGE, LEARNED, readers.imagenet, "{train,val}/<a folder a class>/<images>"),
}


class Data(NamedTuple):
    """Both splits of a data set, and its number of classes."""

    train: Resident | Streamed
    test: Resident | Streamed
    n_classes: int


def lookup(config) -> DataSet:
    """The table's entry of a Config's data set, or one made for the user's own folder of images."""
    if config.dataset in DATASETS:
        return DATASETS[config.dataset]
    shape = (config.image_channels, config.image_size, config.image_size)
    likelihood = "Bernoulli" if config.image_channels == 1 else LEARNED
    in_memory = partial(readers.read_folder, channels=shape[0], size=shape[1])
    reader = readers.folder if shape[1] == LARGE[1] else in_memory
    return DataSet(shape, likelihood, reader, "a folder of images for each class, or train/ and val/ of such")


def load(config, data_dir: str, device: torch.device, download: bool = False) -> Data:
    """Both splits of the Config's data set, under `data_dir` or a folder of the data set's name in it.

    Raises UserError, saying where it looked and what belongs there, when the files are missing or damaged.
    """
    dataset, own = lookup(config), config.dataset not in DATASETS
    roots = [Path(config.dataset)] if own else [Path(data_dir), Path(data_dir) / config.dataset]
    if download and dataset.fetch is not None:
        try:
            dataset.fetch(roots[0])
        except (OSError, RuntimeError) as e:
            raise UserError(f"--download: could not fetch {config.dataset} ({e})") from e
    for root in roots:
        try:
            train, test = dataset.reader(root, train=True), dataset.reader(root, train=False)
            break
        except FileNotFoundError:
            continue
        except UserError:
            raise
        except PermissionError as e:
            raise UserError(f"{e.filename or root}: no permission to read {config.dataset} there") from e
        except Exception as e:  # the libraries' parsers raise anything on damaged files
            raise UserError(f"{config.dataset}: the files under {root} are damaged or not the data set's: {e}") from e
    else:
        how = "; --download fetches it" if dataset.fetch is not None else ""
        where = " or ".join(str(r.resolve()) for r in roots)
        raise UserError(f"{config.dataset}: not found; looked in {where} for {dataset.files}{how}")
    if isinstance(train, torchvision.datasets.ImageFolder):
        splits = [Streamed(part.samples, dataset.shape, device) for part in (train, test)]
        return Data(*splits, n_classes=len(train.classes))
    for images, labels in (train, test):
        if images.shape[1:] != dataset.shape or len(images) != len(labels) or len(images) == 0:
            raise UserError(f"{config.dataset}: {root} holds images {tuple(images.shape)}, {len(labels)} labels")
    n_classes = int(max(train[1].max(), test[1].max())) + 1
    return Data(Resident(*train, device), Resident(*test, device), n_classes if own else max(10, n_classes))
