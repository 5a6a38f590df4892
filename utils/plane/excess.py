"""Multi-rate cells against separately trained ones: their excess loss, their area, and what is left to gain."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from utils.cli import wrapped
from utils.config import fields_of
from utils.evaluation.probes import standard_error
from utils.plane.cells import BETAS, Cell, Plane
from utils.plane.gains import terms_of
from utils.plane.neighbours import LEAST_CELLS, interpolated

EXCESS = {  # columns and headings of excess.csv; own_ is of the separately trained cell
    "num_epochs": "epochs, multi-rate", "own_epochs": "separate",
    "optimizer": "optimizer, multi-rate", "own_optimizer": "separate", "beta_y": "beta_y", "beta_z": "beta_z",
    "loss": "loss, multi-rate", "own_loss": "separate", "excess": "excess", "se": "+-",
    "kl_y": "R(y|z), multi-rate", "own_kl_y": "separate", "kl_z": "R(z), multi-rate", "own_kl_z": "separate",
    "psnr": "PSNR, multi-rate", "own_psnr": "separate", "n": "seeds, multi-rate", "own_n": "separate",
}  # fmt: skip


def excess_rows(plane: Plane) -> list[dict[str, str | float]]:
    """Every unfolded cell with every separately trained one of the same model, data and betas.

    `excess` is by how many nats the unfolded cell's loss is larger, `se` its standard error over seeds and images.
    """
    terms, rows = terms_of(plane, "loss"), []
    for i, j in _pairs(plane):
        pair, a, b = (plane.cells[i], plane.cells[j]), terms[i], terms[j]
        losses = [np.array([row.get("loss", math.nan) for row in cell.repeats]) for cell in pair]
        errors = [standard_error(of_seeds) for of_seeds in losses]
        if a is not None and b is not None and a.shape[1] == b.shape[1]:
            errors.append(standard_error(a.mean(0) - b.mean(0)))  # over the images, which they share
        errors = [se for se in errors if math.isfinite(se)]
        row = {name: pair[0].median[name] for name in BETAS}
        row["se"] = math.hypot(*errors) if errors else math.nan
        row["excess"] = float(losses[0].mean() - losses[1].mean())
        for whose, cell, loss in zip(("", "own_"), pair, losses, strict=True):
            row[f"{whose}epochs" if whose else "num_epochs"], row[f"{whose}optimizer"] = made_with(cell)
            row |= {whose + name: cell.median.get(name) for name in ("kl_y", "kl_z", "psnr")}
            row |= {f"{whose}loss": float(loss.mean()), f"{whose}n": len(cell.runs)}
        rows.append({name: row[name] for name in EXCESS})
    return rows


def _pairs(plane: Plane) -> list[tuple[int, int]]:
    names = fields_of("model", "data")
    models = [[*map(cell.settings.get, names), *(f"{cell.median[b]:.6g}" for b in BETAS)] for cell in plane.cells]
    of_both = (np.flatnonzero(plane.is_given & mask) for mask in (plane.unfolded, ~plane.unfolded))
    return [(i, j) for i, j in product(*of_both) if models[i] == models[j]]


def made_with(cell: Cell) -> tuple[str, str]:
    """A cell's epochs and optimizer; old tables do not name Adam."""
    return cell.epochs, cell.settings.get("optimizer") or "adam"


