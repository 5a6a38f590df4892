"""Evaluates every run of a batch; results that are up to date are not recomputed.

    python eval_beta_grid.py --run_batch_name B --all --cpu_n 2                  all of it, or step by step:
    python eval_beta_grid.py --run_batch_name B --exclude_mi --with_classifier   step 1: rates, PSNR, IS, FID, latents
    python eval_beta_single.py --run_path runs/B/*/                              step 2: mutual information
    python eval_beta_grid.py --run_batch_name B --get_mi_cal_acc --cpu_n 2       step 3: simple classifiers on latents
    python eval_beta_grid.py --run_batch_name B --recons_acc                     step 4: accuracy on reconstructions

All metrics are computed on the test images, stored in each run's metrics.json and collected in the batch's
eval_results.csv, one row per run. Without --exclude_mi, step 1 includes step 2.
"""

from functools import partial

from utils.cli import Parser, add_bench_flags, whole
from utils.distributed import is_first, share, wait_for_all
from utils.errors import run_script
from utils.machine import prepare


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    parser.add_argument("--run_batch_name", required=True, help="the batch: a folder of runs under --runs_dir")
    steps = parser.add_argument_group("steps (default: step 1)")
    steps.add_argument("--all", action="store_true", help="steps 1 to 4, those included that need the classifier")
    steps.add_argument("--get_mi_cal_acc", action="store_true", help="step 3: simple classifiers on the latents")
    steps.add_argument("--recons_acc", action="store_true", help="step 4: classifier accuracy on reconstructions")
    steps.add_argument("--pca", action="store_true", help="write 3 principal components of the means of y to pca.npz")
    steps.add_argument(
        "--latents",
        nargs="+",
        choices=("train", "test"),
        default=[],
        help="write means, stds and samples of z and y of these images to latents_train.npz, latents_test.npz",
    )
    add_bench_flags(parser)
    group = parser.add_argument_group("step 1")
    group.add_argument(
        "--with_classifier",
        action="store_true",
        help="compute the inception score; where the Inception weights are missing, fid_classifier instead of fid",
    )
    group.add_argument("--exclude_mi", action="store_true", help="leave the mutual information to step 2")
    group.add_argument("--exclude_fid", action="store_true", help="skip fid and fid_classifier")
    group.add_argument(
        "--n_samples",
        type=partial(whole, least=10, most=10**7),
        default=10_000,
        help="samples per model for IS and FID (default: 10000)",
    )
    group.add_argument(
        "--iw_samples",
        type=partial(whole, most=10**6),
        help="also compute the importance-weighted ll, with this number of posterior samples per image",
    )
    group = parser.add_argument_group("step 3")
    group.add_argument(
        "--cpu_n", type=partial(whole, most=1000), default=1, help="worker processes, one thread each (default: 1)"
    )
    group.add_argument(
        "--probe_protocol",
        choices=("train", "paper"),
        default="train",
        help="train: on standardised latents of training images, test on all test images (default); paper: train on "
        "80 %% of the test images' posterior means, test on the rest; results in columns *_paper",
    )
    group.add_argument(
        "--probe_images",
        type=partial(whole, least=10, most=10**7),
        default=10_000,
        help="training images for the simple classifiers, at most (default: 10000)",
    )
    args = parser.parse(argv)
    args.with_classifier |= args.all
    return args


def wanted_steps(args) -> list[str]:
    """Names of the steps that the flags select."""
    from utils.evaluation.steps import MI_STEPS

    probes = "probes_paper" if args.probe_protocol == "paper" else "probes"
    asked = [(args.all or args.get_mi_cal_acc, probes), (args.all or args.recons_acc, "recons"), (args.pca, "pca")]
    asked += [(split in args.latents, f"latents_{split}") for split in ("train", "test")]
    later = [name for wanted, name in asked if wanted]
    if later and not args.all:
        return later
    names = ["rates", "units", *["iw"] * bool(args.iw_samples), *["is"] * args.with_classifier]
    return names + ["frechet"] * (not args.exclude_fid) + ([] if args.exclude_mi else MI_STEPS) + later


def main(argv=None) -> int:
    """Runs the selected steps for all runs of the batch; returns the exit status."""
    args = parse_args(argv)
    args.device = prepare(args.device, args.threads)
    from utils.evaluation.batch import find_runs, finish, gather, open_subjects, require_classifiers, run_steps
    from utils.evaluation.steps import choose
    from utils.evaluation.subject import Bench

    (runs, problems), steps = find_runs(args.runs_dir, args.run_batch_name), wanted_steps(args)
    bench = Bench.of(args)
    n = len(runs) + len(problems)
    if is_first():
        print(f"{n} runs of {args.run_batch_name}; steps: {', '.join(steps)}; on {args.device}", flush=True)
    mine, problems = share(runs), problems if is_first() else {}
    n = len(mine) + len(problems)
    subjects = open_subjects(mine, bench, problems)
    steps = [chosen for chosen in (choose(name, bench) for name in steps) if chosen is not None]
    require_classifiers(subjects, steps)
    try:
        run_steps(subjects, steps, args, problems)
    except KeyboardInterrupt:
        gather(args.runs_dir, args.run_batch_name)
        raise
    wait_for_all()
    return finish(args.runs_dir, args.run_batch_name, problems, n)


if __name__ == "__main__":
    run_script(main)
