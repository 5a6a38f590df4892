"""Estimates the mutual information between the label and z, and the label and y, of some runs.

    python eval_beta_single.py --run_path "runs/B/<run>"
    python eval_beta_single.py --run_path runs/B/*/

This is step 2 of the evaluation; eval_beta_grid.py runs step 1, which must come first.
"""

from pathlib import Path

from utils.cli import Parser, add_bench_flags
from utils.distributed import share
from utils.errors import UserError, run_script
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
    device = prepare(args.device, args.threads)
    from utils.evaluation import batch
    from utils.evaluation.metrics import read_metrics
    from utils.evaluation.run import Evaluation
    from utils.evaluation.steps import possible
    from utils.runs import Run, is_cell

    evaluation, several = Evaluation.of(vars(args), device), len(args.run_path) > 1
    runs, problems = [], {}
    for path in share(args.run_path):
        if is_cell(path) or not several:  # a shell's * finds figures, too
            with batch.failures_in(problems, path):
                runs.append(Run.open(path))
    batch.evaluate(runs, possible(("mi_z", "mi_y", "mi_p"), evaluation), evaluation, problems)
    if problems and not several:
        raise UserError(*problems.values())
    for run in (run for run in runs if run.path not in problems):
        if run.config.qz_family == "GumbelSoftmax" and not args.with_classifier:
            evaluation.note("mi_p, which labels generated images, needs --with_classifier")
        print(run.path.name)
        for name, value in read_metrics(run.path).items():
            if name.startswith("mi_"):
                print(f"  {name:16s} {value:8.4f}")
    for folder in dict.fromkeys(path.resolve().parent for path in args.run_path):
        print(f"results in {batch.gather(str(folder.parent), folder.name)}")
    return batch.report(problems)


if __name__ == "__main__":
    run_script(main)
