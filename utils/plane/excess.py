"""Multi-rate cells against separately trained ones: their excess loss, and what is left to gain."""

import math
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
    names, terms, rows = fields_of("model", "data"), terms_of(plane, "loss"), []
    models = [[*map(cell.settings.get, names), *(f"{cell.median[b]:.6g}" for b in BETAS)] for cell in plane.cells]
    of_both = (np.flatnonzero(plane.is_given & mask) for mask in (plane.unfolded, ~plane.unfolded))
    for i, j in ((i, j) for i, j in product(*of_both) if models[i] == models[j]):
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


def made_with(cell: Cell) -> tuple[str, str]:
    """A cell's epochs and optimizer; old tables do not name Adam."""
    return cell.epochs, cell.settings.get("optimizer") or "adam"


def by_trainings(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by what both were trained with, such as ("16 epochs, muon", "8 epochs, adam")."""
    groups = {}
    for row in rows:
        shared = f"{row['num_epochs'] or '?'} epochs, {row['optimizer']}"
        separate = f"{row['own_epochs'] or '?'} epochs, {row['own_optimizer']}"
        groups.setdefault((shared, separate), []).append(row)
    return groups


def print_excess(rows: list[dict]) -> None:
    """Prints, for each pair of trainings, by how much the multi-rate cells are behind or ahead."""
    finite = [row for row in rows if math.isfinite(row["excess"])]
    for (shared, separate), of_both in by_trainings(finite).items():
        excess = [row["excess"] for row in of_both]
        text = f"multi-rate cells ({shared}) against separately trained ones ({separate}): "
        text += f"loss {np.mean(excess):+.2f} nats on average, {min(excess):+.2f} to {max(excess):+.2f}; "
        print("\n" + wrapped(f"{text}lower in {sum(e < 0 for e in excess)} of {len(excess)} cells"))


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
