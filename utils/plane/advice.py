"""The advice: for each task the best cell, the best ordinary beta-VAE, and whether the former is really better."""

import dataclasses
import functools
import math
import shlex

import numpy as np

from utils.config import FLAGS, Config, kind_of
from utils.errors import UserError
from utils.plane.cells import ASKED, BETAS, Cell, Plane
from utils.plane.gains import gain
from utils.plane.metrics import ACCURACIES, mean_of, metric, score_of, value_of
from utils.plane.mixtures import mixture
from utils.plane.paired import UNTESTED, terms_of

ADVICE = {  # columns of the advice and their headings
    "task": "task",
    "budget": "budget",
    "metric": "metric",
    "unit": "in",
    "value": "best",
    "se": "+-",
    "beta_y": "beta_y",
    "beta_z": "beta_z",
    "kl_y": "R(y|z)",
    "kl_z": "R(z)",
    "rate": "R",
    "diagonal_value": "ordinary",
    "diagonal_rate": "at R",
    "gain": "gain",
    "low": "95 % from",
    "high": "to",
    "told": "is it better?",
    "chosen_kl_z": "R(z) of each choice",
}
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
LIMITS = {"rate": "R(z) + R(y|z)", "kl_z": "R(z)", "kl_y": "R(y|z)"}


def advice(plane: Plane, budget: dict[str, float] | None = None, terms: dict | None = None) -> list[dict]:
    """One row for each task and available metric: the best cell, what ordinary beta-VAEs reach at its rate, the gain.

    `budget` limits the rates of the cells considered, in the plane's unit: {"rate": 20.0, "kl_z": 5.0}. The best cell
    is that of all test images; where `terms` (see `terms_of`) allow it, the two figures are of images on which nothing
    was chosen, and the gain has an interval.
    """
    within, limits, budget = np.ones(len(plane.cells), bool), [], budget or {}
    ordinary = plane.diagonal  # those of too large a total rate, mixed, may be within the budget
    for name, most in budget.items():
        within &= plane.values(name) <= most
        ordinary = ordinary & ((plane.values(name) <= most) | (name == "rate"))
        limits.append(f"{LIMITS[name]} <= {most:g} {plane.unit}")
    rows, seeds, rates, terms = [], [cell.seeds for cell in plane.cells], plane.values("rate"), terms or {}
    for task, name in ((task, name) for task, names in TASKS.items() for name in names):
        best = plane.best(name, within)
        if best is None:
            continue
        cell, unit, values = plane.cells[best], plane.scale(name), plane.values(name)
        row = {"task": task, "budget": ", ".join(limits), "metric": name, "unit": plane.unit_of(name)}
        row |= {n: plane.scale(n) * cell.median[n] for n in ("beta_y", "beta_z", "kl_y", "kl_z", "rate")}
        row |= {n: cell.settings.get(n) for n in plane.differing} | {"value": float(values[best])}
        row["command"] = training(cell) if plane.unfolded[best] else ""
        few = ordinary & np.isfinite(values)
        tested = gain(name, terms[name], seeds, within & np.isfinite(values), few, rates) if name in terms else None
        if tested:
            row |= {n: unit * getattr(tested, n) for n in ("value", "se", "gain", "low", "high")}
            row |= {"diagonal_value": unit * tested.other, "diagonal_rate": tested.rate, "told": tested.told}
            row["chosen_kl_z"] = span(plane.values("kl_z")[[*tested.chosen]])
        elif few.any():
            means = mean_of(name, values)
            way = mixture(name, rates, np.where(few, score_of(name, means), math.nan), rates[best])
            mean, row["diagonal_rate"] = (float(sum(w * v[i] for i, w in way.items())) for v in (means, rates))
            row["diagonal_value"], row["told"] = float(value_of(name, np.array(mean))), UNTESTED
            row["gain"] = metric(name).better * (row["value"] - row["diagonal_value"])
        if "gain" in row:
            row["gain"] = round(row["gain"], 12) + 0.0  # never -0
        rows.append(row)
    return rows


def span(values: np.ndarray) -> str:
    """The least and the largest of some values, as text; of equal ones, that."""
    ends = [f"{float(f'{v:.3g}'):g}" for v in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def terms_for(plane: Plane) -> dict:
    """The terms of single images of all metrics that the advice is about."""
    return terms_of(plane, [name for names in TASKS.values() for name in names if name in plane.names])


def training(cell: Cell) -> str:
    """The command that trains a cell on its own: one of a grid as it was trained, with all of its seeds.

    Empty if its settings are not those of a training any more, or it started from other weights.
    """
    unfolded = cell.settings.get("multi_rate") == "True"
    found = unfolded or any(cell.settings.get(rate) for rate in ASKED.values())
    left = (*BETAS, "seed", *["warmup_epochs"] * unfolded)  # a multi-rate model warms up another rate than its cells
    flags = _flags(tuple((k, v) for k, v in cell.settings.items() if v and k in FLAGS and k not in left))
    if flags is None or (cell.settings.get("init_from") and not unfolded):
        return ""
    words = list(flags)
    for name in BETAS:  # those that were found have more digits than they are known to
        beta = float(f"{cell.median[name]:.6g}") if found else cell.median[name]
        words += [f"--{name}", f"{beta}"] if beta != getattr(Config, name) else []
    seeds = [seed for seed in dict.fromkeys(cell.seeds) if seed.isdecimal()]
    words += ["--seed", *seeds] if seeds not in ([], [str(Config.seed)]) else []
    return shlex.join(["python", "train.py", *words])


@functools.lru_cache(maxsize=64)  # the same for all cells of a grid
def _flags(settings: tuple[tuple[str, str], ...]) -> tuple[str, ...] | None:
    """The flags of a training with these settings that are not the default; None if there can be none."""
    texts = {name: text for name, text in settings if name not in ("no_warmup", "multi_rate")}
    kinds = {f.name: kind_of(f) for f in dataclasses.fields(Config) if f.name in FLAGS}
    try:
        given = {k: text == "True" if kinds[k] is bool else kinds[k](text) for k, text in texts.items()}
        config = Config(**given)
        for name in list(given):  # only what is not the default
            fewer = {k: v for k, v in given.items() if k != name}
            if Config(**fewer) == config:
                given = fewer
    except (UserError, ValueError):  # of data that is not there any more
        return None
    return tuple(w for k, v in given.items() for w in (f"--{k}", *([] if v is True else [f"{v}"])))


def commands(advised: list[dict]) -> list[dict[str, str]]:
    """The commands of the advice, each once, with the metrics that it is for."""
    distinct = {}
    for row in advised:
        if row["command"]:
            distinct.setdefault(row["command"], []).append(row["metric"])
    return [{"metrics": ", ".join(dict.fromkeys(names)), "command": command} for command, names in distinct.items()]


def headings_of(plane: Plane) -> dict[str, str]:
    """Columns and headings of the advice, including the settings in which the plane's cells differ."""
    rates = {n: f"{ADVICE[n]} ({plane.unit})" for n in ("kl_y", "kl_z", "rate", "diagonal_rate", "chosen_kl_z")}
    return ADVICE | rates | {name: name for name in plane.differing}
