"""Cells of a multi-rate model against cells trained on their own at the same betas."""

import math
from typing import NamedTuple

import numpy as np

from utils.evaluation.probes import standard_error
from utils.plane.cells import ASKED, BETAS, SAME_CELL, Cell, Plane
from utils.plane.paired import terms_of

OF_TRAINING = ("num_epochs", "batch_size", "learning_rate", "optimizer", "warmup_epochs", "no_warmup")
OF_TRAINING += ("lr_schedule", "multi_rate")
MODEL = [n for n in SAME_CELL if n not in (*OF_TRAINING, *BETAS, *ASKED.values(), "init_from")]
EXCESS = {
    "num_epochs": "epochs, multi-rate",
    "own_epochs": "epochs, own",
    "optimizer": "optimizer, multi-rate",
    "own_optimizer": "own",
    "beta_y": "beta_y",
    "beta_z": "beta_z",
    "loss": "loss, multi-rate",
    "own_loss": "own",
    "excess": "excess",
    "se": "+-",
    **{f"{whose}{n}": f"{label}, {who}" for n, label in (("kl_y", "R(y|z)"), ("kl_z", "R(z)"), ("psnr", "PSNR"))
       for whose, who in (("", "multi-rate"), ("own_", "own"))},
    "n": "seeds",
    "own_n": "seeds, own",
}  # fmt: skip


class Pair(NamedTuple):
    """A cell of a multi-rate model, and one that was trained on its own at the same betas."""

    unfolded: Cell
    own: Cell
    of_images: float = math.nan  # standard error of the difference over the test images, which they share

    @property
    def excess(self) -> float:
        """Nats by which the loss of the unfolded cell is larger; means over seeds, test images."""
        return float(_losses(self.unfolded).mean() - _losses(self.own).mean())

    @property
    def se(self) -> float:
        """Its standard error, over the test images and over the seeds of either if it has several; NaN if unknown."""
        errors = [standard_error(_losses(cell)) for cell in self[:2]] + [self.of_images]
        errors = [se for se in errors if math.isfinite(se)]
        return math.hypot(*errors) if errors else math.nan

    @property
    def trainings(self) -> tuple[str, str]:
        """Epochs and optimiser of the two, such as "16 epochs, adam"."""
        return tuple(f"{cell.settings.get('num_epochs') or '?'} epochs, {_optimizer(cell)}" for cell in self[:2])


def _optimizer(cell: Cell) -> str:
    return cell.settings.get("optimizer") or "adam"  # as all cells were trained whose tables do not say


def _losses(cell: Cell) -> np.ndarray:
    return np.array([row.get("loss", math.nan) for row in cell.repeats])


def pairs(plane: Plane) -> list[Pair]:
    """Every unfolded cell with every own cell of the same model and betas, however long either was trained."""
    known, fixed = {}, np.isnan(plane.asked).all(1)
    for cell in plane.where(fixed & ~plane.unfolded).cells:
        known.setdefault(_key(cell), []).append(cell)
    unfolded = plane.where(fixed & plane.unfolded).cells
    return [Pair(cell, own, _of_images(plane, cell, own)) for cell in unfolded for own in known.get(_key(cell), ())]


def _of_images(plane: Plane, *cells: Cell) -> float:
    """The standard error over test images of the difference of two cells' losses, means over seeds; NaN if unknown."""
    a, b = terms_of(Plane(cells, folder=plane.folder), ["loss"])["loss"]
    return math.nan if a is None or b is None or a.shape[1] != b.shape[1] else standard_error(a.mean(0) - b.mean(0))


def _key(cell: Cell) -> tuple:
    return (*(cell.settings.get(n) for n in MODEL), *(float(f"{cell.median[n]:.6g}") for n in BETAS))


def excess_rows(found: list[Pair]) -> list[dict[str, str | float]]:
    """The rows of excess.csv."""
    rows = []
    for pair in found:
        row = {n: pair.unfolded.median[n] for n in BETAS} | {"excess": pair.excess, "se": pair.se}
        for whose, epochs, cell in (("", "num_epochs", pair.unfolded), ("own_", "own_epochs", pair.own)):
            row |= {epochs: cell.settings.get("num_epochs") or "", f"{whose}optimizer": _optimizer(cell)}
            row |= {whose + n: cell.median.get(n) for n in ("kl_y", "kl_z", "psnr")}
            row |= {f"{whose}loss": float(_losses(cell).mean()), f"{whose}n": len(cell.runs)}
        rows.append({name: row[name] for name in EXCESS})
    return rows


def print_excess(found: list[Pair]) -> None:
    """Prints, for each pair of trainings, by how much the multi-rate cells are behind or ahead."""
    by_trainings = {}
    for pair in found:
        if math.isfinite(pair.excess):
            by_trainings.setdefault(pair.trainings, []).append(pair.excess)
    for (shared, own), excess in by_trainings.items():
        print(
            f"\nmulti-rate cells ({shared}) against their own trainings ({own}): loss {np.mean(excess):+.2f} nats on "
            f"average, {min(excess):+.2f} to {max(excess):+.2f}; lower in {sum(e < 0 for e in excess)} of "
            f"{len(excess)} cells"
        )
