"""The rate plane: the metrics of a batch's runs, grouped into cells, with their rates R(z) and R(y|z).

Read from eval_results.csv; nothing is drawn here. Rates, D and mutual information are in nats per image.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np

from models.tables import COLLAPSED
from utils.config import fields_of
from utils.errors import UserError
from utils.files import read_arrays
from utils.plane.metrics import METRICS, metric

BETAS = ("beta_y", "beta_z")
TARGETS = {"beta_y": "target_rate_y", "beta_z": "target_rate_z"}  # the rates for which these betas were searched
SETTINGS = fields_of()
OF_GRID = fields_of("model", "training", "data")  # equal for the cells of one grid
OF_CELL = [*OF_GRID, *fields_of("objective")]  # equal for the repeats of one cell
SATURABLE = ("mi_q_mc", "mi_q_mc_y")  # estimates that are left out where they are saturated
UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}  # per nat


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: its settings, and the metrics of its runs, which differ in nothing but their seed."""

    settings: dict[str, str]
    runs: tuple[str, ...]
    repeats: tuple[dict[str, float], ...]  # the metrics that each run has
    seeds: tuple[str, ...] = ("",)

    @cached_property
    def median(self) -> dict[str, float]:
        """The median of every metric over the runs that have it."""
        names = dict.fromkeys(name for row in self.repeats for name in row)
        return {n: float(np.median([row[n] for row in self.repeats if n in row])) for n in names}

    def collapsed(self, *rates: str) -> int:
        """The number of runs in which one of some rates is below COLLAPSED."""
        return sum(min(row[rate] for rate in rates) < COLLAPSED for row in self.repeats)


