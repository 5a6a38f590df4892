"""What an evaluation leaves in a run's folder: metrics.json, and per_image*.npz with the terms of each image."""

import contextlib
import math
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import digest_of, read_arrays, read_json


def read_metrics(folder: Path) -> dict:
    """The content of metrics.json; empty if there is none, or one of an early version. Raises UserError if damaged."""
    path = folder / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    for name, value in metrics.items():
        right = isinstance(value, dict if name in ("steps", "files") else int | float | str)
        if not right or isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: damaged ({name} cannot be {value!r:.40}); remove it and evaluate the run again")
    new = {"lr_acc_mean": "probe_images", "acc_bound": "mi_z_high"}  # of names with another meaning before
    return {} if any(name in metrics and other not in metrics for name, other in new.items()) else metrics


def per_image(folder: Path) -> dict[str, np.ndarray]:
    """What each test image adds to the mean of a column, float32 (N,), by column, from the per_image*.npz of a run.

    `ll`, `kl_y`, `kl_z`, log losses and lower ends of information in nats, `mse` (of PSNR) per pixel in [0, 1], of
    accuracies whether the image was recognised; NaN where it was not tested. Damaged and outdated files are left out.
    """
    terms = {}
    with contextlib.suppress(UserError):
        for name, digest in read_metrics(folder).get("files", {}).items():
            if name.startswith("per_image") and digest == digest_of(folder / name):
                terms |= read_arrays(folder / name)
    return terms
