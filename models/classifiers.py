"""The networks that label images. datasets/table.py says which one a data set has, and how it is trained."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError, one_line
from utils.files import digest, load_tensors, read_json


class Classifier(nn.Module):
    """`features` (B, F) of images (B, C, H, W), and a linear layer's logits (B, K) of them."""

    def __init__(self, body: nn.Module, n_features: int, n_classes: int):
        super().__init__()
        self.features, self.head = body, nn.Linear(n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class InParts(nn.Module):
    """A function of images (B, C, H, W), on a CPU of few at a time in channels_last memory: faster."""

    def __init__(self, network: Callable[[Tensor], Tensor], part: int = 32):
        super().__init__()
        self.network, self.part = network, part

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.network(x)
        parts = x.contiguous(memory_format=torch.channels_last).split(self.part)
        return torch.cat([self.network(part) for part in parts])


def small_conv_net(shape: tuple[int, int, int], n_classes: int) -> Classifier:
    """Two convolutions, for images of 28 or 32 pixels."""
    channels, size, _ = shape
    layers = [nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Dropout(0.25), nn.Flatten(), nn.Linear(64 * (size // 2 - 2) ** 2, 128), nn.ReLU()]
    return Classifier(nn.Sequential(*layers, nn.Dropout(0.5)), 128, n_classes)


def resnet18(shape: tuple[int, int, int], n_classes: int) -> Classifier:
    """torchvision's ResNet-18; for up to 32 pixels with a small stem: 3x3, stride 1, no max-pool."""
    from torchvision import models

    (channels, size, _), net = shape, models.resnet18()
    net.fc = nn.Identity()
    if size <= 32:
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return Classifier(net, 512, n_classes)


def densenet121(shape: tuple[int, int, int], n_classes: int) -> Classifier:
    """torchvision's DenseNet-121 with a stem for 32 pixels: 3x3, stride 1, no max-pool."""
    from torchvision import models

    net = models.densenet121()
    net.features.conv0 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    net.features.pool0, net.classifier = nn.Identity(), nn.Identity()
    return Classifier(net, 1024, n_classes)


NETWORKS = {build.__name__: build for build in (small_conv_net, resnet18, densenet121)}
OPTIMIZERS = {
    "adadelta": torch.optim.Adadelta,
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
}


def build_classifier(config, n_classes: int) -> Classifier:
    """The network of a Config's data set, with fresh weights from torch's global generator."""
    return NETWORKS[config.recipe.network](config.image_shape, n_classes)


def augmented(x: Tensor, crop: int, flip: bool, g: torch.Generator) -> Tensor:
    """Random crops, after zero-padding by `crop` pixels, and flips of images (B, C, H, W)."""
    b, _, h, w = x.shape
    padded = F.pad(x, (crop,) * 4)
    top, left = torch.randint(0, 2 * crop + 1, (2, b, 1), generator=g, device=x.device)
    rows, columns = top + torch.arange(h, device=x.device), left + torch.arange(w, device=x.device)
    mirrored = torch.rand(b, 1, generator=g, device=x.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns) if flip else columns
    index = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: Classifier, split) -> float:
    """Accuracy on all images of a split."""
    model.eval()
    return sum((model(x).argmax(1) == label).sum().item() for x, label in split.batches(500)) / len(split)


def evaluator(model: Classifier, device: torch.device) -> Classifier:
    """A trained classifier on a device, in eval mode and in the form that is fastest there."""
    if device.type == "cpu":
        model.features = InParts(model.features.to(memory_format=torch.channels_last))
    return model.to(device).eval()


def folder_of(seed: int, folder: Path) -> Path:
    """Where the classifier of a seed is: the data set's folder if free or its own, or one below it."""
    path = folder / "config.json"
    taken = path.exists() and read_json(path).get("seed", seed) != seed
    return folder / f"seed_{seed}" if taken else folder


def load_classifier(
    path: Path, config, device: torch.device, data=None, how: str = "train_classifier.py"
) -> tuple[Classifier, str]:
    """A Config's classifier in eval mode, from its folder or weights' file, and its digest.

    `data` is the Data that it labels, `how` the command that trains it. Raises UserError if it cannot be used, or was
    trained on other images.
    """
    file, name = path if path.suffix == ".pth" else path / "classifier.pth", config.data_name
    settings = file.with_name("config.json")
    if not file.is_file() or not settings.is_file():
        raise UserError(f"{file}: no trained classifier there; {how} makes one")
    stored, state = read_json(settings), load_tensors(file)
    if stored.get("dataset") != name:
        raise UserError(f"{file}: labels {stored.get('dataset')}, not {name}")
    if data is not None and not data.is_of(stored.get("data")):
        raise UserError(f"{file}: trained on other images by the name of {name}; --overwrite trains it anew")
    try:
        model = build_classifier(config, int(stored["n_classes"]))
        model.load_state_dict(state)
    except Exception as e:  # damaged values raise anything
        raise UserError(f"{file}: does not fit {settings} ({one_line(e)})") from e
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{file}: holds weights that are not finite")
    return evaluator(model, device), digest(file.read_bytes())
