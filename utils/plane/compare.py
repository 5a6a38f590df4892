"""Batches against each other: what each reaches at equal rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.config import fields_of
from utils.files import to_csv, write_text
from utils.plane.cells import Plane
from utils.plane.drawing import headings, styled, write_drawing
from utils.plane.figures import batches
from utils.plane.gains import UNTESTED, resamples, terms_of, tested_images, verdict, widths
from utils.plane.metrics import metric, value_of
from utils.plane.mixtures import mixed_values
from utils.plane.tables import to_markdown

OF_DATA = [name for name in fields_of("data") if name != "data_digest"]  # which old runs do not say
OF_LIKELIHOOD = ["px_y_family_ll", "sigma"]
LIKELY = ("ll", "loss", "D", "nelbo", "ll_iw", "bpd")  # metrics that depend on the likelihood
POINTS = 100  # of the rates that two batches share
RESAMPLED = 200  # of the resamples, each of which takes frontiers anew
ENDS = 0.025, 0.975  # of the bootstrap
COMPARED = {"metric": "metric", "unit": "in", "rate": "at R", "first": "batch", "value": "its best"}
COMPARED |= {"second": "other", "other": "its best ", "gain": "other is better by", "low": "95 % from", "high": "to"}
COMPARED |= {"told": "is it better?"}  # columns of the table and their headings


class Group(NamedTuple):
    """A metric, of what data set and likelihood, and by batch the cells in which it can be compared."""

    name: str
    of: str
    planes: dict[str, Plane]


def groups(planes: dict[str, Plane], names: Sequence[str]) -> list[Group]:
    """For each metric the cells that can be compared: of one data set and, where it matters, of one likelihood."""
    parts = {}
    for name in names:
        settings = OF_DATA + OF_LIKELIHOOD if name.removeprefix("train_") in LIKELY else OF_DATA
        for batch, plane in planes.items():
            keys = [tuple(cell.settings.get(n) or "" for n in settings) for cell in plane.cells]
            # sigma only matters where it is fixed
            keys = [key if "GaussianFixedSigma" in key else key[: len(OF_DATA) + 1] for key in keys]
            for key in dict.fromkeys(keys):
                part = plane.where(np.array([k == key for k in keys]) & np.isfinite(plane.values(name)))
                if part.cells:
                    parts.setdefault((name, key), {})[batch] = part
    return [Group(name, " ".join(filter(None, key)), of_batch) for (name, key), of_batch in parts.items()]


def comparisons(parts: Sequence[Group]) -> list[dict]:
    """Of each group, the second and further batches against the first: on average over the rates that both have, and
    at three of these. Positive gains mean that the other batch is better."""
    rows = []
    for group in parts:
        (first, a), *others = group.planes.items()
        for second, b in others if metric(group.name).mixes and metric(group.name).better else ():
            pair = {"metric": group.name, "first": first, "second": second}
            rows += [pair | row for row in _compared(group.name, (a, b))]
    return rows


def _compared(name: str, pair: tuple[Plane, Plane]) -> list[dict]:
    """The comparison of two batches at equal rate. The average over rates is the area between the two frontiers."""
    rates, unit = [plane.values("rate") for plane in pair], pair[0].scale(name)
    low, high = max(r.min() for r in rates), min(r.max() for r in rates)
    if not low < high:
        return []
    at = np.linspace(low, high, POINTS)

    def best_and_gain(values: Sequence[np.ndarray]) -> np.ndarray:
        first, second = (mixed_values(name, r, v, at) for r, v in zip(rates, values, strict=True))
        return np.array([first, second, metric(name).better * (second - first)])

    best = best_and_gain([np.array([cell.median[name] for cell in plane.cells]) for plane in pair])
    of_images = np.array([best_and_gain(values)[2] for values in _resampled(name, pair)])
    by_seed = [[plane.of_seed(name, seed) for plane in pair] for seed in pair[0].seeds]
    shared = [values for values in by_seed if np.isfinite(np.concatenate(values)).all()]
    of_seeds = np.reshape([best_and_gain(values)[2] for values in shared], (-1, POINTS))
    parts = {f"{low:.4g} to {high:.4g}": slice(None)}
    parts |= {f"{at[i]:.4g}": slice(i, i + 1) for i in (POINTS // 4, POINTS // 2, 3 * POINTS // 4)}
    rows = []
    for rate, part in parts.items():
        numbers = dict(zip(("value", "other", "gain"), (unit * best[:, part].mean(1)).tolist(), strict=True))
        row = {"unit": pair[0].unit_of(name), "rate": f"{rate} {pair[0].unit}", **numbers, "told": UNTESTED}
        if len(of_images):
            differences = of_images[:, part].mean(1), of_seeds[:, part].mean(1)
            below, above = widths(best[2, part].mean(), *differences, ENDS)
            row |= {"low": row["gain"] - unit * below, "high": row["gain"] + unit * above}
            row["told"] = verdict(row["low"], row["high"], len(of_seeds), "better", "worse")
        rows.append(row)
    return rows


def _resampled(name: str, pair: tuple[Plane, Plane]) -> list[tuple[np.ndarray, ...]]:
    """The metric of the cells of both batches, (N,) each, by each resample of the test images; none if untested."""
    terms = [terms_of(plane, [name])[name] for plane in pair]
    images = tested_images([t for of_batch in terms for t in of_batch])
    if images is None:
        return []
    counts = resamples(len(images), 0)[1 : 1 + RESAMPLED].T
    means = [[of_cell[:, images] @ counts / len(images) for of_cell in of_batch] for of_batch in terms]
    values = [np.array([np.median(value_of(name, of_cell), axis=0) for of_cell in of_batch]) for of_batch in means]
    return list(zip(*(of_batch.T for of_batch in values), strict=True))


@styled
def write_comparison(out: Path, formats: Sequence[str], planes: dict[str, Plane], names: Sequence[str]) -> str:
    """Writes the figure and the tables that compare batches; returns what to print: the table and notes."""
    parts = groups(planes, names)
    rows, (first, *others) = comparisons(parts), planes
    name = f"compare_{'_'.join(others)}"
    drawing = batches(parts, "\n".join(f"{batch}: {plane.about}" for batch, plane in planes.items()))
    write_drawing(out, name, formats, drawing, headings(drawing.rows, planes[first]))
    write_text(out / f"{name}_table.csv", to_csv(rows, COMPARED))
    text = to_markdown(rows, COMPARED)
    write_text(out / f"{name}_table.md", text)
    apart = [f"{metric(g.name).label} of {g.of or 'other settings'}" for g in parts if len(g.planes) < len(planes)]
    notes = [f"not in every batch, so not compared with all: {text}" for text in apart]
    notes += [f"{batch}: {note}" for batch, plane in planes.items() for note in plane.notes]
    return text + "".join(f"note: {note}\n" for note in dict.fromkeys(notes))
