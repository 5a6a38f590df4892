"""The advice: for each task the best cell, the best ordinary beta-VAE, and whether it is worse."""

import math
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from models.conditioned import SHARING
from models.own import from_copy
from utils.cli import wrapped, wrapped_command
from utils.config import FLAGS, Config, fields_of
from utils.errors import UserError
from utils.plane.cells import BETAS, Cell, Plane
from utils.plane.gains import SPLITS, UNTESTED, errors, gain, reach, terms_of
from utils.plane.metrics import ACCURACIES, mean_term, metric, score_of, value_of
from utils.plane.tables import text_of
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
TASK_OF = {
    "psnr": "reconstruction",
    **dict.fromkeys(ACCURACIES["qz_mu"], "representation, from z"),
    **dict.fromkeys(ACCURACIES["qy_mu"], "representation, from y"),
    **dict.fromkeys(("is_mean", "fid", "fid_classifier"), "generation"),
    "mi_z_low": "information on the label, in z",
    "mi_y_low": "information on the label, in y",
    "nelbo": "likelihood",
}


def advice(plane: Plane, *budgets: dict[str, float]) -> list[dict]:
    """A row for each task, metric and `comparable` cells: the best, what ordinary ones reach, the gain.

    `budgets` limit rates, in the plane's unit; rows of the cells within each follow those of all.
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
    for limits in ({}, *filter(None, budgets)):
        masks = {rate: plane.values(rate) <= most for rate, most in limits.items()}
        within = np.all([np.isfinite(plane.values("rate")), *masks.values()], axis=0)
        masks.pop("rate", None)  # ordinary cells of too large a total, mixed, may be within
        few = np.all([plane.diagonal, *masks.values()], axis=0)
        text = ", ".join(f"{metric(n).label} <= {most:g} {plane.unit}" for n, most in limits.items())
        for name, part in ((n, part) for n in names for part in plane.comparable(n).values()):
            best = plane.best(name, within & part)
            if best is None:
                continue
            cell, (terms, se) = plane.cells[best], of_names[name]
            row = {"task": TASK_OF[name], "budget": text, "metric": name, "unit": plane.unit_of(name)}
            row |= {n: float(plane.values(n)[best]) for n in (*BETAS, "kl_y", "kl_z", "rate")}
            row["value"] = float(plane.values(name)[best])
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

    def ends(of_cells: np.ndarray) -> str:  # to three digits
        return " to ".join(dict.fromkeys(f"{float(f'{v:.3g}'):g}" for v in (of_cells.min(), of_cells.max())))

    means = mean_term(name, values)
    (weights,), _ = reach(name, rates, np.where(few, score_of(name, means), math.nan), rates[[best]])
    row = {"diagonal_rate": float(weights @ rates), "told": UNTESTED}
    row["diagonal_value"] = float(value_of(name, weights @ np.nan_to_num(means)))
    row["gain"] = round(better * (float(values[best]) - row["diagonal_value"]), 9) + 0.0  # never -0
    ordinary = np.sort(rates[few])
    after = np.searchsorted(ordinary, rates[best])
    row["neighbours"] = ends(ordinary[max(after - 1, 0) : after + 1])
    tested = gain(name, terms, [cell.seeds for cell in plane.cells], among, few, rates)
    if tested:
        row |= tested | {n: plane.scale(name) * tested[n] for n in ("gain", "low", "high") if n in tested}
        row["chosen_kl_z"] = ends(plane.values("kl_z")[row["chosen"]])
        if row["told"].startswith("no, worse") and ordinary[0] > rates[best]:
            row["told"] = "unclear: ordinary ones have more rate"
        elif ordinary[-1] < rates[best]:
            row["told"] = "unclear: ordinary ones have less rate"
    return row


def training(cell: Cell, folder: Path | None) -> str:
    """The command that trains a cell of the batch in `folder` separately, with all its seeds.

    Empty if its run is not there any more, or began with other weights.
    """
    path = (folder or Path()) / cell.runs[0]
    try:
        config = Run.open(path).config
    except UserError:
        return ""
    if config.init_from and not config.multi_rate:
        return ""
    # a multi-rate model warms up another rate than its cells; no_warmup follows from warmup_epochs
    unused = {"multi_rate", "refine_epochs", "no_warmup", *(["warmup_epochs"] if config.multi_rate else [])}
    names = [n for n in fields_of("model", "training", "data", "name") if n in {*FLAGS} - unused]
    separate = Config(**{n: getattr(config, n) for n in names})
    if config.multi_rate and config.optimizer == "muon":  # of earlier versions a multiple of --learning_rate
        faster = SHARING[config.sharing].learning_rates[1]
        separate = replace(separate, learning_rate=faster * config.learning_rate)
    words = from_copy(separate.flags(without=(*BETAS, "seed")), config.networks, path)
    for name in BETAS:  # those that were searched have more digits than they are known to
        beta = cell.median[name]
        beta = float(f"{beta:.6g}") if config.multi_rate or config.has_target else beta
        words += [f"--{name}", f"{beta}"] if beta != getattr(Config, name) else []
    seeds = [seed for seed in dict.fromkeys(cell.seeds) if seed.isdecimal()]
    words += ["--seed", *seeds] if seeds not in ([], [str(Config.seed)]) else []
    return shlex.join(["python", "train.py", *words])


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


def print_advice(rows: list[dict], plane: Plane) -> None:
    """Prints rows of the advice, below task, unit, budget and settings, and the commands."""
    unit = f"rates in {plane.unit}"
    lines = [["", unit, "best", "beta_y, beta_z", "R(z), R(y|z)", "gain over ordinary, 95 %", "better?"]]
    for row in rows:
        settings = (f"{n} {row[n]}" for n in plane.differing if row.get(n))
        head = ", ".join(filter(None, (row["task"], row["unit"], row["budget"], *settings)))
        text = partial(text_of, row)
        best = " +- ".join(filter(None, (text("value"), text("se"))))
        gain = text("gain") + (f", {text('low')} to {text('high')}" if text("low") else "")
        pairs = [f"{text(a)}, {text(b)}" for a, b in (BETAS, ("kl_z", "kl_y"))]
        told = re.split(": | that | \\(", text("told"))[0]
        lines.append([head, f"  {text('metric')}", best, *pairs, gain, told])
    widths, of_heads = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)][1:], {}
    for head, *texts in lines:
        of_heads.setdefault(head, []).append("".join(map(str.ljust, texts, widths)).rstrip())
    for head, of_head in of_heads.items():
        print("\n".join(filter(None, (wrapped(head), *of_head))))
    print(wrapped(EXPLAINED))
    for row in commands(rows):
        print("\n" + wrapped(f"To train the best for {row['metrics']} separately:"))
        print(wrapped_command(row["command"]))
