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
from utils.runs import Run, is_conditioned, locked

CONFIG_COLUMNS = [field.name for field in dataclasses.fields(Config)]
METRIC_COLUMNS = [column for step in STEPS.values() for column in step.columns]
TRAIN_COLUMNS = [f"train_{name}" for name in TERMS]


def find_runs(runs_dir: str, batch: str) -> list[Path]:
    """The run folders of a batch. Raises UserError, listing the existing batches, if it has none."""
    root, folder = Path(runs_dir), batch_folder(runs_dir, batch)
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    found = [p for p in found if is_cell(p)]
    if not found:
        batches = (
            sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "classifiers") if root.is_dir() else []
        )
        raise UserError(f"--run_batch_name: no runs in {folder}{nearest(batch, batches) if batches else ''}")
    return found


def is_cell(path: Path) -> bool:
    """Whether a folder in a batch is a run to evaluate: neither figures, nor the model that cells are unfolded from."""
    return path.name != "figures" and not is_conditioned(path)


def open_run(path: Path) -> Run:
    """Opens a run for evaluation. Raises UserError if it is broken, unfinished or failed."""
    run = Run.open(path)
    if run.status != "finished":
        raise UserError(f"{path}: {run.status}; only finished runs are evaluated")
    return run


def open_subjects(paths: list[Path], bench: Bench, problems: dict[Path, str]) -> list[Subject]:
    """Opens the runs that can be evaluated; records the others in `problems`."""
    subjects = []
    for path in paths:
        with listed(problems, path):
            subjects.append(Subject(open_run(path), bench))
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
        rows = []
        for folder in find_runs(runs_dir, batch):
            problems = {}
            row = {"run": folder.name}
            with listed(problems, folder):
                run = Run.open(folder)
                row |= {"status": run.status, **vars(run.config), **metrics_of(run)}
                row["dataset"] = Path(run.config.dataset).name  # wherever it lies
                row |= {f"train_{name}": value for name, value in run.result.get("train", {}).items()}
            rows.append(row | {"status": "broken"} if problems else row)
        write_text(path, to_csv(rows, columns))
    return path


def finish(runs_dir: str, batch: str, problems: dict[Path, str], n: int) -> int:
    """Writes eval_results.csv and lists the runs that this process could not evaluate; returns the exit status."""
    where = gather(runs_dir, batch) if is_first() else Path(runs_dir) / batch / "eval_results.csv"
    print(f"\n{n - len(problems)} of {n} runs evaluated: {where}")
    for problem in problems.values():
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0
