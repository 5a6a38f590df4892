"""Estimates the mutual information between the label and z, and between the label and y, for one run.

    python eval_beta_single.py --run_path "runs/B/<run>"

This is step 2 of the evaluation; eval_beta_grid.py runs step 1, which must come first.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

from pathlib import Path

from utils.cli import Parser
from utils.errors import run_script
from utils.evaluation.batch import add_bench_flags, gather, open_run, run_step
from utils.evaluation.steps import MI_STEPS, choose
from utils.evaluation.subject import Bench, Subject, metrics_of


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    parser.add_argument("--run_path", type=Path, required=True, help="the run's folder")
    parser.add_argument("--with_classifier", action="store_true", help="for a categorical z: also compute mi_p")
    add_bench_flags(parser)
    return parser.parse(argv)


def main(argv=None) -> int:
    """Runs step 2 for one run and updates its batch's eval_results.csv; returns the exit status."""
    args = parse_args(argv)
    run = open_run(args.run_path)
    bench = Bench.of(args)
    subject = Subject(run, bench)
    for name in MI_STEPS:
        if choose(name, bench):
            run_step(subject, name, args.force)
    if run.config.qz_family == "GumbelSoftmax" and not args.with_classifier:
        print("note: mi_p, which labels generated images, needs --with_classifier")
    for name, value in metrics_of(run).items():
        if name.startswith("mi_"):
            print(f"  {name:16s} {value:8.4f}")
    folder = run.path.resolve().parent
    print(f"results in {gather(str(folder.parent), folder.name)}")
    return 0


if __name__ == "__main__":
    run_script(main)
