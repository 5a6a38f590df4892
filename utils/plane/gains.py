"""Whether the best of many cells is better than the best of a few, or only looks so by the choice of test images."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.evaluation.per_image import per_image
from utils.plane.cells import Plane
from utils.plane.metrics import metric

RESAMPLES = 1000
LEAST_IMAGES = 20  # to compare cells by
UNTESTED = "untested"
DECIBEL = -10 / math.log(10)


class Gain(NamedTuple):
    """What a choice among many cells gains over a choice among a few, on images that were not used to choose."""

    value: float  # of the first choice
    other: float  # of the second
    gain: float  # positive if the first is better
    low: float  # ends of the 95 % interval
    high: float
    agreed: bool  # whether every choice was of the same cell
    seeds: int = 1  # that were compared

    @property
    def told(self) -> bool:
        """Whether these images show a gain."""
        return self.low > 0


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
            f"no per_image.npz for {without} of {len(plane.cells)} cells: the advice's differences are untested; "
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
    """The best of the cells in the mask `among` (N,) against the best of those also in `few`; None if untestable.

    Chosen on one half of the test images and reported on the other, both ways, and averaged (Cawley & Talbot 2010).
    The interval is a paired bootstrap over images. If all cells share several seeds, the choice is made on all seeds
    but one and reported on that one, in turn, and Student's interval over these seeds is added. `terms`, `seeds` and
    `rates` are of each cell, see `terms_of`; ties go to the lowest rate.
    """
    mine, few = np.flatnonzero(among), np.asarray(few) & among
    tested = tested_images([terms[i] for i in mine]) if few.any() else None
    if tested is None:
        return None
    groups, found, firsts = (mine, np.flatnonzero(few)), [], set()
    made = choices(name, terms, seeds, mine, tested)
    for score, there, half, kept in made:
        pair = [max(group, key=lambda i: (score[i], -rates[i])) for group in groups]
        told = [_signed(name, terms[i][:, there], resamples(len(there), half))[kept[i]] for i in pair]
        found.append([np.median(v, axis=0) for v in told])
        firsts.add(pair[0])
    better, folds = metric(name).better, len(made) // 2
    found = np.array(found).reshape(2, folds, 2, -1).mean(0)  # (seeds, pair, resamples)
    gains = found[:, 0] - found[:, 1]
    (value, other), mean = found[:, :, 0].mean(0), gains.mean(0)
    low, high = np.quantile(mean[1:], (0.025, 0.975)) - mean[0]
    extra = of_seeds(gains[:, 0])
    ends = mean[0] - math.hypot(low, extra), mean[0] + math.hypot(high, extra)
    return Gain(better * value, better * other, float(mean[0]) + 0.0, *map(float, ends), len(firsts) == 1, folds)


class Choice(NamedTuple):
    """One choice among cells: the scores by cell that it is made by, and the images and seeds it is reported on."""

    score: dict[int, float]  # signed so that more is better
    there: np.ndarray
    half: int
    kept: dict[int, list[int] | slice]


def choices(name: str, terms: Sequence, seeds: Sequence[tuple], mine: Sequence[int], tested: np.ndarray):
    """The Choices among the cells `mine`: on each half of the images, and on all of their shared seeds but one."""
    halves, made = np.array_split(np.random.default_rng(0).permutation(tested), 2), []
    shared = [s for s in seeds[mine[0]] if all(s in seeds[i] for i in mine)]
    folds = [([s], [r for r in shared if r != s]) for s in shared] if len(shared) > 1 else [(None, None)]
    for half, (here, there) in enumerate((halves, halves[::-1])):
        of_cell = {i: _signed(name, terms[i][:, here], np.ones((1, len(here))))[:, 0] for i in mine}
        for seed, others in folds:
            on, kept = (
                {i: slice(None) if of is None else [seeds[i].index(s) for s in of] for i in mine}
                for of in (others, seed)
            )
            made.append(Choice({i: np.median(of_cell[i][on[i]]) for i in mine}, there, half, kept))
    return made


def scores(name: str, terms: Sequence[np.ndarray | None], seeds: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """What each cell would be chosen by, and what would then be reported of it, (choices, N) each.

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
            told[k, i] = np.median(_signed(name, terms[i][:, there], np.ones((1, len(there))))[kept[i]])
    return metric(name).better * chosen, metric(name).better * told


def _signed(name: str, of_cell: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A metric of each seed, (seeds, resamples), signed so that more is better, from a cell's terms (seeds, images)."""
    return metric(name).better * value_of(name, of_cell @ counts.T / of_cell.shape[1])


def value_of(name: str, means: np.ndarray) -> np.ndarray:
    """A metric from the means of its terms."""
    return DECIBEL * np.log(means.clip(1e-30)) if name == "psnr" else means


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
