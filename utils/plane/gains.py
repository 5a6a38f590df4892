"""Whether the best of many cells is better than the best of a few, or only looks so by the choice of test images."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.evaluation.per_image import per_image
from utils.plane.cells import Plane
from utils.plane.metrics import metric, score_of, value_of

RESAMPLES = 1000
LEAST_IMAGES = 20  # to compare cells by
ENDS = 0.005, 0.995  # of the bootstrap: it is too narrow, as the halves, each of which chooses for the other, are not
# independent, and squared errors are skewed; of equal cells, 0.025 to 0.975 leave 0 out in 5 to 10 %, these in 1 to 5 %
UNTESTED = "untested"


class Gain(NamedTuple):
    """What a choice among many cells gains over a few at no larger rate, on images that were not used to choose."""

    value: float  # of the choice
    se: float  # its standard error
    other: float  # of the few
    rate: float  # of the few
    gain: float  # positive if the choice is better
    low: float  # ends of the 95 % interval
    high: float
    chosen: tuple[int, ...]  # the cells that were chosen, each once
    seeds: int = 1  # that were compared

    @property
    def told(self) -> str:
        """What these images show of the gain."""
        words = "yes" if self.low > 0 else "no, worse" if self.high < 0 else ""
        return shown(words, self.seeds) if words else equal(self.seeds)


def shown(words: str, seeds: int) -> str:
    """The words for an interval that does not cover 0: of a single seed it is over images only, and says no more."""
    return words if seeds > 1 else f"{words} (one seed)"


def equal(seeds: int) -> str:
    """The words for an interval that covers 0."""
    return f"no difference that these images{' and seeds' * (seeds > 1)} show"


def terms_of(plane: Plane, names: Sequence[str]) -> dict[str, list[np.ndarray | None]]:
    """By metric, the terms of each cell, (seeds, images), whose mean is the metric (of PSNR: the squared error).

    None for cells whose runs lack them, with a note.
    """
    found, without = {name: [] for name in names}, 0
    for cell in plane.cells:
        try:
            runs = [per_image(plane.folder / run) for run in cell.runs] if plane.folder else []
        except UserError:
            runs = [{}]
        without += not all(runs)
        for name in names:
            rows = [_terms(run, name) for run in runs]
            fit = rows and all(r is not None and r.shape == rows[0].shape for r in rows)
            found[name].append(np.stack(rows) if fit else None)
    if without:
        plane.notes.append(
            f"no per_image.npz for {without} of {len(plane.cells)} cells: what the advice says of them is untested; "
            "repeat eval_beta_grid.py (steps 1 and 3)"
        )
    return found


def _terms(run: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    try:
        terms = {"psnr": lambda: run["mse"], "nelbo": lambda: run["kl_y"] + run["kl_z"] - run["ll"]}
        values = terms.get(name, lambda: run[name])()
    except (KeyError, ValueError):
        return None
    return values.astype(np.float64) if values.ndim == 1 else None


def tested_images(terms: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The images that all cells were tested on; None if a cell has no terms, or there are too few to compare by."""
    if any(t is None for t in terms) or len({t.shape[1] for t in terms}) > 1:
        return None
    tested = np.flatnonzero(np.all([np.isfinite(t).all(0) for t in terms], axis=0))
    return tested if len(tested) >= LEAST_IMAGES else None


def gain(name: str, terms: Sequence[np.ndarray | None], seeds: Sequence[tuple], among, few, rates) -> Gain | None:
    """The best of the cells in the mask `among` (N,) against the `mixture` of those in `few` (N,) at its rate.

    None if untestable. Chosen on one half of the test images and reported on the other, both ways, and averaged (Cawley
    & Talbot 2010). The interval is a paired bootstrap over images, between its ENDS. If all cells share several seeds,
    the choice is made on all seeds but one and reported on that one, in turn, and Student's interval over these seeds
    is added. `terms`, `seeds` and `rates` are of each cell, see `terms_of`; ties go to the lowest rate.
    """
    mine, few = np.flatnonzero(among), np.flatnonzero(few)
    both = sorted({*mine, *few})
    tested = tested_images([terms[i] for i in both]) if len(few) and len(mine) else None
    if tested is None:
        return None
    found, compared, firsts = [], [], set()
    made = choices(name, terms, seeds, both, tested)
    for score, there, half, kept in made:
        first = max(mine, key=lambda i: (score[i], -rates[i]))
        other = mixture(name, {i: score[i] for i in few}, rates, rates[first])
        means = {i: _means(terms[i][:, there], resamples(len(there), half), kept[i]) for i in {first, *other}}
        found.append([value_of(name, sum(w * means[i] for i, w in way.items())) for way in ({first: 1.0}, other)])
        compared.append(sum(w * rates[i] for i, w in other.items()))
        firsts.add(first)
    folds = len(made) // 2
    found = np.array(found).reshape(2, folds, 2, -1).mean(0)  # (seeds, pair, resamples)
    gains = metric(name).better * (found[:, 0] - found[:, 1])
    (value, other), mean = found[:, :, 0].mean(0), gains.mean(0)
    se = math.hypot(
        np.std(found[:, 0, 1:].mean(0)), np.std(found[:, 0, 0], ddof=1) / math.sqrt(folds) if folds > 1 else 0
    )
    low, high = np.quantile(mean[1:], ENDS) - mean[0]
    extra = of_seeds(gains[:, 0])
    ends = mean[0] - math.hypot(low, extra), mean[0] + math.hypot(high, extra)
    numbers = map(float, (value, se, other, np.mean(compared), mean[0] + 0.0, *ends))
    return Gain(*numbers, tuple(sorted(map(int, firsts))), folds)


