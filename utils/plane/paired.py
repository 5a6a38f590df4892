"""Differences of cells on shared test images: the terms of single images, intervals, and the words for these."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from utils.evaluation.results import per_image
from utils.plane.cells import BETAS, Plane

RESAMPLES = 1000
LEAST_IMAGES = 20  # to compare cells by
UNTESTED = "untested"


def terms_of(plane: Plane, names: Sequence[str]) -> dict[str, list[np.ndarray | None]]:
    """By metric, the terms of each cell, (seeds, images), whose mean is the metric (of PSNR: the squared error).

    None for cells whose runs lack them, or have them of different images; cells without any are noted.
    """
    terms, missing = {name: [] for name in names}, 0
    for cell in plane.cells:
        runs = [per_image(plane.folder / run) for run in cell.runs] if plane.folder else []
        missing += not all(runs)
        betas = {"nelbo": (1.0, 1.0), "loss": [cell.median[name] for name in BETAS]}
        for run in runs:
            run["psnr"] = run.get("mse")
            if {"ll", "kl_y", "kl_z"} <= run.keys():
                run |= {name: y * run["kl_y"] + z * run["kl_z"] - run["ll"] for name, (y, z) in betas.items()}
        for name in names:
            rows = [run.get(name) for run in runs]
            alike = rows and all(row is not None and row.shape == rows[0].shape for row in rows)
            terms[name].append(np.stack(rows).astype(np.float64) if alike else None)
    if missing:
        plane.notes.append(
            f"no per_image.npz for {missing} of {len(plane.cells)} cells: what the advice says of them is untested; "
            "repeat eval_beta_grid.py (steps 1 and 3)"
        )
    return terms


def tested_images(terms: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The images that all cells were tested on; None if a cell has no terms, or there are too few to compare by."""
    if any(t is None for t in terms) or len({t.shape[1] for t in terms}) > 1:
        return None
    tested = np.flatnonzero(np.all([np.isfinite(t).all(0) for t in terms], axis=0))
    return tested if len(tested) >= LEAST_IMAGES else None


@functools.lru_cache(maxsize=4)
def resamples(n: int, key: int) -> np.ndarray:
    """How often each of n images is drawn, (1 + RESAMPLES, n); once each in the first row."""
    drawn = np.random.default_rng(key).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn])


def widths(value: float, resampled: np.ndarray, of_seeds: np.ndarray, ends: tuple[float, float]) -> tuple[float, float]:
    """By how much the 95 % interval of a difference reaches below and above its value.

    The `ends` are quantiles of the differences of resampled images (R,). Student's interval over the differences of
    single seeds (S,), if there are several, is added in squares.
    """
    from scipy.stats import t

    n, student = len(of_seeds), 0.0
    if n > 1:
        student = float(t.ppf(0.975, n - 1) * np.std(of_seeds, ddof=1) / math.sqrt(n))
    low, high = np.quantile(resampled, ends) - value
    return math.hypot(low, student), math.hypot(high, student)


def told(low: float, high: float, seeds: int, better: str, worse: str) -> str:
    """The words for a 95 % interval of a difference; of a single seed, it is over images only and says no more."""
    if low <= 0 <= high:
        return f"no difference that these images{' and seeds' * (seeds > 1)} show"
    words = better if low > 0 else worse
    return words if seeds > 1 else f"{words} (one seed)"
