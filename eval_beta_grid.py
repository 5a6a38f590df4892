"""Evaluates every run of a batch; what is done already is not done again.

    python eval_beta_grid.py --run_batch_name B --exclude_mi --with_classifier   step 1: rates, PSNR, IS, FID, latents
    for run in runs/B/*/; do python eval_beta_single.py --run_path "$run"; done   step 2: mutual information
    python eval_beta_grid.py --run_batch_name B --get_mi_cal_acc --cpu_n 2        step 3: simple classifiers on latents
    python eval_beta_grid.py --run_batch_name B --recons_acc                      step 4: accuracy on reconstructions

All figures are of the test images. They are kept in each run's metrics.json and gathered in the batch's
eval_results.csv, one row a run. Step 1 without --exclude_mi does step 2 as well.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from joblib.externals.loky import get_reusable_executor

from models.stack import TERMS
from utils.cli import Parser, batch_folder, whole
from utils.config import Config
from utils.distributed import is_first, progress, share, wait_for_all
from utils.errors import UserError, nearest, run_script
from utils.evaluation import PATIENCE, Bench, Subject, is_done, metrics_of, record
from utils.files import to_csv, write_text
from utils.probes import PROBES, probe
from utils.runs import Run, locked
from utils.steps import STEPS, bound, inception_features

CONFIG_COLUMNS = [field.name for field in dataclasses.fields(Config)]
METRIC_COLUMNS = [column for step in STEPS.values() for column in step.columns]
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of the workers
MI_STEPS = ["mi_z", "mi_y", "mi_p"]
TRAIN_COLUMNS = [f"train_{name}" for name in TERMS]


def add_bench_flags(parser: Parser) -> None:
    """Flags that the evaluation scripts share."""
    group = parser.add_argument_group("what is computed, and how much of it")
    group.add_argument("--classifier_path", help="classifier (default: runs/classifiers/<data set>)")
    group.add_argument(
        "--y_samples",
        type=partial(whole, most=1000),
        default=4,
        help="samples of z in q(y|x), for the MI of y (default: 4)",
    )
    group.add_argument("--force", action="store_true", help="compute anew what is done already")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--run_batch_name", required=True, help="the batch: a folder of runs under --runs_dir")
    steps = parser.add_argument_group("steps (default: step 1)")
    steps.add_argument(
        "--get_mi_cal_acc", action="store_true", help="step 3: classifiers on the latents, accuracy bound"
    )
    steps.add_argument("--recons_acc", action="store_true", help="step 4: the classifier on reconstructions")
    steps.add_argument("--pca", action="store_true", help="3 principal components of the y means, into pca.npz")
    add_bench_flags(parser)
    group = parser.add_argument_group("step 1")
    group.add_argument("--with_classifier", action="store_true", help="inception score, and fid_classifier without fid")
    group.add_argument("--exclude_mi", action="store_true", help="leave the mutual information to step 2")
    group.add_argument("--exclude_fid", action="store_true", help="no Frechet distance")
    group.add_argument(
        "--n_samples",
        type=partial(whole, least=10, most=10**7),
        default=10_000,
        help="samples for IS and FID (default: 10000)",
    )
    group.add_argument(
        "--iw_samples", type=partial(whole, most=10**6), help="samples of the importance-weighted ll (default: none)"
    )
    group = parser.add_argument_group("step 3")
    group.add_argument(
        "--cpu_n", type=partial(whole, most=1000), default=1, help="worker processes, one thread each (default: 1)"
    )
    group.add_argument("--standardize", action="store_true", help="standardise the latents; columns of their own")
    return parser.parse(argv)


def wanted_steps(args) -> list[str]:
    """Names of the steps that the flags ask for."""
    if args.get_mi_cal_acc or args.recons_acc or args.pca:
        probes = "probes_standardized" if args.standardize else "probes"
        asked = [(args.get_mi_cal_acc, probes), (args.recons_acc, "recons"), (args.pca, "pca")]
        return [name for wanted, name in asked if wanted]
    names = ["rates", *["iw"] * bool(args.iw_samples), *["is"] * args.with_classifier]
    return names + ["frechet"] * (not args.exclude_fid) + ([] if args.exclude_mi else MI_STEPS)


def choose(name: str, bench: Bench) -> str | None:
    """The step that a name stands for with what there is on this machine; None for none."""
    if name == "frechet":
        return "fid" if inception_features(bench) else "fid_classifier" if bench.with_classifier else None
    if name == "mi_p" and not bench.with_classifier:
        return None
    return name


def find_runs(runs_dir: str, batch: str) -> list[Path]:
    """The run folders of a batch. Raises UserError, listing the batches there are, when there are none."""
    root, folder = Path(runs_dir), batch_folder(runs_dir, batch)
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    found = [p for p in found if p.name != "figures"]  # plot_eval.py's
    if not found:
        batches = (
            sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "classifiers") if root.is_dir() else []
        )
        raise UserError(f"--run_batch_name: no runs in {folder}{nearest(batch, batches) if batches else ''}")
    return found


def open_run(path: Path) -> Run:
    """A run that can be evaluated. Raises UserError if it is broken, unfinished or failed."""
    run = Run.open(path)
    if run.status != "finished":
        raise UserError(f"{path}: {run.status}; only finished runs are evaluated")
    return run


@contextlib.contextmanager
def listed(problems: dict[Path, str], path: Path) -> Iterator[None]:
    """Lists what goes wrong with one run, whatever it is, so that the others go on."""
    try:
        yield
    except UserError as e:
        problems[path] = str(e) if str(path) in str(e) else f"{path}: {e}"
    except Exception as e:
        problems[path] = f"{path}: {type(e).__name__}: {' '.join(str(e).split())}"


def run_step(subject: Subject, name: str, force: bool) -> None:
    """Computes a step of one run, unless it is done."""
    step = STEPS[name]
    if force or not is_done(subject, step):
        record(subject, step, step.compute(subject))


def run_probes(subjects: list[Subject], name: str, args, problems: dict[Path, str]) -> None:
    """Trains the simple classifiers of all runs in worker processes."""
    step, suffix, jobs, figures = STEPS[name], "_standardized" * args.standardize, [], {}
    for index, subject in enumerate(subjects):
        with listed(problems, subject.run.path):
            if not args.force and is_done(subject, step):
                continue
            tails = {"qz_mu": suffix, "qy_mu": "_y" + suffix}
            tails = {key: tail for key, tail in tails.items() if subject.latents[key].size}
            figures[index] = {} if args.standardize else bound(subject)
            file = (subject.run.path / "latents.npz").resolve()  # workers that are kept have folders of their own
            for key, tail in tails.items():
                jobs += [(index, (probe_name, (file, key), tail, args.standardize)) for probe_name in PROBES]
        subject.forget()
    left = {index: sum(i == index for i, _ in jobs) for index in figures}
    executor = get_reusable_executor(args.cpu_n, env=dict.fromkeys(ONE_THREAD, "1"))
    try:
        done = as_completed([executor.submit(probe, index, *job) for index, job in jobs])
        for future in progress(done, total=len(jobs), unit="fit"):
            index, result = future.result()
            subject, left[index] = subjects[index], left[index] - 1
            if isinstance(result, str):
                problems[subject.run.path] = result
            else:
                figures[index] |= result
            if left[index] == 0 and subject.run.path not in problems:
                with listed(problems, subject.run.path):
                    record(subject, step, figures[index])
    except BrokenProcessPool:
        for index in (i for i, n in left.items() if n):
            problems[subjects[index].run.path] = f"{subjects[index].run.path}: a worker process was killed (memory?)"
    except KeyboardInterrupt:  # do not wait for fits that may take minutes
        threading.excepthook = lambda _: None  # nor let the pool's thread tell of their loss
        executor.shutdown(wait=True, kill_workers=True)
        raise


def gather(runs_dir: str, batch: str) -> Path:
    """Writes eval_results.csv, one row a run, from the runs' config.json and metrics.json; returns its path."""
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
                row |= {f"train_{name}": value for name, value in run.result.get("train", {}).items()}
            rows.append(row | {"status": "broken"} if problems else row)
        write_text(path, to_csv(rows, columns))
    return path


