"""What a cell costs from training to figures, and how the costs of evaluation grow."""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.benchmark.evaluation import CORES, GRID, Made, plain_mi
from utils.benchmark.grid import EPOCHS
from utils.benchmark.loops import config_of, like_the_papers, random_split, stepper
from utils.benchmark.measuring import measure
from utils.evaluation.probes import PROBES, TAILS
from utils.files import to_csv, write_text
from utils.training.engine import Engine

STEPS = {  # of the evaluation, as the README counts them
    "step 1, rates, PSNR, latents": ("rates", "units"),
    "step 1, samples: IS, Frechet distance": ("is", "fid_classifier"),
    "step 2, mutual information": ("mi_z", "mi_y"),
    "step 4, reconstructions": ("recons",),
}
TRAINING, SOME = 50_000, 100  # images; those of which a plain loop is timed
ROOT = Path(__file__).parents[2]
SIZES = (1_000, 3_000, 10_000, 30_000, 60_000)


def pipeline(args: argparse.Namespace) -> None:
    """Seconds a cell and hours for 441 of training, each step of the evaluation, and figures.

    Beside it, what is like the paper's code where that can be told: its training step, its mutual information image by
    image, its probes by saga, and a start of Python for every cell. Its evaluation itself does not start.
    """
    config, device, n = config_of(args), args.device, args.images or 10_000
    on_gpu, steps = device.type == "cuda", EPOCHS * math.ceil(TRAINING / args.batch_size)
    print(f"{args.dataset}'s shape: {EPOCHS} epochs of {TRAINING:,} images; {n:,} test images, as many samples")
    split, found = random_split(config, min(TRAINING, 20 * args.batch_size), device), {}
    here = stepper(Engine(config, 1, device, on_gpu, on_gpu, args.convolutions[0]), split)
    took = measure({"here": here, "theirs": like_the_papers(config, split, device)}, args.n, device)
    found["training"] = tuple(steps * statistics.median(values) for values in took.values())
    made = Made(config, n, device)
    for title, names in STEPS.items():
        found[title] = statistics.median(made.seconds(names, args.n)), None
    means, stds, labels = (torch.from_numpy(made.latents[name]).to(device) for name in ("qz_mu", "qz_std", "labels"))
    some = min(SOME, n)
    theirs = seconds(partial(plain_mi, means, means, stds, labels, some), args.n, device) * n / some
    found["step 2, mutual information"] = found["step 2, mutual information"][0], theirs
    made.prepare()
    ours = sum(seconds(partial(made.fit, name, key), 2, device) for key in TAILS for name in PROBES)
    theirs = seconds(made.plain_probes, 2, device)
    found["step 3, simple classifiers"] = ours + seconds(made.prepare, args.n, device), theirs
    start = [sys.executable, "-c", "import eval_beta_single, utils.evaluation.steps"]
    started = seconds(partial(subprocess.run, start, check=True, cwd=ROOT), args.n, device)
    found["start of Python"] = started / GRID, started
    found["figures and tables"] = seconds(partial(plots, GRID), 2, device) / GRID, None
    print(f"\n{'':38} {'s a cell':>10} {f'h for {GRID}':>10} {'like the paper, s':>18} {'times':>7}")
    for title, (ours, theirs) in found.items():
        beside = "" if theirs is None else f" {theirs:18.2f} {theirs / ours:7.1f}"
        print(f"{title:38} {ours:10.2f} {ours * GRID / 3600:10.2f}{beside}")
    print(f"step 3 is of one core: --cpu_n {CORES} fits {CORES} at once")


def growth(args: argparse.Namespace) -> None:
    """How seconds grow with test images, classes and cells, and the power of each from the last two sizes."""
    config, device, most = config_of(args), args.device, args.images or SIZES[-1]

    def parts(n: int, classes: int) -> dict[str, float]:
        made = Made(config, n, device, classes)
        found = {name: seconds(partial(made.compute, name), args.n, device) for name in ("rates", "mi_z", "mi_y")}
        made.prepare()
        fits = {f"{name}, {key}": partial(made.fit, name, key) for key in ("z", "y") for name in PROBES}
        return found | {name: seconds(fit, args.n, device) for name, fit in fits.items()}

    sizes, few = [n for n in SIZES if n <= most] or [most // 2, most], min(most, 3_000)
    table("test images; 10,000 or fewer for probes", {n: parts(n, 10) for n in sizes})
    table(f"classes, of {few:,} images", {k: parts(few, k) for k in (10, 30, 100, 1000) if 2 * k <= few})
    cells = args.cells or (9, 49, GRID)
    table("cells", {n: {"figures, tables": seconds(partial(plots, n), args.n, device)} for n in cells})


def table(what: str, of_size: dict[int, dict[str, float]]) -> None:
    """Prints seconds by size, and with which power of the size they grow."""
    (before, few), (size, many) = list(of_size.items())[-2:]
    print(f"\n{what:40}" + "".join(f"{n:>10,}" for n in of_size) + f"{'power':>8}")
    for name in many:
        power = math.log(many[name] / few[name]) / math.log(size / before)
        print(f"{name:40}" + "".join(f"{row[name]:10.3f}" for row in of_size.values()) + f"{power:8.1f}", flush=True)


def seconds(call: Callable[[], object], n: int, device: torch.device) -> float:
    """The median time of n calls."""
    return statistics.median(measure({"": call}, n, device, warmup=0)[""])


def plots(cells: int) -> None:
    """Draws all figures and the report of a made batch of so many cells, without pictures of models."""
    rows, rng = [], np.random.default_rng(0)
    betas = np.geomspace(0.1, 10, math.ceil(cells**0.5))
    for beta_y, beta_z in itertools.islice(itertools.product(betas, betas), cells):
        of_betas = {"run": f"{beta_y}-{beta_z}", "beta_y": beta_y, "beta_z": beta_z, "kl_y": 20 / beta_y}
        rates = {"kl_z": 5 / beta_z, "ll": -20 * math.log(20 * beta_y) - 5 * math.log(5 * beta_z) - 300}
        scores = dict(zip(("psnr", "is_mean", "svm_rbf_acc", "svm_rbf_acc_y"), rng.random(4), strict=True))
        rows.append({**of_betas, **rates, **scores, "status": "finished", "vae_type": "HVAE"})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "b").mkdir()
        write_text(Path(folder, "b", "eval_results.csv"), to_csv(rows, rows[0]))
        plot = [sys.executable, ROOT / "plot_eval.py", "--runs_dir", folder, "--run_batch_name", "b", "--device", "cpu"]
        subprocess.run(plot, check=True, capture_output=True)
