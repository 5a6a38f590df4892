"""The advice: for each task the best cell, the best ordinary beta-VAE, and whether it is worse."""

import dataclasses
import functools
import math
import shlex
from pathlib import Path

import numpy as np

from datasets.table import DATASETS
from models.own import from_copy
from utils.config import FLAGS, Config, fields_of, kind_of
from utils.errors import UserError
from utils.plane.cells import BETAS, TARGETS, Cell, Plane
from utils.plane.gains import SPLITS, UNTESTED, errors, gain, reach, terms_of
from utils.plane.metrics import ACCURACIES, mean_term, metric, score_of, value_of
from utils.runs import Run

ADVICE = {  # columns and headings
    "task": "task", "budget": "budget", "metric": "metric", "unit": "in", "value": "best", "se": "+-",
    "beta_y": "beta_y", "beta_z": "beta_z", "kl_y": "R(y|z)", "kl_z": "R(z)", "rate": "R",
    "diagonal_value": "ordinary", "diagonal_rate": "at R", "neighbours": "R of the nearest",
    "gain": "tested gain", "low": "95 % from", "high": "to", "told": "is it better?", "chosen_kl_z": "R(z) of choices",
}  # fmt: skip
IN_NATS = ("kl_y", "kl_z", "rate", "diagonal_rate", "chosen_kl_z")
EXPLAINED = (
    "best: a cell as in eval_results.csv. ordinary: what beta-VAEs with beta_y = beta_z reach at its R, the "
    "two nearest mixed, or one alone for metrics that do not mix; at the R where they end if it is beyond. "
    f"tested gain: of choosing on one half of the images (and on other seeds) what is compared on the "
    f"other, over {SPLITS} random halves; untested, the difference. Its interval begins with what ordinary "
    "ones between the nearest can reach at most, so it is wide where these are far apart."
)
TASKS = {
    "reconstruction": ("psnr",),
    "representation, from z": ACCURACIES["qz_mu"],
    "representation, from y": ACCURACIES["qy_mu"],
    "generation": ("is_mean", "fid", "fid_classifier"),
    "information on the label, in z": ("mi_z_low",),
    "information on the label, in y": ("mi_y_low",),
    "likelihood": ("nelbo",),
}
TASK_OF = {name: task for task, names in TASKS.items() for name in names}
LIMITS = {"rate": "R(z) + R(y|z)", "kl_z": "R(z)", "kl_y": "R(y|z)"}


def advice(plane: Plane, budget: dict[str, float] | None = None) -> list[dict]:
    """A row for each task, metric and `comparable` cells: the best one, what ordinary ones reach at its rate, the gain.

    `budget` limits rates, in the plane's unit; rows of the cells within it follow those of all.
    Values are those of all test images. Where runs have terms of single images, the gain is tested, with an interval.
    """
    rows = []
    if missing := sum(not all(runs) for runs in plane.per_image):
        plane.notes.append(
            f"no per_image.npz for {missing} of {len(plane.cells)} cells: what the advice says of "
            "them is untested; repeat eval_beta_grid.py (steps 1 and 3)"
        )
    names = [name for name in TASK_OF if name in plane.names]
    of_names = {name: (terms_of(plane, name), errors(plane, name)) for name in names}
    for limits in [{}, budget] if budget else [{}]:
        within, few = np.ones(len(plane.cells), bool), plane.diagonal
        for rate, most in limits.items():
            mask = plane.values(rate) <= most
            within = within & mask
            if rate != "rate":  # ordinary cells of too large a total, mixed, may be within
                few = few & mask
        text = ", ".join(f"{LIMITS[n]} <= {most:g} {plane.unit}" for n, most in limits.items())
        for name, part in ((n, part) for n in names for part in plane.comparable(n).values()):
            best = plane.best(name, within & part)
            if best is None:
                continue
            cell = plane.cells[best]
            row = {"task": TASK_OF[name], "budget": text, "metric": name, "unit": plane.unit_of(name)}
            for column, of in (("value", name), *((n, n) for n in (*BETAS, "kl_y", "kl_z", "rate"))):
                row[column] = float(plane.values(of)[best])
            terms, se = of_names[name]
            row |= {"se": float(se[best])} if math.isfinite(se[best]) else {}
            row |= {n: cell.settings.get(n) for n in plane.differing}
            row["command"] = training(cell, plane.folder) if plane.unfolded[best] else ""
            rows.append(row | _compared(plane, name, terms, (within & part, few & part), best))
    return rows


