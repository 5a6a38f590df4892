"""What a map of the rate plane costs: its training, one for each cell or one for all, its evaluation and its report."""

import argparse
import dataclasses
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from utils.benchmark.evaluation import multi_rate, seconds_of_cells
from utils.benchmark.measuring import measure, report
from utils.benchmark.step import THEIRS, config_of, like_the_papers, random_split, stepper
from utils.files import to_csv, write_text

EPOCHS, CELLS = 500, (49, 441)  # the paper's grid, and one of 7 x 7
ADAM, MUON, MULTI_RATE = "separate trainings by Adam", "separate trainings by Muon", "one multi-rate training"
ROOT = Path(__file__).parents[2]


def plane(args: argparse.Namespace) -> None:
    """Prints hours for maps of CELLS cells x EPOCHS epochs: trainings of each kind, unfolding, evaluation, report.

    From training steps, two cells that are unfolded and evaluated, and reports of made results. How long a multi-rate
    training must be to be as good as separate ones is not measured here.
    """
    config, device = config_of(args, num_epochs=EPOCHS), args.device
    steps = EPOCHS * math.ceil(args.images / args.batch_size)
    split = random_split(config, min(args.images, 20 * args.batch_size), device)
    conditioned = multi_rate(config)
    kinds = {ADAM: config, MUON: dataclasses.replace(config, optimizer="muon"), MULTI_RATE: conditioned}
    candidates = {THEIRS: like_the_papers(config, split, device)}
    candidates |= {name: stepper(c, 1, split) for name, c in kinds.items()}
    print(f"{args.dataset}'s shape: {args.images:,} images, batch {args.batch_size}, {config.precision}; a step:")
    seconds = measure(candidates, args.n, device)
    report(seconds, dict.fromkeys(candidates, 1), THEIRS)
    candidates.clear()
    of_cell = seconds_of_cells(conditioned, args.test_images, 2, device)
    unfolding = statistics.median(of_cell.pop("unfolding"))
    evaluating = sum(map(statistics.median, of_cell.values()))
    print(f"\n{'hours for a map':40s}" + "".join(f"{f'{n} cells':>12}" for n in CELLS))

    def line(name: str, *hours: float) -> None:
        print(f"{name:40s}" + "".join(f"{h:12.2f}" for h in hours))

    for name, took in seconds.items():
        training = steps * statistics.median(took) / 3600
        line(name, *[training * (1 if name == MULTI_RATE else n) for n in CELLS])
    line("unfolding", *[n * unfolding / 3600 for n in CELLS])
    line("evaluation, all four steps", *[n * evaluating / 3600 for n in CELLS])
    line("report", *[seconds_of_report(n) / 3600 for n in CELLS])
    print(f"(evaluation of {args.test_images:,} test images by one process, n = 2 cells; other steps n = {args.n})")


def seconds_of_report(cells: int) -> float:
    """Seconds of plot_eval.py for a made batch of so many cells, without pictures of models."""
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
        start = time.monotonic()
        subprocess.run(plot, check=True, capture_output=True)
        return time.monotonic() - start
