"""The data sets: one table of what they are. Adding one is adding a row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import arrays, readers
from .gaussian import Gaussian, Optimum

GREY, COLOUR, LARGE = (1, 28, 28), (3, 32, 32), (3, 256, 256)
LEARNED = "GaussianLearnedSigma"
MNIST_FILES = "{train,t10k}-{images-idx3,labels-idx1}-ubyte"


@dataclass(frozen=True)
class Recipe:
    """How a data set's classifier is trained; models/classifiers.py has the networks and optimisers by name."""

    network: str
    optimizer: str
    learning_rate: float
    batch_size: int
    num_epochs: int
    decay: float | None = 1.0  # of the learning rate after every epoch; None: along a cosine, to 0
    crop: int = 0  # pixels of padding for random crops
    flip: bool = False  # random horizontal flips


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without having it."""

    shape: tuple[int, int, int]  # C, H, W
    likelihood: str  # the usual p(x|y)
    reader: Callable  # of a folder: both splits' images and labels (readers.py), or what the folder holds (folders.py)
    files: str  # what is expected under --data_dir
    n_classes: int | None = None  # None: those of the folder
    fetch: Callable | None = None  # downloads it into a folder
    recipe: Recipe | None = None  # of its classifier; None: the usual one of the shape
    elsewhere: str | None = None  # where a package of the system puts it
    settings: Mapping[str, float | str] = field(default_factory=dict)  # of train.py, in place of its usual defaults
    optimum: Callable | None = None  # of the smaller beta and sigma: the best of all models, where it is known

    def __post_init__(self):
        object.__setattr__(self, "recipe", self.recipe or _usual_recipe(self.shape))


def _usual_recipe(shape: tuple[int, int, int]) -> Recipe:
    channels, size, _ = shape
    if channels == 1 and size <= 32:
        return Recipe("small_conv_net", "adadelta", 1.0, 64, num_epochs=14, decay=0.7)
    return Recipe("resnet18", "sgd", 0.01, 64, num_epochs=30, decay=None, crop=0 if size == LARGE[1] else size // 8)


def _torchvision(name: str, *parts: dict) -> Callable:
    """Downloads by torchvision's class of that name, called once with each of the arguments."""

    def fetch(root: Path) -> None:
        import torchvision

        for arguments in parts or ({"train": True}, {"train": False}):
            getattr(torchvision.datasets, name)(root, download=True, **arguments)

    return fetch


def _mnist(family: str, n_classes=10, files=MNIST_FILES, fetch=None, elsewhere=None, **how) -> DataSet:
    """A data set in MNIST's format; `how` is for its reader."""
    reader, files = partial(readers.idx, family=family, **how), f"{family}/raw/{files} (or .gz)"
    fetch = fetch or _torchvision(family)
    return DataSet(GREY, "Bernoulli", reader, files, n_classes, fetch, elsewhere=elsewhere)


def _emnist(split: str, n_classes: int, first_label: int = 0) -> DataSet:
    """A part of EMNIST, whose files hold images column by column."""
    return _mnist(
        "EMNIST",
        n_classes,
        f"emnist-{split}-{{train,test}}-{{images-idx3,labels-idx1}}-ubyte",
        _torchvision("EMNIST", {"split": split}),
        parts=(f"emnist-{split}-train", f"emnist-{split}-test"),
        first_label=first_label,
        transposed=True,
    )


def _digits(**where) -> DataSet:
    return DataSet(
        GREY,
        "Bernoulli",
        partial(readers.digits, **where),
        "nothing: it ships with scikit-learn",
        n_classes=10,
        recipe=Recipe("small_conv_net", "adadelta", 1.0, 64, num_epochs=40, decay=0.95, crop=2),  # few images
        settings={"num_epochs": 60, "batch_size": 128, "learning_rate": 9e-4, "z_dims": 8},  # trains within a minute
    )


def _gaussian() -> DataSet:
    gaussian = Gaussian()
    return DataSet(
        GREY,
        "GaussianFixedSigma",
        gaussian.read,
        "nothing: it is made from a seed",
        n_classes=4,
        recipe=Recipe("small_conv_net", "sgd", 0.02, 64, num_epochs=3, decay=None),
        settings={"sigma": 0.2, "num_epochs": 5, "batch_size": 128, "optimizer": "muon", "lr_schedule": "tail"},
        optimum=gaussian.optimum,
    )


def _cifar(number: int, folder: str, parts: tuple[list[str], list[str]], labels: str, files: str) -> DataSet:
    reader = partial(readers.cifar, folder=folder, parts=parts, labels=labels)
    recipe = Recipe("densenet121", "sgd", 0.01, 128, num_epochs=100, decay=None, crop=4, flip=True)
    return DataSet(COLOUR, LEARNED, reader, f"{folder}/{{{files}}}", number, _torchvision(f"CIFAR{number}"), recipe)


CIFAR10_PARTS = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
FASHION = {"elsewhere": "/usr/share/datasets/fashion-mnist"}  # apt-get install dataset-fashion-mnist
QMNIST = {"parts": ("qmnist-train", "qmnist-test"), "labels": "labels-idx2-int"}
DATASETS = {
    "Digits": _digits(),
    "BinaryDigits": _digits(binary=True),
    "MNIST": _mnist("MNIST"),
    "BinaryMNIST": _mnist("MNIST", binary=True),
    "FashionMNIST": _mnist("FashionMNIST", **FASHION),
    "BinaryFashionMNIST": _mnist("FashionMNIST", binary=True, **FASHION),
    "KMNIST": _mnist("KMNIST"),
    "QMNIST": _mnist("QMNIST", files="qmnist-{train,test}-{images-idx3-ubyte,labels-idx2-int}", **QMNIST),
    "EMNISTLetters": _emnist("letters", 26, first_label=1),  # A and a are one class, 0, to Z, 25
    "EMNISTBalanced": _emnist("balanced", 47),
    "EMNISTDigits": _emnist("digits", 10),
    "CIFAR10": _cifar(10, "cifar-10-batches-py", CIFAR10_PARTS, "labels", "data_batch_1..5,test_batch"),
    "CIFAR100": _cifar(100, "cifar-100-python", (["train"], ["test"]), "fine_labels", "train,test"),
    "SVHN": DataSet(
        COLOUR,
        LEARNED,
        readers.svhn,
        "{train,test}_32x32.mat",
        n_classes=10,
        fetch=_torchvision("SVHN", {"split": "train"}, {"split": "test"}),
        recipe=Recipe("resnet18", "sgd", 0.01, 256, num_epochs=14),
    ),
    "ImageNet": DataSet(LARGE, LEARNED, readers.imagenet, "{train,val}/<a folder a class>/<images>"),
    "Gaussian": _gaussian(),
}


def lookup(config) -> DataSet:
    """The table's row of a Config's data set, or one made for the user's own images."""
    if config.dataset in DATASETS:
        return DATASETS[config.dataset]
    shape = (config.image_channels, config.image_size, config.image_size)
    likelihood = "Bernoulli" if config.image_channels == 1 else LEARNED
    files = "a folder of images, with or without a folder for each class, or an .npz of arrays"
    return DataSet(shape, likelihood, arrays.scan, files)


def optimum(config) -> Optimum | None:
    """The best of all models at a Config's betas; None where it is not known."""
    row, betas = lookup(config), [config.beta_y] if config.vae_type == "BVAE" else [config.beta_y, config.beta_z]
    if row.optimum is None or config.px_y_family_ll != row.likelihood or config.is_conditioned:
        return None
    return row.optimum(min(betas), config.sigma)