def _compared(plane: Plane, name: str, terms: list, masks: tuple, best: int) -> dict:
    """The best cell of those within a budget against a few ordinary ones, both `masks` (N,)."""
    values, rates, better = plane.values(name), plane.values("rate"), metric(name).better
    among, few = (mask & np.isfinite(values) for mask in masks)
    if not few.any():
        return {}
    means = mean_term(name, values)
    (weights,), _ = reach(name, rates, np.where(few, score_of(name, means), math.nan), rates[[best]])
    row = {"diagonal_rate": float(weights @ rates), "told": UNTESTED}
    row["diagonal_value"] = float(value_of(name, weights @ np.nan_to_num(means)))
    row["gain"] = round(better * (float(values[best]) - row["diagonal_value"]), 9) + 0.0  # never -0
    ordinary = np.sort(rates[few])
    after = np.searchsorted(ordinary, rates[best])
    row["neighbours"] = _ends(ordinary[max(after - 1, 0) : after + 1])
    tested = gain(name, terms, [cell.seeds for cell in plane.cells], among, few, rates)
    if tested:
        row |= tested | {n: plane.scale(name) * tested[n] for n in ("gain", "low", "high") if n in tested}
        row["chosen_kl_z"] = _ends(plane.values("kl_z")[row["chosen"]])
        if row["told"].startswith("no, worse") and ordinary[0] > rates[best]:
            row["told"] = "unclear: ordinary ones have more rate"
        elif ordinary[-1] < rates[best]:
            row["told"] = "unclear: ordinary ones have less rate"
    return row


def _ends(values: np.ndarray) -> str:
    """The least and the largest value to three digits; one if they are the same."""
    return " to ".join(dict.fromkeys(f"{float(f'{v:.3g}'):g}" for v in (values.min(), values.max())))


def training(cell: Cell, folder: Path | None = None) -> str:
    """The command that trains a cell separately: of a grid as it was trained, with all its seeds.

    The runs in `folder` tell where own images are. Empty if its settings are not those of a training any more,
    or it began with other weights.
    """
    unfolded = cell.settings.get("multi_rate") == "True"
    # a multi-rate model warms up another rate than its cells; no_warmup follows from warmup_epochs
    unused = {"multi_rate", "no_warmup", *(["warmup_epochs"] if unfolded else [])}
    names = [n for n in fields_of("model", "training", "data", "name") if n in {*FLAGS} - unused]
    settings = dict(cell.settings)
    if settings.get("dataset", Config.dataset) not in DATASETS:
        try:
            settings["dataset"] = Run.open((folder or Path()) / cell.runs[0]).config.dataset
        except UserError:
            return ""
    flags = _flags(tuple((n, settings[n]) for n in names if settings.get(n)))
    if flags is None or (cell.settings.get("init_from") and not unfolded):
        return ""
    words = from_copy(flags, settings.get("networks"), (folder or Path()) / cell.runs[0])
    searched = any(cell.settings.get(rate) for rate in TARGETS.values())
    for name in BETAS:  # those that were searched have more digits than they are known to
        beta = cell.median[name]
        beta = float(f"{beta:.6g}") if unfolded or searched else beta
        words += [f"--{name}", f"{beta}"] if beta != getattr(Config, name) else []
    seeds = [seed for seed in dict.fromkeys(cell.seeds) if seed.isdecimal()]
    words += ["--seed", *seeds] if seeds not in ([], [str(Config.seed)]) else []
    return shlex.join(["python", "train.py", *words])


@functools.lru_cache(maxsize=64)  # the same for all cells of a grid
def _flags(texts: tuple[tuple[str, str], ...]) -> list[str] | None:
    """The flags of a training with these settings that are not the default; None if none can be."""
    kinds = {field.name: kind_of(field) for field in dataclasses.fields(Config)}
    try:
        config = Config(**{k: v == "True" if kinds[k] is bool else kinds[k](v) for k, v in texts})
        return config.flags(without=(*BETAS, "seed"))
    except (UserError, ValueError):  # of data that is not there any more
        return None


def commands(rows: list[dict]) -> list[dict[str, str]]:
    """The commands of the advice, each once, with the metrics that it is for."""
    metrics = {row["command"]: {} for row in rows if row["command"]}
    for row in rows:
        metrics.get(row["command"], {})[row["metric"]] = None
    return [{"metrics": ", ".join(names), "command": text} for text, names in metrics.items()]


def headings_of(plane: Plane) -> dict[str, str]:
    """Columns and headings of the advice, with the settings in which the plane's cells differ."""
    rates = {n: f"{ADVICE[n]} ({plane.unit})" for n in IN_NATS}
    return ADVICE | rates | {name: name for name in plane.differing}
