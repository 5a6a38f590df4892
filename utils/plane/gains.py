"""What models reach within a rate, mixed for shares of the images, and whether one is better.

The best of many cells may only look so by the choice of test images: it is chosen on others.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from utils.evaluation.metrics import per_image
from utils.plane.cells import BETAS, Plane
from utils.plane.metrics import mean_term, metric, score_of, value_of

RESAMPLES = 1000
LEAST_IMAGES = 20  # to compare cells by
UNTESTED = "untested"
ENDS = 0.005, 0.995  # of the bootstrap: it is too narrow, as the halves, each of which chooses for
# the other, are not independent, and squared errors are skewed; of equal cells, 0.025 to 0.975
# leave 0 out in 5 to 10 %, these in 1 to 5 %


def frontier(rate: np.ndarray, score: np.ndarray, mixes: bool = True) -> np.ndarray:
    """Indices of the points (N,) that none of no larger rate beats, by rate; of NaN scores none.

    If points can be mixed, mixtures do not beat them either: they are corners of the convex hull,
    from the least rate to the best score, and mixtures of two neighbours are on the line between.
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


def mixture(name: str, rate: np.ndarray, score: np.ndarray, most: float) -> dict[int, float]:
    """The best mixture of rate `most` or less, as weights by index; NaN scores are left out.

    If all have larger rates, the model whose rate is least. `score` (N,) is that of `score_of`.
    """
    corners = frontier(rate, score, metric(name).mixes)
    within = np.searchsorted(rate[corners], most, "right")
    if not metric(name).mixes or within in (0, len(corners)):
        return {corners[max(within - 1, 0)]: 1.0}
    a, b = corners[within - 1 : within + 1]
    share = (rate[b] - most) / (rate[b] - rate[a])
    return {a: share, b: 1 - share}


def mixed_values(name: str, rate: np.ndarray, value: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The best value of mixtures of points (N,) within given rates."""
    means = mean_term(name, value)
    corners = frontier(rate, score_of(name, means))
    return value_of(name, np.interp(at, rate[corners], means[corners]))


def hull(plane: Plane, name: str, among: np.ndarray | bool = True) -> list[dict[str, float]]:
    """What mixtures of cells in a mask (N,) reach, along their rates; empty if it does not mix."""
    cells = among & np.isfinite(plane.values(name))
    if not cells.any() or not metric(name).mixes or not metric(name).better:
        return []
    rate, value = plane.values("rate")[cells], plane.values(name)[cells]
    # PSNR is not straight between two cells
    at = np.unique([*np.linspace(rate.min(), rate.max(), 300), *rate])
    points = zip(at.tolist(), mixed_values(name, rate, value, at).tolist(), strict=True)
    return [{"rate": x, name: v} for x, v in points]


def terms_of(plane: Plane, names: Sequence[str]) -> dict[str, list[np.ndarray | None]]:
    """By metric, each cell's terms (seeds, images), whose mean it is (of PSNR: squared errors).

    None for cells whose runs lack them, or have them of other images; those without are noted.
    """
    terms, missing = {name: [] for name in names}, 0
    for cell in plane.cells:
        runs = [per_image(plane.folder / run) for run in cell.runs] if plane.folder else []
        missing += not all(runs)
        betas = {"nelbo": (1.0, 1.0), "loss": [cell.median[name] for name in BETAS]}
        for run in runs:
            run["psnr"] = run.get("mse")
            if {"ll", "kl_y", "kl_z"} <= run.keys():
                for name, (y, z) in betas.items():
                    run[name] = y * run["kl_y"] + z * run["kl_z"] - run["ll"]
        for name in names:
            rows = [run.get(name) for run in runs]
            shapes = {None if row is None else row.shape for row in rows}
            alike = len(shapes) == 1 and None not in shapes
            terms[name].append(np.stack(rows).astype(np.float64) if alike else None)
    if missing:
        plane.notes.append(
            f"no per_image.npz for {missing} of {len(plane.cells)} cells: what the advice says of "
            "them is untested; repeat eval_beta_grid.py (steps 1 and 3)"
        )
    return terms


def tested_images(terms: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The images that all cells were tested on; None if they differ, or are too few."""
    if any(t is None for t in terms) or len({t.shape[1] for t in terms}) != 1:
        return None
    images = np.flatnonzero(np.all([np.isfinite(t).all(0) for t in terms], axis=0))
    return images if len(images) >= LEAST_IMAGES else None


@functools.lru_cache(maxsize=4)
def resamples(n: int, key: int) -> np.ndarray:
    """How often each of n images is drawn, (1 + RESAMPLES, n); once each in the first row."""
    counts = np.random.default_rng(key).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), counts])


