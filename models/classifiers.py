"""The networks that label images, and how each data set's is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import digest, load_tensors, read_json


class Classifier(nn.Module):
    """`features` (B, F) of images (B, C, H, W), and a linear layer's logits (B, K) of them."""

    def __init__(self, body: nn.Module, n_features: int, n_classes: int):
        super().__init__()
        self.features, self.head = body, nn.Linear(n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def small_conv_net(n_classes: int) -> Classifier:
    """Two convolutions, for grey images of 28 pixels."""
    body = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5)),
    )
    return Classifier(body, 128, n_classes)


def small_resnet18(n_classes: int) -> Classifier:
    """torchvision's ResNet-18 with a stem for 32 pixels: 3x3, stride 1, no max-pool."""
    from torchvision.models import resnet18

    net = resnet18()
    net.conv1, net.maxpool, net.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    return Classifier(net, 512, n_classes)


def small_densenet121(n_classes: int) -> Classifier:
    """torchvision's DenseNet-121 with a stem for 32 pixels: 3x3, stride 1, no max-pool."""
    from torchvision.models import densenet121

    net = densenet121()
    net.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.features.pool0, net.classifier = nn.Identity(), nn.Identity()
    return Classifier(net, 1024, n_classes)


@dataclass(frozen=True)
class Recipe:
    """How a data set's classifier is built and trained; the scheduler steps once an epoch."""

    build: Callable[[int], Classifier]
    optimizer: Callable
    scheduler: Callable  # of the optimizer and the number of epochs
    learning_rate: float
    batch_size: int
    num_epochs: int
    crop: int = 0  # pixels of padding for random crops
    flip: bool = False  # random horizontal flips


def _adadelta(parameters, lr):
    return torch.optim.Adadelta(parameters, lr=lr)


def _sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def _by(gamma):
    return lambda optimizer, num_epochs: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)


def _constant(optimizer, num_epochs):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def _cosine(optimizer, num_epochs):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)


_mnist = Recipe(small_conv_net, _adadelta, _by(0.7), 1.0, 64, num_epochs=14)
CLASSIFIERS = {
    "Digits": Recipe(small_conv_net, _adadelta, _by(0.95), 1.0, 64, num_epochs=40, crop=2),  # few images
    "MNIST": _mnist,
    "BinaryMNIST": _mnist,
    "SVHN": Recipe(small_resnet18, _sgd, _constant, 0.01, 256, num_epochs=14),
    "CIFAR10": Recipe(
        small_densenet121,
        _sgd,
        _cosine,
        0.01,
        128,
        num_epochs=100,
        crop=4,
        flip=True,
    ),
}


def load_classifier(path: Path, dataset: str, device: torch.device) -> tuple[Classifier, str]:
    """The trained classifier of a data set in eval mode, from its folder or its weights' file, and their digest.

    Raises UserError when it is missing, unfinished, damaged, or another data set's.
    """
    file = path if path.suffix == ".pth" else path / "classifier.pth"
    settings = file.with_name("config.json")
    if not file.is_file() or not settings.is_file():
        raise UserError(
            f"{file}: no trained classifier there; python train_classifier.py --dataset {dataset} makes one"
        )
    config, state = read_json(settings), load_tensors(file)
    if config.get("dataset") != dataset:
        raise UserError(f"{file}: labels {config.get('dataset')}, not {dataset}")
    try:
        model = CLASSIFIERS[dataset].build(int(config["n_classes"]))
        model.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as e:
        raise UserError(f"{file}: does not fit {settings} ({e})") from e
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{file}: holds weights that are not finite")
    return model.to(device).eval(), digest(file.read_bytes())
