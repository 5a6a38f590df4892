"""Estimates the mutual information between the label and z, and between the label and y, for some runs.

    python eval_beta_single.py --run_path "runs/B/<run>"
    python eval_beta_single.py --run_path runs/B/*/

This is step 2 of the evaluation; eval_beta_grid.py runs step 1, which must come first.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from utils.cli import Parser, add_bench_flags
from utils.distributed import progress, share
from utils.errors import run_script
from utils.machine import prepare


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    parser.add_argument("--run_path", type=Path, nargs="+", required=True, help="the folders of the runs")
    parser.add_argument("--with_classifier", action="store_true", help="for a categorical z: also compute mi_p")
    add_bench_flags(parser)
    return parser.parse(argv)


def main(argv=None) -> int:
    """Runs step 2 for each run and updates the eval_results.csv of its batch; returns the exit status."""
    args = parse_args(argv)
    args.device = prepare(args.device, args.threads)
    from utils.evaluation.batch import gather
    from utils.evaluation.subject import Bench, listed
    from utils.runs import is_cell

    bench, problems, several = Bench.of(args), {}, len(args.run_path) > 1
    paths = [p for p in share(args.run_path) if is_cell(p) or not several]  # a shell's * finds figures, too
    for path in progress(paths, unit="run"):
        with listed(problems, path) if several else nullcontext():
            step_2(path, bench, args.force)
    for folder in dict.fromkeys(path.resolve().parent for path in args.run_path):
        print(f"results in {gather(str(folder.parent), folder.name)}")
    for problem in problems.values():
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def step_2(path: Path, bench, force: bool) -> None:
    """Estimates and prints the mutual information of one run, on a Bench."""
    from utils.evaluation.batch import open_subject, run_step
    from utils.evaluation.steps import MI_STEPS, choose
    from utils.evaluation.subject import metrics_of
    from utils.runs import Run

    run = Run.open(path)
    subject = open_subject(run, bench)
    for name in MI_STEPS:
        if choose(name, bench):
            run_step(subject, name, force)
    if run.config.qz_family == "GumbelSoftmax" and not bench.with_classifier:
        bench.note("mi_p, which labels generated images, needs --with_classifier")
    print(run.path.name)
    for name, value in metrics_of(run).items():
        if name.startswith("mi_"):
            print(f"  {name:16s} {value:8.4f}")


if __name__ == "__main__":
    run_script(main)
