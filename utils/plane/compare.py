"""Batches against each other: what each reaches at equal rate."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from utils.plane.cells import Plane
from utils.plane.metrics import metric, value_of
from utils.plane.mixtures import reach
from utils.plane.paired import UNTESTED, resamples, terms_of, tested_images, told, widths

OF_DATA = ("dataset", "image_size", "image_channels")
OF_LIKELIHOOD = ("px_y_family_ll", "sigma")
LIKELY = ("ll", "loss", "D", "nelbo", "ll_iw", "bpd")  # metrics that depend on the likelihood
POINTS = 100  # of the rates that two batches share
RESAMPLED = 200  # of the resamples, each of which takes frontiers anew
ENDS = 0.025, 0.975  # of the bootstrap
COMPARED = {
    "metric": "metric",
    "unit": "in",
    "rate": "at R",
    "first": "batch",
    "value": "its best",
    "second": "other",
    "other": "its best ",
    "gain": "other is better by",
    "low": "95 % from",
    "high": "to",
    "told": "is it better?",
}


class Group(NamedTuple):
    """The parts of batches in which a metric can be compared."""

    name: str  # of the metric
    of: str  # data set, and likelihood where it matters
    planes: dict[str, Plane]  # by batch


def groups(planes: dict[str, Plane], names: Sequence[str]) -> list[Group]:
    """For each metric the cells that can be compared: of one data set and, where it matters, of one likelihood."""
    parts = {}
    for name in names:
        of = OF_DATA + (OF_LIKELIHOOD if name.removeprefix("train_") in LIKELY else ())
        for batch, plane in planes.items():
            keys = [tuple(_said(cell.settings, n) for n in of) for cell in plane.cells]
            for key in dict.fromkeys(keys):
                part = plane.where(np.array([k == key for k in keys]) & np.isfinite(plane.values(name)))
                if part.cells:
                    parts.setdefault((name, key), {})[batch] = part
    return [Group(name, " ".join(filter(None, key)), of_batch) for (name, key), of_batch in parts.items()]


def _said(settings: dict, name: str) -> str:
    """A setting as far as it matters: sigma only does where it is fixed."""
    unused = name == "sigma" and settings.get("px_y_family_ll") != "GaussianFixedSigma"
    return "" if unused else settings.get(name) or ""


def comparisons(found: Sequence[Group]) -> list[dict]:
    """Of each group, the second and further batches against the first: on average over the rates that both have, and
    at three of these. Positive gains mean that the other batch is better."""
    rows = []
    for group in found:
        (first, a), *others = group.planes.items()
        for second, b in others if metric(group.name).mixes and metric(group.name).better else ():
            batches = {"metric": group.name, "first": first, "second": second}
            rows += [batches | row for row in _compared(group.name, (a, b))]
    return rows


def _compared(name: str, pair: tuple[Plane, Plane]) -> list[dict]:
    """The comparison of two batches at equal rate. The average over rates is the area between the two frontiers."""
    rates, unit = [plane.values("rate") for plane in pair], pair[0].scale(name)
    low, high = max(r.min() for r in rates), min(r.max() for r in rates)
    if not low < high:
        return []
    at = np.linspace(low, high, POINTS)

    def best_and_gain(values: Sequence[np.ndarray]) -> np.ndarray:
        first, second = (reach(name, r, v, at) for r, v in zip(rates, values, strict=True))
        return np.array([first, second, metric(name).better * (second - first)])

    best = best_and_gain([np.array([cell.median[name] for cell in plane.cells]) for plane in pair])
    of_images = np.array([best_and_gain(values)[2] for values in _of_resamples(name, pair)])
    by_seed = [[plane.of_seed(name, seed) for plane in pair] for seed in pair[0].seeds]
    shared = [values for values in by_seed if np.isfinite(np.concatenate(values)).all()]
    of_seeds = np.reshape([best_and_gain(values)[2] for values in shared], (-1, POINTS))
    parts = {f"{low:.4g} to {high:.4g}": slice(None)}
    parts |= {f"{at[i]:.4g}": slice(i, i + 1) for i in (POINTS // 4, POINTS // 2, 3 * POINTS // 4)}
    rows = []
    for rate, part in parts.items():
        value, other, gain = (unit * float(v) for v in best[:, part].mean(1))
        row = {"unit": pair[0].unit_of(name), "rate": f"{rate} {pair[0].unit}", "value": value, "other": other}
        row |= {"gain": gain, "told": UNTESTED}
        if len(of_images):
            differences = of_images[:, part].mean(1), of_seeds[:, part].mean(1)
            below, above = widths(best[2, part].mean(), *differences, ENDS)
            row |= {"low": gain - unit * below, "high": gain + unit * above}
            row["told"] = told(row["low"], row["high"], len(of_seeds), "better", "worse")
        rows.append(row)
    return rows


def _of_resamples(name: str, pair: tuple[Plane, Plane]) -> Iterator[list[np.ndarray]]:
    """The metric of the cells of both batches, (N,) each, by each resample of the test images; none if untested."""
    terms = [terms_of(plane, [name])[name] for plane in pair]
    tested = tested_images([t for of_batch in terms for t in of_batch])
    if tested is None:
        return
    counts = resamples(len(tested), 0)[1 : 1 + RESAMPLED]
    means = [[of_cell[:, tested] @ counts.T / len(tested) for of_cell in of_batch] for of_batch in terms]
    values = [np.array([np.median(value_of(name, of_cell), axis=0) for of_cell in of_batch]) for of_batch in means]
    yield from zip(*(of_batch.T for of_batch in values), strict=True)
