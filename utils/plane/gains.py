"""Whether the best of many cells is better than the best of a few, or only looks so by the choice of test images."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

import numpy as np

from utils.plane.metrics import metric, score_of, value_of
from utils.plane.mixtures import mixture
from utils.plane.paired import resamples, tested_images, told, widths

ENDS = 0.005, 0.995  # of the bootstrap: it is too narrow, as the halves, each of which chooses for the other, are not
# independent, and squared errors are skewed; of equal cells, 0.025 to 0.975 leave 0 out in 5 to 10 %, these in 1 to 5 %


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
        return told(self.low, self.high, self.seeds, "yes", "no, worse")


def gain(name: str, terms: Sequence[np.ndarray | None], seeds: Sequence[tuple], among, few, rates) -> Gain | None:
    """The best of the cells in the mask `among` (N,) against the `mixture` of those in `few` (N,) at its rate.

    None if untestable. Chosen on one half of the test images and reported on the other, both ways, and averaged (Cawley
    & Talbot 2010). The interval is a paired bootstrap over images, between its ENDS. If all cells share several seeds,
    the choice is made on all seeds but one and reported on that one, in turn, and Student's interval over these seeds
    is added. `terms`, `seeds` and `rates` are of each cell, see `terms_of`; ties go to the lowest rate.
    """
    tested = tested_images(list(compress(terms, among | few))) if among.any() and few.any() else None
    if tested is None:
        return None
    pairs, compared, chosen = [], [], set()
    for score, means_of in choices(name, terms, seeds, among | few, tested):
        best = max(np.flatnonzero(among).tolist(), key=lambda i: (score[i], -rates[i]))
        other = mixture(name, rates, np.where(few, score, math.nan), rates[best])
        mixed = sum(weight * means_of(i) for i, weight in other.items())
        pairs.append([value_of(name, means_of(best)), value_of(name, mixed)])
        compared.append(sum(weight * rates[i] for i, weight in other.items()))
        chosen.add(best)
    folds = len(pairs) // 2
    values, others = np.array(pairs).reshape(2, folds, 2, -1).mean(0).swapaxes(0, 1)  # (seeds, resamples) each
    gains = metric(name).better * (values - others)
    of_seeds = np.std(values[:, 0], ddof=1) / math.sqrt(folds) if folds > 1 else 0.0
    se = math.hypot(np.std(values[:, 1:].mean(0)), of_seeds)
    mean = gains.mean(0)
    below, above = widths(mean[0], mean[1:], gains[:, 0], ENDS)
    numbers = values[:, 0].mean(), se, others[:, 0].mean(), np.mean(compared)
    numbers += mean[0] + 0.0, mean[0] - below, mean[0] + above
    return Gain(*map(float, numbers), tuple(sorted(chosen)), folds)


def choices(name: str, terms: Sequence, seeds: Sequence[tuple], among: np.ndarray, tested: np.ndarray) -> Iterator:
    """Each choice among the cells in a mask (N,): on a half of the images, and on all of their shared seeds but one.

    As the scores that it is made by, (N,), NaN for other cells, and a function of a cell that gives what is reported:
    its mean terms, the median over seeds, in the resamples of the other half (R,).
    """
    cells, folds = np.flatnonzero(among).tolist(), [(slice(None), slice(None))]
    terms = {i: terms[i] for i in cells}
    shared = [s for s in dict.fromkeys(seeds[cells[0]]) if all(s in seeds[i] for i in cells)]
    if len(shared) > 1:
        terms = {i: terms[i][[seeds[i].index(s) for s in shared]] for i in cells}
        folds = [(np.arange(len(shared)) != k, slice(k, k + 1)) for k in range(len(shared))]
    halves = np.array_split(np.random.default_rng(0).permutation(tested), 2)
    for half, (here, there) in enumerate((halves, halves[::-1])):
        of_seed = {i: terms[i][:, here].mean(1) for i in cells}
        for others, one in folds:
            score = np.full(len(among), math.nan)
            score[cells] = [score_of(name, np.median(of_seed[i][others])) for i in cells]
            yield score, partial(_reported, terms, there, half, one)


def _reported(terms: Mapping[int, np.ndarray], images: np.ndarray, half: int, seeds: slice, cell: int) -> np.ndarray:
    means = terms[cell][:, images] @ resamples(len(images), half).T / len(images)
    return np.median(means[seeds], axis=0)
