"""What models reach within a rate, mixed for shares of the images, and whether one is better.

The best of many cells may only look so by the choice of test images: it is chosen on others.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t as student

from utils.evaluation.probes import standard_error
from utils.plane.cells import BETAS, Plane
from utils.plane.metrics import DECIBEL, mean_term, metric, score_of, value_of

SPLITS = 50  # of the test images into halves
LEAST_IMAGES = 20  # to compare cells by
UNTESTED, FAR_APART = "untested", "unclear: rates too far apart"


def frontier(rate: np.ndarray, score: np.ndarray, mixes: bool = True) -> np.ndarray:
    """Indices of the points (N,) that none of no larger rate beats, by rate; of NaN scores none.

    If points can be mixed, mixtures do not beat them either: they are corners of the convex hull.
    """
    corners = []
    for i in np.lexsort((-score, rate)).tolist():
        if math.isnan(score[i]) or (corners and score[i] <= score[corners[-1]]):
            continue
        while mixes and len(corners) > 1:
            a, b = corners[-2:]
            steps = rate[i] - rate[a], rate[b] - rate[a]
            if (score[b] - score[a]) * steps[0] > (score[i] - score[a]) * steps[1]:
                break
            corners.pop()
        corners.append(i)
    return np.array(corners, int)


def reach(name: str, rate: np.ndarray, score: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """Weights (2, rates, N) by which points of a `score_of` (N,), NaN if left out, reach the best within rates `at`.

    First those of the best mixture, or of the point of least rate where all have more. Then those of a bound on what
    others of their kind reach: as the best score is concave in the rate and does not fall, it is not above the next
    corner of the frontier, nor the lines through the two before and the two after; NaN beyond all.
    """
    corners, weights = frontier(rate, score, metric(name).mixes), np.zeros((2, len(at), len(rate)))
    most = rate[np.isfinite(score)].max()
    for of_mixture, of_bound, r in zip(*weights, at, strict=True):
        k = max(int(np.searchsorted(rate[corners], r, "right")), 1)
        last, above = corners[k - 1], corners[k : k + 2]
        if r <= rate[last] or not metric(name).mixes:
            of_mixture[last] = of_bound[last] = 1
            continue
        lines = [_line(rate, *ends, r) for ends in (corners[k - 2 : k], above) if len(ends) == 2]
        of_mixture[:] = _line(rate, last, above[0], r) if len(above) else np.eye(1, len(rate), last)
        lines.append(np.eye(1, len(rate), above[0] if len(above) else last)[0])
        of_bound[:] = min(lines, key=lambda line: line @ np.nan_to_num(score)) if r <= most else math.nan
    return weights


def _line(rate: np.ndarray, i: int, j: int, r: float) -> np.ndarray:
    """The weights (N,) of points i and j on the line through both at rate r."""
    weights, share = np.zeros(len(rate)), (rate[j] - r) / (rate[j] - rate[i])
    weights[[i, j]] = share, 1 - share
    return weights


def reached(name: str, rate: np.ndarray, value: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """The best value of mixtures of points (N,) within given rates."""
    means = mean_term(name, value)
    return value_of(name, reach(name, rate, score_of(name, means), at)[0] @ means)


def hull(plane: Plane, name: str, among: np.ndarray | bool = True) -> list[dict[str, float]]:
    """What mixtures of cells in a mask (N,) reach, along their rates; empty if it does not mix."""
    cells = among & np.isfinite(plane.values(name))
    if not cells.any() or not metric(name).mixes or not metric(name).better:
        return []
    rate, value = plane.values("rate")[cells], plane.values(name)[cells]
    # PSNR is not straight between two cells
    at = np.unique([*np.linspace(rate.min(), rate.max(), 300), *rate])
    points = zip(at.tolist(), reached(name, rate, value, at).tolist(), strict=True)
    return [{"rate": x, name: v} for x, v in points]


def terms_of(plane: Plane, name: str) -> list[np.ndarray | None]:
    """Each cell's terms (seeds, images), whose mean a metric is (of PSNR: squared errors), or None."""
    terms = []
    for cell, runs in zip(plane.cells, plane.per_image, strict=True):
        losses = {"nelbo": (1.0, 1.0), "loss": [cell.median[beta] for beta in BETAS]}
        parts = {"mse" if name == "psnr" else name: 1.0}
        if name in losses:
            parts = dict(zip(("kl_y", "kl_z", "ll"), (*losses[name], -1.0), strict=True))
        rows = [sum(weight * run[n] for n, weight in parts.items()) for run in runs if parts.keys() <= run.keys()]
        alike = len(rows) == len(runs) and len({row.shape for row in rows}) == 1
        terms.append(np.stack(rows).astype(np.float64) if alike else None)
    return terms


