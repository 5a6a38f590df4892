"""Planes and CSVs with known answers."""

import csv
import math
from pathlib import Path

import numpy as np

from utils.files import digest_of, write_json
from utils.plane.cells import Cell, Plane

AXIS = [0.1, 10**-0.5, 1.0, 10**0.5, 10.0]
HEADER = ["run", "status", "vae_type", "z_dims", "seed", "beta_y", "beta_z"]
HEADER += ["ll", "kl_y", "kl_z", "psnr", "is_mean", "lr_acc_mean"]


def plane_of(rows, *settings, **of_plane):
    """A Plane of rows of figures, one cell each, all of the same settings unless told otherwise."""
    cells = []
    for row, of_cell in zip(rows, settings or [{"vae_type": "HVAE"}] * len(rows), strict=True):
        row = {"rate": row["kl_y"] + row["kl_z"], **{k: v for k, v in row.items() if not isinstance(v, str)}}
        cells.append(Cell(of_cell, (f"{row['beta_y']}-{row['beta_z']}",), (row,)))
    return Plane(cells, **of_plane)


def grid(axis=AXIS, **of_cell):
    """The optima of a grid of betas, with further metrics, as functions of the row or values."""
    rows = [exponential(by, bz) for by in axis for bz in axis]
    return [row | {name: v(row) if callable(v) else v for name, v in of_cell.items()} for row in rows]


def exponential(beta_y, beta_z, slope=1.0):
    """The optimum of D = a exp(-R(y|z) / c) + b exp(-R(z) / d) + e, where -dD/dR = slope * beta."""
    a, b, c, d = 400.0, 100.0, 20.0, 5.0
    kl_y, kl_z = -c * math.log(slope * beta_y * c / a), -d * math.log(slope * beta_z * d / b)
    distortion = a * math.exp(-kl_y / c) + b * math.exp(-kl_z / d) + 7
    return {"beta_y": beta_y, "beta_z": beta_z, "kl_y": kl_y, "kl_z": kl_z, "ll": -distortion}


def rows_of(axis=AXIS, **more):
    """The rows of a CSV of such a grid, with PSNR, inception score and accuracy."""
    settings = {"status": "finished", "vae_type": "HVAE", "z_dims": 8, "seed": 2, "lr_acc_mean": 0.5}
    rows = grid(axis, psnr=lambda row: 20 + row["beta_z"], is_mean=lambda row: 2 + row["beta_y"])
    return [{"run": f"r-{row['beta_y']}-{row['beta_z']}", **settings, **row, **more} for row in rows]


def write_csv(rows, batch="b", header=()):
    """The table of a batch, with the HEADER and further columns."""
    path = Path("runs", batch, "eval_results.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*HEADER, *header], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_terms(folder, **terms):
    """A run folder with the terms of single images, as an evaluation leaves it."""
    folder.mkdir(parents=True)
    np.savez(folder / "per_image.npz", **{name: values.astype(np.float32) for name, values in terms.items()})
    write_json(folder / "metrics.json", {"files": {"per_image.npz": digest_of(folder / "per_image.npz")}})
