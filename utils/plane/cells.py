"""The rate plane: a batch's runs, grouped into cells, with their rates R(z) and R(y|z).

Read from eval_results.csv; nothing is drawn here. Rates, D and information are in nats per image.
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
from utils.config import fields_of
from utils.errors import UserError
from utils.files import read_arrays
from utils.plane.metrics import METRICS, metric

BETAS = ("beta_y", "beta_z")
TARGETS = {"beta_y": "target_rate_y", "beta_z": "target_rate_z"}  # for which betas were searched
SETTINGS = [*fields_of(), "commit", "date"]
OF_GRID = fields_of("model", "training", "data")  # equal for the cells of one grid
OF_CELL = [*OF_GRID, *fields_of("objective")]  # equal for the repeats of one cell
SATURABLE = ("mi_q_mc", "mi_q_mc_y")  # estimates that are left out where they are saturated
OF_DATA = [name for name in fields_of("data") if name != "data_digest"]  # which old runs lack
OF_LIKELIHOOD = ["px_y_family_ll", "sigma"]
LIKELY = ("ll", "loss", "D", "nelbo", "ll_iw", "bpd")  # these depend on the likelihood
UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}  # per nat


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: its settings, and its runs, which differ in nothing but their seed."""

    settings: dict[str, str]
    runs: tuple[str, ...]
    repeats: tuple[dict[str, float], ...]  # the metrics that each run has
    seeds: tuple[str, ...] = ("",)

    @cached_property
    def median(self) -> dict[str, float]:
        """The median of every metric over the runs that have it."""
        names = dict.fromkeys(name for row in self.repeats for name in row)
        values = {n: [row[n] for row in self.repeats if n in row] for n in names}
        return {n: float(np.median(of_runs)) for n, of_runs in values.items()}

    def collapsed(self, *rates: str) -> int:
        """The number of runs in which one of some rates, of layers that there are, is below COLLAPSED."""
        rates = [r for r in rates if (r, self.settings.get("vae_type")) != ("kl_z", "BVAE")]
        return sum(any(row[rate] < COLLAPSED for rate in rates) for row in self.repeats)


