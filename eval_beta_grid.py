"""Evaluates every run of a batch; results that are up to date are not recomputed.

    python eval_beta_grid.py --run_batch_name B --all --cpu_n 2

does all of it. Or step by step: 1, rates, PSNR, IS, FID, latents; 2, mutual information; 3, simple
classifiers on latents; 4, accuracy on reconstructions:

    python eval_beta_grid.py --run_batch_name B --exclude_mi --with_classifier
    python eval_beta_single.py --run_path runs/B/*/
    python eval_beta_grid.py --run_batch_name B --get_mi_cal_acc --cpu_n 2
    python eval_beta_grid.py --run_batch_name B --recons_acc

All metrics are computed on the test images, stored in each run's metrics.json and collected in the
batch's eval_results.csv, one row per run. Without --exclude_mi, step 1 includes step 2.
"""

import math
from collections import Counter
from functools import partial

from utils.cli import Parser, add_bench_flags, at_least_0, batch_folder, positive, whole
from utils.distributed import is_first, leave, share
from utils.errors import run_script
from utils.machine import prepare

IMAGES = {"type": partial(whole, least=10, most=10**7), "default": None}
NUMBER = {"type": partial(whole, most=10**6)}
FLAGS = {  # by group; without type or choices they are switches
    "steps (default: step 1)": {
        "all": ("steps 1 to 4, those included that need the classifier", {}),
        "get_mi_cal_acc": ("step 3: simple classifiers on the latents", {}),
        "recons_acc": ("step 4: classifier accuracy on reconstructions", {}),
        "pca": ("write 3 principal components of the means of y to pca.npz", {}),
        "latents": ("write means, stds and samples of z and y of these images to latents_train.npz, latents_test.npz "
                    "(plot_eval.py --latents draws z)",
                    {"choices": ("train", "test"), "nargs": "+", "default": []}),
    },
    "time": {
        "error": ("of differences between cells, as a share of a metric's spread over the plane: decides how many "
                  "samples, probe images and, in step 4 and for I(y; label), test images are used (default: 0.1; 0: "
                  "10000, 10000, all)", {"type": at_least_0, "default": 0.1}),
        "cpu_n": ("processes that share the cells, one thread each (default: this one alone, of several threads)",
                  {"type": partial(whole, most=1000), "default": 1}),
        "max_hours": ("begin nothing after so many hours: the map is then a coarser one, and the same command goes on",
                      {"type": positive}),
    },
    "step 1": {
        "with_classifier": ("compute the inception score; where the Inception weights are missing, fid_classifier "
                            "instead of fid", {}),
        "exclude_mi": ("leave the mutual information to step 2", {}),
        "exclude_fid": ("skip fid and fid_classifier", {}),
        "n_samples": ("samples per model for IS and FID (default: as --error asks, at most 10000)", IMAGES),
        "iw_samples": ("also compute the importance-weighted ll, with so many posterior samples per image", NUMBER),
    },
    "step 3": {
        "probe_protocol": ("train: on standardised latents of training images, test on all test images (default); "
                           "paper: train on 80 %% of the test images' posterior means, test on the rest; results in "
                           "columns *_paper", {"choices": ("train", "paper"), "default": "train"}),
        "probe_images": ("training images for the simple classifiers, at most (default: as --error asks, at most "
                         "10000)", IMAGES),
    },
}  # fmt: skip


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    parser.add_argument("--run_batch_name", required=True, help="the batch: a folder of runs under --runs_dir")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (text, how) in flags.items():
            group.add_argument(f"--{name}", help=text, **how or {"action": "store_true"})
    add_bench_flags(parser)
    args = parser.parse(argv)
    args.with_classifier |= args.all
    return args


def step_names(args) -> list[str]:
    """The steps that the flags select, of which some may not be possible."""
    probes = "probes_paper" if args.probe_protocol == "paper" else "probes"
    later = {
        "recons": args.all or args.recons_acc,
        "pca": args.pca,
        **{f"latents_{split}": split in args.latents for split in ("train", "test")},
        probes: args.all or args.get_mi_cal_acc,
    }
    first = {"rates": True, "units": True, "iw": args.iw_samples, "is": args.with_classifier}
    first |= dict.fromkeys(("fid", "fid_classifier"), not args.exclude_fid)
    first |= dict.fromkeys(("mi_z", "mi_y", "mi_p"), not args.exclude_mi)
    chosen = first | later if args.all or not any(later.values()) else later
    return [name for name, flag in chosen.items() if flag]


def main(argv=None) -> int:
    """Runs the selected steps for all runs of the batch; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    from utils.evaluation import batch, images
    from utils.evaluation.run import Evaluation
    from utils.evaluation.steps import possible

    evaluation, name = Evaluation.of(vars(args), device), args.run_batch_name
    runs, problems = batch.find_runs(args.runs_dir, name)
    steps = possible(step_names(args), evaluation)
    sizes = [size for size in images.SIZES if vars(args).get(size) is None] if args.error else []
    if is_first():
        names = ", ".join(step.name for step in steps)
        error = f"; --error {args.error:g}" if sizes and len(runs) >= images.CELLS else ""
        print(f"{len(runs) + len(problems)} runs of {name}; steps: {names}; on {device}{error}", flush=True)
    else:
        problems = {}
    ordered = batch.coarse_first(runs)
    runs, folder = share(ordered), batch_folder(args.runs_dir, name)
    n = len(runs) + len(problems)
    gather = partial(batch.gather, args.runs_dir, name)
    choose = partial(images.choose, folder, ordered, steps, evaluation, args.error, sizes)
    try:
        missing = batch.evaluate(runs, steps, evaluation, problems, gather, args.max_hours or math.inf, choose)
        leave()
    finally:  # in every process, so that the table is complete whoever is last
        table = gather()
    if missing:
        lacking = Counter(name for _, name in missing)
        print(f"\nstopped after {args.max_hours:g} hours; runs that still lack a step:")
        for step in (step for step in steps if lacking[step.name]):
            print(f"  {step.name:14} {lacking[step.name]:4} of {n}")
    done = n - len({*problems} | {path for path, _ in missing})
    print(f"\n{done} of {n} runs evaluated: {table}")
    return batch.report(problems)


if __name__ == "__main__":
    run_script(main)
