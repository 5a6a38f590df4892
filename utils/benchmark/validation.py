"""A part of the training images to choose settings by, so that test images are left for what was chosen."""

from pathlib import Path

import torch

from datasets.batches import Resident, subset
from datasets.loading import load_data
from utils.config import Config
from utils.errors import UserError
from utils.files import npz, write_atomic

SHARE = 10  # of the training images, one is for validation


def validation(config: Config, data_dir: str) -> None:
    """Writes <data set>_validation.npz: the training images of a data set, with one of ten as test images.

    Each label has its share of these. Any script takes the file as its --dataset. Raises UserError for images that
    are too large to be held in memory.
    """
    train = load_data(config, data_dir, torch.device("cpu")).train
    if not isinstance(train, Resident):
        raise UserError(f"--dataset: {config.dataset} is files of large images; make a folder of some of them")
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[subset(train.labels, len(train) // SHARE)] = True
    arrays = {}
    for name, chosen in (("", ~held_out), ("test_", held_out)):
        images = train.images[chosen].movedim(1, -1)  # (N, H, W, C)
        arrays |= {f"{name}images": images.numpy(), f"{name}labels": train.labels[chosen].numpy()}
    path = Path(f"{config.dataset}_validation.npz")
    write_atomic(path, npz(arrays))
    print(f"{path}: {(~held_out).sum():,} images to train on, {held_out.sum():,} for validation; --dataset takes it")