@dataclass
class Plane:
    """The cells of a batch for which both rates are known, and notes on what is missing."""

    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None  # in which the runs are
    unit: str = "nats"  # in which `values` gives what is known in nats
    seeds: list[str] = field(init=False)  # of all runs
    differing: list[str] = field(init=False)  # the settings, other than the betas, in which the cells differ
    diagonal: np.ndarray = field(init=False)  # a mask (N,) of the ordinary beta-VAEs, beta_y = beta_z
    unfolded: np.ndarray = field(init=False)  # a mask (N,) of the cells of a multi-rate model
    targets: np.ndarray = field(init=False)  # (N, 2), R(y|z) and R(z) in nats for which betas were searched, or NaN

    def __post_init__(self):
        settings = [cell.settings for cell in self.cells]
        self.seeds = list(dict.fromkeys(seed for cell in self.cells for seed in cell.seeds))
        self.differing = [n for n in OF_GRID if len({of_cell.get(n) for of_cell in settings}) > 1]
        self.diagonal = np.isclose(self.values("beta_y"), self.values("beta_z"), rtol=1e-6)
        self.unfolded = np.array([of_cell.get("multi_rate") == "True" for of_cell in settings])
        self.targets = np.array([[number(of_cell.get(n)) for n in TARGETS.values()] for of_cell in settings])

    def values(self, name: str) -> np.ndarray:
        """The median of a metric over the runs of every cell, (N,), in the plane's unit; NaN where it is missing."""
        return self.scale(name) * np.array([cell.median.get(name, math.nan) for cell in self.cells])

    def shown(self, metrics: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
        """Some metrics of a cell or of a run, in the plane's unit, without those that it lacks."""
        return {n: self.scale(n) * metrics[n] for n in names if n in metrics}

    def of_seed(self, name: str, seed: str) -> np.ndarray:
        """A metric of the cells' runs with a seed, (N,), as it is stored; NaN where it is missing."""
        runs = [dict(zip(cell.seeds, cell.repeats, strict=True)).get(seed, {}) for cell in self.cells]
        return np.array([run.get(name, math.nan) for run in runs])

    def scale(self, name: str) -> float:
        """What a metric as it is stored is multiplied by, to be in the plane's unit."""
        return UNITS[self.unit] if metric(name).unit == "nats" else 1.0

    def unit_of(self, name: str) -> str:
        """The unit in which `values` gives a metric; empty if it has none."""
        unit = metric(name).unit
        return self.unit if unit == "nats" else unit

    def title(self, name: str) -> str:
        """A metric's label with its unit, for an axis or a heading."""
        unit = self.unit_of(name)
        return f"{metric(name).label} ({unit})" if unit else metric(name).label

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The labels (N,) of the test images, from the first run with latents; None if there is none."""
        for run in (run for cell in self.cells for run in cell.runs if self.folder):
            try:
                return read_arrays(self.folder / run / "latents.npz")["labels"]
            except (UserError, KeyError):
                continue
        return None

    @cached_property
    def about(self) -> str:
        """What the figures are of: data set, epochs, test images, cells, seeds, collapsed runs."""
        data, epochs = (", ".join(self.settings(n, "?")) for n in ("dataset", "num_epochs"))
        images = "?" if self.labels is None else f"{len(self.labels):,}"
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "1 seed"
        text = f"{data}, {epochs} epochs, n = {images} test images; {len(self.cells)} cells, {seeds}"
        for rate in ("kl_z", "kl_y"):
            if count := sum(cell.collapsed(rate) for cell in self.cells):
                runs = sum(len(cell.runs) for cell in self.cells)
                text += f"; {metric(rate).label} < {COLLAPSED:g} nats in {count} of {runs} runs"
        return text

    def settings(self, name: str, unknown: str = "none") -> list[str]:
        """All values of a setting of the cells, in the order of their letters."""
        return sorted({cell.settings.get(name) or unknown for cell in self.cells})

    def where(self, mask: np.ndarray) -> "Plane":
        """The plane of the cells in a mask (N,)."""
        return dataclasses.replace(self, cells=list(compress(self.cells, mask)))

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Masks (N,) of the cells of equal settings but for the betas, by a name for files, "" if there is one kind."""
        names, kinds = self.differing, {}
        keys = [tuple(cell.settings.get(n) for n in names) for cell in self.cells]
        for key in dict.fromkeys(keys):
            settings = [(n, v) for n, v in zip(names, key, strict=True) if v not in (None, "", "False")]
            words = [n if v == "True" else f"{n}_{v}" for n, v in settings]
            name = re.sub(r"[^\w.-]+", "_", "-".join(words))[:120]
            while name in kinds:  # of texts that are cut off, or differ in other characters
                name += "_"
            kinds[name] = np.array([k == key for k in keys])
        return kinds

    @property
    def grids(self) -> dict[str, "Plane"]:
        """The cells of each kind whose betas were given, if there are any."""
        given = np.isnan(self.targets).all(1)
        return {kind: self.where(mask & given) for kind, mask in self.kinds.items() if (mask & given).any()}

    @property
    def names(self) -> list[str]:
        """The metrics that at least one cell has."""
        names = {name for cell in self.cells for name in cell.median if name not in SETTINGS}
        return [*(n for n in METRICS if n in names), *sorted(names - set(METRICS))]

    def best(self, name: str, among: np.ndarray | bool = True) -> int | None:
        """Index of the best cell in a mask (N,); ties go to the lowest total rate. None if no cell has the metric."""
        values, rate = metric(name).better * self.values(name), self.values("rate")
        cells = np.flatnonzero(np.isfinite(values) & among)
        return max(cells, key=lambda i: (values[i], -rate[i]), default=None)


def number(text: str | None) -> float:
    """A field of a CSV as a number; NaN if it is not a number, not finite, or 1e30 or more in magnitude."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < 1e30 else math.nan  # larger values cannot be drawn


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV's rows, also with the semicolons and decimal commas of spreadsheets; UserError if it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        if separator != ",":
            text = re.sub(r"(?<=\d),(?=\d)", ".", text)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except (OSError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read ({e}); eval_beta_grid.py writes it") from e


def read_plane(path: Path, unit: str = "nats") -> Plane:
    """Reads a batch's eval_results.csv. Raises UserError if it is unreadable or no run has rates."""
    cells, without = {}, []
    for row in read_rows(path):
        if any(math.isnan(number(row.get(name))) for name in (*BETAS, "kl_y", "kl_z")):
            without.append(row)
        else:
            searched = {beta: None for beta, rate in TARGETS.items() if row.get(rate)}  # for each seed others
            cells.setdefault(tuple({**row, **searched}.get(name) for name in OF_CELL), []).append(row)
    if not cells:
        raise UserError(f"{path}: no run has rates yet; run eval_beta_grid.py (step 1) first")
    plane = Plane([_cell(rows) for rows in cells.values()], folder=path.parent, unit=unit)
    plane.notes += _notes(plane, without)
    return plane


def _cell(rows: list[dict[str, str]]) -> Cell:
    """The cell whose repeats are these rows of the CSV."""
    repeats = []
    for row in rows:
        values = {k: number(v) for k, v in row.items() if k and (k not in SETTINGS or k in BETAS)}
        values["rate"] = values["kl_y"] + values["kl_z"]
        values["nelbo"] = values["rate"] - values.get("ll", math.nan)
        saturated = [name for name in SATURABLE if values.get(f"{name}_saturated", 0) > 0]
        repeats.append({k: v for k, v in values.items() if not math.isnan(v) and k not in saturated})
    runs, seeds = (tuple(row.get(name) or "?" for row in rows) for name in ("run", "seed"))
    return Cell({k: v for k, v in rows[0].items() if k in SETTINGS}, runs, tuple(repeats), seeds)


def _notes(plane: Plane, without: list[dict[str, str]]) -> Iterator[str]:
    """What the table lacks, and what figures cannot show; `without` are the rows without rates."""
    cells = len(plane.cells)
    for status in sorted({row.get("status") or "" for row in without}):
        runs = [row.get("run") or "?" for row in without if (row.get("status") or "") == status]
        names = ", ".join(runs if len(runs) <= 3 else [*runs[:3], "..."])
        yield f"{len(runs)} run(s) left out, without rates ({status or 'without status'}): {names}"
    if repeated := sum(len(cell.runs) > 1 for cell in plane.cells):
        yield f"{repeated} cell(s) were trained more than once: medians over their runs"
    if names := plane.differing:
        values = "; ".join(f"{n} {', '.join(plane.settings(n))}" for n in names)
        yield f"the batch mixes settings, each with a marker (heat maps and image sheets apart): {values}"
    saturated = {name: int((plane.values(f"{name}_saturated") > 0).sum()) for name in SATURABLE}
    for name, count in saturated.items():
        if count:
            yield f"{metric(name).label} ({name}) is saturated in {count} of {cells} cells: left out"
    for rate in ("kl_z", "kl_y"):
        counts, label = [cell.collapsed(rate) for cell in plane.cells], f"{metric(rate).label} < {COLLAPSED} nats"
        if some := sum(0 < n < len(cell.runs) for n, cell in zip(counts, plane.cells, strict=True)):
            yield f"in {some} cell(s) some seeds collapse, others do not: {label} in {sum(counts)} run(s)"
    for name in plane.names:
        missing = int(np.isnan(plane.values(name)).sum())
        if missing and name in METRICS and not saturated.get(name):
            yield f"{metric(name).label} ({name}) is missing in {missing} of {cells} cells"
