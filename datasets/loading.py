"""Puts a data set where training can batch it.

Images of up to 32 pixels live on the training device (`Resident`); larger ones stream (`Streamed`).
"""

from pathlib import Path
from typing import NamedTuple

import torch

from utils.errors import UserError

from .batches import Resident, Streamed
from .table import DATASETS, lookup


class Data(NamedTuple):
    """Both splits of a data set, and its number of classes."""

    train: Resident | Streamed
    test: Resident | Streamed
    n_classes: int


def load_data(config, data_dir: str, device: torch.device, download: bool = False) -> Data:
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
    if hasattr(train, "samples"):
        splits = [Streamed(part.samples, dataset.shape, device) for part in (train, test)]
        return Data(*splits, n_classes=len(train.classes))
    for images, labels in (train, test):
        if images.shape[1:] != dataset.shape or len(images) != len(labels) or len(images) == 0:
            raise UserError(f"{config.dataset}: {root} holds images {tuple(images.shape)}, {len(labels)} labels")
    n_classes = int(max(train[1].max(), test[1].max())) + 1 if own else 10
    for _, labels in (train, test):
        if labels.min() < 0 or labels.max() >= n_classes:
            raise UserError(f"{config.dataset}: {root} holds labels from {labels.min()} to {labels.max()}, not 0 to 9")
    return Data(Resident(*train, device), Resident(*test, device), n_classes)
