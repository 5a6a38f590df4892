"""Evaluates a batch: finds and opens its runs, runs the steps, collects the results, lists the failures."""

import dataclasses
import sys
from pathlib import Path

from models.stack import TERMS
from utils.cli import batch_folder
from utils.config import Config
from utils.distributed import is_first, progress
from utils.errors import UserError, nearest
from utils.evaluation.fits import run_probes
from utils.evaluation.steps import STEPS
from utils.evaluation.subject import PATIENCE, Bench, Subject, can_do, is_done, listed, metrics_of, record
from utils.files import to_csv, write_text
from utils.runs import Run, locked, runs_in

CONFIG_COLUMNS = [field.name for field in dataclasses.fields(Config)]
METRIC_COLUMNS = [column for step in STEPS.values() for column in step.columns]
TRAIN_COLUMNS = [f"train_{name}" for name in TERMS]


def find_runs(runs_dir: str, batch: str) -> tuple[list[Run], dict[Path, str]]:
    """The runs of a batch that are to be evaluated, and what is wrong with others, by path.

    Raises UserError, listing the existing batches, if there are none.
    """
    root, folder = Path(runs_dir), batch_folder(runs_dir, batch)
    runs, problems = runs_in(folder)
    runs = [run for run in runs if not run.config.is_conditioned]
    if not runs and not problems:
        batches = (
            sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "classifiers") if root.is_dir() else []
        )
        raise UserError(f"--run_batch_name: no runs in {folder}{nearest(batch, batches) if batches else ''}")
    return runs, problems


def open_subject(run: Run, bench: Bench) -> Subject:
    """A run under evaluation. Raises UserError if it is unfinished or failed."""
    if run.status != "finished":
        raise UserError(f"{run.path}: {run.status}; only finished runs are evaluated")
    return Subject(run, bench)


def open_subjects(runs: list[Run], bench: Bench, problems: dict[Path, str]) -> list[Subject]:
    """Opens the runs that can be evaluated; records the others in `problems`."""
    subjects = []
    for run in runs:
        with listed(problems, run.path):
            subjects.append(open_subject(run, bench))
    return subjects


def require_classifiers(subjects: list[Subject], steps: list[str]) -> None:
    """Raises UserError if a classifier that a step needs is missing, before hours of work rather than after."""
    if any(STEPS[name].classifier for name in steps):
        for subject in {s.config.data_name: s for s in reversed(subjects)}.values():
            subject.bench.classifier_of(subject.config)


def run_steps(subjects: list[Subject], steps: list[str], args, problems: dict[Path, str]) -> None:
    """Computes the steps run by run, then the probes of all runs together; records failures in `problems`."""
    each = [name for name in steps if STEPS[name].compute is not None]
    for subject in progress(subjects if each else [], unit="run"):
        with listed(problems, subject.run.path):
            for name in each:
                run_step(subject, name, args.force)
        subject.forget()
    for name in set(steps) - set(each):
        run_probes([s for s in subjects if s.run.path not in problems], STEPS[name], args, problems)


def run_step(subject: Subject, name: str, force: bool) -> None:
    """Computes a step of one run, unless its result is up to date; with `force`, always."""
    step = STEPS[name]
    if can_do(subject, step) and (force or not is_done(subject, step)):
        record(subject, step, step.compute(subject))


def gather(runs_dir: str, batch: str) -> Path:
    """Writes eval_results.csv, one row per run, from the runs' JSON files; returns its path."""
    columns = ["run", "status", *CONFIG_COLUMNS, *METRIC_COLUMNS, *TRAIN_COLUMNS]
    path = Path(runs_dir) / batch / "eval_results.csv"
    with locked(path.parent, PATIENCE):
        runs, problems = find_runs(runs_dir, batch)
        rows = {}
        for run in runs:
            with listed(problems, run.path):
                row = {"status": run.status, **vars(run.config), **metrics_of(run)}
                row["dataset"] = Path(run.config.dataset).name  # wherever it lies
                rows[run.path] = row | {f"train_{n}": value for n, value in run.result.get("train", {}).items()}
        rows |= {folder: {"status": "broken"} for folder in problems}
        write_text(path, to_csv([{"run": folder.name, **rows[folder]} for folder in sorted(rows)], columns))
    return path


def finish(runs_dir: str, batch: str, problems: dict[Path, str], n: int) -> int:
    """Writes eval_results.csv and lists the runs that this process could not evaluate; returns the exit status."""
    where = gather(runs_dir, batch) if is_first() else Path(runs_dir) / batch / "eval_results.csv"
    print(f"\n{n - len(problems)} of {n} runs evaluated: {where}")
    for problem in problems.values():
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0
