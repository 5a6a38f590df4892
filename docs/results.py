"""Makes docs/results.png and docs/results/README.md, the figure and the tables behind results.md.

python docs/results.py                  from the files in docs/results/, which it checks
python docs/results.py runs/results     from an evaluated batch, whose files it puts there
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import UserError, run_script  # noqa: E402
from utils.evaluation.probes import standard_error  # noqa: E402
from utils.files import to_csv, write_atomic, write_text  # noqa: E402
from utils.plane.advice import ADVICE, advice  # noqa: E402
from utils.plane.cells import Cell, Plane, number  # noqa: E402
from utils.plane.drawing import styled  # noqa: E402
from utils.plane.excess import EXCESS, areas, excess_rows, share  # noqa: E402
from utils.plane.figures import rate_planes  # noqa: E402
from utils.plane.metrics import metric  # noqa: E402
from utils.plane.reading import read_plane, read_rows  # noqa: E402
from utils.plane.tables import DRIVERS, RATES, Table, drivers  # noqa: E402

FOLDER, BUDGETS = ROOT / "docs" / "results", (10.0, 20.0, 40.0)
SHOWN = [
    *("psnr", "nelbo", "svm_rbf_acc", "svm_rbf_acc_sample", "mi_z_low"),
    *("svm_rbf_acc_y", "svm_linear_acc_y", "svm_rbf_acc_sample_y", "mi_y_low", "is_mean", "fid_classifier"),
]
DRAWN = ["psnr", "is_mean", "svm_rbf_acc", "svm_rbf_acc_y"]
COMPARED = {"loss": 1, "kl_z": 1, "kl_y": 1, "psnr": 2, "is_mean": 2, "fid_classifier": 2}  # digits
TESTED = {"se", "gain", "low", "high", "told", "chosen_kl_z"}  # by single images, which are not kept


def kinds_of(plane: Plane) -> dict[str, Plane]:
    """The cells by how they were trained."""
    refined = np.array([bool(cell.settings.get("refine_epochs")) for cell in plane.cells])
    masks = {"unfolded": plane.unfolded & ~refined, "refined": refined, "separate": ~plane.unfolded & ~refined}
    return {kind: plane.where(mask) for kind, mask in masks.items() if mask.any()}


def files_of(plane: Plane) -> dict[str, Table]:
    """The files behind the page, as plot_eval.py makes them; the advice is of unfolded cells."""
    kinds = kinds_of(plane)
    of_kinds = [{"cells": kind} | row for kind, cells in kinds.items() for row in drivers(cells, SHOWN)]
    return {
        "advice": Table(advice(kinds["unfolded"], *({"rate": most} for most in BUDGETS)), ADVICE),
        "drivers": Table(of_kinds, {"cells": "cells"} | DRIVERS),
        "excess": Table(excess_rows(plane), EXCESS),
    }


def check(file: str, table: Table) -> None:
    """Raises UserError where a committed file is not what follows from eval_results.csv."""
    kept, columns = rows_of(file), [name for name in table.headings if file == "drivers" or name not in TESTED]
    if len(kept) != len(table.rows):
        raise UserError(f"{file}.csv: {len(kept)} rows, by eval_results.csv {len(table.rows)}")
    for line, (of_file, row) in enumerate(zip(kept, table.rows, strict=True), 2):
        for name in columns:
            text, expected = of_file[name], "" if row.get(name) is None else str(row[name])
            if text != expected and not np.isclose(number(text), number(expected), rtol=1e-6, atol=1e-9):
                raise UserError(f"{file}.csv, line {line}: {name} is {text!r}, by eval_results.csv {expected!r}")


def rows_of(file: str) -> list[dict[str, str]]:
    """The rows of a committed file."""
    return read_rows(FOLDER / f"{file}.csv")


def with_error(value: float, error: float, digits: int) -> str:
    """A number and its standard error, where they are known."""
    texts = [f"{number:.{digits}f}" for number in (value, error) if np.isfinite(number)]
    return " +- ".join(texts)


def mean_of(cell: Cell, name: str) -> tuple[float, float]:
    """A metric's mean over a cell's seeds, and its standard error; of one seed over test images, or classifiers."""
    values = np.array([row.get(name, np.nan) for row in cell.repeats])
    several = len(values) > 1
    return float(values.mean()), standard_error(values) if several else cell.median.get(f"{name}_se", np.nan)


def correlations() -> list[dict[str, str]]:
    """Of each metric with the rates, a line for each kind of training."""
    lines = []
    for row in rows_of("drivers"):
        line = {"metric": metric(row["metric"]).label, "cells": f"{row['n']} {row['cells']}", "seeds": row["seeds"]}
        lines.append(line | {v: with_error(number(row[k]), number(row[f"{k}_se"]), 2) for k, v in RATES.items()})
    return lines


def best_cells() -> list[dict[str, str]]:
    """Of each task, metric and budget, with the tested gain."""
    lines = []
    for row in (row for row in rows_of("advice") if row["metric"] in SHOWN):
        of = {name: number(row[name]) for name in ("kl_z", "kl_y", "value", "se", "gain", "low", "high")}
        line = {"task": row["task"], "metric": metric(row["metric"]).label, "budget": row["budget"] or "none"}
        line |= {"R(z), R(y|z)": f"{of['kl_z']:.1f}, {of['kl_y']:.1f}", "best": with_error(of["value"], of["se"], 3)}
        line |= {"gain": f"{of['gain']:.3f}", "95 %": f"{of['low']:.3f} to {of['high']:.3f}".replace("nan", "")}
        lines.append(line | {"better?": row["told"], "R(z) of choices": row["chosen_kl_z"]})
    return lines


def beside_separate(plane: Plane) -> list[dict[str, str]]:
    """Cells that were trained separately, and others at their betas."""
    lines = []
    for at, of_cell in by_betas(plane).items():
        for kind, cell in of_cell.items():
            line = {"beta_y, beta_z": at, "cells": kind, "seeds": str(len(cell.runs))}
            numbers = {metric(n).label: with_error(*mean_of(cell, n), digits) for n, digits in COMPARED.items()}
            lines.append(line | numbers)
    return lines


def above_separate(plane: Plane) -> list[dict[str, str]]:
    """By how much others are above them: the mean over cells with its error, and the range."""
    lines, cells = [], by_betas(plane).values()
    for kind in sorted(next(iter(cells)).keys() - {"separate"}):
        line = {"cells": kind}
        for name, digits in COMPARED.items():
            more = np.array([mean_of(of[kind], name)[0] - mean_of(of["separate"], name)[0] for of in cells])
            mean = with_error(more.mean(), standard_error(more), digits)
            line[metric(name).label] = f"{mean}, {more.min():+.{digits}f} to {more.max():+.{digits}f}"
        lines.append(line)
    return lines


def by_betas(plane: Plane) -> dict[str, dict[str, Cell]]:
    """The cells by betas and kind, at betas of separate ones."""
    cells = {}
    for kind, of_kind in kinds_of(plane).items():
        for cell in of_kind.cells:
            cells.setdefault(f"{cell.median['beta_y']:.3g}, {cell.median['beta_z']:.3g}", {})[kind] = cell
    return {at: of_cell for at, of_cell in cells.items() if "separate" in of_cell}


def of_corners(plane: Plane) -> list[dict[str, str]]:
    """The areas of maps and of separate trainings, by what both were trained with."""
    lines = []
    for (shared, separate), pair in areas(plane).items():
        line = {"map": shared, "separate": separate}
        line |= zip(("area", "of separate"), (with_error(a.mean(), standard_error(a), 0) for a in pair), strict=True)
        lines.append(line | {"share": share(*pair)})
    return lines


def page(plane: Plane) -> str:
    """docs/results/README.md."""
    parts = {
        "Rank correlations of metrics with rates (1: always better at more rate), means over seeds": correlations(),
        "The best unfolded cells, and their gains over ordinary beta-VAEs of equal rate": best_cells(),
        "Cells beside separate trainings: means over seeds; errors of one are over images": beside_separate(plane),
        "By how much these are above separate ones: mean over cells with its error, range": above_separate(plane),
        "Areas of the corners in (R(z), R(y|z)), nats^2": of_corners(plane),
    }
    text = "# The tables behind [results.md](../results.md)\n\nMade by `python docs/results.py` from the files here.\n"
    for heading, rows in parts.items():
        text += f"\n## {heading}\n\n{Table(rows, dict(zip(rows[0], rows[0], strict=True))).markdown()}"
    return text


@styled
def main(argv: list[str]) -> int:
    """Writes the page's tables and figure; returns the exit status."""
    batch = Path(argv[0]) if argv else FOLDER
    plane = read_plane(batch / "eval_results.csv")
    for file, table in files_of(plane).items():
        if argv:
            write_text(FOLDER / f"{file}.csv", to_csv(table.rows, table.headings))
        else:
            check(file, table)
    if argv:
        write_atomic(FOLDER / "eval_results.csv", (batch / "eval_results.csv").read_bytes())
    write_text(FOLDER / "README.md", page(plane))
    figure = rate_planes(kinds_of(plane)["unfolded"], DRAWN).figure
    figure.suptitle("")  # tells how many test images, which the runs say
    figure.savefig(ROOT / "docs" / "results.png")
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
