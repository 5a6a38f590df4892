"""Batches against each other: what each reaches at equal rate."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from utils.files import to_csv, write_text
from utils.plane.cells import Plane
from utils.plane.drawing import MARKERS, Drawing, literal, panels, rate_axis, styled, write_drawing
from utils.plane.figures import draw_seeds
from utils.plane.gains import UNTESTED, hull, interval, mixed_values, resamples, terms_of, tested_images
from utils.plane.metrics import metric, value_of
from utils.plane.tables import Table, cells_of

POINTS = 100  # of the rates that two batches share
RESAMPLED = 200  # of the resamples, each of which takes frontiers anew
ENDS = 0.025, 0.975  # of the bootstrap
COMPARED = {  # columns and headings of the table
    "metric": "metric", "unit": "in", "rate": "at R", "first": "batch", "value": "its best", "second": "other",
    "other": "its best ", "gain": "other is better by", "low": "95 % from", "high": "to", "told": "is it better?",
}  # fmt: skip


class Group(NamedTuple):
    """A metric, of what data and likelihood, and by batch the cells that can be compared."""

    name: str
    of: str
    planes: dict[str, Plane]


def groups(planes: dict[str, Plane], names: Sequence[str]) -> list[Group]:
    """For each metric the cells of one data set and, where it matters, of one likelihood."""
    parts = {}
    for name in names:
        for batch, plane in planes.items():
            for key, mask in plane.comparable(name).items():
                if (mask := mask & np.isfinite(plane.values(name))).any():
                    parts.setdefault((name, key), {})[batch] = plane.where(mask)
    return [Group(n, " ".join(filter(None, key)), part) for (n, key), part in parts.items()]


def comparisons(parts: Sequence[Group]) -> list[dict]:
    """Of each group, further batches against the first: over the rates that both have, and at three.

    Positive gains mean that the other batch is better.
    """
    rows = []
    for name, _, planes in parts:
        (first, a), *others = planes.items()
        for second, b in others if metric(name).mixes and metric(name).better else ():
            pair = {"metric": name, "first": first, "second": second, "unit": a.unit_of(name)}
            rows += [pair | row for row in _compared(name, (a, b))]
    return rows


def _compared(name: str, pair: tuple[Plane, Plane]) -> list[dict]:
    """Two batches at equal rate. The average over rates is the area between the two frontiers."""
    rates, unit = [plane.values("rate") for plane in pair], pair[0].scale(name)
    low, high = max(r.min() for r in rates), min(r.max() for r in rates)
    if not low < high:
        return []
    at = np.linspace(low, high, POINTS)

    def best_of(values: Sequence[np.ndarray]) -> np.ndarray:  # (first, second and gain, POINTS)
        best = [mixed_values(name, r, v, at) for r, v in zip(rates, values, strict=True)]
        return unit * np.array([*best, metric(name).better * (best[1] - best[0])])

    best = best_of([np.array([cell.median[name] for cell in p.cells]) for p in pair])
    of_images = np.array([best_of(values)[2] for values in _resampled(name, pair)])
    by_seed = [[plane.of_seed(name, seed) for plane in pair] for seed in pair[0].seeds]
    shared = [values for values in by_seed if np.isfinite(np.concatenate(values)).all()]
    of_seeds = np.reshape([best_of(values)[2] for values in shared], (-1, POINTS))
    parts = {f"{low:.4g} to {high:.4g}": slice(None)}
    parts |= {f"{at[i]:.4g}": slice(i, i + 1) for i in POINTS * np.arange(1, 4) // 4}
    rows = []
    for rate, part in parts.items():
        numbers = zip(("value", "other", "gain"), best[:, part].mean(1).tolist(), strict=True)
        row = {"rate": f"{rate} {pair[0].unit}", **dict(numbers), "told": UNTESTED}
        if len(of_images):
            differences = of_images[:, part].mean(1), of_seeds[:, part].mean(1)
            row |= interval(row["gain"], *differences, ENDS, ("better", "worse"))
        rows.append(row)
    return rows


def _resampled(name: str, pair: tuple[Plane, Plane]) -> list[tuple[np.ndarray, ...]]:
    terms = [terms_of(plane, [name])[name] for plane in pair]
    images = tested_images([t for of_batch in terms for t in of_batch])
    if images is None:
        return []
    counts = resamples(len(images), 0)[1 : 1 + RESAMPLED].T

    def values(of_cell: np.ndarray) -> np.ndarray:
        return np.median(value_of(name, of_cell[:, images] @ counts / len(images)), axis=0)

    return list(zip(*(np.array(list(map(values, of_batch))).T for of_batch in terms), strict=True))


def batches(parts: Sequence[Group], about: str) -> Drawing:
    """Each metric against the total rate, with marker, colour and hull of each batch."""
    several = len({group.of for group in parts}) > 1
    some, rows = next(iter(parts[0].planes.values())), []
    names = dict.fromkeys(batch for group in parts for batch in group.planes)
    looks = dict(zip(names, cycle(MARKERS), strict=False))

    def draw(ax: Axes, group: Group) -> None:
        name, of, planes = group
        for batch, plane in planes.items():
            marker, colour = looks[batch]
            draw_seeds(ax, plane, "rate", name)
            at, look = (plane.values("rate"), plane.values(name)), {"ms": 3.5, "mew": 0, "ls": "none"}
            ax.plot(*at, marker, c=colour, label=literal(batch), **look)
            corners = hull(plane, name)
            ax.plot([c["rate"] for c in corners], [c[name] for c in corners], c=colour, lw=1.2)
            both = {"batch": batch, "of": of}
            rows.extend(both | row for row in cells_of(plane, [name]))
            rows.extend(both | {"what": "hull"} | row for row in corners)
        ax.set_title(f"{some.title(name)}, {literal(of)}" if several else some.title(name))
        rate_axis(ax, "x", max(planes.values(), key=lambda p: p.values("rate").max()), "rate")

    return Drawing(panels(about, parts, draw), rows)


@styled
def write_comparison(out: Path, formats: Sequence[str], planes: dict[str, Plane], names: Sequence[str]) -> str:
    """Writes the figure and tables that compare batches; returns the table and notes to print."""
    parts, (first, *others) = groups(planes, names), planes
    table, name = Table(comparisons(parts), COMPARED), f"compare_{'_'.join(others)}"
    about = "\n".join(f"{batch}: {plane.about}" for batch, plane in planes.items())
    write_drawing(out, name, formats, batches(parts, about), planes[first].heading)
    write_text(out / f"{name}_table.csv", to_csv(table.rows, COMPARED))
    write_text(out / f"{name}_table.md", table.markdown())
    notes = [
        f"not in every batch, so not compared with all: {metric(g.name).label} of {g.of or 'other settings'}"
        for g in parts if len(g.planes) < len(planes)
    ]  # fmt: skip
    notes += [f"{batch}: {note}" for batch, plane in planes.items() for note in plane.notes]
    return table.markdown() + "".join(f"note: {note}\n" for note in dict.fromkeys(notes))
