"""The rate plane: what the runs of a batch achieved at which R(z) and R(y|z), and what follows from it.

Reads eval_results.csv; nothing is drawn here. Rates, D and mutual information are in nats per image.
"""

import csv
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.config import Config
from utils.errors import UserError

BETAS = ("beta_y", "beta_z")
SETTINGS = [f.name for f in dataclasses.fields(Config)]
SAME_CELL = [n for n in SETTINGS if n not in ("seed", "run_name", "run_batch_name")]  # runs alike in these are repeats
SHARED = [n for n in SAME_CELL if n not in BETAS]  # by the cells of one grid
FAR_OFF = 2.0  # a slope this many times its beta, or its inverse, is reported
FAR_EXCESS = 0.1  # of what D typically differs by between neighbours; more excess loss than that is reported
LEAST_RATE = 0.1  # nats by which neighbours' rates must differ to tell a slope
BITS = 1 / math.log(2)  # per nat


class Metric(NamedTuple):
    """What a column measures, in which unit, and whether more (+1) or less (-1) of it is better (0: neither)."""

    label: str
    unit: str = ""
    better: int = 1


METRICS = {
    "ll": Metric("log-likelihood", "nats"),
    "loss": Metric("loss at the cell's own betas", "nats", 0),
    "psnr": Metric("PSNR", "dB"),
    "D": Metric("distortion D", "nats", -1),
    "nelbo": Metric("loss at betas 1, D + R", "nats", -1),
    "ll_iw": Metric("importance-weighted ll", "nats"),
    "bpd": Metric("bits per dimension", "bits", -1),
    "is_mean": Metric("inception score"),
    "is_div": Metric("diversity of samples"),
    "is_sharp": Metric("sharpness of samples"),
    "fid": Metric("FID", better=-1),
    "fid_classifier": Metric("Frechet distance (classifier)", better=-1),
    "recons_acc": Metric("accuracy on reconstructions"),
    "mi_q_mc": Metric("I(z; label)", "nats"),
    "mi_q": Metric("I(z; label)", "nats"),
    "mi_p": Metric("I(z; generated label)", "nats"),
    "mi_q_mc_y": Metric("I(y; label)", "nats"),
    "mi_q_mc_se": Metric("standard error of I(z; label)", "nats", 0),
    "mi_q_mc_y_se": Metric("standard error of I(y; label)", "nats", 0),
    "mi_q_mc_null": Metric("I(z; shuffled label)", "nats", 0),
    "mi_q_mc_y_null": Metric("I(y; shuffled label)", "nats", 0),
    "recons_pred_entropy": Metric("entropy of the prediction", "nats", 0),
    "mi_lr_lb": Metric("lower bound on I(z; label)", "nats"),
    "acc_bound": Metric("bound on accuracy from z"),
    "lr_acc_mean": Metric("logistic regression on z"),
    "svm_rbf_acc": Metric("SVM (rbf) on z"),
    "svm_linear_acc": Metric("SVM (linear) on z"),
    "kNN_acc": Metric("5-NN on z"),
    "lr_ece": Metric("calibration error on z", better=-1),
    "lr_nll": Metric("log loss on z", "nats", -1),
    "clsfr_ece": Metric("classifier's calibration error", better=-1),
    "active_z": Metric("active units of z", better=0),
    "active_y": Metric("active units of y", better=0),
    "kl_z": Metric("R(z)", "nats", 0),
    "kl_y": Metric("R(y|z)", "nats", 0),
    "rate": Metric("R = R(z) + R(y|z)", "nats", 0),
}
PROBES = ("lr_acc_mean", "svm_rbf_acc", "svm_linear_acc", "kNN_acc")
TASKS = {
    "reconstruction": ("psnr",),
    "representation, from z": PROBES,
    "representation, from y": tuple(f"{name}_y" for name in PROBES),
    "generation": ("is_mean", "fid", "fid_classifier"),
    "likelihood": ("nelbo",),
}


