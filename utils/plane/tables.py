"""Tables of cells, and of the rates that metrics go with; how a table is written."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from utils.evaluation.probes import standard_error
from utils.files import to_csv, write_text
from utils.plane.cells import BETAS, Plane
from utils.plane.drawing import Output
from utils.plane.gains import errors
from utils.plane.metrics import metric

ROUGH = ("se", "gain", "low", "high")  # of errors and differences, two digits say all
RATES = {"kl_z": "R(z)", "kl_y": "R(y|z)", "rate": "R", "kl_z_given_rate": "R(z) at equal R"}
DRIVERS = {"metric": "metric", "n": "cells", "seeds": "seeds"}  # headings of drivers.csv
for _name, _label in RATES.items():  # R = R(z) + R(y|z)
    DRIVERS |= {_name: f"with {_label}", f"{_name}_se": f"+- of {_label}"}
LEAST_CELLS = 4  # of fewer, ranks say nothing
ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # of LaTeX
ESCAPES |= {c: rf"\{c}" for c in "&%$#_{}"} | {c: f"${c}$" for c in "<>|"}


class Table(NamedTuple):
    """Rows by column, the columns' headings, and the name of its files, if it is written."""

    rows: list[dict]
    headings: dict[str, str]
    file: str = ""

    def texts(self) -> dict[str, list]:
        """The columns that are not empty, their heads, kinds ("text", "number") and lines."""
        columns = [n for n in self.headings if any(row.get(n) not in (None, "") for row in self.rows)]
        is_text = [any(isinstance(row.get(n), str) for row in self.rows) for n in columns]
        kinds = ["text" if of_column else "number" for of_column in is_text]
        lines = [[text_of(row, n) for n in columns] for row in self.rows]
        return {"columns": columns, "head": [self.headings[n] for n in columns], "kinds": kinds, "lines": lines}

    def markdown(self) -> str:
        """The table in Markdown."""
        texts = self.texts()
        lines = [[t.replace("|", "\\|") for t in line] for line in (texts["head"], *texts["lines"])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        lines = [map(str.ljust, line, widths) for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def latex(self) -> str:
        """For LaTeX with booktabs: three significant digits, errors behind their values."""
        texts = self.texts()
        kinds = dict(zip(texts["columns"], texts["kinds"], strict=True))
        kinds.pop("run", None)
        errors = {a: b for a, b in pairwise(kinds) if self.headings[b].startswith("+-")}
        columns = [n for n in kinds if n not in errors.values()]
        lines = [[_escaped(self.headings[n]) for n in columns]]
        lines += [[_latex(row, n, row.get(errors.get(n))) for n in columns] for row in self.rows]
        head, *lines = (rf"{' & '.join(line)} \\" for line in lines)
        begin = rf"\begin{{tabular}}{{{''.join('l' if kinds[n] == 'text' else 'r' for n in columns)}}}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""])

    def write(self, out: Output) -> None:
        """Writes the table as CSV and Markdown, and for LaTeX if that is among the formats."""
        write_text(out.folder / f"{self.file}.csv", to_csv(self.rows, self.headings))
        write_text(out.folder / f"{self.file}.md", self.markdown())
        tex = out.folder / f"{self.file}.tex"
        tex.unlink(missing_ok=True)
        if "tex" in out.formats:
            write_text(tex, self.latex())


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
    return text.translate(str.maketrans(ESCAPES))


def text_of(row: dict, name: str) -> str:
    """A row's number to four digits, or two of ROUGH ones, a text unchanged, and "" for None."""
    value, digits = row.get(name), 2 if name in ROUGH else 4
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)


def cells_of(plane: Plane, names: Sequence[str]) -> list[dict]:
    """What a figure of cells shows: each one's medians with `errors`, and its runs where there are several."""
    columns, rows = dict.fromkeys((*BETAS, "kl_z", "kl_y", "rate", *names)), []
    of_medians = {name: errors(plane, name) for name in names}
    for i, cell in enumerate(plane.cells):
        settings = {n: cell.settings.get(n) for n in plane.differing}
        several = len(cell.runs) > 1
        lines = [("median" if several else "run", " ".join(cell.runs), cell.median)]
        if several:
            lines += [("seed", *run) for run in zip(cell.runs, cell.repeats, strict=True)]
        for what, runs, values in lines:
            row = {"what": what, "runs": runs, **settings}
            for n in (n for n in columns if n in values):
                row[n] = plane.scale(n) * values[n]
                if what != "seed" and n in of_medians and math.isfinite(of_medians[n][i]):
                    row[f"{n}_se"] = float(of_medians[n][i])
            rows.append(row)
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
