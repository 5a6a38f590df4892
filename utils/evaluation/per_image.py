"""The terms of single test images, from which comparisons of runs are paired."""

from pathlib import Path

import numpy as np

from utils.files import read_arrays


def per_image(folder: Path) -> dict[str, np.ndarray]:
    """The terms of a run folder, (N,) each, by column; NaN where an image was not tested. Raises UserError."""
    return read_arrays(folder / "per_image.npz")
