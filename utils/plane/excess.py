"""Cells of a multi-rate model against cells trained on their own at the same betas."""

import math
from itertools import product

import numpy as np

from utils.config import fields_of
from utils.evaluation.probes import standard_error
from utils.plane.cells import BETAS, Cell, Plane
from utils.plane.gains import terms_of

EXCESS = {"num_epochs": "epochs, multi-rate", "own_epochs": "epochs, own"}  # columns of excess.csv and their headings
EXCESS |= {"optimizer": "optimizer, multi-rate", "own_optimizer": "own", "beta_y": "beta_y", "beta_z": "beta_z"}
EXCESS |= {"loss": "loss, multi-rate", "own_loss": "own", "excess": "excess", "se": "+-"}
for _name, _label in (("kl_y", "R(y|z)"), ("kl_z", "R(z)"), ("psnr", "PSNR")):
    EXCESS |= {_name: f"{_label}, multi-rate", f"own_{_name}": f"{_label}, own"}
EXCESS |= {"n": "seeds", "own_n": "seeds, own"}


def excess_rows(plane: Plane) -> list[dict[str, str | float]]:
    """The rows of excess.csv: every unfolded cell with every own cell of the same model, data and betas.

    `excess` is by how many nats the loss of the unfolded cell is larger, `se` its standard error over seeds and images.
    """
    given = np.isnan(plane.targets).all(1)
    unfolded, own = ([(_model(c), c) for c in plane.where(given & m).cells] for m in (plane.unfolded, ~plane.unfolded))
    return [_row(plane, (a, b)) for (model, a), (of_other, b) in product(unfolded, own) if model == of_other]


def _model(cell: Cell) -> list:
    settings = [cell.settings.get(name) for name in fields_of("model", "data")]
    return settings + [f"{cell.median[name]:.6g}" for name in BETAS]


def _row(plane: Plane, pair: tuple[Cell, Cell]) -> dict[str, str | float]:
    losses = [np.array([row.get("loss", math.nan) for row in cell.repeats]) for cell in pair]
    errors = [standard_error(of_seeds) for of_seeds in losses]
    a, b = terms_of(Plane([*pair], folder=plane.folder), ["loss"])["loss"]
    if a is not None and b is not None and a.shape[1] == b.shape[1]:
        errors.append(standard_error(a.mean(0) - b.mean(0)))  # over the test images, which they share
    errors = [se for se in errors if math.isfinite(se)]
    row = {name: pair[0].median[name] for name in BETAS}
    row |= {"excess": float(losses[0].mean() - losses[1].mean()), "se": math.hypot(*errors) if errors else math.nan}
    for whose, epochs, cell, loss in zip(("", "own_"), ("num_epochs", "own_epochs"), pair, losses, strict=True):
        row[epochs] = cell.settings.get("num_epochs") or ""
        row[f"{whose}optimizer"] = cell.settings.get("optimizer") or "adam"  # of tables that do not say
        row |= {whose + name: cell.median.get(name) for name in ("kl_y", "kl_z", "psnr")}
        row |= {f"{whose}loss": float(loss.mean()), f"{whose}n": len(cell.runs)}
    return {name: row[name] for name in EXCESS}


def by_trainings(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The rows by what multi-rate model and own cells were trained with, such as ("16 epochs, muon", ...)."""
    groups = {}
    for row in rows:
        shared = f"{row['num_epochs'] or '?'} epochs, {row['optimizer']}"
        groups.setdefault((shared, f"{row['own_epochs'] or '?'} epochs, {row['own_optimizer']}"), []).append(row)
    return groups


def print_excess(rows: list[dict]) -> None:
    """Prints, for each pair of trainings, by how much the multi-rate cells are behind or ahead."""
    for (shared, own), of_both in by_trainings([row for row in rows if math.isfinite(row["excess"])]).items():
        excess = [row["excess"] for row in of_both]
        print(
            f"\nmulti-rate cells ({shared}) against their own trainings ({own}): loss {np.mean(excess):+.2f} nats on "
            f"average, {min(excess):+.2f} to {max(excess):+.2f}; lower in {sum(e < 0 for e in excess)} of "
            f"{len(excess)} cells"
        )
