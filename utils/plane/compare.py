"""Batches against each other: what each reaches at equal rate."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import chain, combinations, cycle

import numpy as np
from matplotlib.axes import Axes

from utils.cli import wrapped
from utils.plane.cells import OF_GRID, Plane
from utils.plane.drawing import MARKERS, Drawing, Output, literal, panels, rate_axis, styled, write_drawing
from utils.plane.figures import draw_errors, draw_seeds
from utils.plane.gains import UNTESTED, hull, interval, on_others, reach, reached, terms_of
from utils.plane.metrics import metric
from utils.plane.tables import Table, cells_of

COMPARED = {  # columns and headings of the table
    "metric": "metric", "unit": "in", "rate": "at R", "first": "batch", "value": "its best", "second": "other",
    "other": "its best ", "gain": "other is better by", "low": "95 % from", "high": "to", "told": "is it better?",
}  # fmt: skip


def names_of(planes: Sequence[Plane]) -> list[str]:
    """What tells batches apart: the settings in which they differ, or their folders."""
    differing = [name for name in OF_GRID if len({tuple(plane.settings(name)) for plane in planes}) > 1]
    names = [", ".join(f"{n} {' and '.join(plane.settings(n))}" for n in differing) for plane in planes]
    told = [0 < len(name) <= 60 and names.count(name) == 1 for name in names]
    names = [name if is_told else p.folder.name for name, is_told, p in zip(names, told, planes, strict=True)]
    return names if len({*names}) == len(names) else [str(plane.folder) for plane in planes]


def groups(planes: dict[str, Plane], names: Sequence[str]) -> dict[tuple[str, str], dict[str, Plane]]:
    """By metric and its data, likelihood and step: the cells of each batch that are `comparable`."""
    parts = {}
    for name in names:
        for batch, plane in planes.items():
            for key, mask in plane.comparable(name).items():
                if (mask := mask & np.isfinite(plane.values(name))).any():
                    parts.setdefault((name, key), {})[batch] = plane.where(mask)
    return {(name, ", ".join(filter(None, key))): part for (name, key), part in parts.items()}


def comparisons(parts: dict[tuple[str, str], dict[str, Plane]]) -> list[dict]:
    """The gain of every two batches of each of `groups`, over the rates that both have, and at three."""
    rows = []
    for (name, _), planes in parts.items():
        pairs = combinations(planes.items(), 2) if metric(name).mixes and metric(name).better else ()
        for (first, a), (second, b) in pairs:
            pair = {"metric": name, "first": first, "second": second, "unit": a.unit_of(name)}
            rows += [pair | row for row in _compared(name, (a, b))]
    return rows


def _compared(name: str, pair: tuple[Plane, Plane]) -> list[dict]:
    """Two batches at equal rate: at those of the one with fewer cells, where it is known best."""
    rates, unit = [plane.values("rate") for plane in pair], pair[0].scale(name)
    low, high = max(r.min() for r in rates), min(r.max() for r in rates)
    if not low < high:
        return []
    inside = [np.unique(r[(low <= r) & (r <= high)]) for r in rates]
    at = min((of_batch for of_batch in inside if len(of_batch)), key=len)
    medians = [np.array([cell.median[name] for cell in plane.cells]) for plane in pair]
    best = [unit * reached(name, r, values, at) for r, values in zip(rates, medians, strict=True)]
    of_first = np.arange(sum(map(len, rates))) < len(rates[0])  # of the cells of both

    def choose(score: np.ndarray) -> np.ndarray:  # (first and other, mixtures and their bound, cells of both)
        weights = np.zeros((2, 2, len(at), len(score)))
        for of_batch, r, cells in zip(weights, rates, (of_first, ~of_first), strict=True):
            of_batch[..., cells] = reach(name, r, score[cells], at)
        return weights.reshape(4, len(at), -1)

    cells = [cell for plane in pair for cell in plane.cells]
    terms = [t for plane in pair for t in terms_of(plane, name)]
    values = on_others(name, terms, [cell.seeds for cell in cells], choose)
    parts = {f"{at[0]:.4g} to {at[-1]:.4g}": slice(None)} if len(at) > 1 else {}
    parts |= {f"{at[i]:.4g}": slice(i, i + 1) for i in np.arange(1, 4) * len(at) // 4}
    rows = []
    for rate, part in parts.items():
        value, other = (float(v[part].mean()) for v in best)
        row = {"rate": f"{rate} {pair[0].unit}", "value": value, "other": other, "told": UNTESTED}
        row["gain"] = metric(name).better * (other - value)
        if values is not None:
            a, a_most, b, b_most = np.moveaxis(metric(name).better * unit * values[..., part].mean(-1), 2, 0)
            row |= interval(b - a_most, b_most - a, ("better", "worse")) | {"gain": row["gain"]}
        rows.append(row)
    return rows


def batches(parts: dict[tuple[str, str], dict[str, Plane]], about: str) -> Drawing:
    """Each metric against the total rate, with marker, colour and hull of each batch."""
    groups_of, rows = Counter(name for name, _ in parts), []
    looks = dict(zip(dict.fromkeys(chain(*parts.values())), cycle(MARKERS), strict=False))

    def draw(ax: Axes, group: tuple[str, str]) -> None:
        (name, of), planes = group, parts[group]
        for batch, plane in planes.items():
            marker, colour = looks[batch]
            draw_seeds(ax, plane, "rate", name)
            draw_errors(ax, plane, "rate", name, name)
            at, look = (plane.values("rate"), plane.values(name)), {"ms": 3.5, "mew": 0, "ls": "none"}
            ax.plot(*at, marker, c=colour, label=literal(batch), **look)
            corners = hull(plane, name)
            label = f"{literal(batch)}, mixed" if corners else None
            ax.plot([c["rate"] for c in corners], [c[name] for c in corners], c=colour, lw=1.2, label=label)
            both = {"batch": batch, "of": of}
            rows.extend(both | row for row in cells_of(plane, [name]))
            rows.extend(both | {"what": "hull"} | row for row in corners)
        widest = max(planes.values(), key=lambda p: p.values("rate").max())
        title = f"{widest.title(name)}, {literal(of)}" if groups_of[name] > 1 else widest.title(name)
        ax.set_title(textwrap.fill(title, 40))
        rate_axis(ax, "x", widest, "rate")

    return Drawing(panels(about, list(parts), draw), rows)


@styled
def write_comparison(out: Output, planes: Sequence[Plane], names: Sequence[str]) -> str:
    """Writes the figure and tables that compare batches; returns the table and notes to print."""
    name = "_".join(["compare", *(plane.folder.name for plane in planes[1:])])
    planes = dict(zip(names_of(planes), planes, strict=True))
    parts = groups(planes, names)
    table = Table(comparisons(parts), COMPARED, f"{name}_table")
    about = "\n".join(f"{batch}: {plane.about}" for batch, plane in planes.items())
    write_drawing(out, name, batches(parts, about), next(iter(planes.values())).title)
    table.write(out)
    apart = [(metric(n).label, of or "other settings") for (n, of), part in parts.items() if len(part) < len(planes)]
    notes = [f"not in every batch, so not compared with all: {label} of {of}" for label, of in apart]
    notes += [f"{batch}: {note}" for batch, plane in planes.items() for note in plane.notes]
    short = {n: text for n, text in COMPARED.items() if n not in ("unit", "first", "told")}
    table = Table(table.rows, short | {"value": next(iter(planes)), "gain": "gain"})  # which a terminal has room for
    text = table.markdown() if table.rows else "nothing can be compared\n"
    return text + "".join(wrapped(f"note: {note}") + "\n" for note in dict.fromkeys(notes))
