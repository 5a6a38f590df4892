"""The slopes of the distortion: whether each cell is at the optimum for its betas, estimated from its neighbours."""

import math
from typing import NamedTuple

import numpy as np

from utils.plane.cells import BETAS, SHARED, Cell, Plane
from utils.plane.tables import to_markdown

FAR_OFF = 2.0  # report a slope that differs from its beta by more than this factor
FAR_EXCESS = 0.1  # report an excess loss of more than this fraction of the typical difference in D of neighbours
LEAST_RATE = 0.1  # nats by which the rates of neighbours must differ for a slope to be estimated


class Slope(NamedTuple):
    """How far a cell is from its optimum, at which -dD/dR of each layer equals the layer's beta."""

    cell: Cell
    ratio_y: float  # -dD/dR(y|z) / beta_y; 1 at the optimum, NaN if it cannot be estimated
    ratio_z: float
    se_y: float  # standard errors of the ratios, from the residuals of the fit
    se_z: float
    excess: float  # nats by which the loss of the best cell is lower at this cell's betas; 0 if it is the best
    under_trained: bool  # whether the excess is large compared with the neighbours' differences in D

    @property
    def far_off(self) -> bool:
        """Whether it is under-trained, or a slope differs from its beta by FAR_OFF and by two standard errors."""
        pairs = (self.ratio_y, self.se_y), (self.ratio_z, self.se_z)
        return self.under_trained or any(
            not 1 / FAR_OFF <= r <= FAR_OFF and abs(r - 1) > 2 * se for r, se in pairs if math.isfinite(r)
        )


def log_mean(a: float, b: float) -> float:
    """The logarithmic mean (a - b) / ln(a / b): the mean of a slope that changes exponentially from a to b."""
    return a if math.isclose(a, b, rel_tol=1e-9) or min(a, b) <= 0 else (a - b) / math.log(a / b)


def slopes(plane: Plane) -> list[Slope]:
    """Estimates -dD/dR(y|z) / beta_y and -dD/dR(z) / beta_z of every cell from its neighbours in the grid.

    Least squares on the neighbours' differences, -(D_j - D_i) = s_z m_z (R_z,j - R_z,i) + s_y m_y (R_y,j - R_y,i),
    where m is the logarithmic mean of the two betas. This is exact at an optimum (s = 1) if D falls exponentially
    with the rates, as for Gaussians. Under-trained neighbours are left out. If available, metrics of the training
    images are used, since the loss on these was minimised.
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
        losses = d + b_y[:, None] * r_y + b_z[:, None] * r_z  # [i, j]: cell j at the betas of cell i
        excess = losses.diagonal() - np.fmin.reduce(losses, axis=1)
        typical = [np.median(abs(d[near[i]] - d[i])) if near[i].any() else math.inf for i in range(len(cells))]
        under_trained = excess > FAR_EXCESS * np.array(typical)
        for i, cell in enumerate(cells):
            well = near[i] & ~under_trained  # under-trained neighbours count only if hardly any others are left
            js = np.flatnonzero(well if well.sum() > 1 else near[i])
            identified, columns = [], []
            for b, r in ((b_y, r_y), (b_z, r_z)):
                columns.append([log_mean(b[i], b[j]) * (r[j] - r[i]) for j in js])
                identified.append(len(js) > 0 and b[i] > 0 and abs(r[js] - r[i]).max() >= LEAST_RATE)
            ratios, errors = _least_squares(np.array(columns).T, d[i] - d[js], np.array(identified))
            result.append(Slope(cell, *ratios, *errors, float(excess[i]), bool(under_trained[i])))
    return result


def _least_squares(terms: np.ndarray, target: np.ndarray, identified: np.ndarray) -> tuple[list[float], list[float]]:
    """Coefficients of the columns of `terms` (n, k) selected by `identified` (k,), and their standard errors.

    NaN for the other columns; NaN for all if the columns are nearly collinear or no degree of freedom is left.
    """
    result = np.full((2, len(identified)), math.nan)
    a, target = terms[:, identified], target - terms[:, ~identified].sum(1)  # the small effect of the others, at s = 1
    n, k = a.shape
    if n > k > 0 and np.linalg.cond(a / np.linalg.norm(a, axis=0)) < 10:
        coefficients = np.linalg.lstsq(a, target, rcond=None)[0]
        scatter = ((target - a @ coefficients) ** 2).sum() / (n - k)
        result[:, identified] = coefficients, np.sqrt(scatter * np.linalg.inv(a.T @ a).diagonal())
    return result[0].tolist(), result[1].tolist()


SLOPES = {
    "run": "run",
    "beta_y": "beta_y",
    "beta_z": "beta_z",
    "slope_y": "-dD/dR(y|z)",
    "slope_z": "-dD/dR(z)",
    "excess": "excess loss",
    "far_off": "far off",
}


def slope_rows(found: list[Slope]) -> list[dict]:
    """The rows of slopes.csv: the estimated slopes, which equal the betas at an optimum, and the excess loss."""
    rows = []
    for s in found:
        b_y, b_z = s.cell.mean["beta_y"], s.cell.mean["beta_z"]
        estimates = {"slope_y": s.ratio_y * b_y, "slope_z": s.ratio_z * b_z, "excess": s.excess}
        row = {"run": s.cell.runs[0], "beta_y": b_y, "beta_z": b_z}
        rows.append(row | {k: v for k, v in estimates.items() if math.isfinite(v)} | {"far_off": "yes" * s.far_off})
    return rows


def print_far_off(rows: list[dict]) -> None:
    """Prints the ten cells with the largest excess loss of those that are far from their optimum, if any."""
    far_off = sorted((row for row in rows if row["far_off"]), key=lambda row: -row.get("excess", 0))
    if far_off:
        print(
            f"\n{len(far_off)} of {len(rows)} cells are far from their optimum, probably under-trained: a slope is off"
        )
        print(f"its beta by more than a factor of {FAR_OFF:g}, or another cell has a lower loss at the cell's betas:")
        print(to_markdown(far_off[:10], {k: v for k, v in SLOPES.items() if k not in ("run", "far_off")}), end="")
