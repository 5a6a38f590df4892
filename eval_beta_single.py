"""Computes the Monte-Carlo mutual information of z and of y with the label, for one run.

    python eval_beta_single.py --run_path "runs/B/<run>"

Step 2 of the evaluation; see eval_beta_grid.py, whose step 1 comes before it.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

from pathlib import Path

from eval_beta_grid import MI_STEPS, add_bench_flags, choose, gather, open_run, run_step
from utils.cli import Parser
from utils.errors import run_script
from utils.evaluation import Bench, Subject, metrics_of


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--run_path", type=Path, required=True, help="the run's folder")
    parser.add_argument("--with_classifier", action="store_true", help="for a categorical z: mi_p as well")
    add_bench_flags(parser)
    return parser.parse(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    run = open_run(args.run_path)
    bench = Bench(
        args.device, args.data_dir, args.runs_dir, args.download, args.classifier_path,
        with_classifier=args.with_classifier, y_samples=args.y_samples,
    )  # fmt: skip
    subject = Subject(run, bench)
    for name in MI_STEPS:
        if choose(name, bench):
            run_step(subject, name, args.force)
    if run.config.qz_family == "GumbelSoftmax" and not args.with_classifier:
        print("note: mi_p, of what z generates, needs --with_classifier")
    for name, value in metrics_of(run).items():
        if name.startswith("mi_"):
            print(f"  {name:16s} {value:8.4f}")
    folder = run.path.resolve().parent
    print(f"gathered in {gather(str(folder.parent), folder.name)}")
    return 0


if __name__ == "__main__":
    run_script(main)
