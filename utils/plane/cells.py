"""The rate plane: the metrics of a batch's runs, grouped into cells, with their rates R(z) and R(y|z).

Read from eval_results.csv; nothing is drawn here. Rates, D and mutual information are in nats per image.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np

from models.tables import COLLAPSED
from utils.config import Config
from utils.errors import UserError
from utils.files import read_arrays
from utils.plane.metrics import METRICS, metric

BETAS = ("beta_y", "beta_z")
SETTINGS = [f.name for f in dataclasses.fields(Config)]
ASKED = {"beta_y": "target_rate_y", "beta_z": "target_rate_z"}  # the rates for which these betas were found
OF_RUN = ("seed", "run_name", "run_batch_name", "source")  # may differ between the repeats of a cell
SAME_CELL = [n for n in SETTINGS if n not in OF_RUN]
SHARED = [n for n in SAME_CELL if n not in (*BETAS, *ASKED.values())]  # equal for the cells of one grid
SATURABLE = ("mi_q_mc", "mi_q_mc_y")  # estimates that are left out where they are saturated
UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}  # per nat


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: its settings, and the metrics of its runs, which differ in nothing but their seed."""

    settings: dict[str, str]
    runs: tuple[str, ...]
    repeats: tuple[dict[str, float], ...]  # the metrics of each run
    seeds: tuple[str, ...] = ("",)

    @cached_property
    def median(self) -> dict[str, float]:
        """The median of every metric over the runs that have it."""
        names = dict.fromkeys(name for row in self.repeats for name in row)
        there = {name: [row[name] for row in self.repeats if not math.isnan(row.get(name, math.nan))] for name in names}
        return {name: float(np.median(values)) for name, values in there.items() if values}


