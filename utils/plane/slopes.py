"""The slopes of the distortion: whether cells can be at the optimum for their betas."""

import math

import numpy as np
from scipy.stats import t as student

from utils.cli import wrapped
from utils.plane.cells import BETAS, Plane
from utils.plane.tables import Table

FAR_OFF = 2.0  # report a slope that differs from its beta by more than this factor
FAR_EXCESS = 0.1  # and an excess of more than this share of the neighbours' difference in D
LEAST_RATE = 0.1  # nats by which the rates of neighbours must differ; with less, a layer is given up
ALARM = 0.05 / 3  # chance of a false alarm of each of a cell's tests: two slopes, the excess
SLOPES = {  # columns and headings of slopes.csv
    "run": "run", "beta_y": "beta_y", "beta_z": "beta_z", "slope_y": "-dD/dR(y|z)", "se_y": "+- of y",
    "slope_z": "-dD/dR(z)", "se_z": "+- of z", "excess": "excess loss", "far_off": "far off",
    "left": "nats left", "left_se": "+-", "above_bound": "above the bound",
}  # fmt: skip


def slopes(plane: Plane) -> list[dict]:
    """Estimates of -dD/dR(y|z) and -dD/dR(z) of every cell from its neighbours: its betas, if it is at an optimum.

    That is necessary, not sufficient: cells that are all equally far from their optima have these slopes as well.
    Least squares on the differences of neighbours, -(D_j - D_i) = s_z m_z (R_z,j - R_z,i) + s_y m_y (R_y,j - R_y,i),
    where m is the logarithmic mean of the two betas: exact at an optimum (s = 1) if D falls exponentially with the
    rates, as for Gaussians. Differences are taken within a seed, so the scatter of seeds is in the standard errors.
    `excess` is by how many nats the best cell's loss is lower at a cell's betas; under-trained neighbours, whose excess
    is large, are left out. Metrics of the training images are used where all cells have them.
    """
    names = [f"train_{name}" for name in ("ll", "kl_y", "kl_z")]
    if not all(name in cell.median for cell in plane.cells for name in names):
        names = ["ll", "kl_y", "kl_z"]
    return [row for grid in plane.grids.values() for row in _slopes_of(grid, names)]


def _slopes_of(plane: Plane, names: list[str]) -> list[dict]:
    # (seeds, cells) each
    ll, *rates = (np.array([plane.of_seed(name, s) for s in plane.seeds]) for name in names)
    betas, d = plane.betas, -ll
    near = np.isfinite(d).any(0)
    for b in betas:
        at = np.unique(b, return_inverse=True)[1]
        near = near & (abs(at[:, None] - at) <= 1)
    np.fill_diagonal(near, False)
    # where a layer is given up between two cells, its slope is not a mean of their betas
    used = np.array([[cell.median[rate] >= LEAST_RATE for cell in plane.cells] for rate in ("kl_y", "kl_z")])
    alike = near & (used[:, :, None] == used[:, None]).all(0)
    of_y, of_z = (b[:, None] * r[:, None] for b, r in zip(betas, rates, strict=True))
    losses = d[:, None] + of_y + of_z  # (seeds, i, j): of cell j at the betas of i
    worse = _mean(losses.diagonal(axis1=1, axis2=2)[:, :, None] - losses)  # over shared seeds
    excess = np.fmax.reduce(worse, axis=1)
    between = zip(abs(_mean(d[:, :, None] - d[:, None])), near, strict=True)
    typical = np.array([np.nanmedian(row[js]) if js.any() else math.inf for row, js in between])
    candidates = excess > FAR_EXCESS * typical

    def fit(i: int, outliers: np.ndarray) -> tuple:
        well = alike[i] & ~outliers  # outliers count only if hardly any others are left
        js = np.r_[i, np.flatnonzero(well if well.sum() > 1 else alike[i])]
        columns, identified = [], []
        for b, r in zip(betas, rates, strict=True):
            differences = r[:, js] - r[:, [i]]
            columns.append(np.array([log_mean(b[i], b[j]) for j in js]) * differences)
            identified.append(b[i] > 0 and bool((abs(differences) >= LEAST_RATE).any()))
        return _least_squares(np.array(columns), -d[:, js], np.array(identified))

    noise = _noise([fit(i, candidates) for i in np.flatnonzero(~candidates)])
    counts = np.array([len(cell.runs) for cell in plane.cells])
    under_trained = candidates & (excess > noise * math.sqrt(2) / np.sqrt(counts))
    rows = []
    for i, cell in enumerate(plane.cells):
        ratios, errors, _, freedom = fit(i, under_trained)
        numbers = [*betas[:, i], *ratios * betas[:, i], excess[i], cell.median.get("above_bound", math.nan)]
        columns = (*BETAS, "slope_y", "slope_z", "excess", "above_bound", "se_y", "se_z")
        numbers = zip(columns, map(float, [*numbers, *errors * betas[:, i]]), strict=True)
        rows.append({"run": cell.runs[0], **{name: value for name, value in numbers if math.isfinite(value)}})
        off = (ratios < 1 / FAR_OFF) | (ratios > FAR_OFF)
        off &= ~(abs(ratios - 1) <= student.ppf(1 - ALARM / 2, freedom) * errors)  # by more than noise
        rows[-1]["far_off"] = "yes" if under_trained[i] or off.any() else ""
    return rows