def by_trainings(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by what both were trained with, such as ("16 epochs, muon", "8 epochs, adam"); of one optimiser first."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["optimizer"] != row["own_optimizer"]):
        shared, separate = (row["num_epochs"], row["optimizer"]), (row["own_epochs"], row["own_optimizer"])
        groups.setdefault((_training(*shared), _training(*separate)), []).append(row)
    return groups


def _training(epochs: str, optimizer: str) -> str:
    return f"{epochs or '?'} epochs, {optimizer}"


def areas(plane: Plane) -> dict[tuple[str, str], list[np.ndarray]]:
    """By what both were trained with, the `area` of multi-rate cells and that of separate ones at the same betas."""
    groups = {}
    for pair in ([plane.cells[i] for i in indices] for indices in _pairs(plane)):
        trainings = tuple(_training(*made_with(cell)) for cell in pair)
        groups.setdefault(trainings, []).append(pair)
    return {of: [area(cells) for cells in zip(*pairs, strict=True)] for of, pairs in groups.items()}


def area(cells: Sequence[Cell]) -> np.ndarray:
    """The area of the quadrilateral of a grid's corners in (R(z), R(y|z)), nats^2, of each seed that has all four."""
    at = {tuple(cell.median[name] for name in BETAS): cell for cell in cells}
    (y, y_max), (z, z_max) = ((min(betas), max(betas)) for betas in zip(*at, strict=True))
    ring = [(y, z), (y, z_max), (y_max, z_max), (y_max, z)]
    if len({*ring}) < 4 or not at.keys() >= {*ring}:
        return np.array([])
    corners = [dict(zip(at[betas].seeds, at[betas].repeats, strict=True)) for betas in ring]
    seeds = sorted(set.intersection(*map(set, corners)))
    rates = np.array([[[of[seed][rate] for rate in ("kl_z", "kl_y")] for of in corners] for seed in seeds])
    r_z, r_y = np.moveaxis(rates.reshape(-1, 4, 2), 2, 0)  # (seeds, corners) each
    return abs((r_z * np.roll(r_y, -1, 1) - r_y * np.roll(r_z, -1, 1)).sum(1)) / 2


def print_excess(rows: list[dict], of_trainings: dict[tuple[str, str], list[np.ndarray]]) -> None:
    """Prints, for each pair of trainings, by how much the multi-rate cells are behind or ahead, and their `areas`."""
    finite = [row for row in rows if math.isfinite(row["excess"])]
    for (shared, separate), of_both in by_trainings(finite).items():
        excess = [row["excess"] for row in of_both]
        text = f"multi-rate cells ({shared}) against separately trained ones ({separate}): "
        text += f"loss {np.mean(excess):+.2f} nats on average, {min(excess):+.2f} to {max(excess):+.2f}; "
        text += f"lower in {sum(e < 0 for e in excess)} of {len(excess)} cells"
        map_, others = of_trainings[shared, separate]
        if len(map_) and len(others):
            text += f"; area of the map {_with_error(map_)} of {_with_error(others)} nats^2 ({share(map_, others)})"
        print("\n" + wrapped(text))


def share(areas: np.ndarray, others: np.ndarray) -> str:
    """The mean of areas as a share of that of others, `62 %`."""
    return f"{100 * areas.mean() / others.mean():.0f} %"


def _with_error(values: np.ndarray) -> str:
    error = standard_error(values)  # over seeds
    return f"{values.mean():,.0f}" + (f" +- {error:.0f}" if math.isfinite(error) else "")


def left(plane: Plane, excess: list[dict]) -> dict[str, dict[str, float]]:
    """By how many nats separate trainings are better than multi-rate cells, by their runs.

    `excess` (see `excess_rows`) tells it of some cells, of the others it is interpolated. Of several kinds of
    trainings, it is those that are best on average.
    """
    known = [row for row in excess if math.isfinite(row["excess"]) and min(row[name] for name in BETAS) > 0]
    groups = [rows for rows in by_trainings(known).values() if len(rows) >= LEAST_CELLS]
    if not groups:
        return {}
    rows = max(groups, key=lambda rows: np.mean([row["excess"] for row in rows]))
    made = rows[0]["num_epochs"], rows[0]["optimizer"]
    betas = plane.betas.T
    alike = plane.unfolded & [made_with(cell) == made for cell in plane.cells] & (betas > 0).all(1)
    at, values = (np.array([[row[n] for n in names] for row in rows]) for names in (BETAS, ["excess"]))
    result = np.full((2, len(alike)), math.nan)
    result[:, alike] = interpolated(np.log10(at), values[:, 0], np.log10(betas[alike]))
    for row, of_row in zip(rows, at, strict=True):
        result[:, alike & np.isclose(betas, of_row, rtol=1e-6).all(1)] = [[row["excess"]], [row["se"]]]
    of_cells = zip(plane.cells, *result.tolist(), strict=True)
    found = {cell.runs[0]: {"left": nats, "left_se": se} for cell, nats, se in of_cells}
    return {run: {n: v for n, v in of_run.items() if math.isfinite(v)} for run, of_run in found.items()}