def finish(runs_dir: str, batch: str, problems: dict[Path, str], n: int) -> int:
    """Gathers, and lists the runs that this process could not evaluate; returns the exit status."""
    where = gather(runs_dir, batch) if is_first() else Path(runs_dir) / batch / "eval_results.csv"
    print(f"\n{n - len(problems)} of {n} runs evaluated: {where}")
    for problem in problems.values():
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main(argv=None) -> int:
    args = parse_args(argv)
    paths, steps, problems, subjects = find_runs(args.runs_dir, args.run_batch_name), wanted_steps(args), {}, []
    n, paths = len(paths), share(paths)
    shared = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Bench) if field.init}
    bench = Bench(**{k: v for k, v in shared.items() if v is not None})
    if is_first():
        print(f"{n} runs of {args.run_batch_name}; steps: {', '.join(steps)}; on {args.device}", flush=True)
    for path in paths:
        with listed(problems, path):
            subjects.append(Subject(open_run(path), bench))
    steps = [chosen for chosen in (choose(name, bench) for name in steps) if chosen is not None]
    for dataset in {s.config.dataset for s in subjects}:  # a missing one should be told before hours of work
        if any(STEPS[name].classifier for name in steps):
            bench.classifier_of(next(s.config for s in subjects if s.config.dataset == dataset))
    each = [name for name in steps if STEPS[name].compute is not None]
    try:
        for subject in progress(subjects if each else [], unit="run"):
            with listed(problems, subject.run.path):
                for name in each:
                    run_step(subject, name, args.force)
            subject.forget()
        for name in set(steps) - set(each):
            run_probes([s for s in subjects if s.run.path not in problems], name, args, problems)
    except KeyboardInterrupt:
        gather(args.runs_dir, args.run_batch_name)
        raise
    wait_for_all()
    return finish(args.runs_dir, args.run_batch_name, problems, len(paths))


if __name__ == "__main__":
    run_script(main)