def metric(name: str) -> Metric:
    """What is known of a column; the variants `_y` and `_standardized` share their metric's entry."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("train_"):
        label, unit, better = metric(name.removeprefix("train_"))
        return Metric(f"{label}, training images", unit, better)
    plain = name.removesuffix("_standardized")
    base = plain.removesuffix("_y")
    if base not in METRICS:
        return Metric(name.replace("_", " "), better=0)
    label, unit, better = METRICS[base]
    if base != plain:
        label = label.replace(" z", " y").replace("(z", "(y")
    return Metric(label + ", standardised" * (plain != name), unit, better)


@dataclass(frozen=True)
class Cell:
    """A point of the grid: its settings, and mean and standard deviation of every figure over its repeats."""

    settings: dict[str, str]
    runs: tuple[str, ...]
    mean: dict[str, float]
    std: dict[str, float]  # only of figures that several repeats have


@dataclass
class Plane:
    """The cells of a batch that have both rates, and notes on what is missing."""

    cells: list[Cell]
    notes: list[str] = field(default_factory=list)

    def values(self, name: str) -> np.ndarray:
        """A figure of every cell, (N,); NaN where it is missing."""
        return np.array([cell.mean.get(name, math.nan) for cell in self.cells])

    def stds(self, name: str) -> np.ndarray:
        """Its standard deviation over a cell's repeats, (N,); NaN where there are none."""
        return np.array([cell.std.get(name, math.nan) for cell in self.cells])

    @property
    def diagonal(self) -> np.ndarray:
        """Which cells are ordinary beta-VAEs, beta_y = beta_z; (N,)."""
        return np.isclose(self.values("beta_y"), self.values("beta_z"), rtol=1e-6)

    @property
    def differing(self) -> list[str]:
        """The settings, other than the betas, that not all cells share."""
        return [n for n in SHARED if len({c.settings.get(n) for c in self.cells}) > 1]

    @property
    def names(self) -> list[str]:
        """The figures that at least one cell has."""
        known = {name for cell in self.cells for name in cell.mean if name not in SETTINGS}
        return [*(n for n in METRICS if n in known), *sorted(known - set(METRICS))]

    def best(self, name: str, among: np.ndarray | None = None) -> int | None:
        """Index of the best cell; of equally good ones, that of the lowest total rate. None if no cell has it."""
        values, rate = metric(name).better * self.values(name), self.values("rate")
        there = np.isfinite(values) & (True if among is None else among)
        return max(np.flatnonzero(there), key=lambda i: (values[i], -rate[i])) if there.any() else None


def number(text: str | None) -> float:
    """A cell of a CSV as a number; NaN if it is none, not finite or absurd."""
    try:
        value = float(text or "nan")
    except (ValueError, TypeError):
        return math.nan
    return value if abs(value) < 1e30 else math.nan  # beyond, nothing of ours lies and nothing can be drawn


def read_plane(path: Path) -> Plane:
    """The rate plane of a batch from its eval_results.csv. Raises UserError if there is nothing to draw."""
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read ({e}); eval_beta_grid.py writes it") from e
    plane, groups, without = Plane([]), {}, []
    for row in rows:
        if any(math.isnan(number(row.get(name))) for name in (*BETAS, "kl_y", "kl_z")):
            without.append(row)
        else:
            groups.setdefault(tuple(row.get(name) for name in SAME_CELL), []).append(row)
    if not groups:
        raise UserError(f"{path}: no run has rates yet; run eval_beta_grid.py, step 1, first")
    plane.cells = [merge(repeats) for repeats in groups.values()]
    for status in sorted({row.get("status") or "without status" for row in without}):
        runs = [row.get("run") or "?" for row in without if (row.get("status") or "without status") == status]
        listed = ", ".join(runs[:3]) + ", ..." * (len(runs) > 3)
        plane.notes.append(f"{len(runs)} run(s) left out, without rates ({status}): {listed}")
    repeated = sum(len(cell.runs) > 1 for cell in plane.cells)
    if repeated:
        plane.notes.append(f"{repeated} cell(s) were trained more than once: means, with standard deviations")
    if plane.differing:
        listed = "; ".join(
            f"{n} {', '.join(sorted({str(c.settings.get(n)) for c in plane.cells}))}" for n in plane.differing
        )
        plane.notes.append(
            f"the batch mixes settings, all drawn together, means in the heat maps, the first in the sheets: {listed}"
        )
    for name in plane.names:
        missing = int(np.isnan(plane.values(name)).sum())
        if missing and name in METRICS:
            plane.notes.append(f"{name} is missing in {missing} of {len(plane.cells)} cells")
    return plane


