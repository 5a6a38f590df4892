"""The slopes of the distortion: whether each cell is at the optimum for its betas, estimated from its neighbours."""

import math
from typing import NamedTuple

import numpy as np

from utils.plane.cells import BETAS, SHARED, Cell, Plane
from utils.plane.tables import to_markdown

FAR_OFF = 2.0  # report a slope that differs from its beta by more than this factor
FAR_EXCESS = 0.1  # report an excess loss of more than this fraction of the typical difference in D of neighbours
LEAST_RATE = 0.1  # nats by which the rates of neighbours must differ for a slope to be estimated
ALARM = 0.05 / 3  # chance of a false alarm of each of a cell's three tests: two slopes and the excess


class Slope(NamedTuple):
    """How far a cell is from its optimum, at which -dD/dR of each layer equals the layer's beta."""

    cell: Cell
    ratio_y: float  # -dD/dR(y|z) / beta_y; 1 at the optimum, NaN if it cannot be estimated
    ratio_z: float
    se_y: float  # standard errors of the ratios, from the residuals of the fit
    se_z: float
    freedom: int  # degrees of freedom of these errors
    excess: float  # nats by which the loss of the best cell is lower at this cell's betas; 0 if it is the best
    under_trained: bool  # whether the excess is large compared with the neighbours' differences in D, and with noise

    @property
    def far_off(self) -> bool:
        """Whether it is under-trained, or a slope differs from its beta by FAR_OFF, and by more than noise explains."""
        from scipy.stats import t

        pairs = [(r, se) for r, se in ((self.ratio_y, self.se_y), (self.ratio_z, self.se_z)) if math.isfinite(r)]
        return self.under_trained or any(
            not 1 / FAR_OFF <= r <= FAR_OFF and abs(r - 1) > t.ppf(1 - ALARM / 2, self.freedom) * se for r, se in pairs
        )


def log_mean(a: float, b: float) -> float:
    """The logarithmic mean (a - b) / ln(a / b): the mean of a slope that changes exponentially from a to b."""
    return a if math.isclose(a, b, rel_tol=1e-9) or min(a, b) <= 0 else (a - b) / math.log(a / b)


def slopes(plane: Plane) -> list[Slope]:
    """Estimates -dD/dR(y|z) / beta_y and -dD/dR(z) / beta_z of every cell from its neighbours in the grid.

    Least squares on the neighbours' differences, -(D_j - D_i) = s_z m_z (R_z,j - R_z,i) + s_y m_y (R_y,j - R_y,i),
    where m is the logarithmic mean of the two betas. This is exact at an optimum (s = 1) if D falls exponentially
    with the rates, as for Gaussians. Differences are taken within a seed, and all seeds are fitted together, so their
    scatter is in the standard errors. Under-trained neighbours are left out. If available, metrics of the training
    images are used, since the loss on these was minimised.
    """
    part = "train_" if all(f"train_{n}" in c.median for c in plane.cells for n in ("ll", "kl_y", "kl_z")) else ""
    keys = [tuple(cell.settings.get(name) for name in SHARED) for cell in plane.cells]  # names of kinds are cut off
    grids = [plane.where(np.array([key == k for k in keys])) for key in dict.fromkeys(keys)]
    return [slope for grid in grids for slope in _slopes_of(grid, part)]


