"""Evaluates runs: steps in this process, their jobs in others; the table of a batch's results."""

import contextlib
import math
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from signal import SIGHUP, SIGUSR1
from time import monotonic

import numpy as np

from models.stack import TERMS
from utils.cli import batch_folder
from utils.config import fields_of
from utils.distributed import progress
from utils.errors import UserError, nearest, signals_postponed
from utils.evaluation.metrics import columns_of, read_metrics
from utils.evaluation.run import PATIENCE, EvaluatedRun, Evaluation
from utils.evaluation.steps import STEPS, Step
from utils.files import to_csv, write_text
from utils.provenance import commit_and_date
from utils.runs import Run, locked, runs_in

AT_ONCE = ("rates", "units")  # of all cells first: seconds each
GROW = 60  # seconds after which the table is written anew
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # and OPENBLAS_NUM_THREADS, as in this process
COLUMNS = ["run", "status", *fields_of()]
COLUMNS += [column for step in STEPS for column in columns_of(step)]
COLUMNS += [*(f"train_{name}" for name in TERMS), "commit", "date"]


@contextlib.contextmanager
def failures_in(problems: dict[Path, str], path: Path) -> Iterator[None]:
    """Records an exception in `problems` under a run's path, so that other runs go on."""
    try:
        yield
    except BrokenProcessPool:
        problems[path] = f"{path}: a worker process was killed (out of memory?)"
    except UserError as e:
        problems[path] = str(e) if str(path) in str(e) else f"{path}: {e}"
    except Exception as e:
        problems[path] = f"{path}: {type(e).__name__}: {' '.join(str(e).split())}"


def find_runs(runs_dir: str, batch: str) -> tuple[list[Run], dict[Path, str]]:
    """The runs of a batch to evaluate; what is wrong with others, by path. Raises UserError if there are none."""
    folder = batch_folder(runs_dir, batch)
    runs, problems = runs_in(folder)
    runs = [run for run in runs if not run.config.is_conditioned]
    if not runs and not problems:
        folders = [p for p in Path(runs_dir).glob("*") if p.is_dir() and p.name != "classifiers"]
        batches = sorted(p.name for p in folders)
        hint = nearest(batch, batches) if batches else ""
        raise UserError(f"--run_batch_name: no runs in {folder}{hint}")
    return runs, problems


def coarse_first(runs: list[Run]) -> list[Run]:
    """The runs in an order that fills the plane evenly: corners first, then what is farthest from those before.

    So an evaluation that is stopped leaves a coarser map. Repeats of a cell follow after all cells.
    """
    rounds: dict[int, list[Run]] = {}
    seen = Counter()
    for run in runs:
        betas = run.config.beta_y, run.config.beta_z
        rounds.setdefault(seen[betas], []).append(run)
        seen[betas] += 1
    ordered = []
    for of_round in rounds.values():
        at = np.log10(np.maximum([[run.config.beta_y, run.config.beta_z] for run in of_round], 1e-9))
        at = (at - at.min(0)) / np.maximum(np.ptp(at, 0), 1e-9)
        nearest, i = np.full(len(at), math.inf), int(at.sum(1).argmin())
        for _ in of_round:
            ordered.append(of_round[i])
            nearest = np.minimum(nearest, np.linalg.norm(at - at[i], axis=1).round(6))
            nearest[i] = -1
            i = int(nearest.argmax())
    return ordered


def evaluate(
    runs: list[Run],
    steps: list[Step],
    evaluation: Evaluation,
    problems: dict[Path, str],
    grow: Callable = lambda: None,
    hours: float = math.inf,
) -> Counter:
    """Computes steps that are not up to date, of all runs first what takes seconds; failures go to `problems`.

    Calls `grow` every minute, and begins nothing after so many hours. Returns how many runs lack each step then.
    Raises UserError without a classifier.
    """
    start = last = monotonic()
    evaluated, n = [], evaluation.cpu_n
    for run in runs:
        with failures_in(problems, run.path):
            evaluated.append(EvaluatedRun(run, evaluation))
    for run in evaluated if any(step.classifier for step in steps) else []:
        evaluation.classifiers(run.config)
    queue, missing = deque(), Counter()
    parts = [s for s in steps if s.name in AT_ONCE], [s for s in steps if s.name not in AT_ONCE]
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder, worker_processes(n) as submit:
        for part in filter(None, parts):
            for i, run in enumerate(progress(evaluated, unit="run")):
                for step in part:
                    with failures_in(problems, run.path):
                        if run.path in problems or not run.needs(step):
                            continue
                        if monotonic() > start + 3600 * hours:
                            missing[step.name] += 1
                        elif step.jobs:
                            file = Path(folder, f"{i}.npz")
                            queue.append((run, step, file, [submit(*job) for job in step.jobs(run, file)]))
                        else:
                            run.record(step, step.compute(run))
                    finish(queue, 2 * n, problems)
                run.forget()
                if monotonic() > last + GROW:
                    grow()
                    last = monotonic()
            finish(queue, 0, problems)
            grow()
    return missing


def finish(queue: deque[tuple], enough: int, problems: dict[Path, str]) -> None:
    """Completes the first entries (run, step, file, Futures) of a queue while the others have enough jobs."""
    while queue and sum(len(e[-1]) for e in list(queue)[1:]) >= enough:
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
        with signals_postponed(SIGHUP, SIGUSR1):  # workers do not heed them: this process ends them
            try:
                executor = get_reusable_executor(n, env=dict.fromkeys(THREADS, "1"))  # a new one, if one was killed
            except OSError as e:
                raise UserError(f"/dev/shm: worker processes cannot share memory there ({e.strerror or e})") from e
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
    path = Path(runs_dir, batch, "eval_results.csv")
    with locked(path.parent, PATIENCE):
        runs, problems = find_runs(runs_dir, batch)
        rows = {}
        for run in runs:
            with failures_in(problems, run.path):
                row = {"status": run.status, **vars(run.config), **read_metrics(run.path)}
                row["dataset"] = Path(run.config.dataset).name  # wherever it lies
                terms = run.result.get("train", {})
                row |= {f"train_{name}": value for name, value in terms.items()}
                rows[run.path] = row | commit_and_date(run.result)
        rows |= {folder: {"status": "broken"} for folder in problems}
        rows = [{"run": folder.name, **row} for folder, row in sorted(rows.items())]
        write_text(path, to_csv(rows, COLUMNS))
    return path


def report(problems: dict[Path, str]) -> int:
    """Lists the runs that could not be evaluated; returns the exit status."""
    for problem in problems.values():
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0
