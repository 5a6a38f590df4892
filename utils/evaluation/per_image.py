"""Per-image terms of a run, with which differences between runs are taken image by image."""

from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import digest_of, read_arrays, read_json


def per_image(folder: Path) -> dict[str, np.ndarray]:
    """The evaluation's terms of each test image by column, float32 (N,), as it left them in a run's folder.

    `ll`, `kl_y`, `kl_z` in nats, `mse` the squared error per pixel in [0, 1], of accuracies whether the image was
    recognised, of log losses and lower ends of information what the image adds to the mean, in nats; NaN where it was
    not tested. Empty where there are none; damaged and outdated files are left out.
    """
    found = {}
    try:
        files = read_json(folder / "metrics.json").get("files")
        for name, digest in files.items() if isinstance(files, dict) else ():
            if name.startswith("per_image") and digest == digest_of(folder / name):
                found |= read_arrays(folder / name)
    except UserError:
        return found
    return found
