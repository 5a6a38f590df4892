"""Batches against each other: what each reaches at equal rate."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.plane.cells import Plane, reach
from utils.plane.gains import UNTESTED, equal, of_seeds, resamples, shown, terms_of, tested_images
from utils.plane.metrics import metric, value_of

OF_DATA = ("dataset", "image_size", "image_channels")
OF_LIKELIHOOD = ("px_y_family_ll", "sigma")
LIKELY = ("ll", "loss", "D", "nelbo", "ll_iw", "bpd")  # metrics that depend on the likelihood
POINTS = 100  # of the rates that two batches share
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
    found = []
    for name in names:
        of = OF_DATA + (OF_LIKELIHOOD if name.removeprefix("train_") in LIKELY else ())
        parts = {}
        for batch, plane in planes.items():
            keys = [tuple(_said(cell.settings, n) for n in of) for cell in plane.cells]
            for key in dict.fromkeys(keys):
                part = plane.where(np.array([k == key for k in keys]) & np.isfinite(plane.values(name)))
                if part.cells:
                    parts.setdefault(key, {})[batch] = part
        found += [Group(name, " ".join(filter(None, key)), part) for key, part in parts.items()]
    return found


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
            rows += [
                {"metric": group.name, "first": first, "second": second} | row for row in _compared(group.name, a, b)
            ]
    return rows


def _compared(name: str, a: Plane, b: Plane) -> list[dict]:
    """The comparison of two batches at equal rate. The average over rates is the area between the two frontiers."""
    rates, unit, better = [p.values("rate") for p in (a, b)], a.scale(name), metric(name).better
    low, high = max(r.min() for r in rates), min(r.max() for r in rates)
    if not low < high:
        return []
    at = np.linspace(low, high, POINTS)
    values = [np.array([c.median[name] for c in p.cells]) for p in (a, b)]
    reached = np.array([reach(name, r, v, at) for r, v in zip(rates, values, strict=True)])
    gain = better * (reached[1] - reached[0])
    resampled = _of_images(name, a, b, rates, at)
    of_seed = [[_of_seed(p, name, s) for p in (a, b)] for s in a.seeds]
    shared = [pair for pair in of_seed if all(np.isfinite(v).all() for v in pair)]
    by_seed = np.array([_difference(name, rates, pair, at) for pair in shared])
    rows = []
    where = {
        f"{low:.4g} to {high:.4g}": slice(None),
        **{f"{at[i]:.4g}": i for i in (POINTS // 4, POINTS // 2, 3 * POINTS // 4)},
    }
    for text, i in where.items():
        told = unit * float(np.mean(gain[i]))
        row = {"unit": a.unit_of(name), "rate": f"{text} {a.unit}", "gain": told, "told": UNTESTED}
        row |= {"value": unit * float(np.mean(reached[0, i])), "other": unit * float(np.mean(reached[1, i]))}
        if resampled is not None:
            ends = np.quantile(resampled[:, i].reshape(len(resampled), -1).mean(1), (0.025, 0.975)) - np.mean(gain[i])
            extra = of_seeds(by_seed[:, i].reshape(len(shared), -1).mean(1)) if len(shared) > 1 else 0.0
            below, above = (unit * math.hypot(end, extra) for end in ends)
            row |= {"low": told - below, "high": told + above}
            words = shown("better" if told > 0 else "worse", len(shared))
            row["told"] = equal(len(shared)) if row["low"] <= 0 <= row["high"] else words
        rows.append(row)
    return rows


def _of_seed(plane: Plane, name: str, seed: str) -> np.ndarray:
    """A metric of every cell's run with a seed, (N,); NaN where there is none."""
    runs = [dict(zip(cell.seeds, cell.repeats, strict=True)).get(seed, {}) for cell in plane.cells]
    return np.array([run.get(name, math.nan) for run in runs])


def _difference(name: str, rates: list, values: list, at: np.ndarray) -> np.ndarray:
    a, b = (reach(name, r, v, at) for r, v in zip(rates, values, strict=True))
    return metric(name).better * (b - a)


def _of_images(name: str, a: Plane, b: Plane, rates: list, at: np.ndarray) -> np.ndarray | None:
    """The differences at the rates for resampled test images, the same for both, (resamples, rates); None: untested."""
    terms = [terms_of(p, [name])[name] for p in (a, b)]
    tested = tested_images([t for of_batch in terms for t in of_batch])
    if tested is None:
        return None
    counts = resamples(len(tested), 0)[1:201]
    values = [
        np.array([np.median(value_of(name, t[:, tested] @ counts.T / len(tested)), axis=0) for t in of_batch])
        for of_batch in terms
    ]
    return np.array([_difference(name, rates, [v[:, k] for v in values], at) for k in range(len(counts))])