def errors(plane: Plane, name: str) -> np.ndarray:
    """Standard errors (N,) of a metric: over a cell's seeds, of one over its test images."""
    result = np.full(len(plane.cells), math.nan)
    for i, cell in enumerate(plane.cells):
        of_runs = np.array([row[name] for row in cell.repeats if name in row])
        one = cell.median.get(f"{name}_se", math.nan)
        result[i] = standard_error(of_runs) if len(of_runs) > 1 else one
    terms = terms_of(plane, name) if np.isnan(result).any() else []
    for i, of_cell in enumerate(terms):
        if of_cell is not None and np.isnan(result[i]):
            slope = -DECIBEL / of_cell.mean() if name == "psnr" else 1
            result[i] = slope * standard_error(of_cell[0])
    return plane.scale(name) * result


def on_others(name: str, terms: Sequence, seeds: Sequence[tuple], choose: Callable) -> np.ndarray | None:
    """Values (SPLITS, seeds, K, rates) of mixtures that are chosen on other images and seeds; None if untestable.

    Mixtures are weights (K, rates, N) that `choose` gives for scores (N,) of one half of the test images, reported on
    the other, for random halves; if all cells share several seeds, also chosen on all but one and reported on that one.
    `terms` (see `terms_of`) and `seeds` are of each cell.
    """
    if any(t is None for t in terms) or len({t.shape[1] for t in terms}) > 1:
        return None
    images = np.flatnonzero(np.all([np.isfinite(t).all(0) for t in terms], axis=0))  # that all were tested on
    if len(images) < LEAST_IMAGES:
        return None
    shared = [s for s in dict.fromkeys(seeds[0]) if all(s in of_cell for of_cell in seeds)]
    folds = [(slice(None), slice(None))]
    if (n := len(shared)) > 1:
        terms = [t[[of_cell.index(s) for s in shared]] for t, of_cell in zip(terms, seeds, strict=True)]
        folds = [(np.arange(n) != k, slice(k, k + 1)) for k in range(n)]
    rng, of_images = np.random.default_rng(0), np.arange(len(images))
    half = np.array([rng.permutation(of_images) < len(images) // 2 for _ in range(SPLITS)], float).T
    # by cell, (seeds, SPLITS) each
    here, there = ([t[:, images] @ part / part.sum(0) for t in terms] for part in (half, 1 - half))
    values = []
    for others, one in folds:
        scores = score_of(name, np.array([np.median(means[others], 0) for means in here]).T)
        reported = np.array([np.median(means[one], 0) for means in there]).T
        values.append([value_of(name, choose(s) @ means) for s, means in zip(scores, reported, strict=True)])
    return np.swapaxes(values, 0, 1)


def interval(least: np.ndarray, most: np.ndarray, words: tuple[str, str]) -> dict[str, float | str]:
    """A gain between what is `least` and `most`, (SPLITS, seeds): its 95 % interval, and what it says, in `words`.

    Halves overlap from split to split, so their mean has the error of Nadeau & Bengio (2003), which of a choice that is
    always the same is that of all images. Student's interval over several seeds is added in squares.
    """
    ends = []
    for gains in (least, most):
        n, of_seeds = gains.shape[1], 0.0
        of_images = student.ppf(0.975, SPLITS - 1) * math.sqrt(1 + 1 / SPLITS) * np.std(gains.mean(1), ddof=1)
        if n > 1:
            of_seeds = student.ppf(0.975, n - 1) * np.std(gains.mean(0), ddof=1) / math.sqrt(n)
        ends.append((gains.mean(), math.hypot(of_images, of_seeds)))
    (below, width), (mean, half) = ends
    # differences of equal numbers are not exactly 0
    low, gain, over_mixtures, high = (round(float(v), 9) + 0.0 for v in (below - width, mean, mean - half, mean + half))
    if not math.isfinite(low):  # nothing is known of what is more
        return {"gain": gain, "high": high, "told": FAR_APART}
    if low > 0 or high < 0:
        told = words[low <= 0] + ("" if n > 1 else " (one seed)")
    elif over_mixtures > 0:
        told = FAR_APART
    else:
        told = f"no difference that these images{' and seeds' if n > 1 else ''} show"
    return {"gain": gain, "low": low, "high": high, "told": told}


def gain(name: str, terms: Sequence, seeds: Sequence[tuple], among, few, rates) -> dict:
    """By how much the best of the cells in the mask `among` (N,) is better than the `few` at its rate.

    The `interval` of what is reported `on_others`, from the gain over what others can reach to that over mixtures of
    the few, and the cells that were `chosen`; empty if untestable.
    """
    cells = np.flatnonzero(among | few)
    if not among.any() or not few.any():
        return {}
    is_among, is_few, rate, chosen = among[cells], few[cells], rates[cells], set()

    def choose(score: np.ndarray) -> np.ndarray:
        best = np.lexsort((rate, np.where(is_among, -score, np.inf)))[0]
        chosen.add(int(cells[best]))
        ordinary = reach(name, rate, np.where(is_few, score, math.nan), [rate[best]])
        return np.concatenate([np.eye(1, len(cells), best)[None], ordinary])

    values = on_others(name, [terms[i] for i in cells], [seeds[i] for i in cells], choose)
    if values is None:
        return {}
    best, mixed, bound = metric(name).better * np.moveaxis(values[..., 0], 2, 0)
    return interval(best - bound, best - mixed, ("yes", "no, worse")) | {"chosen": sorted(chosen)}