def _slopes_of(plane: Plane, part: str) -> list[Slope]:
    """The slopes of the cells of one grid; the metrics' names begin with `part`."""
    cells, names = plane.cells, ("ll", "kl_y", "kl_z")
    ll, r_y, r_z = (np.array([plane.of_seed(part + n, s) for s in plane.seeds]) for n in names)  # (seeds, cells)
    d = -ll
    b_y, b_z = (np.array([c.median[n] for c in cells]) for n in BETAS)
    at_y, at_z = (np.unique(b, return_inverse=True)[1] for b in (b_y, b_z))
    near = (abs(at_y[:, None] - at_y) <= 1) & (abs(at_z[:, None] - at_z) <= 1) & np.isfinite(d).any(0)
    np.fill_diagonal(near, False)
    losses = d[:, None] + b_y[:, None] * r_y[:, None] + b_z[:, None] * r_z[:, None]  # [s, i, j]: j at i's betas
    worse = _mean(losses.diagonal(axis1=1, axis2=2)[:, :, None] - losses)  # means over the seeds that both have
    excess = np.fmax.reduce(worse, axis=1)
    between = abs(_mean(d[:, :, None] - d[:, None]))
    typical = np.array([np.nanmedian(between[i, near[i]]) if near[i].any() else math.inf for i in range(len(cells))])
    candidates = excess > FAR_EXCESS * typical

    def fitted(i: int, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, int]:
        well = near[i] & ~left_out  # under-trained neighbours count only if hardly any others are left
        js = np.r_[i, np.flatnonzero(well if well.sum() > 1 else near[i])]
        columns, identified = [], []
        for b, r in ((b_y, r_y), (b_z, r_z)):
            means = np.array([log_mean(b[i], b[j]) for j in js])
            columns.append(means * (r[:, js] - r[:, [i]]))
            identified.append(b[i] > 0 and bool((abs(r[:, js] - r[:, [i]]) >= LEAST_RATE).any()))
        return _least_squares(np.array(columns), -d[:, js], np.array(identified))

    noise = _noise([fitted(i, candidates) for i in np.flatnonzero(~candidates)])
    counts = np.array([len(c.runs) for c in cells])
    under_trained = candidates & (excess > noise * math.sqrt(2) / np.sqrt(counts))
    result = []
    for i, cell in enumerate(cells):
        ratios, errors, _, freedom = fitted(i, under_trained)
        result.append(
            Slope(cell, *ratios.tolist(), *errors.tolist(), freedom, excess[i].item(), bool(under_trained[i]))
        )
    return result


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of the values that are not NaN; NaN where there are none."""
    there = np.isfinite(values)
    return np.where(there.any(0), np.where(there, values, 0).sum(0) / np.maximum(there.sum(0), 1), math.nan)


def _noise(fits: list[tuple]) -> float:
    """The difference that noise makes between the losses of two runs at most, over sqrt(2), nats.

    From the residuals of all fits together. These overlap, so Student's quantile is that of one plane through all
    cells. The excess is the largest of many differences, so the chance of an alarm is shared among them.
    """
    from scipy.stats import t

    squares, freedom = (sum(fit[k] for fit in fits if fit[3] > 0) for k in (2, 3))
    if not freedom:
        return 0.0
    return math.sqrt(squares / freedom) * t.ppf(1 - ALARM / max(1, len(fits) - 1), max(1, len(fits) - 3))


def _least_squares(
    terms: np.ndarray, target: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Coefficients (k,) of `terms` (k, seeds, cells) selected by `known` (k,), standard errors, residual, freedom.

    `target` is (seeds, cells); each seed has an intercept of its own, so only differences within a seed count. The
    coefficients are NaN where not `known`, and all if the terms are nearly collinear or no degree of freedom is left.
    """
    result = np.full((2, len(known)), math.nan)
    target = target - terms[~known].sum(0)  # the small effect of the others, at a ratio of 1
    there = np.isfinite(target) & np.isfinite(terms).all(0)
    there &= there.sum(1, keepdims=True) > 1
    centred = [
        np.where(there, v - _mean(np.where(there, v, math.nan).T)[:, None], 0.0) for v in (*terms[known], target)
    ]
    *columns, y = (v[there] for v in centred)
    a = np.array(columns).T
    freedom = len(y) - int(there.any(1).sum()) - len(columns)
    if not columns or freedom < 1 or not np.linalg.norm(a, axis=0).all():
        return *result, 0.0, 0
    if np.linalg.cond(a / np.linalg.norm(a, axis=0)) >= 10:
        return *result, 0.0, 0
    coefficients = np.linalg.lstsq(a, y, rcond=None)[0]
    squares = float(((y - a @ coefficients) ** 2).sum())
    result[:, known] = coefficients, np.sqrt(squares / freedom * np.linalg.inv(a.T @ a).diagonal())
    return *result, squares, freedom


SLOPES = {
    "run": "run",
    "beta_y": "beta_y",
    "beta_z": "beta_z",
    "slope_y": "-dD/dR(y|z)",
    "se_y": "+- of y",
    "slope_z": "-dD/dR(z)",
    "se_z": "+- of z",
    "excess": "excess loss",
    "far_off": "far off",
}


def slope_rows(found: list[Slope]) -> list[dict]:
    """The rows of slopes.csv: the estimated slopes, which equal the betas at an optimum, and the excess loss."""
    rows = []
    for s in found:
        b_y, b_z = s.cell.median["beta_y"], s.cell.median["beta_z"]
        numbers = {"beta_y": b_y, "beta_z": b_z, "slope_y": s.ratio_y * b_y, "slope_z": s.ratio_z * b_z}
        numbers |= {"excess": s.excess, "se_y": s.se_y * b_y, "se_z": s.se_z * b_z}
        numbers = {name: v for name, v in numbers.items() if math.isfinite(v)}
        rows.append({"run": s.cell.runs[0], **numbers, "far_off": "yes" * s.far_off})
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