def interval(value: float, resampled, of_seeds, ends: tuple, words: tuple[str, str]) -> dict:
    """The 95 % interval of a difference, and what it says, in `words` for better and for worse.

    To the `ends`, quantiles over resampled images (R,), Student's interval over those of several
    seeds (S,) is added in squares. Of a single seed, it is over images only and says no more.
    """
    n, of_mean = len(of_seeds), 0.0
    if n > 1:
        of_mean = float(student.ppf(0.975, n - 1) * np.std(of_seeds, ddof=1) / math.sqrt(n))
    below, above = (math.hypot(v, of_mean) for v in np.quantile(resampled, ends) - value)
    low, high = value - below, value + above
    if low <= 0 <= high:
        seeds = " and seeds" if n > 1 else ""
        told = f"no difference that these images{seeds} show"
    else:
        told = (words[0] if low > 0 else words[1]) + ("" if n > 1 else " (one seed)")
    return {"low": float(low), "high": float(high), "told": told}


def gain(name: str, terms: Sequence, seeds: Sequence[tuple], among, few, rates) -> dict:
    """The best of the cells in the mask `among` (N,) against the `mixture` of `few` at its rate.

    Columns of the advice, and the cells that were `chosen`; empty if untestable. Chosen on one
    half of the test images and reported on the other, both ways, and averaged (Cawley & Talbot
    2010), with the interval of a paired bootstrap over images. If all cells share several seeds,
    also chosen on all but one and reported on that one, in turn. `terms` (see `terms_of`), `seeds`
    and `rates` are of each cell.
    """
    cells = np.flatnonzero(among | few).tolist()
    images = tested_images([terms[i] for i in cells]) if among.any() and few.any() else None
    if images is None:
        return {}
    terms, folds = _folds({i: (terms[i], seeds[i]) for i in cells})
    halves = np.array_split(np.random.default_rng(0).permutation(images), 2)
    pairs, compared, chosen = [], [], set()
    for half, (choosing, reporting) in enumerate((halves, halves[::-1])):
        counts = resamples(len(reporting), half).T
        by_seed = [of_cell[:, choosing].mean(1) for of_cell in terms.values()]
        for others, one in folds:
            score = np.full(len(rates), math.nan)
            score[cells] = [score_of(name, np.median(means[others])) for means in by_seed]
            best = np.lexsort((rates, np.where(among, -score, np.inf)))[0]
            weights = mixture(name, rates, np.where(few, score, math.nan), rates[best])
            means = {i: terms[i][:, reporting] @ counts / len(reporting) for i in {best, *weights}}
            means = {i: np.median(of_seeds[one], axis=0) for i, of_seeds in means.items()}
            mixed = sum(weight * means[i] for i, weight in weights.items())
            pairs.append([value_of(name, means[best]), value_of(name, mixed)])
            compared.append(sum(weight * rates[i] for i, weight in weights.items()))
            chosen.add(int(best))
    # (seeds, resamples) each
    values, others = np.array(pairs).reshape(2, len(folds), 2, -1).mean(0).swapaxes(0, 1)
    gains = metric(name).better * (values - others)
    mean, of_seeds = gains.mean(0), 0.0
    if len(folds) > 1:
        of_seeds = np.std(values[:, 0], ddof=1) / math.sqrt(len(folds))
    numbers = {"value": values[:, 0].mean(), "diagonal_value": others[:, 0].mean()}
    numbers |= {"se": math.hypot(np.std(values[:, 1:].mean(0)), of_seeds)}
    numbers |= {"diagonal_rate": np.mean(compared), "gain": mean[0] + 0.0}
    told = interval(mean[0], mean[1:], gains[:, 0], ENDS, ("yes", "no, worse"))
    return {n: float(v) for n, v in numbers.items()} | told | {"chosen": sorted(chosen)}


def _folds(cells: dict[int, tuple[np.ndarray, tuple]]) -> tuple[dict, list[tuple]]:
    first, *_ = (seeds for _, seeds in cells.values())
    shared = [s for s in dict.fromkeys(first) if all(s in seeds for _, seeds in cells.values())]
    n = len(shared)
    if n < 2:
        return {i: terms for i, (terms, _) in cells.items()}, [(slice(None), slice(None))]
    terms = {i: of[[seeds.index(s) for s in shared]] for i, (of, seeds) in cells.items()}
    return terms, [(np.arange(n) != k, slice(k, k + 1)) for k in range(n)]
