"""Evaluates runs: the steps in this process, or their jobs in others; the table of a batch's results."""

import contextlib
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from signal import SIGHUP, SIGUSR1

from models.stack import TERMS
from utils.cli import batch_folder
from utils.config import fields_of
from utils.distributed import progress
from utils.errors import UserError, nearest, signals_postponed
from utils.evaluation.evaluation import Evaluation
from utils.evaluation.metrics import columns_of
from utils.evaluation.results import read_metrics
from utils.evaluation.run import PATIENCE, EvaluatedRun, Step, failures_in
from utils.evaluation.steps import STEPS
from utils.files import to_csv, write_text
from utils.runs import Run, locked, runs_in

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
UNHEEDED = (SIGHUP, SIGUSR1)  # by worker processes, which this one ends
COLUMNS = [
    *("run", "status", *fields_of()),
    *(column for step in STEPS for column in columns_of(step)),
    *(f"train_{name}" for name in TERMS),
]


def find_runs(runs_dir: str, batch: str) -> tuple[list[Run], dict[Path, str]]:
    """The runs of a batch that are to be evaluated, and what is wrong with others, by path.

    Raises UserError, listing the existing batches, if there are none.
    """
    root, folder = Path(runs_dir), batch_folder(runs_dir, batch)
    runs, problems = runs_in(folder)
    runs = [run for run in runs if not run.config.is_conditioned]
    if not runs and not problems:
        batches = sorted(p.name for p in root.glob("*") if p.is_dir() and p.name != "classifiers")
        raise UserError(f"--run_batch_name: no runs in {folder}{nearest(batch, batches) if batches else ''}")
    return runs, problems


def evaluate(runs: list[Run], steps: list[Step], evaluation: Evaluation, problems: dict[Path, str]) -> None:
    """Computes those steps of the runs that are not up to date; records failures in `problems`.

    Raises UserError if a classifier that a step needs is missing, before hours of work rather than after.
    """
    evaluated = []
    for run in runs:
        with failures_in(problems, run.path):
            evaluated.append(EvaluatedRun(run, evaluation))
    if any(step.classifier for step in steps):
        for run in evaluated:
            evaluation.classifiers(run.config)
    queue, enough = deque(), 2 * evaluation.cpu_n
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder, worker_processes(evaluation.cpu_n) as submit:
        for with_jobs in (False, True):  # which then have the cores to themselves
            chosen = [step for step in steps if bool(step.jobs) == with_jobs]
            for n, run in enumerate(progress(evaluated if chosen else [], unit="run")):
                for step in chosen:
                    with failures_in(problems, run.path):
                        if run.path not in problems and run.needs(step):
                            file = Path(folder, f"{n}.npz")
                            jobs = step.jobs(run, file) if step.jobs else []
                            queue.append((run, step, file, [submit(*job) for job in jobs]))
                    finish(queue, enough, problems)
                run.forget()
        finish(queue, 0, problems)


def finish(queue: deque[tuple], enough: int, problems: dict[Path, str]) -> None:
    """Completes the first steps of a queue while those behind have enough jobs to keep the workers busy.

    An entry is a run, a step of it, the file that its jobs read, and the jobs' Futures.
    """
    while queue and (not queue[0][-1] or sum(len(entry[-1]) for entry in list(queue)[1:]) >= enough):
        run, step, file, jobs = queue.popleft()
        with failures_in(problems, run.path):
            run.record(step, step.compute(run, *(job.result() for job in jobs)))
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def worker_processes(n: int) -> Iterator[Callable[..., Future]]:
    """Yields `submit(function, *arguments)`, which has one of n processes call a function."""
    from joblib.externals.loky import get_reusable_executor

    executor = None

    def submit(*job) -> Future:
        nonlocal executor
        with signals_postponed(*UNHEEDED):
            executor = get_reusable_executor(n, env=ONE_THREAD)  # a new one, if a worker was killed
            return executor.submit(*job)

    try:
        yield submit
    except KeyboardInterrupt:  # do not wait for jobs that may take minutes
        hook = threading.excepthook
        threading.excepthook = lambda _: None  # the pool's thread may stumble over the jobs that it loses
        if executor:
            executor.shutdown(wait=True, kill_workers=True)
        threading.excepthook = hook
        raise


def gather(runs_dir: str, batch: str) -> Path:
    """Writes eval_results.csv, one row per run, from the runs' JSON files; returns its path."""
    path = Path(runs_dir) / batch / "eval_results.csv"
    with locked(path.parent, PATIENCE):
        runs, problems = find_runs(runs_dir, batch)
        rows = {}
        for run in runs:
            with failures_in(problems, run.path):
                row = {"status": run.status, **vars(run.config), **read_metrics(run.path)}
                row["dataset"] = Path(run.config.dataset).name  # wherever it lies
                rows[run.path] = row | {f"train_{n}": value for n, value in run.result.get("train", {}).items()}
        rows |= {folder: {"status": "broken"} for folder in problems}
        write_text(path, to_csv([{"run": folder.name, **rows[folder]} for folder in sorted(rows)], COLUMNS))
    return path


def report(problems: dict[Path, str]) -> int:
    """Lists the runs that could not be evaluated; returns the exit status."""
    for problem in problems.values():
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0