@dataclass
class Plane:
    """The cells of a batch for which both rates are known, and notes on what is missing."""

    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None  # in which the runs are
    unit: str = "nats"  # in which `values` gives what is known in nats

    def values(self, name: str) -> np.ndarray:
        """The median of a metric over the runs of every cell, (N,), in the plane's unit; NaN where it is missing."""
        return self.scale(name) * np.array([cell.median.get(name, math.nan) for cell in self.cells])

    def of_seed(self, name: str, seed: str) -> np.ndarray:
        """A metric of the cells' runs with a seed, (N,), as it is stored; NaN where it is missing."""
        runs = [dict(zip(cell.seeds, cell.repeats, strict=True)).get(seed, {}) for cell in self.cells]
        return np.array([run.get(name, math.nan) for run in runs])

    def scale(self, name: str) -> float:
        """What a metric as it is stored is multiplied by, to be in the plane's unit."""
        return UNITS[self.unit] if metric(name).unit == "nats" else 1.0

    def title(self, name: str) -> str:
        """A metric's label with its unit, for an axis or a heading."""
        unit = self.unit_of(name)
        return f"{metric(name).label} ({unit})" if unit else metric(name).label

    def unit_of(self, name: str) -> str:
        """The unit in which `values` gives a metric; empty if it has none."""
        unit = metric(name).unit
        return self.unit if unit == "nats" else unit

    @property
    def seeds(self) -> list[str]:
        """The seeds of all runs."""
        return list(dict.fromkeys(seed for cell in self.cells for seed in cell.seeds))

    @property
    def collapsed(self) -> dict[str, tuple[int, int]]:
        """By rate, the number of runs in which it is below COLLAPSED, and of cells where it is in some of them only."""
        result = {}
        for name in ("kl_z", "kl_y"):
            cells = [[row[name] < COLLAPSED for row in cell.repeats] for cell in self.cells]
            result[metric(name).label] = sum(map(sum, cells)), sum(any(c) and not all(c) for c in cells)
        return result

    @cached_property
    def about(self) -> str:
        """What the figures are of: data set, epochs, test images, cells, seeds, collapsed runs."""
        data, epochs = (
            ", ".join(sorted({c.settings.get(n) or "?" for c in self.cells})) for n in ("dataset", "num_epochs")
        )
        labels, seeds, runs = labels_of(self), len(self.seeds), sum(len(cell.runs) for cell in self.cells)
        parts = [f"{data}, {epochs} epochs, n = {'?' if labels is None else f'{len(labels):,}'} test images"]
        parts.append(f"{len(self.cells)} cells, {seeds} seed{'s' * (seeds > 1)}")
        for rate, (count, _) in self.collapsed.items():
            if count:
                parts.append(f"{rate} < {COLLAPSED:g} nats in {count} of {runs} runs")
        return "; ".join(parts)

    @property
    def diagonal(self) -> np.ndarray:
        """A mask (N,) of the ordinary beta-VAEs, beta_y = beta_z."""
        return np.isclose(self.values("beta_y"), self.values("beta_z"), rtol=1e-6)

    @property
    def unfolded(self) -> np.ndarray:
        """A mask (N,) of the cells that were unfolded from a multi-rate model, not trained on their own."""
        return np.array([cell.settings.get("multi_rate") == "True" for cell in self.cells])

    @property
    def asked(self) -> np.ndarray:
        """The rates R(y|z), R(z) in nats that the cells were asked for, (N, 2); NaN where there are none."""
        return np.array([[number(cell.settings.get(name)) for name in ASKED.values()] for cell in self.cells])

    def where(self, mask: np.ndarray) -> "Plane":
        """The plane of the cells in a mask (N,)."""
        return dataclasses.replace(self, cells=list(compress(self.cells, mask)))

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Masks (N,) of the cells of equal settings but for the betas, by what tells these settings from others'."""
        differing = self.differing
        keys = [_slug({n: cell.settings.get(n) for n in differing}) for cell in self.cells]
        return {key: np.array([k == key for k in keys]) for key in dict.fromkeys(keys)}

    @property
    def grids(self) -> dict[str, "Plane"]:
        """The cells of each grid of betas, by what tells its settings from others'; without betas that were found."""
        fixed = np.isnan(self.asked).all(1)
        found = {key: self.where(fixed & mask) for key, mask in self.kinds.items()}
        return {key: plane for key, plane in found.items() if plane.cells}

    @property
    def differing(self) -> list[str]:
        """The settings, other than the betas, in which the cells differ."""
        return [n for n in SHARED if len({c.settings.get(n) for c in self.cells}) > 1]

    @property
    def names(self) -> list[str]:
        """The metrics that at least one cell has."""
        known = {name for cell in self.cells for name in cell.median if name not in SETTINGS}
        return [*(n for n in METRICS if n in known), *sorted(known - set(METRICS))]

    def best(self, name: str, among: np.ndarray | None = None) -> int | None:
        """Index of the best cell in a mask (N,); ties go to the lowest total rate. None if no cell has the metric."""
        values, rate = metric(name).better * self.values(name), self.values("rate")
        there = np.isfinite(values) & (True if among is None else among)
        return max(np.flatnonzero(there), key=lambda i: (values[i], -rate[i])) if there.any() else None


def _slug(settings: dict[str, str | None]) -> str:
    """Settings as a part of a file's name."""
    words = [n if v == "True" else f"{n}_{v}" for n, v in settings.items() if v not in (None, "", "False")]
    return re.sub(r"[^\w.-]+", "_", "-".join(words))[:120]


