"""What models reach within a rate, alone or mixed: each used for a share of the images (time sharing)."""

import math

import numpy as np

from utils.plane.cells import Plane
from utils.plane.metrics import mean_term, metric, score_of, value_of


def frontier(rate: np.ndarray, score: np.ndarray, mixes: bool = True) -> np.ndarray:
    """Indices of the points (N,) that none of no larger rate beats, in order of increasing rate; of NaN scores none.

    If points can be mixed, mixtures do not beat them either: they are corners of the convex hull, from the least rate
    to the best score, and what mixtures of two neighbours have is on the line between these.
    """
    corners = []
    for i in np.lexsort((-score, rate)).tolist():
        if math.isnan(score[i]) or (corners and score[i] <= score[corners[-1]]):
            continue
        while mixes and len(corners) > 1:
            a, b = corners[-2:]
            if (score[b] - score[a]) * (rate[i] - rate[a]) > (score[i] - score[a]) * (rate[b] - rate[a]):
                break
            corners.pop()
        corners.append(i)
    return np.array(corners, int)


def mixture(name: str, rate: np.ndarray, score: np.ndarray, most: float) -> dict[int, float]:
    """The best mixture of models with a rate of at most `most`, as weights by index; NaN scores are left out.

    If all have larger rates, it is the model whose rate is least. `score` (N,) is what `score_of` gives.
    """
    corners = frontier(rate, score, metric(name).mixes)
    within = np.searchsorted(rate[corners], most, "right")
    if not metric(name).mixes or within in (0, len(corners)):
        return {corners[max(within - 1, 0)]: 1.0}
    a, b = corners[within - 1 : within + 1]
    share = (rate[b] - most) / (rate[b] - rate[a])
    return {a: share, b: 1 - share}


def mixed_values(name: str, rate: np.ndarray, value: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The best value within given rates that mixtures of points (N,) have; PSNR is mixed as squared errors."""
    means = mean_term(name, value)
    corners = frontier(rate, score_of(name, means))
    return value_of(name, np.interp(at, rate[corners], means[corners]))


def hull(plane: Plane, name: str, among: np.ndarray | bool = True) -> list[dict[str, float]]:
    """What mixtures of the cells in a mask (N,) reach at best, along their rates; empty for metrics that do not mix."""
    cells = among & np.isfinite(plane.values(name))
    if not cells.any() or not metric(name).mixes or not metric(name).better:
        return []
    rate, value = plane.values("rate")[cells], plane.values(name)[cells]
    at = np.unique([*np.linspace(rate.min(), rate.max(), 300), *rate])  # PSNR is not straight between two cells
    values = mixed_values(name, rate, value, at)
    return [{"rate": x, name: v} for x, v in zip(at.tolist(), values.tolist(), strict=True)]
