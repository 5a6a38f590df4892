"""Tables of cells, of the rates that metrics go with, of multi-rate cells against separately trained ones."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise, product
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from utils.cli import wrapped
from utils.config import fields_of
from utils.evaluation.probes import standard_error
from utils.files import to_csv, write_text
from utils.plane.cells import BETAS, Cell, Plane
from utils.plane.drawing import Output
from utils.plane.gains import terms_of
from utils.plane.metrics import metric

ROUGH = ("se", "gain", "low", "high")  # of errors and differences, two digits say all
RATES = {"kl_z": "R(z)", "kl_y": "R(y|z)", "rate": "R", "kl_z_given_rate": "R(z) at equal R"}
DRIVERS = {"metric": "metric", "n": "cells", "seeds": "seeds"}  # headings of drivers.csv
for _name, _label in RATES.items():  # R = R(z) + R(y|z)
    DRIVERS |= {_name: f"with {_label}", f"{_name}_se": f"+- of {_label}"}
EXCESS = {  # columns and headings of excess.csv; own_ is of the separately trained cell
    "num_epochs": "epochs, multi-rate", "own_epochs": "separate",
    "optimizer": "optimizer, multi-rate", "own_optimizer": "separate", "beta_y": "beta_y", "beta_z": "beta_z",
    "loss": "loss, multi-rate", "own_loss": "separate", "excess": "excess", "se": "+-",
    "kl_y": "R(y|z), multi-rate", "own_kl_y": "separate", "kl_z": "R(z), multi-rate", "own_kl_z": "separate",
    "psnr": "PSNR, multi-rate", "own_psnr": "separate", "n": "seeds, multi-rate", "own_n": "separate",
}  # fmt: skip
LEAST_CELLS = 4  # of fewer, ranks say nothing


class Table(NamedTuple):
    """Rows by column, the columns' headings, and the name of its files, if it is written."""

    rows: list[dict]
    headings: dict[str, str]
    file: str = ""

    def texts(self) -> dict[str, list]:
        """Head, lines, and kinds, "text" or "number", of the columns that are not empty."""
        values = {n: [row.get(n) for row in self.rows] for n in self.headings}
        columns = [n for n, column in values.items() if set(column) - {None, ""}]
        texts = [any(isinstance(value, str) for value in values[n]) for n in columns]
        lines = [[text_of(row, n) for n in columns] for row in self.rows]
        kinds = ["text" if is_text else "number" for is_text in texts]
        return {"head": [self.headings[n] for n in columns], "kinds": kinds, "lines": lines}

    def markdown(self) -> str:
        """The table in Markdown."""
        texts = self.texts()
        lines = [[t.replace("|", "\\|") for t in line] for line in (texts["head"], *texts["lines"])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        lines = [map(str.ljust, line, widths) for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def latex(self) -> str:
        """The table for LaTeX, with the package booktabs: three significant digits, errors behind their values."""
        there = [n for n in self.headings if any(row.get(n) not in (None, "") for row in self.rows) and n != "run"]
        columns = [n for n in there if not self.headings[n].startswith("+-")]
        errors = {a: b for a, b in pairwise(there) if self.headings[b].startswith("+-")}
        cells = [[_latex(row, n, row.get(errors.get(n))) for n in columns] for row in self.rows]
        head = [_escaped(self.headings[n]) for n in columns]
        lines = [f"{' & '.join(line)} \\\\" for line in (head, *cells)]
        lines = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        kinds = "".join("l" if any(isinstance(row.get(n), str) for row in self.rows) else "r" for n in columns)
        return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", *lines, r"\end{tabular}", ""])

    def write(self, out: Output) -> None:
        """Writes the table as CSV and Markdown, and for LaTeX if that is among the formats."""
        write_text(out.folder / f"{self.file}.csv", to_csv(self.rows, self.headings))
        write_text(out.folder / f"{self.file}.md", self.markdown())
        tex = out.folder / f"{self.file}.tex"
        if "tex" in out.formats:
            write_text(tex, self.latex())
        else:
            tex.unlink(missing_ok=True)


def _latex(row: dict, name: str, error: float | None) -> str:
    value = row.get(name)
    if name == "metric":
        return _escaped(metric(value).label)
    if not isinstance(value, float) or not math.isfinite(value):
        return _escaped("" if value is None else str(value))
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    if error and math.isfinite(error):  # an error shows its first digit
        digits = max(digits, -math.floor(math.log10(error)))
        return rf"${value:.{max(digits, 0)}f} \pm {error:.{max(digits, 0)}f}$"
    return f"${float(f'{value:.3g}'):.{max(digits, 0)}f}$"


def _escaped(text: str) -> str:
    specials = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    specials |= {c: rf"\{c}" for c in "&%$#_{}"} | {c: f"${c}$" for c in "<>|"}
    return text.translate(str.maketrans(specials))


def text_of(row: dict, name: str) -> str:
    """A row's number to four digits, or two of ROUGH ones, a text unchanged, and "" for None."""
    value, digits = row.get(name), 2 if name in ROUGH else 4
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)


def short_advice(rows: list[dict], plane: Plane) -> str:
    """Rows of the advice in 100 columns, below task, unit, budget, and the settings that differ."""
    head = [f"rates in {plane.unit}", "best", "beta_y, beta_z", "R(z), R(y|z)", "gain over ordinary, 95 %", "better?"]
    lines = [head]
    for row in rows:
        text = partial(text_of, row)
        best = " +- ".join(filter(None, (text("value"), text("se"))))
        gain = text("gain") + (f", {text('low')} to {text('high')}" if text("low") else "")
        pairs = [f"{text(a)}, {text(b)}" for a, b in (BETAS, ("kl_z", "kl_y"))]
        told = text("told").partition(":")[0].partition(" that ")[0].partition(" (")[0]
        lines.append([f"  {text('metric')}", best, *pairs, gain, told])
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    first, *lines = ("".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    kinds = [[f"{n} {row[n]}" for n in plane.differing if row.get(n)] for row in rows]
    heads = [(row["task"], row["unit"], row["budget"], *of_row) for row, of_row in zip(rows, kinds, strict=True)]
    tasks = [", ".join(filter(None, texts)) for texts in heads]
    of_tasks = {task: [line for line, of in zip(lines, tasks, strict=True) if of == task] for task in tasks}
    return "\n".join([first, *chain(*([wrapped(task), *of_task] for task, of_task in of_tasks.items()))]) + "\n"


def cells_of(plane: Plane, names: Sequence[str]) -> list[dict]:
    """What a figure of cells shows: each one's medians, and its runs where there are several."""
    columns, rows = dict.fromkeys((*BETAS, "kl_z", "kl_y", "rate", *names)), []
    for cell in plane.cells:
        settings = {n: cell.settings.get(n) for n in plane.differing}
        several = len(cell.runs) > 1
        lines = [("median" if several else "run", " ".join(cell.runs), cell.median)]
        if several:
            lines += [("seed", *run) for run in zip(cell.runs, cell.repeats, strict=True)]
        for what, runs, values in lines:
            shown = {n: plane.scale(n) * values[n] for n in columns if n in values}
            rows.append({"what": what, "runs": runs, **settings, **shown})
    return rows


def drivers(plane: Plane, names: Sequence[str]) -> list[dict]:
    """Spearman's correlations of metrics with rates in each grid; 1 if always better at more rate.

    "R(z) at equal R" is the partial rank correlation with R(z) given R. If all cells of a grid
    share several seeds, the mean over these, with its standard error; else of the cells' medians.
    Metrics equal in all cells are left out.
    """
    rows = []
    for grid in plane.grids.values():
        settings = {name: grid.cells[0].settings.get(name) for name in plane.differing}
        seeds = [s for s in grid.seeds if all(s in cell.seeds for cell in grid.cells)]
        several = len(seeds) > 1

        def of_seeds(name: str) -> np.ndarray:  # (seeds, cells)
            columns = [grid.of_seed(name, s) for s in seeds] if several else [grid.values(name)]  # noqa: B023
            return np.array(columns)

        rates = np.stack([of_seeds(rate) for rate in ("kl_z", "kl_y", "rate")], 1)
        for name in names:
            values = metric(name).better * of_seeds(name)
            by_seed = np.array(list(map(_correlations, rates, values)))  # (seeds, RATES)
            if np.isnan(by_seed).all():
                continue
            n = int(np.isfinite(values).sum(1).min())
            row = {"metric": name, **settings, "n": n, "seeds": len(grid.seeds)}
            for rate, column in zip(RATES, by_seed.T, strict=True):
                if np.isfinite(column).all():  # not of a rate that is the same in all cells
                    row[rate] = float(column.mean())
                    row |= {f"{rate}_se": standard_error(column)} if several else {}
            rows.append(row)
    return rows


def _correlations(rates: np.ndarray, values: np.ndarray) -> list[float]:
    finite = np.isfinite(values)
    if finite.sum() < LEAST_CELLS or np.ptp(values[finite]) == 0:
        return [math.nan] * len(RATES)
    ranks = rankdata([*rates[:, finite], values[finite]], axis=1)
    with np.errstate(invalid="ignore"):  # of a rate that is the same in all cells
        (*_, of_z), (*_, of_y), (z_and_r, *_, of_r), _ = np.corrcoef(ranks)
    variance = (1 - of_r**2) * (1 - z_and_r**2)  # of both, once R is finite
    partial = (of_z - of_r * z_and_r) / math.sqrt(variance) if variance > 1e-9 else math.nan
    return [of_z, of_y, of_r, partial]


def excess_rows(plane: Plane) -> list[dict[str, str | float]]:
    """Every unfolded cell with every separately trained one of the same model, data and betas.

    `excess` is by how many nats the unfolded cell's loss is larger, `se` its standard error over
    seeds and images.
    """
    masks = plane.is_given & [plane.unfolded, ~plane.unfolded]
    pairs = product(*(plane.where(mask).cells for mask in masks))
    return [_row(plane, pair) for pair in pairs if _model(pair[0]) == _model(pair[1])]


def _model(cell: Cell) -> list:
    settings = [cell.settings.get(name) for name in fields_of("model", "data")]
    return settings + [f"{cell.median[name]:.6g}" for name in BETAS]


def _row(plane: Plane, pair: tuple[Cell, Cell]) -> dict[str, str | float]:
    losses = [np.array([row.get("loss", math.nan) for row in cell.repeats]) for cell in pair]
    errors = [standard_error(of_seeds) for of_seeds in losses]
    a, b = terms_of(Plane([*pair], folder=plane.folder), "loss")
    if a is not None and b is not None and a.shape[1] == b.shape[1]:
        errors.append(standard_error(a.mean(0) - b.mean(0)))  # over the images, which they share
    errors = [se for se in errors if math.isfinite(se)]
    row = {name: pair[0].median[name] for name in BETAS}
    row["se"] = math.hypot(*errors) if errors else math.nan
    row["excess"] = float(losses[0].mean() - losses[1].mean())
    for whose, cell, loss in zip(("", "own_"), pair, losses, strict=True):
        row[f"{whose}epochs" if whose else "num_epochs"] = cell.settings.get("num_epochs") or ""
        row[f"{whose}optimizer"] = cell.settings.get("optimizer") or "adam"  # of old tables
        row |= {whose + name: cell.median.get(name) for name in ("kl_y", "kl_z", "psnr")}
        row |= {f"{whose}loss": float(loss.mean()), f"{whose}n": len(cell.runs)}
    return {name: row[name] for name in EXCESS}


def by_trainings(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by what both were trained with, such as ("16 epochs, muon", "8 epochs, adam")."""
    groups = {}
    for row in rows:
        shared = f"{row['num_epochs'] or '?'} epochs, {row['optimizer']}"
        separate = f"{row['own_epochs'] or '?'} epochs, {row['own_optimizer']}"
        groups.setdefault((shared, separate), []).append(row)
    return groups


def print_excess(rows: list[dict]) -> None:
    """Prints, for each pair of trainings, by how much the multi-rate cells are behind or ahead."""
    finite = [row for row in rows if math.isfinite(row["excess"])]
    for (shared, separate), of_both in by_trainings(finite).items():
        excess = [row["excess"] for row in of_both]
        lower = sum(e < 0 for e in excess)
        text = f"multi-rate cells ({shared}) against separately trained ones ({separate}): "
        text += f"loss {np.mean(excess):+.2f} nats on average, {min(excess):+.2f} to {max(excess):+.2f}; "
        print("\n" + wrapped(f"{text}lower in {lower} of {len(excess)} cells"))
