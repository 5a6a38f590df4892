"""Whether the best of many cells is better than the best of a few, or only looks so by the choice of test images."""

import functools
import math
from collections.abc import Sequence
from itertools import compress

import numpy as np

from utils.evaluation.metrics import per_image
from utils.plane.cells import BETAS, Plane
from utils.plane.metrics import metric, score_of, value_of
from utils.plane.mixtures import mixture

RESAMPLES = 1000
LEAST_IMAGES = 20  # to compare cells by
UNTESTED = "untested"
ENDS = 0.005, 0.995  # of the bootstrap: it is too narrow, as the halves, each of which chooses for the other, are not
# independent, and squared errors are skewed; of equal cells, 0.025 to 0.975 leave 0 out in 5 to 10 %, these in 1 to 5 %


def terms_of(plane: Plane, names: Sequence[str]) -> dict[str, list[np.ndarray | None]]:
    """By metric, the terms of each cell, (seeds, images), whose mean is the metric (of PSNR: the squared error).

    None for cells whose runs lack them, or have them of other images; cells without any are noted.
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
    images = np.flatnonzero(np.all([np.isfinite(t).all(0) for t in terms], axis=0))
    return images if len(images) >= LEAST_IMAGES else None


@functools.lru_cache(maxsize=4)
def resamples(n: int, key: int) -> np.ndarray:
    """How often each of n images is drawn, (1 + RESAMPLES, n); once each in the first row."""
    counts = np.random.default_rng(key).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), counts])


def widths(value: float, resampled: np.ndarray, of_seeds: np.ndarray, ends: tuple[float, float]) -> tuple[float, float]:
    """By how much the 95 % interval of a difference reaches below and above its value: the `ends`, quantiles of the
    differences of resampled images (R,), and in squares Student's interval over those of several seeds (S,)."""
    from scipy.stats import t

    n = len(of_seeds)
    student = float(t.ppf(0.975, n - 1) * np.std(of_seeds, ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    low, high = np.quantile(resampled, ends) - value
    return math.hypot(low, student), math.hypot(high, student)


def verdict(low: float, high: float, seeds: int, better: str, worse: str) -> str:
    """The words for a 95 % interval of a difference; of a single seed, it is over images only and says no more."""
    if low <= 0 <= high:
        return "no difference that these images and seeds show" if seeds > 1 else "no difference that these images show"
    words = better if low > 0 else worse
    return words if seeds > 1 else f"{words} (one seed)"


def gain(name: str, terms: Sequence[np.ndarray | None], seeds: Sequence[tuple], among, few, rates) -> dict:
    """The best of the cells in the mask `among` (N,) against the `mixture` of those in `few` (N,) at its rate.

    Columns of the advice, and the cells that were `chosen`; empty if untestable. Chosen on one half of the test images
    and reported on the other, both ways, and averaged (Cawley & Talbot 2010), with the interval of a paired bootstrap
    over images. If all cells share several seeds, also chosen on all but one and reported on that one, in turn.
    `terms` (see `terms_of`), `seeds` and `rates` are of each cell.
    """
    images = tested_images(list(compress(terms, among | few))) if among.any() and few.any() else None
    if images is None:
        return {}
    terms, folds = _folds({i: (terms[i], seeds[i]) for i in np.flatnonzero(among | few).tolist()})
    halves = np.array_split(np.random.default_rng(0).permutation(images), 2)
    pairs, compared, chosen = [], [], set()
    for half, (choosing, reporting) in enumerate((halves, halves[::-1])):
        counts = resamples(len(reporting), half).T
        by_seed = {i: t[:, choosing].mean(1) for i, t in terms.items()}
        for others, one in folds:
            score = np.full(len(rates), math.nan)
            score[list(terms)] = [score_of(name, np.median(means[others])) for means in by_seed.values()]
            best = max(np.flatnonzero(among).tolist(), key=lambda i: (score[i], -rates[i]))  # noqa: B023
            weights = mixture(name, rates, np.where(few, score, math.nan), rates[best])
            means = {i: terms[i][:, reporting] @ counts / len(reporting) for i in {best, *weights}}
            means = {i: np.median(of_seeds[one], axis=0) for i, of_seeds in means.items()}
            mixed = sum(weight * means[i] for i, weight in weights.items())
            pairs.append([value_of(name, means[best]), value_of(name, mixed)])
            compared.append(sum(weight * rates[i] for i, weight in weights.items()))
            chosen.add(best)
    values, others = np.array(pairs).reshape(2, len(folds), 2, -1).mean(0).swapaxes(0, 1)  # (seeds, resamples) each
    gains = metric(name).better * (values - others)
    of_seeds = np.std(values[:, 0], ddof=1) / math.sqrt(len(folds)) if len(folds) > 1 else 0.0
    se, mean = math.hypot(np.std(values[:, 1:].mean(0)), of_seeds), gains.mean(0)
    below, above = widths(mean[0], mean[1:], gains[:, 0], ENDS)
    row = {"value": values[:, 0].mean(), "se": se, "diagonal_value": others[:, 0].mean()}
    row |= {"diagonal_rate": np.mean(compared), "gain": mean[0] + 0.0, "low": mean[0] - below, "high": mean[0] + above}
    told = verdict(row["low"], row["high"], len(folds), "yes", "no, worse")
    return {column: float(number) for column, number in row.items()} | {"told": told, "chosen": sorted(chosen)}


def _folds(cells: dict[int, tuple[np.ndarray, tuple]]) -> tuple[dict[int, np.ndarray], list[tuple]]:
    """The terms of cells, in the order of the seeds that all share, and which of these choose and which report."""
    first, *_ = (seeds for _, seeds in cells.values())
    shared = [s for s in dict.fromkeys(first) if all(s in seeds for _, seeds in cells.values())]
    if len(shared) < 2:
        return {i: terms for i, (terms, _) in cells.items()}, [(slice(None), slice(None))]
    terms = {i: terms[[seeds.index(s) for s in shared]] for i, (terms, seeds) in cells.items()}
    return terms, [(np.arange(len(shared)) != k, slice(k, k + 1)) for k in range(len(shared))]
