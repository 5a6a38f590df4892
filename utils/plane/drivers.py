"""Which of the rates each metric of a batch goes with."""

import math
from collections.abc import Sequence

import numpy as np

from utils.evaluation.probes import standard_error
from utils.plane.cells import Plane
from utils.plane.metrics import metric

RATES = {"kl_z": "R(z)", "kl_y": "R(y|z)", "rate": "R", "kl_z_given_rate": "R(z) at equal R"}  # R = R(z) + R(y|z)
DRIVERS = {"metric": "metric", "n": "cells", "seeds": "seeds"}  # columns of drivers.csv and their headings
for _name, _label in RATES.items():
    DRIVERS |= {_name: f"with {_label}", f"{_name}_se": f"+- of {_label}"}
LEAST_CELLS = 4  # of fewer, ranks say nothing


def drivers(plane: Plane, names: Sequence[str]) -> list[dict[str, str | float | int]]:
    """Spearman's rank correlations of metrics with rates over each grid's cells; 1 if always better at more rate.

    "R(z) at equal R" is the partial rank correlation with R(z) given R. If all cells of a grid share several seeds, the
    mean over these, with its standard error; else of the cells' medians. Metrics equal in all cells are left out.
    """
    rows = []
    for grid in plane.grids.values():
        settings = {name: grid.cells[0].settings.get(name) for name in plane.differing}
        seeds = [seed for seed in grid.seeds if all(seed in cell.seeds for cell in grid.cells)]
        repeats = [[cell.repeats[cell.seeds.index(seed)] for cell in grid.cells] for seed in seeds]
        if len(seeds) < 2:
            repeats = [[cell.median for cell in grid.cells]]
        for name in names:
            correlations = np.array([_correlations(name, cells) for cells in repeats])  # (seeds, rates)
            if np.isnan(correlations).all():
                continue
            n = min(sum(math.isfinite(cell.get(name, math.nan)) for cell in cells) for cells in repeats)
            row = {"metric": name, **settings, "n": n, "seeds": len(grid.seeds)}
            for rate, values in zip(RATES, correlations.T, strict=True):
                if np.isnan(values).any():  # of a rate that is the same in all cells
                    continue
                row[rate] = float(values.mean())
                if len(repeats) > 1:
                    row[f"{rate}_se"] = standard_error(values)
            rows.append(row)
    return rows


def _correlations(name: str, cells: Sequence[dict[str, float]]) -> list[float]:
    from scipy.stats import rankdata

    values = np.array([metric(name).better * cell.get(name, math.nan) for cell in cells])
    finite = np.isfinite(values)
    if finite.sum() < LEAST_CELLS or np.ptp(values[finite]) == 0:
        return [math.nan] * len(RATES)
    rates = np.array([[cell[rate] for cell in cells] for rate in ("kl_z", "kl_y", "rate")])
    with np.errstate(invalid="ignore"):  # of a rate that is the same in all cells
        (*_, of_z), (*_, of_y), (z_and_r, *_, of_r), _ = np.corrcoef(
            rankdata([*rates[:, finite], values[finite]], axis=1)
        )
    variance = (1 - of_r**2) * (1 - z_and_r**2)  # of both, once R is finite
    return [of_z, of_y, of_r, (of_z - of_r * z_and_r) / math.sqrt(variance) if variance > 1e-9 else math.nan]