def log_mean(a: float, b: float) -> float:
    """(a - b) / ln(a / b): the mean of a slope that changes exponentially from a to b."""
    same = math.isclose(a, b, rel_tol=1e-9) or min(a, b) <= 0
    return a if same else (a - b) / math.log(a / b)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of the values that are not NaN; NaN where there are none."""
    return np.ma.masked_invalid(values).mean(0).filled(math.nan)


def _noise(fits: list[tuple]) -> float:
    """The difference that noise makes between two runs' losses at most, over sqrt(2), nats.

    From the residuals of all fits, which overlap: Student's quantile is that of one plane through all cells, and the
    chance of an alarm is shared among the differences of which the excess is the largest.
    """
    squares, freedom = (sum(fit[k] for fit in fits if fit[3]) for k in (2, 3))
    if not freedom:
        return 0.0
    quantile = student.ppf(1 - ALARM / max(1, len(fits) - 1), max(1, len(fits) - 3))
    return math.sqrt(squares / freedom) * quantile


def _least_squares(terms: np.ndarray, target: np.ndarray, identified: np.ndarray) -> tuple:
    """Fits `terms` (k, seeds, cells), where `identified` (k,), to `target` (seeds, cells), within each seed.

    Returns coefficients and standard errors, (k,), the sum of squared residuals and its degrees of freedom.
    Coefficients are NaN where not identified, and all, with a freedom of 0, if the terms are nearly collinear or no
    degree of freedom is left.
    """
    result = np.full((2, len(terms)), math.nan)
    target = target - terms[~identified].sum(0)  # the small effect of the others, at a ratio of 1
    finite = np.isfinite(target) & np.isfinite(terms).all(0)
    finite &= finite.sum(1, keepdims=True) > 1
    parts = [np.where(finite, part, math.nan) for part in (*terms[identified], target)]
    parts = [np.where(finite, part - _mean(part.T)[:, None], 0.0)[finite] for part in parts]
    *columns, y = parts
    a = np.array(columns).T
    freedom = len(y) - int(finite.any(1).sum()) - len(columns)
    norms = np.linalg.norm(a, axis=0)
    if not columns or freedom < 1 or not norms.all() or np.linalg.cond(a / norms) >= 10:
        return *result, 0.0, 0
    coefficients = np.linalg.lstsq(a, y, rcond=None)[0]
    squares = float(((y - a @ coefficients) ** 2).sum())
    errors = np.sqrt(squares / freedom * np.linalg.inv(a.T @ a).diagonal())
    result[:, identified] = coefficients, errors
    return *result, squares, freedom


def print_far_off(rows: list[dict]) -> None:
    """Prints the ten worst of the cells that are far from their optimum, if any."""
    far_off = sorted((row for row in rows if row["far_off"]), key=lambda r: -r.get("excess", 0))
    if far_off:
        text = f"{len(far_off)} of {len(rows)} cells are not at their optimum, probably under-trained: a slope is off "
        text += f"its beta by more than a factor of {FAR_OFF:g}, or another cell has a lower loss at the cell's betas. "
        text += "The others may still be, all of them alike: only differences are seen."
        print("\n" + wrapped(text))
        headings = {k: v for k, v in SLOPES.items() if k not in ("run", "far_off")}
        print(Table(far_off[:10], headings).markdown(), end="")
    for name, text in (
        ("left", "Separate trainings of some cells, interpolated to the others, find at most"),
        ("above_bound", "The best of all models would have at most"),
    ):
        if there := [row for row in rows if name in row]:
            worst = max(there, key=lambda row: row[name])
            most, betas = f"{worst[name]:.2f} nats less", f"{worst['beta_y']:g}, {worst['beta_z']:g}"
            print("\n" + wrapped(f"{text} {most}, at betas {betas}."))