@dataclass
class Plane:
    """The cells of a batch for which both rates are known, and notes on what is missing."""

    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None  # in which the runs are
    unit: str = "nats"  # in which `values` gives what is known in nats

    def __post_init__(self):
        settings = [cell.settings for cell in self.cells]
        self.seeds = list(dict.fromkeys(seed for cell in self.cells for seed in cell.seeds))
        # settings, other than the betas, in which the cells differ
        self.differing = [n for n in OF_GRID if len({of_cell.get(n) for of_cell in settings}) > 1]
        # masks (N,) of the ordinary beta-VAEs, and of the cells of a multi-rate model
        self.diagonal = np.isclose(self.values("beta_y"), self.values("beta_z"), rtol=1e-6)
        self.unfolded = np.array([of_cell.get("multi_rate") == "True" for of_cell in settings])
        # (N, 2): R(y|z) and R(z) in nats for which betas were searched, or NaN
        targets = [[number(of_cell.get(n)) for n in TARGETS.values()] for of_cell in settings]
        self.targets = np.array(targets)

    def values(self, name: str) -> np.ndarray:
        """A metric's medians of all cells, (N,), in the plane's unit; NaN where it is missing."""
        return self.scale(name) * np.array([cell.median.get(name, math.nan) for cell in self.cells])

    def of_seed(self, name: str, seed: str) -> np.ndarray:
        """A metric of the cells' runs with a seed, (N,), as stored; NaN where it is missing."""
        runs = [dict(zip(c.seeds, c.repeats, strict=True)).get(seed, {}) for c in self.cells]
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

    def heading(self, name: str) -> str:
        """The title of a column of figures' data; of one that is no metric, its name."""
        known = metric(name).label != name.replace("_", " ")
        return self.title(name) if known else name

    @cached_property
    def labels(self) -> np.ndarray | None:
        """The labels (N,) of the test images, from the first run with latents, if any."""
        for run in (run for cell in self.cells for run in cell.runs if self.folder):
            try:
                return read_arrays(self.folder / run / "latents.npz")["labels"]
            except (UserError, KeyError):
                continue
        return None

    @cached_property
    def about(self) -> str:
        """What figures are of: data set, epochs, test images, cells, seeds, collapsed runs."""
        data, epochs = (", ".join(self.settings(n, "?")) for n in ("dataset", "num_epochs"))
        images = "?" if self.labels is None else f"{len(self.labels):,}"
        seeds = f"{len(self.seeds)} seed" + ("s" if len(self.seeds) > 1 else "")
        text = f"{data}, {epochs} epochs, n = {images} test images; {len(self.cells)} cells, {seeds}"
        runs = sum(len(cell.runs) for cell in self.cells)
        for rate in ("kl_z", "kl_y"):
            if count := sum(cell.collapsed(rate) for cell in self.cells):
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
        """Masks (N,) of cells that differ in their betas alone, by names for files; "" if one."""
        names, kinds = self.differing, {}
        keys = [tuple(cell.settings.get(n) for n in names) for cell in self.cells]
        for key in dict.fromkeys(keys):
            values = dict(zip(names, key, strict=True)).items()
            words = [n if v == "True" else f"{n}_{v}" for n, v in values if v and v != "False"]
            name = re.sub(r"[^\w.-]+", "_", "-".join(words))[:120]
            while name in kinds:  # of texts that are cut off, or differ in other characters
                name += "_"
            kinds[name] = np.array([k == key for k in keys])
        return kinds

    def comparable(self, name: str) -> dict[tuple[str, ...], np.ndarray]:
        """Masks (N,) of cells of one data set and, where a metric depends on it, of one likelihood, by these."""
        settings = OF_DATA + (OF_LIKELIHOOD if name.removeprefix("train_") in LIKELY else [])
        keys = [tuple(cell.settings.get(n) or "" for n in settings) for cell in self.cells]
        n = len(OF_DATA) + 1  # sigma only matters where it is fixed
        keys = [key if "GaussianFixedSigma" in key else key[:n] for key in keys]
        return {key: np.array([k == key for k in keys]) for key in dict.fromkeys(keys)}

    @property
    def grids(self) -> dict[str, "Plane"]:
        """The cells of each kind whose betas were given, if there are any."""
        masks = {kind: mask & self.is_given for kind, mask in self.kinds.items()}
        return {kind: self.where(mask) for kind, mask in masks.items() if mask.any()}

    @property
    def is_given(self) -> np.ndarray:
        """A mask (N,) of the cells whose betas were not searched."""
        return np.isnan(self.targets).all(1)

    @property
    def names(self) -> list[str]:
        """The metrics that at least one cell has."""
        names = {name for cell in self.cells for name in cell.median} - set(SETTINGS)
        return [*(n for n in METRICS if n in names), *sorted(names - set(METRICS))]

    def best(self, name: str, among: np.ndarray | bool = True) -> int | None:
        """The best cell's index in a mask (N,), of ties that of least rate; None if none has it."""
        values, rate = metric(name).better * self.values(name), self.values("rate")
        cells = np.flatnonzero(np.isfinite(values) & among)
        return max(cells, key=lambda i: (values[i], -rate[i]), default=None)


