"""The advice: for each task the best cell, the best ordinary beta-VAE, and whether the former is really better."""

import dataclasses
import functools
import shlex

import numpy as np

from utils.config import FLAGS, Config, fields_of, kind_of
from utils.errors import UserError
from utils.plane.cells import BETAS, TARGETS, Cell, Plane
from utils.plane.gains import UNTESTED, gain, terms_of
from utils.plane.metrics import ACCURACIES, mean_term, metric, score_of, value_of
from utils.plane.mixtures import mixture

ADVICE = {"task": "task", "budget": "budget", "metric": "metric", "unit": "in", "value": "best", "se": "+-"}
ADVICE |= {"beta_y": "beta_y", "beta_z": "beta_z", "kl_y": "R(y|z)", "kl_z": "R(z)", "rate": "R"}
ADVICE |= {"diagonal_value": "ordinary", "diagonal_rate": "at R", "gain": "gain", "low": "95 % from", "high": "to"}
ADVICE |= {"told": "is it better?", "chosen_kl_z": "R(z) of each choice"}  # columns of advice.csv and their headings
EXPLAINED = (
    "ordinary: what beta-VAEs with beta_y = beta_z reach at the same R, two of them mixed where none has it; with less "
    "R where they end, with the least that one has where all have more, and one alone for metrics that do not mix. "
    "Each part of the images and seeds chooses for the rest; figures with an interval are of images on which nothing "
    "was chosen, so they differ a little from eval_results.csv, and from budget to budget."
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
OF_TASKS = [name for names in TASKS.values() for name in names]
LIMITS = {"rate": "R(z) + R(y|z)", "kl_z": "R(z)", "kl_y": "R(y|z)"}


def advice(plane: Plane, budget: dict[str, float] | None = None) -> list[dict]:
    """One row for each task and available metric: the best cell, what ordinary beta-VAEs reach at its rate, the gain.

    `budget` limits rates, in the plane's unit; rows of the cells within it follow those of all. Where runs have terms
    of single images, values and gains are of images on which nothing was chosen, and the gain has an interval.
    """
    names = [name for name in OF_TASKS if name in plane.names]
    terms, rows = terms_of(plane, names), []
    for limits in [{}, budget] if budget else [{}]:
        masks = {n: plane.values(n) <= most for n, most in limits.items()}
        within = np.logical_and.reduce([np.ones(len(plane.cells), bool), *masks.values()])
        masks.pop("rate", None)  # ordinary cells of too large a total rate, mixed, may be within the budget
        few = np.logical_and.reduce([plane.diagonal, *masks.values()])
        text = ", ".join(f"{LIMITS[n]} <= {most:g} {plane.unit}" for n, most in limits.items())
        for task, name in ((task, name) for task, of_task in TASKS.items() for name in of_task if name in names):
            best = plane.best(name, within)
            if best is None:
                continue
            cell, value = plane.cells[best], float(plane.values(name)[best])
            row = {"task": task, "budget": text, "metric": name, "unit": plane.unit_of(name), "value": value}
            row |= plane.shown(cell.median, (*BETAS, "kl_y", "kl_z", "rate"))
            row |= {n: cell.settings.get(n) for n in plane.differing}
            row["command"] = training(cell) if plane.unfolded[best] else ""
            rows.append(row | _compared(plane, name, terms[name], within, few, best))
    return rows


def _compared(plane: Plane, name: str, terms: list, within: np.ndarray, few: np.ndarray, best: int) -> dict:
    """What the advice says of the best cell of those within a budget against a few ordinary ones, both masks (N,)."""
    unit, values, rates = plane.scale(name), plane.values(name), plane.values("rate")
    among, few = within & np.isfinite(values), few & np.isfinite(values)
    row = gain(name, terms, [cell.seeds for cell in plane.cells], among, few, rates)
    if row:
        row |= {n: unit * row[n] for n in ("value", "se", "gain", "low", "high", "diagonal_value")}
        rates_z = plane.values("kl_z")[row["chosen"]]
        row["chosen_kl_z"] = " to ".join(
            dict.fromkeys(f"{float(f'{v:.3g}'):g}" for v in (rates_z.min(), rates_z.max()))
        )
    elif few.any():
        means = mean_term(name, values)
        weights = mixture(name, rates, np.where(few, score_of(name, means), np.nan), rates[best])
        mean, rate = (float(sum(w * v[i] for i, w in weights.items())) for v in (means, rates))
        row = {"diagonal_rate": rate, "diagonal_value": float(value_of(name, np.array(mean))), "told": UNTESTED}
        row["gain"] = metric(name).better * (float(values[best]) - row["diagonal_value"])
    if row:
        row["gain"] = round(row["gain"], 12) + 0.0  # never -0
    return row


def training(cell: Cell) -> str:
    """The command that trains a cell on its own: one of a grid as it was trained, with all of its seeds.

    Empty if its settings are not those of a training any more, or it started from other weights.
    """
    unfolded = cell.settings.get("multi_rate") == "True"
    # a multi-rate model warms up another rate than its cells; no_warmup follows from warmup_epochs
    unused = ("multi_rate", "no_warmup", "warmup_epochs") if unfolded else ("multi_rate", "no_warmup")
    names = [n for n in fields_of("model", "training", "data", "name") if n in FLAGS and n not in unused]
    flags = _flags(tuple((n, cell.settings[n]) for n in names if cell.settings.get(n)))
    if flags is None or (cell.settings.get("init_from") and not unfolded):
        return ""
    words, searched = list(flags), any(cell.settings.get(rate) for rate in TARGETS.values())
    for name in BETAS:  # those that were searched have more digits than they are known to
        beta = float(f"{cell.median[name]:.6g}") if unfolded or searched else cell.median[name]
        words += [f"--{name}", f"{beta}"] if beta != getattr(Config, name) else []
    seeds = [seed for seed in dict.fromkeys(cell.seeds) if seed.isdecimal()]
    words += ["--seed", *seeds] if seeds not in ([], [str(Config.seed)]) else []
    return shlex.join(["python", "train.py", *words])


@functools.lru_cache(maxsize=64)  # the same for all cells of a grid
def _flags(texts: tuple[tuple[str, str], ...]) -> tuple[str, ...] | None:
    """The flags of a training with these settings that are not the default; None if there can be none."""
    kinds = {field.name: kind_of(field) for field in dataclasses.fields(Config)}
    try:
        settings = {k: text == "True" if kinds[k] is bool else kinds[k](text) for k, text in texts}
        config = Config(**settings)
        for name in list(settings):
            fewer = {k: v for k, v in settings.items() if k != name}
            if Config(**fewer) == config:
                settings = fewer
    except (UserError, ValueError):  # of data that is not there any more
        return None
    return tuple(w for k, v in settings.items() for w in ([f"--{k}"] if v is True else [f"--{k}", f"{v}"]))


def commands(rows: list[dict]) -> list[dict[str, str]]:
    """The commands of the advice, each once, with the metrics that it is for."""
    distinct = {}
    for row in rows:
        if row["command"]:
            distinct.setdefault(row["command"], {})[row["metric"]] = None
    return [{"metrics": ", ".join(names), "command": command} for command, names in distinct.items()]


def headings_of(plane: Plane) -> dict[str, str]:
    """Columns and headings of the advice, including the settings in which the plane's cells differ."""
    rates = {n: f"{ADVICE[n]} ({plane.unit})" for n in ("kl_y", "kl_z", "rate", "diagonal_rate", "chosen_kl_z")}
    return ADVICE | rates | {name: name for name in plane.differing}