def merge(repeats: list[dict[str, str]]) -> Cell:
    """One cell of the rows of its repeats."""
    figures = [{k: number(v) for k, v in row.items() if k and (k not in SETTINGS or k in BETAS)} for row in repeats]
    for row in figures:
        row["rate"] = row["kl_y"] + row["kl_z"]
        row["nelbo"] = row["rate"] - row.get("ll", math.nan)
    mean, std = {}, {}
    for name in figures[0]:
        values = np.array([row[name] for row in figures if not math.isnan(row[name])])
        if len(values):
            mean[name] = float(values.mean())
        if len(values) > 1:
            std[name] = float(values.std(ddof=1))
    runs = tuple(row.get("run") or "?" for row in repeats)
    return Cell({k: v for k, v in repeats[0].items() if k in SETTINGS}, runs, mean, std)


def frontier(rate: np.ndarray, value: np.ndarray, better: int) -> tuple[np.ndarray, np.ndarray]:
    """The better side of the convex hull of the points: its corners, by rising rate.

    What lies on it can be had, on average, by using two of the models in turns (time sharing).
    """
    corners = []
    for x, v in sorted(zip(rate.tolist(), (better * value).tolist(), strict=True)):
        while corners and corners[-1][0] == x:  # of one rate only the best counts, which comes last
            corners.pop()
        while len(corners) > 1:
            (x0, v0), (x1, v1) = corners[-2:]
            if (v1 - v0) * (x - x0) > (v - v0) * (x1 - x0):
                break
            corners.pop()
        corners.append((x, v))
    xs, vs = np.array(corners).reshape(-1, 2).T
    return xs, better * vs


class Slope(NamedTuple):
    """How far a cell is from its optimum, where -dD/dR of a layer equals the layer's beta."""

    cell: Cell
    ratio_y: float  # -dD/dR(y|z) over beta_y; 1 at the optimum, NaN where the neighbours do not tell
    ratio_z: float
    se_y: float  # their standard errors, from how far the neighbours' differences scatter
    se_z: float
    excess: float  # nats by which another cell does better at this cell's own betas; 0 if none does
    under_trained: bool  # whether that is much, compared with the neighbours' differences in D

    @property
    def far_off(self) -> bool:
        """Whether it is under-trained, or a slope is off its beta by FAR_OFF and by two standard errors."""
        pairs = (self.ratio_y, self.se_y), (self.ratio_z, self.se_z)
        return self.under_trained or any(
            not 1 / FAR_OFF <= r <= FAR_OFF and abs(r - 1) > 2 * se for r, se in pairs if math.isfinite(r)
        )


def log_mean(a: float, b: float) -> float:
    """The logarithmic mean (a - b) / ln(a / b): the mean slope where the slope changes exponentially."""
    return a if math.isclose(a, b, rel_tol=1e-9) or min(a, b) <= 0 else (a - b) / math.log(a / b)