def number(text: str | None) -> float:
    """A field of a CSV; NaN if it is no number, not finite, or 1e30 or more in magnitude."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < 1e30 else math.nan  # larger values cannot be drawn


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV's rows, also with the semicolons and decimal commas of spreadsheets. Raises UserError if unreadable."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        if separator != ",":
            text = re.sub(r"(?<=\d),(?=\d)", ".", text)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except (OSError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read ({e}); eval_beta_grid.py writes it") from e


def read_plane(path: Path, unit: str = "nats") -> Plane:
    """Reads a batch's eval_results.csv. Raises UserError if it is unreadable or without rates."""
    cells, without, rows = {}, [], read_rows(path)
    digests = {row.get("data_digest") for row in rows} - {None, ""}
    for row in rows:
        for name in SETTINGS:  # of which spreadsheets make TRUE
            if row.get(name) in ("TRUE", "FALSE"):
                row[name] = row[name].capitalize()
        if len(digests) == 1:  # runs of earlier versions have none
            row["data_digest"] = next(iter(digests))
        if any(math.isnan(number(row.get(name))) for name in (*BETAS, "kl_y", "kl_z")):
            without.append(row)
        else:  # of searched betas each seed has others
            key = row | {beta: None for beta, rate in TARGETS.items() if row.get(rate)}
            cells.setdefault(tuple(key.get(name) for name in OF_CELL), []).append(row)
    if not cells:
        raise UserError(f"{path}: no run has rates yet; run eval_beta_grid.py (step 1) first")
    plane = Plane([_cell(rows) for rows in cells.values()], folder=path.parent, unit=unit)
    plane.notes += _notes(plane, without)
    return plane


def _cell(rows: list[dict[str, str]]) -> Cell:
    repeats = []
    for row in rows:
        values = {k: number(v) for k, v in row.items() if k and (k not in SETTINGS or k in BETAS)}
        values["rate"] = values["kl_y"] + values["kl_z"]
        values["nelbo"] = values["rate"] - values.get("ll", math.nan)
        for name in SATURABLE:
            if values.get(f"{name}_saturated", 0) > 0:
                values.pop(name, None)
        repeats.append({k: v for k, v in values.items() if not math.isnan(v)})
    runs, seeds = (tuple(row.get(name) or "?" for row in rows) for name in ("run", "seed"))
    settings = {k: v for k, v in rows[0].items() if k in SETTINGS}
    return Cell(settings, runs, tuple(repeats), seeds)


def _notes(plane: Plane, without: list[dict[str, str]]) -> Iterator[str]:
    """What the table lacks, and what figures cannot show; `without` are the rows without rates."""
    cells = len(plane.cells)
    for status in sorted({row.get("status") or "" for row in without}):
        runs = [row.get("run") or "?" for row in without if (row.get("status") or "") == status]
        names, why = ", ".join(runs if len(runs) <= 3 else [*runs[:3], "..."]), status or "without status"
        yield f"{len(runs)} run(s) left out, without rates ({why}): {names}"
    if repeated := sum(len(cell.runs) > 1 for cell in plane.cells):
        yield f"{repeated} cell(s) were trained more than once: medians over their runs"
    if plane.differing:
        values = "; ".join(f"{n} {', '.join(plane.settings(n))}" for n in plane.differing)
        apart = "each with a marker (heat maps and image sheets apart)"
        yield f"the batch mixes settings, {apart}: {values}"
    saturated = {name: int((plane.values(f"{name}_saturated") > 0).sum()) for name in SATURABLE}
    for name, count in saturated.items():
        if count:
            label = metric(name).label
            yield f"{label} ({name}) is saturated in {count} of {cells} cells: left out"
    for rate in ("kl_z", "kl_y"):
        counts = [cell.collapsed(rate) for cell in plane.cells]
        if some := sum(0 < n < len(c.runs) for n, c in zip(counts, plane.cells, strict=True)):
            few = f"{metric(rate).label} < {COLLAPSED} nats in {sum(counts)} run(s)"
            yield f"in {some} cell(s) some seeds collapse, others do not: {few}"
    for name in METRICS:
        missing = int(np.isnan(plane.values(name)).sum())
        if 0 < missing < cells and not saturated.get(name):
            yield f"{metric(name).label} ({name}) is missing in {missing} of {cells} cells"
