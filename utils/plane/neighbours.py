"""What evaluated cells say of their neighbours: metrics are smooth functions of the rates."""

import math
import warnings

import numpy as np
from scipy.stats import t as student

from utils.plane.cells import Plane
from utils.plane.metrics import metric

LEAST_CELLS = 8  # to learn a function of two rates from
SMALL = 0.1  # nats; smaller rates are hardly told apart
LEARNT = 4  # parameters of the process


def predictions(plane: Plane, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What a multi-rate model's other cells predict where a metric is missing, not saturated, and errors, (N,).

    Of no column that says how others were computed, or that is the same in all cells.
    """
    is_saturated = plane.values(f"{name}_saturated") > 0
    values, errors = np.full((2, len(plane.cells)), math.nan)
    if not (metric(name).better or metric(name).unit):  # such as numbers of images
        return values, errors
    # of the rates and not of the betas: where a layer is given up, metrics change within a short way of its beta
    at = np.log([[cell.median[rate] + SMALL for rate in ("kl_y", "kl_z")] for cell in plane.cells])
    for mask in plane.kinds.values():
        known = mask & np.isfinite(plane.values(name))
        wanted, of_known = mask & ~known & ~is_saturated, plane.values(name)[known]
        if plane.unfolded[mask].all() and known.sum() >= LEAST_CELLS and wanted.any() and np.ptp(of_known) > 0:
            values[wanted], errors[wanted] = interpolated(at[known], of_known, at[wanted])
            if of_known.min() >= 0:
                values[wanted] = values[wanted].clip(0)
    return values, errors


def interpolated(at: np.ndarray, values: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What values (N,) at points (N, 2) predict at others (M, 2), and standard errors.

    A Gaussian process whose lengths and noise have the largest likelihood. Where 1.96 of its errors do not hold 95 % of
    the values that are left out, one at a time (Rasmussen & Williams 2006, eq. 5.12), they are scaled so that they do;
    and by Student's quantile, as few values tell its parameters.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern([1.0, 1.0], (0.1, 30), nu=2.5) + WhiteKernel(1e-2, (1e-8, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a length at its limit
        process.fit(at, values)
    inverse = np.linalg.inv(process.kernel_(at))
    standardised = (values - values.mean()) / values.std()
    residuals = inverse @ standardised / np.sqrt(inverse.diagonal())
    means, stds = process.predict(where, return_std=True)
    share, of_few = min(0.95 * (1 + 1 / len(values)), 1.0), student.ppf(0.975, len(values) - LEARNT) / 1.96
    return means, stds * of_few * max(1.0, np.quantile(abs(residuals), share, method="higher") / 1.96)