def mixture(name: str, score: Mapping[int, float], rates: Sequence[float], most: float) -> dict[int, float]:
    """The best that some cells reach with a rate of at most `most`, as weights by cell.

    That is one of them or, of metrics that mix, two, each used for a share of the images so that the rate is `most`; if
    all have larger rates, the cell whose rate is least. `score` is what `score_of` gives.
    """
    ways = [{i: 1.0} for i in score if rates[i] <= most] or [{min(score, key=lambda i: (rates[i], -score[i])): 1.0}]
    if metric(name).mixes:
        below, above = [i for i in score if rates[i] <= most], [i for i in score if rates[i] > most]
        shares = {(a, b): (rates[b] - most) / (rates[b] - rates[a]) for a in below for b in above}
        ways += [{a: share, b: 1 - share} for (a, b), share in shares.items()]
    return max(ways, key=lambda way: [sum(w * v[i] for i, w in way.items()) for v in (score, -np.asarray(rates))])


class Choice(NamedTuple):
    """One choice among cells: the scores by cell that it is made by, and the images and seeds it is reported on."""

    score: dict[int, float]  # see `score_of`
    there: np.ndarray
    half: int
    kept: dict[int, list[int] | slice]


def choices(name: str, terms: Sequence, seeds: Sequence[tuple], mine: Sequence[int], tested: np.ndarray):
    """The Choices among the cells `mine`: on each half of the images, and on all of their shared seeds but one."""
    halves, made = np.array_split(np.random.default_rng(0).permutation(tested), 2), []
    shared = [s for s in dict.fromkeys(seeds[mine[0]]) if all(s in seeds[i] for i in mine)]
    folds = [([s], [r for r in shared if r != s]) for s in shared] if len(shared) > 1 else [(None, None)]
    for half, (here, there) in enumerate((halves, halves[::-1])):
        of_cell = {i: terms[i][:, here].mean(1) for i in mine}
        for seed, others in folds:
            on, kept = (
                {i: slice(None) if of is None else [seeds[i].index(s) for s in of] for i in mine}
                for of in (others, seed)
            )
            made.append(Choice({i: score_of(name, np.median(of_cell[i][on[i]])) for i in mine}, there, half, kept))
    return made


def scores(name: str, terms: Sequence[np.ndarray | None], seeds: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """What each cell would be chosen by, and the mean term that would then be told of it, (choices, N) each.

    As `gain` does it among all cells that have terms, on the images that all of these were tested on; NaN for other
    cells, and no choices where `gain` would make none.
    """
    mine = [i for i, of_cell in enumerate(terms) if of_cell is not None]
    tested = tested_images([terms[i] for i in mine]) if mine else None
    made = [] if tested is None else choices(name, terms, seeds, mine, tested)
    chosen, told = np.full((2, len(made), len(terms)), np.nan)
    for k, (score, there, _, kept) in enumerate(made):
        for i in mine:
            chosen[k, i] = score[i]
            told[k, i] = _means(terms[i][:, there], np.ones((1, len(there))), kept[i])[0]
    return chosen, told


def _means(of_cell: np.ndarray, counts: np.ndarray, kept: list[int] | slice) -> np.ndarray:
    """The mean of a cell's terms (seeds, images), median over the kept seeds, (resamples,)."""
    return np.median((of_cell @ counts.T / of_cell.shape[1])[kept], axis=0)


@functools.lru_cache(maxsize=4)
def resamples(n: int, key: int) -> np.ndarray:
    """How often each of n images is drawn, (1 + RESAMPLES, n); once each in the first row."""
    drawn = np.random.default_rng(key).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn])


def of_seeds(differences: np.ndarray) -> float:
    """Half of Student's 95 % interval of the mean of n differences (n,); 0 for less than two."""
    from scipy.stats import t

    n = len(differences)
    return float(t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / math.sqrt(n)) if n > 1 else 0.0
