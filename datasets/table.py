"""The data sets: one table of what they are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import readers


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without having it."""

    shape: tuple[int, int, int]  # C, H, W
    likelihood: str  # the usual p(x|y)
    reader: Callable
    files: str  # what is expected under --data_dir
    fetch: Callable | None = None  # downloads it into a folder


def _fetch_mnist(root: Path) -> None:
    import torchvision

    torchvision.datasets.MNIST(root, download=True)


def _fetch_cifar10(root: Path) -> None:
    import torchvision

    torchvision.datasets.CIFAR10(root, download=True)


def _fetch_svhn(root: Path) -> None:
    import torchvision

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


def lookup(config) -> DataSet:
    """The table's entry of a Config's data set, or one made for the user's own folder of images."""
    if config.dataset in DATASETS:
        return DATASETS[config.dataset]
    shape = (config.image_channels, config.image_size, config.image_size)
    likelihood = "Bernoulli" if config.image_channels == 1 else LEARNED
    in_memory = partial(readers.read_folder, channels=shape[0], size=shape[1])
    reader = readers.folder if shape[1] == LARGE[1] else in_memory
    return DataSet(shape, likelihood, reader, "a folder of images for each class, or train/ and val/ of such")
