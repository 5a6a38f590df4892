"""Evaluates every run of a batch; what is done already is not done again.

    python eval_beta_grid.py --run_batch_name B --exclude_mi --with_classifier   step 1: rates, PSNR, IS, FID, latents
    for run in runs/B/*/; do python eval_beta_single.py --run_path "$run"; done   step 2: mutual information
    python eval_beta_grid.py --run_batch_name B --get_mi_cal_acc --cpu_n 2        step 3: simple classifiers on latents
    python eval_beta_grid.py --run_batch_name B --recons_acc                      step 4: accuracy on reconstructions

All figures are of the test images. They are kept in each run's metrics.json and gathered in the batch's
eval_results.csv, one row a run. Step 1 without --exclude_mi does step 2 as well.
"""

import csv
import dataclasses
import io
import sys
from pathlib import Path

from joblib import Parallel, delayed, parallel_config

from models.stack import TERMS
from utils.cli import Parser, whole
from utils.config import Config
from utils.distributed import is_first, progress, share, wait_for_all
from utils.errors import UserError, nearest, run_script
from utils.evaluation import STEPS, Bench, Subject, bound, is_done, metrics_of, record
from utils.probes import PROBES, probe
from utils.runs import Run, write_atomic

CONFIG_COLUMNS = [field.name for field in dataclasses.fields(Config)]
METRIC_COLUMNS = [column for step in STEPS.values() for column in step.columns]
TRAIN_COLUMNS = [f"train_{name}" for name in TERMS]


def add_bench_flags(parser: Parser) -> None:
    """Flags that the evaluation scripts share."""
    group = parser.add_argument_group("what is computed, and how much of it")
    group.add_argument("--classifier_path", help="classifier (default: runs/classifiers/<data set>)")
    group.add_argument(
        "--y_samples", type=whole, default=4, help="samples of z in q(y|x), for the MI of y (default: 4)"
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
    group.add_argument("--n_samples", type=whole, default=10_000, help="samples for IS and FID (default: 10000)")
    group.add_argument("--iw_samples", type=whole, help="samples of the importance-weighted ll (default: none)")
    group = parser.add_argument_group("step 3")
    group.add_argument("--cpu_n", type=whole, default=1, help="worker processes, one thread each (default: 1)")
    group.add_argument("--standardize", action="store_true", help="standardise the latents; columns of their own")
    return parser.parse(argv)


def wanted_steps(args) -> list[str]:
    """Names of the steps that the flags ask for."""
    if args.get_mi_cal_acc or args.recons_acc or args.pca:
        probes = "probes_standardized" if args.standardize else "probes"
        asked = [(args.get_mi_cal_acc, probes), (args.recons_acc, "recons"), (args.pca, "pca")]
        return [name for wanted, name in asked if wanted]
    names = [
        "rates",
        *["iw"] * bool(args.iw_samples),
        *["is"] * args.with_classifier,
        *["fid"] * (not args.exclude_fid),
    ]
    return names + ([] if args.exclude_mi else ["mi_z", "mi_y"])


def find_runs(runs_dir: str, batch: str) -> list[Path]:
    """The run folders of a batch. Raises UserError, listing the batches there are, when there are none."""
    root = Path(runs_dir)
    folder = root / batch
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if batch and folder.is_dir() else []
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


def run_step(subject: Subject, name: str, force: bool) -> None:
    """Computes a step of one run, unless it is done."""
    step = STEPS[name]
    if force or not is_done(subject, step):
        record(subject, step, step.compute(subject))


def run_probes(subjects: list[Subject], name: str, args) -> dict[Path, str]:
    """Trains the simple classifiers of all runs in worker processes; returns what failed."""
    step, suffix, problems, jobs, figures = STEPS[name], "_standardized" * args.standardize, {}, [], {}
    for index, subject in enumerate(subjects):
        try:
            if not args.force and is_done(subject, step):
                continue
            labels = subject.latents["labels"]
            figures[index] = {} if args.standardize else bound(metrics_of(subject.run), labels)
            for latent, tail in (("qz_mu", suffix), ("qy_mu", "_y" + suffix)):
                if subject.latents[latent].size:
                    source = (subject.run.path / "latents.npz", latent)
                    jobs += [(index, (probe_name, source, tail, args.standardize)) for probe_name in PROBES]
        except UserError as e:
            problems[subject.run.path] = str(e)
    left = {index: sum(i == index for i, _ in jobs) for index in figures}
    with parallel_config(backend="loky", inner_max_num_threads=1):
        results = Parallel(args.cpu_n, return_as="generator_unordered", pre_dispatch="4*n_jobs")(
            delayed(probe)(index, *job) for index, job in jobs
        )
        for index, result in progress(results, total=len(jobs), unit="fit"):
            subject, left[index] = subjects[index], left[index] - 1
            if isinstance(result, str):
                problems[subject.run.path] = result
            else:
                figures[index] |= result
            if left[index] == 0 and subject.run.path not in problems:
                record(subject, step, figures[index])
    return problems


def gather(runs_dir: str, batch: str) -> Path:
    """Writes eval_results.csv, one row a run, from the runs' config.json and metrics.json; returns its path."""
    rows = []
    for path in find_runs(runs_dir, batch):
        row = {"run": path.name}
        try:
            run = Run.open(path)
            row |= {"status": run.status, **vars(run.config), **metrics_of(run)}
            row |= {f"train_{name}": value for name, value in run.result.get("train", {}).items()}
        except UserError:
            row["status"] = "broken"
        rows.append(row)
    columns = ["run", "status", *CONFIG_COLUMNS, *METRIC_COLUMNS, *TRAIN_COLUMNS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = Path(runs_dir) / batch / "eval_results.csv"
    write_atomic(path, text.getvalue().encode())
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
        try:
            subjects.append(Subject(open_run(path), bench))
        except UserError as e:
            problems[path] = str(e)
    for dataset in {s.config.dataset for s in subjects}:  # a missing one should be told before hours of work
        if "is" in steps or "recons" in steps:
            bench.classifier_of(next(s.config for s in subjects if s.config.dataset == dataset))
    each = [name for name in steps if STEPS[name].compute is not None]
    for subject in progress(subjects if each else [], unit="run"):
        try:
            for name in each:
                run_step(subject, name, args.force)
        except UserError as e:
            problems[subject.run.path] = str(e)
        subject.__dict__.pop("model", None)  # frees the memory of each model in turn
    for name in set(steps) - set(each):
        problems |= run_probes([s for s in subjects if s.run.path not in problems], name, args)
    wait_for_all()
    return finish(args.runs_dir, args.run_batch_name, problems, len(paths))


if __name__ == "__main__":
    run_script(main)
