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
    flag = parser.add_argument_group("steps (default: step 1)").add_argument
    switch = partial(flag, action="store_true")
    switch("--all", help="steps 1 to 4, those included that need the classifier")
    switch("--get_mi_cal_acc", help="step 3: simple classifiers on the latents")
    switch("--recons_acc", help="step 4: classifier accuracy on reconstructions")
    switch("--pca", help="write 3 principal components of the means of y to pca.npz")
    text = "write means, stds and samples of z and y of these images to latents_train.npz, latents_test.npz"
    flag("--latents", nargs="+", choices=("train", "test"), default=[], help=text)
    add_bench_flags(parser)
    flag = parser.add_argument_group("step 1").add_argument
    switch, number = partial(flag, action="store_true"), partial(whole, least=10, most=10**7)
    text = "compute the inception score; where the Inception weights are missing, fid_classifier instead of fid"
    switch("--with_classifier", help=text)
    switch("--exclude_mi", help="leave the mutual information to step 2")
    switch("--exclude_fid", help="skip fid and fid_classifier")
    flag("--n_samples", type=number, default=10_000, help="samples per model for IS and FID (default: 10000)")
    text = "also compute the importance-weighted ll, with this number of posterior samples per image"
    flag("--iw_samples", type=partial(whole, most=10**6), help=text)
    flag = parser.add_argument_group("step 3").add_argument
    text = "worker processes, one thread each (default: 1)"
    flag("--cpu_n", type=partial(whole, most=1000), default=1, help=text)
    text = "train: on standardised latents of training images, test on all test images (default); paper: train on "
    text += "80 %% of the test images' posterior means, test on the rest; results in columns *_paper"
    flag("--probe_protocol", choices=("train", "paper"), default="train", help=text)
    text = "training images for the simple classifiers, at most (default: 10000)"
    flag("--probe_images", type=number, default=10_000, help=text)
    args = parser.parse(argv)
    args.with_classifier |= args.all
    return args


def step_names(args) -> list[str]:
    """The steps that the flags select, of which some may not be possible."""
    probes = "probes_paper" if args.probe_protocol == "paper" else "probes"
    later = {"recons": args.all or args.recons_acc, "pca": args.pca}
    later |= {f"latents_{split}": split in args.latents for split in ("train", "test")}
    later[probes] = args.all or args.get_mi_cal_acc
    first = {"rates": True, "units": True, "iw": args.iw_samples, "is": args.with_classifier}
    first |= dict.fromkeys(("fid", "fid_classifier"), not args.exclude_fid)
    first |= dict.fromkeys(("mi_z", "mi_y", "mi_p"), not args.exclude_mi)
    chosen = first | later if args.all or not any(later.values()) else later
    return [name for name, flag in chosen.items() if flag]


def main(argv=None) -> int:
    """Runs the selected steps for all runs of the batch; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    from utils.evaluation.batch import evaluate, find_runs, gather, report
    from utils.evaluation.evaluation import SETTINGS, Evaluation
    from utils.evaluation.steps import possible

    batch = args.runs_dir, args.run_batch_name
    runs, problems = find_runs(*batch)
    evaluation = Evaluation(**{k: v for k, v in vars(args).items() if k in SETTINGS} | {"device": device})
    steps = possible(step_names(args), evaluation)
    if is_first():
        n, names = len(runs) + len(problems), ", ".join(step.name for step in steps)
        print(f"{n} runs of {args.run_batch_name}; steps: {names}; on {device}", flush=True)
    else:
        problems = {}
    runs = share(runs)
    n = len(runs) + len(problems)
    try:
        evaluate(runs, steps, evaluation, problems)
        wait_for_all()
    finally:  # in every process, so that the table is complete whoever is last
        table = gather(*batch)
    print(f"\n{n - len(problems)} of {n} runs evaluated: {table}")
    return report(problems)


if __name__ == "__main__":
    run_script(main)
