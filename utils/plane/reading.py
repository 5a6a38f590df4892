"""A batch's eval_results.csv as a Plane, with notes on what is missing or left out."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from models.tables import COLLAPSED
from utils.errors import UserError
from utils.evaluation.metrics import STEP_OF, columns_of, conditions_of, read_metrics
from utils.files import digest_of
from utils.plane.cells import BETAS, OF_CELL, OF_DATA, SATURABLE, SETTINGS, TARGETS, Cell, Plane, number
from utils.plane.metrics import METRICS, metric
from utils.runs import Run


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV's rows, also if a spreadsheet saved it. Raises UserError if unreadable."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        if separator != ",":
            text = re.sub(r"(?<=\d),(?=\d)", ".", text)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    except (OSError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read ({e}); eval_beta_grid.py writes it") from e
    digests = {row.get("data_digest") for row in rows} - {None, ""}
    for row in rows:
        row |= {n: row[n].capitalize() for n in SETTINGS if row.get(n) in ("TRUE", "FALSE")}
        row["run"] = row.get("run") or "?"
        if len(digests) == 1:  # runs of earlier versions have none
            row["data_digest"] = next(iter(digests))
    return rows


def read_plane(path: Path, unit: str = "nats") -> Plane:
    """Reads a batch's eval_results.csv. Raises UserError if it is unreadable or without rates."""
    folder, rows, cells = path.parent, read_rows(path), {}
    metrics = {row["run"]: _read(read_metrics, folder / row["run"]) for row in rows}
    stale = [row for row in rows if _is_stale(folder / row["run"], row, metrics[row["run"]])]
    rated = [row for row in rows if not any(math.isnan(number(row.get(n))) for n in (*BETAS, "kl_y", "kl_z"))]
    without = [row for row in rows if row not in rated and row not in stale]
    rows = [row for row in rated if row not in stale]
    of_stale = f"{_names(stale)} left out: not as they were evaluated; repeat eval_beta_grid.py"
    if not rows:
        raise UserError(
            f"{path}: {of_stale if stale else 'no run has rates yet; run eval_beta_grid.py (step 1) first'}"
        )
    shorter = _continued(rows, folder)
    rows = [row for row in rows if row not in shorter]
    conditions, notes = _conditions(rows, metrics)
    for row, of_row in zip(rows, conditions, strict=True):
        # of searched betas each seed has others
        key = row | {beta: None for beta, rate in TARGETS.items() if row.get(rate)}
        cells.setdefault(tuple(key.get(name) for name in OF_CELL), []).append((row, of_row))
    if shorter:
        notes.append(f"{_names(shorter)} left out: the longest of each cell is shown, which continues them")
    notes += [of_stale] if stale else []
    plane = Plane([_cell(*zip(*of_cell, strict=True)) for of_cell in cells.values()], folder=folder, unit=unit)
    plane.notes += [*notes, *_notes(plane, without)]
    return plane


def _read(read: Callable[[Path], dict], run: Path) -> dict:
    """What a file of a run tells; empty if it is not there, or damaged."""
    try:
        return read(run)
    except UserError:
        return {}


def _is_stale(folder: Path, row: dict[str, str], metrics: dict) -> bool:
    """Whether a run was trained or evaluated again since its row was written."""
    weights = digest_of(folder / "vae.pth")
    pairs = [(number(row.get(name)), metrics[name]) for name in ("ll", "kl_y", "kl_z") if name in metrics]
    other = any(not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs if not math.isnan(a))
    return other or None not in (weights, metrics.get("weights")) and weights != metrics["weights"]


def _continued(rows: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """The rows of runs that longer ones continue; of epochs that were trained anew, for comparison, all stay.

    The sessions that trained a run are the first of one that continues it.
    """
    alike, shorter = {}, []
    for row in rows:
        settings = (row.get(name) for name in (*OF_CELL, "seed") if name != "num_epochs")
        alike.setdefault(tuple(settings), []).append(row)
    for group in (group for group in alike.values() if len(group) > 1):
        results = [_read(lambda path: Run.open(path).result, folder / row["run"]) for row in group]
        made = [result.get("sessions", []) for result in results]
        for row, sessions in zip(group, made, strict=True):
            longer = [other for other in made if len(other) > len(sessions) > 0]
            shorter += [row] if any(other[: len(sessions)] == sessions for other in longer) else []
    return shorter


def _conditions(rows: list[dict[str, str]], metrics: dict[str, dict]) -> tuple[list[dict[str, str]], list[str]]:
    """What each row's steps were computed with, by step, and notes; `metrics` are those of runs by name.

    Of a data set's rows, those computed otherwise than most lose the step's values.
    """
    conditions, notes, of_data = [{} for _ in rows], [], [tuple(map(row.get, OF_DATA)) for row in rows]
    # the beginning of the digest of the first classifier behind each step
    classifiers = [metrics[row["run"]].get("classifiers", {}) for row in rows]
    for step in dict.fromkeys(STEP_OF.values()):
        columns, digests = columns_of(step), {of_run[step][:8] for of_run in classifiers if step in of_run}
        there = [i for i, row in enumerate(rows) if any(map(row.get, columns))]
        for i in there:
            words = [f"{name} {rows[i][name]}" for name in conditions_of(step) if rows[i].get(name)]
            # old runs have none
            digest = next(iter(digests)) if len(digests) == 1 else classifiers[i].get(step, "")[:8]
            conditions[i][step] = ", ".join(words + [f"classifier {digest}"] * bool(digest))
        counts = Counter((of_data[i], conditions[i][step]) for i in there).most_common()
        usual = {data: text for (data, text), _ in reversed(counts)}
        for text in dict.fromkeys(text for (data, text), _ in counts if text != usual[data]):
            left_out = [i for i in there if conditions[i][step] == text != usual[of_data[i]]]
            why = f"computed with {text or 'less'}, others with {usual[of_data[left_out[0]]] or 'less'}"
            notes.append(f"{step} of {_names([rows[i] for i in left_out])} left out: {why}")
            for i in left_out:
                rows[i] |= dict.fromkeys(columns, "")
    return conditions, notes


def _names(rows: list[dict[str, str]]) -> str:
    """How many runs these are, and the names of the first."""
    names = [row["run"] for row in rows]
    return f"{len(rows)} run(s) ({', '.join(names if len(rows) <= 3 else [*names[:3], '...'])})"


def _cell(rows: tuple[dict[str, str], ...], conditions: tuple[dict[str, str], ...]) -> Cell:
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
    merged = {step: text for of_run in conditions for step, text in of_run.items()}
    return Cell(settings, runs, tuple(repeats), seeds, merged)


def _notes(plane: Plane, without: list[dict[str, str]]) -> Iterator[str]:
    """What is missing, and what figures cannot show; `without` are the rows without rates."""
    cells = len(plane.cells)
    for status in sorted({row.get("status") or "" for row in without}):
        runs = [row for row in without if (row.get("status") or "") == status]
        yield f"{_names(runs)} left out, without rates: {status or 'without status'}"
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
    missing = {}
    for name in (name for name in METRICS if not saturated.get(name)):
        missing.setdefault(int(np.isnan(plane.values(name)).sum()), []).append(name)
    for count in sorted(missing.keys() - {0, cells}):
        yield f"missing in {count} of {cells} cells: {', '.join(missing[count])}"