def number(text: str | None) -> float:
    """A field of a CSV as a number; NaN if it is not a number, not finite, or 1e30 or more in magnitude."""
    try:
        value = float(text or "nan")
    except (ValueError, TypeError):
        return math.nan
    return value if abs(value) < 1e30 else math.nan  # larger values cannot be drawn


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV's rows, also as spreadsheets save it: with a byte order mark, semicolons or tabs, decimal commas.

    Raises UserError if it cannot be read.
    """
    try:
        data = path.read_bytes()
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = data.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read ({e}); eval_beta_grid.py writes it") from e
    if separator == ",":
        return rows
    return [{k: re.sub(r"^(-?\d*),(\d)", r"\1.\2", v) if isinstance(v, str) else v for k, v in r.items()} for r in rows]


def read_plane(path: Path, unit: str = "nats") -> Plane:
    """Reads a batch's eval_results.csv. Raises UserError if it is unreadable or no run has rates."""
    plane, groups, without = Plane([], folder=path.parent, unit=unit), {}, []
    for row in read_rows(path):
        if any(math.isnan(number(row.get(name))) for name in (*BETAS, "kl_y", "kl_z")):
            without.append(row)
        else:
            found = {beta: None for beta, rate in ASKED.items() if row.get(rate)}  # for each seed others
            groups.setdefault(tuple({**row, **found}.get(name) for name in SAME_CELL), []).append(row)
    if not groups:
        raise UserError(f"{path}: no run has rates yet; run eval_beta_grid.py (step 1) first")
    plane.cells = [merge(repeats) for repeats in groups.values()]
    plane.notes += _notes(plane, without)
    return plane


def _notes(plane: Plane, without: list[dict[str, str]]) -> Iterator[str]:
    """What the table lacks, and what figures cannot show; `without` are the rows without rates."""
    by_status, cells = {}, len(plane.cells)
    for row in without:
        by_status.setdefault(row.get("status") or "without status", []).append(row.get("run") or "?")
    for status, runs in sorted(by_status.items()):
        more = ", ..." * (len(runs) > 3)
        yield f"{len(runs)} run(s) left out, without rates ({status}): {', '.join(runs[:3])}{more}"
    if repeated := sum(len(cell.runs) > 1 for cell in plane.cells):
        yield f"{repeated} cell(s) were trained more than once: medians over their runs"
    if settings := plane.differing:
        values = (f"{n} {', '.join(sorted({str(c.settings.get(n)) for c in plane.cells}))}" for n in settings)
        yield f"the batch mixes settings, each with a marker (heat maps and image sheets apart): {'; '.join(values)}"
    saturated = {name: int((plane.values(f"{name}_saturated") > 0).sum()) for name in SATURABLE}
    for name, count in saturated.items():
        if count:
            yield f"{metric(name).label} ({name}) is saturated in {count} of {cells} cells: left out"
    for rate, (count, some) in plane.collapsed.items():
        if some:
            yield f"in {some} cell(s) some seeds collapse, others do not: {rate} < {COLLAPSED} nats in {count} run(s)"
    for name in plane.names:
        missing = int(np.isnan(plane.values(name)).sum())
        if missing and name in METRICS and not saturated.get(name):
            yield f"{metric(name).label} ({name}) is missing in {missing} of {cells} cells"


def merge(repeats: list[dict[str, str]]) -> Cell:
    """The cell whose repeats are these rows of the CSV."""
    metrics = [{k: number(v) for k, v in row.items() if k and (k not in SETTINGS or k in BETAS)} for row in repeats]
    for row in metrics:
        row["rate"] = row["kl_y"] + row["kl_z"]
        row["nelbo"] = row["rate"] - row.get("ll", math.nan)
        for name in SATURABLE:
            if row.get(f"{name}_saturated", 0) > 0:
                row[name] = math.nan
    runs, seeds = (tuple(row.get(name) or "?" for row in repeats) for name in ("run", "seed"))
    return Cell({k: v for k, v in repeats[0].items() if k in SETTINGS}, runs, tuple(metrics), seeds)


def labels_of(plane: Plane) -> np.ndarray | None:
    """The labels (N,) of the test images, from the first run with latents; None if there is none."""
    for name in (run for cell in plane.cells for run in cell.runs if plane.folder):
        try:
            return read_arrays(plane.folder / name / "latents.npz")["labels"]
        except (UserError, KeyError):
            continue
    return None
