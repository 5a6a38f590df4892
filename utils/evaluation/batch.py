"""Evaluates a batch: finds and opens its runs, runs the steps, collects the results, lists the failures."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from models.stack import TERMS
from utils.cli import batch_folder
from utils.config import Config
from utils.distributed import is_first, progress
from utils.errors import UserError, handled_by, nearest
from utils.evaluation.probes import PROBES, probe
from utils.evaluation.steps import STEPS, bound
from utils.evaluation.subject import PATIENCE, Bench, Step, Subject, is_done, metrics_of, record
from utils.files import to_csv, write_text
from utils.runs import Run, is_conditioned, locked

CONFIG_COLUMNS = [field.name for field in dataclasses.fields(Config)]
METRIC_COLUMNS = [column for step in STEPS.values() for column in step.columns]
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # set to 1 in the workers
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


@contextlib.contextmanager
def listed(problems: dict[Path, str], path: Path) -> Iterator[None]:
    """Records any exception in `problems` under a run's path, so that the evaluation of other runs continues."""
    try:
        yield
    except UserError as e:
        problems[path] = str(e) if str(path) in str(e) else f"{path}: {e}"
    except Exception as e:
        problems[path] = f"{path}: {type(e).__name__}: {' '.join(str(e).split())}"


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
        run_probes([s for s in subjects if s.run.path not in problems], name, args, problems)


def can_do(subject: Subject, step: Step) -> bool:
    """Whether the run's images have the labels that a step needs; a note if they do not."""
    return not step.labels or subject.bench.has_labels(subject.config)


def run_step(subject: Subject, name: str, force: bool) -> None:
    """Computes a step of one run, unless its result is up to date; with `force`, always."""
    step = STEPS[name]
    if can_do(subject, step) and (force or not is_done(subject, step)):
        record(subject, step, step.compute(subject))


def run_probes(subjects: list[Subject], name: str, args, problems: dict[Path, str]) -> None:
    """Fits the simple classifiers of all runs in worker processes; records failures in `problems`."""
    from joblib.externals.loky import get_reusable_executor

    step, suffix, jobs, results = STEPS[name], "_standardized" * args.standardize, [], {}
    for index, subject in enumerate(subjects):
        with listed(problems, subject.run.path):
            if not can_do(subject, step) or not args.force and is_done(subject, step):
                continue
            tails = {"qz_mu": suffix, "qy_mu": "_y" + suffix}
            tails = {key: tail for key, tail in tails.items() if subject.latents[key].size}
            results[index] = {} if args.standardize else bound(subject)
            file = (subject.run.path / "latents.npz").resolve()  # a reused worker may have another cwd
            for key, tail in tails.items():
                jobs += [(index, (probe_name, (file, key), tail, args.standardize)) for probe_name in PROBES]
        subject.forget()
    left = {index: sum(i == index for i, _ in jobs) for index in results}
    # its processes inherit what is ignored: this one ends them, and loky's tracker would complain
    with handled_by(signal.SIG_IGN, signal.SIGHUP, signal.SIGUSR1):
        executor = get_reusable_executor(args.cpu_n, env=dict.fromkeys(ONE_THREAD, "1"))
        submitted = [executor.submit(probe, index, *job) for index, job in jobs]
    try:
        done = as_completed(submitted)
        for future in progress(done, total=len(jobs), unit="fit"):
            index, result = future.result()
            subject, left[index] = subjects[index], left[index] - 1
            if isinstance(result, str):
                problems[subject.run.path] = result
            elif not result:
                subject.bench.note(
                    f"{subject.run.path.name}: too few images, or one class only, to train a classifier on"
                )
            else:
                results[index] |= result
            if left[index] == 0 and subject.run.path not in problems:
                with listed(problems, subject.run.path):
                    record(subject, step, results[index])
    except BrokenProcessPool:
        for index in (i for i, n in left.items() if n):
            path = subjects[index].run.path
            problems[path] = f"{path}: a worker process was killed (out of memory?)"
    except KeyboardInterrupt:  # do not wait for fits that may take minutes
        threading.excepthook = lambda _: None  # the pool's thread would print a traceback about the killed workers
        executor.shutdown(wait=True, kill_workers=True)
        raise


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
