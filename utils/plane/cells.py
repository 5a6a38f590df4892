"""The rate plane: a batch's runs, grouped into cells, with their rates R(z) and R(y|z).

Read from eval_results.csv; nothing is drawn here. Rates, D and information are in nats per image.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np

from models.tables import COLLAPSED
from utils.config import fields_of
from utils.errors import UserError
from utils.evaluation.metrics import STEP_OF, per_image
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
LIKELY = ("ll", "loss", "above_bound", "D", "nelbo", "ll_iw", "bpd")  # these depend on the likelihood
UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}  # per nat


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: its settings, and its runs, which differ in nothing but their seed."""

    settings: dict[str, str]
    runs: tuple[str, ...]
    repeats: tuple[dict[str, float], ...]  # the metrics that each run has
    seeds: tuple[str, ...] = ("",)
    conditions: dict[str, str] = field(default_factory=dict)  # by evaluation step, with what it was computed

    @cached_property
    def median(self) -> dict[str, float]:
        """The median of every metric over the runs that have it."""
        names = dict.fromkeys(name for row in self.repeats for name in row)
        values = {n: [row[n] for row in self.repeats if n in row] for n in names}
        return {n: float(np.median(of_runs)) for n, of_runs in values.items()}

    @property
    def epochs(self) -> str:
        """Those that it was trained for: `60`, or `60 + 6` of a cell that was refined; empty if not known."""
        return " + ".join(filter(None, (self.settings.get(name) for name in ("num_epochs", "refine_epochs"))))

    def collapsed(self, *rates: str) -> int:
        """In how many runs one of some rates, of layers that there are, is below COLLAPSED."""
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
        self.betas = np.stack([self.values(name) for name in BETAS])  # (2, N)
        self.seeds = list(dict.fromkeys(seed for cell in self.cells for seed in cell.seeds))
        # settings, other than the betas, in which the cells differ
        self.differing = [n for n in OF_GRID if len({of_cell.get(n) for of_cell in settings}) > 1]
        # masks (N,) of the ordinary beta-VAEs, and of the cells of a multi-rate model
        self.diagonal = np.isclose(*self.betas, rtol=1e-6)
        self.unfolded = np.array([of_cell.get("multi_rate") == "True" for of_cell in settings])
        # (N, 2): R(y|z) and R(z) in nats for which betas were searched, or NaN
        targets = [[number(of_cell.get(n)) for n in TARGETS.values()] for of_cell in settings]
        self.targets = np.array(targets)
        self.is_given = np.isnan(self.targets).all(1)  # whether no betas were searched, (N,)

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
        """A metric's label with its unit; of a column that is no metric, its name."""
        label, unit = metric(name).label, self.unit_of(name)
        label = name if label == name.replace("_", " ") else label
        return f"{label} ({unit})" if unit else label

    @cached_property
    def per_image(self) -> list[list[dict[str, np.ndarray]]]:
        """What each test image adds to the metrics of each cell's runs, by name, (images,)."""
        return [[per_image(self.folder / run) for run in cell.runs] if self.folder else [] for cell in self.cells]

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
        data = ", ".join(self.settings("dataset", "?"))
        epochs = ", ".join(sorted({cell.epochs or "?" for cell in self.cells}))
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
        part = dataclasses.replace(self, cells=list(compress(self.cells, mask)))
        part.per_image = list(compress(self.per_image, mask))
        return part

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
        """Masks (N,) of cells whose values of a metric can be compared: of one data set, likelihood, step."""
        settings = OF_DATA + (OF_LIKELIHOOD if name.removeprefix("train_") in LIKELY else [])
        keys = [tuple(cell.settings.get(n) or "" for n in settings) for cell in self.cells]
        n = len(OF_DATA) + 1  # sigma only matters where it is fixed
        keys = [key if "GaussianFixedSigma" in key else key[:n] for key in keys]
        step = STEP_OF.get(name)
        keys = [(*key, cell.conditions.get(step, "")) for key, cell in zip(keys, self.cells, strict=True)]
        return {key: np.array([k == key for k in keys]) for key in dict.fromkeys(keys)}

    @property
    def grids(self) -> dict[str, "Plane"]:
        """The cells of each kind whose betas were given, if there are any."""
        masks = {kind: mask & self.is_given for kind, mask in self.kinds.items()}
        return {kind: self.where(mask) for kind, mask in masks.items() if mask.any()}

    @property
    def asked(self) -> np.ndarray:
        """The rates (N, 2), R(y|z) and R(z), that were asked for; the cell's where none was."""
        rates = np.stack([self.values(rate) for rate in ("kl_y", "kl_z")], 1)
        return np.where(np.isnan(self.targets), rates, self.targets * UNITS[self.unit])

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

    def ties(self, name: str) -> np.ndarray:
        """The indices of the best cell and of those that score the same."""
        best = self.best(name) if metric(name).better else None
        values = self.values(name)
        return np.flatnonzero(np.isclose(values, np.nan if best is None else values[best], rtol=1e-9, atol=0))


def number(text: str | None) -> float:
    """A field of a CSV; NaN if it is no number, not finite, or 1e30 or more in magnitude."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if abs(value) < 1e30 else math.nan  # larger values cannot be drawn