def slopes(plane: Plane) -> list[Slope]:
    """Estimates of -dD/dR(y|z) / beta_y and -dD/dR(z) / beta_z of every cell, from its neighbours in the grid.

    Least squares of the neighbours' differences, -(D_j - D_i) = s_z m_z (R_z,j - R_z,i) + s_y m_y (R_y,j - R_y,i),
    where m is the logarithmic mean of the two betas: exact at an optimum (s = 1) where D falls exponentially with
    the rates, as it does for Gaussians. Neighbours are left out that are under-trained: where another cell does better
    at their own betas. Figures of the training images, if there are any: they are what was minimised.
    """
    part = "train_" if all(f"train_{n}" in c.mean for c in plane.cells for n in ("ll", "kl_y", "kl_z")) else ""
    groups = {}
    for cell in plane.cells:
        groups.setdefault(tuple(cell.settings.get(n) for n in SHARED), []).append(cell)
    result = []
    for cells in groups.values():
        d, r_y, r_z = (
            np.array([c.mean.get(part + n, math.nan) for c in cells]) * s
            for n, s in (("ll", -1), ("kl_y", 1), ("kl_z", 1))
        )
        b_y, b_z = (np.array([c.mean[n] for c in cells]) for n in BETAS)
        at_y, at_z = (np.unique(b, return_inverse=True)[1] for b in (b_y, b_z))
        near = (abs(at_y[:, None] - at_y) <= 1) & (abs(at_z[:, None] - at_z) <= 1) & np.isfinite(d)
        np.fill_diagonal(near, False)
        losses = d + b_y[:, None] * r_y + b_z[:, None] * r_z  # [i, j]: of cell j at the betas of cell i
        excess = losses.diagonal() - np.fmin.reduce(losses, axis=1)
        typical = [np.median(abs(d[near[i]] - d[i])) if near[i].any() else math.inf for i in range(len(cells))]
        under_trained = excess > FAR_EXCESS * np.array(typical)
        for i, cell in enumerate(cells):
            well = near[i] & ~under_trained  # the others would spoil the estimate; unless there are hardly any but them
            js = np.flatnonzero(well if well.sum() > 1 else near[i])
            told, columns = [], []
            for b, r in ((b_y, r_y), (b_z, r_z)):
                columns.append([log_mean(b[i], b[j]) * (r[j] - r[i]) for j in js])
                told.append(len(js) > 0 and b[i] > 0 and abs(r[js] - r[i]).max() >= LEAST_RATE)
            ratios, errors = _least_squares(np.array(columns).T, d[i] - d[js], np.array(told))
            result.append(Slope(cell, *ratios, *errors, float(excess[i]), bool(under_trained[i])))
    return result


def _least_squares(terms: np.ndarray, target: np.ndarray, told: np.ndarray) -> tuple[list[float], list[float]]:
    """Coefficients of the columns that are told, and their standard errors; NaN for the others.

    NaN for all where columns are nearly parallel, or no row is left to tell the scatter from.
    """
    result = np.full((2, len(told)), math.nan)
    a, target = terms[:, told], target - terms[:, ~told].sum(1)  # what little the others do, taken at its optimum
    n, k = a.shape
    if n > k > 0 and np.linalg.cond(a / np.linalg.norm(a, axis=0)) < 10:
        coefficients = np.linalg.lstsq(a, target, rcond=None)[0]
        scatter = ((target - a @ coefficients) ** 2).sum() / (n - k)
        result[:, told] = coefficients, np.sqrt(scatter * np.linalg.inv(a.T @ a).diagonal())
    return result[0].tolist(), result[1].tolist()


LIMITS = {"rate": "R(z) + R(y|z)", "kl_z": "R(z)", "kl_y": "R(y|z)"}


def advice(plane: Plane, budget: dict[str, float] | None = None) -> list[dict[str, str | float]]:
    """For each task the best cell, the best ordinary beta-VAE, and the gain; a row for each metric there is.

    `budget` limits rates, in bits: {"rate": 20.0, "kl_z": 5.0}. Only cells within it count.
    """
    within, limits = np.ones(len(plane.cells), bool), []
    for name, bits in (budget or {}).items():
        within &= plane.values(name) * BITS <= bits
        limits.append(f"{LIMITS[name]} <= {bits:g} bits")
    rows = []
    for task, names in TASKS.items():
        for name in names:
            best, ordinary = plane.best(name, within), plane.best(name, within & plane.diagonal)
            if best is None:
                continue
            cell, row = plane.cells[best], {"task": task, "budget": ", ".join(limits), "metric": name}
            row |= {"value": cell.mean[name], "std": cell.std.get(name)}
            row |= {column: cell.mean[column] for column in ("beta_y", "beta_z", "kl_y", "kl_z", "rate")}
            row |= {name: cell.settings.get(name) for name in plane.differing}
            if ordinary is not None:
                there = plane.cells[ordinary].mean
                row |= {"diagonal_value": there[name], "diagonal_beta": there["beta_y"], "diagonal_rate": there["rate"]}
                row["gain"] = metric(name).better * (cell.mean[name] - there[name]) + 0.0  # never -0
            rows.append(row)
    return rows
