"""Cells of a multi-rate model against cells trained on their own at the same betas."""

import math
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.evaluation.per_image import per_image
from utils.evaluation.probes import standard_error
from utils.plane.cells import ASKED, BETAS, SAME_CELL, Cell, Plane

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
        return float(np.mean(_losses(self.unfolded)) - np.mean(_losses(self.own)))

    @property
    def se(self) -> float:
        """Its standard error, over the test images and over the seeds of either if it has several; NaN if unknown."""
        spreads = [np.std(_losses(c), ddof=1) / math.sqrt(len(c.runs)) for c in self[:2] if len(c.runs) > 1]
        known = [v for v in (*spreads, self.of_images) if math.isfinite(v)]
        return math.hypot(*known) if known else math.nan

    @property
    def trainings(self) -> tuple[str, str]:
        """Epochs and optimiser of the two, such as "16 epochs, adam"."""
        return tuple(f"{cell.settings.get('num_epochs') or '?'} epochs, {_optimizer(cell)}" for cell in self[:2])


def _optimizer(cell: Cell) -> str:
    return cell.settings.get("optimizer") or "adam"  # as all cells were trained whose tables do not say


def _losses(cell: Cell) -> list[float]:
    return [row.get("loss", math.nan) for row in cell.repeats]


def pairs(plane: Plane) -> list[Pair]:
    """Every unfolded cell with every own cell of the same model and betas, however long either was trained."""
    known, fixed = {}, np.isnan(plane.asked).all(1)
    for cell in plane.where(fixed & ~plane.unfolded).cells:
        known.setdefault(_key(cell), []).append(cell)
    unfolded = plane.where(fixed & plane.unfolded).cells
    return [Pair(cell, own, _of_images(plane, cell, own)) for cell in unfolded for own in known.get(_key(cell), ())]


def _of_images(plane: Plane, *cells: Cell) -> float:
    """The standard error over test images of the difference of two cells' losses, means over seeds; NaN if unknown."""
    losses = []
    try:
        for cell in cells:
            found = [per_image(plane.folder / run) for run in cell.runs]
            rates = [cell.median["beta_y"] * of["kl_y"] + cell.median["beta_z"] * of["kl_z"] - of["ll"] for of in found]
            losses.append(np.mean(rates, axis=0, dtype=np.float64))
        return standard_error(losses[0] - losses[1])
    except (UserError, KeyError, ValueError, TypeError):  # TypeError: no folder
        return math.nan


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
            row |= {f"{whose}loss": float(np.mean(_losses(cell))), f"{whose}n": len(cell.runs)}
        rows.append({name: row[name] for name in EXCESS})
    return rows


def print_excess(found: list[Pair]) -> None:
    """Prints, for each pair of trainings, by how much the multi-rate cells are behind or ahead."""
    for trainings in dict.fromkeys(pair.trainings for pair in found):
        these = np.array([pair.excess for pair in found if pair.trainings == trainings])
        these = these[np.isfinite(these)]
        if len(these):
            print(
                f"\nmulti-rate cells ({trainings[0]}) against their own trainings ({trainings[1]}): loss "
                f"{these.mean():+.2f} nats on average, {these.min():+.2f} to {these.max():+.2f}; lower in "
                f"{(these < 0).sum()} of {len(these)} cells"
            )
