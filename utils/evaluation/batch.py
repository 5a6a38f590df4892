"""Evaluates runs, in this process or in several; the table of a batch's results."""

import contextlib
import functools
import io
import math
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from time import monotonic

import numpy as np

from models.stack import TERMS
from utils.cli import batch_folder
from utils.config import fields_of
from utils.distributed import progress
from utils.errors import UserError, nearest, signals_postponed
from utils.evaluation.images import SIZES
from utils.evaluation.metrics import columns_of, read_metrics
from utils.evaluation.run import PATIENCE, EvaluatedRun, Evaluation
from utils.evaluation.steps import STEPS, Step
from utils.files import to_csv, write_text
from utils.machine import prepare
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

    So an evaluation that is stopped leaves a coarser map; of those as far, chance decides. Repeats of a cell follow
    after all cells.
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
        chance = 1e-6 * np.random.default_rng(0).random(len(at))
        nearest, i = np.full(len(at), math.inf), int(at.sum(1).argmin())
        for _ in of_round:
            ordered.append(of_round[i])
            nearest = np.minimum(nearest, np.linalg.norm(at - at[i], axis=1).round(6))
            nearest[i] = -1
            i = int((nearest + chance).argmax())
    return ordered


class Work:
    """The evaluation of cells, in this process or each in one of `cpu_n`; failures go to `problems`, by path.

    Begins nothing after so many hours; `missing` then has pairs of a run's path and a step's name. Calls `grow` every
    minute.
    """

    def __init__(self, evaluation: Evaluation, problems: dict[Path, str], grow: Callable, hours: float):
        self.evaluation, self.problems, self.grow, self.missing = evaluation, problems, grow, set()
        self.last, self.submit, self.pending = monotonic(), None, {}
        self.end = self.last + 3600 * hours

    def compute(self, cells: list[EvaluatedRun], steps: list[Step]) -> bool:
        """Computes the steps of cells that are not up to date, one cell after the other; whether there was time."""
        for cell in progress(cells, unit="run"):
            cell.forget()
            if cell.path in self.problems:
                continue
            with failures_in(self.problems, cell.path):
                names = [step.name for step in steps if cell.needs(step)]
                if names and monotonic() > self.end:
                    self.missing |= {(cell.path, name) for name in names}
                elif names and self.evaluation.cpu_n > 1:
                    self.pending[self.submit(in_worker, self.evaluation.settings, cell.run, names)] = cell
                elif names:
                    cell.compute(STEPS[name] for name in names)
            self._wait(self.evaluation.cpu_n)
        self._wait(1)
        self.grow()
        return not self.missing

    def _wait(self, most: int) -> None:
        """Until fewer jobs are pending."""
        while len(self.pending) >= most:
            for job in wait(self.pending, return_when=FIRST_COMPLETED).done:
                cell = self.pending.pop(job)
                with failures_in(self.problems, cell.path):
                    for note in sorted(job.result()):
                        self.evaluation.note(note)
                cell.forget()
        if monotonic() > self.last + GROW:
            self.grow()
            self.last = monotonic()


def evaluate(
    runs: list[Run],
    steps: list[Step],
    evaluation: Evaluation,
    problems: dict[Path, str],
    grow: Callable = lambda: None,
    hours: float = math.inf,
    choose: Callable = lambda compute: None,
) -> set[tuple[Path, str]]:
    """Computes steps that are not up to date: of all runs first what takes seconds, then `choose(compute)`, the rest.

    See `Work`. Returns what is missing after so many hours: runs' paths, and steps. Raises UserError without a
    classifier.
    """
    cells, work = [], Work(evaluation, problems, grow, hours)
    for run in runs:
        with failures_in(problems, run.path):
            cells.append(EvaluatedRun(run, evaluation))
    for cell in cells if any(step.classifier for step in steps) else []:
        evaluation.classifiers(cell.config)
    with worker_processes(evaluation.cpu_n) as work.submit:
        work.compute(cells, [step for step in steps if step.name in AT_ONCE])
        choose(work.compute)
        work.compute(cells, [step for step in steps if step.name not in AT_ONCE])
    return work.missing


def in_worker(settings: dict, run: Run, names: list[str]) -> set[str]:
    """Computes steps of a run in a worker process, and returns the notes on them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    with contextlib.redirect_stdout(io.StringIO()):  # and prints
        evaluation = evaluation_of(tuple((k, v) for k, v in settings.items() if k not in SIZES))
        vars(evaluation).update(settings)
        EvaluatedRun(run, evaluation).compute(STEPS[name] for name in names)
    return evaluation.notes


@functools.cache
def evaluation_of(settings: tuple[tuple[str, object], ...]) -> Evaluation:
    """The Evaluation of a worker process, which has one thread."""
    settings = dict(settings)
    prepare(str(settings["device"]), 1)
    return Evaluation(**settings)


@contextlib.contextmanager
def worker_processes(n: int) -> Iterator[Callable[..., Future]]:
    """Yields `submit(function, *arguments)`, which has one of n processes call a function."""
    from joblib.externals.loky import get_reusable_executor

    executor = None

    def submit(*job) -> Future:
        nonlocal executor
        with signals_postponed(signal.SIGHUP, signal.SIGUSR1):  # workers do not heed them: this process ends them
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
