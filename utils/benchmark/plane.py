"""What a map of the rate plane costs: its training, one for each cell or one for all, its evaluation and its report."""

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
import torch

from utils.benchmark.evaluation import multi_rate, seconds_of_cells
from utils.benchmark.step import THEIRS, like_the_papers, measure, patterns, report, stepper
from utils.config import Config
from utils.files import to_csv, write_text

EPOCHS, CELLS = 500, (49, 441)  # the paper's grid, and one of 7 x 7
REFINE = EPOCHS // 10  # epochs, of every unfolded cell
ADAM, MUON, MULTI_RATE = "separate trainings by Adam", "separate trainings by Muon", "one multi-rate training"
ROOT = Path(__file__).parents[2]


def plane(config: Config, images: int, test_images: int, some: int, n: int, device: torch.device) -> None:
    """Prints hours for maps of CELLS cells x EPOCHS epochs: trainings, unfolding, refining, evaluation, report."""
    config = dataclasses.replace(config, num_epochs=EPOCHS)
    split = patterns(config, min(images, 20 * config.batch_size), device)
    conditioned = multi_rate(config)
    kinds = {ADAM: config, MUON: dataclasses.replace(config, optimizer="muon"), MULTI_RATE: conditioned}
    candidates = {THEIRS: like_the_papers(config, split, device)}
    candidates |= {name: stepper(c, 1, split) for name, c in kinds.items()}
    print(f"{config.dataset}'s shape: {images:,} images, batch {config.batch_size}, {config.precision}; a step:")
    seconds = measure(candidates, n, device)
    report(seconds)
    of_cell = seconds_of_cells(conditioned, test_images, [test_images, some], 2, device)
    of_cell = {size: {name: statistics.median(s) for name, s in of_size.items()} for size, of_size in of_cell.items()}
    unfolding, *_ = (of_size.pop("unfolding") for of_size in [*of_cell.values()])
    hours, steps = {}, EPOCHS * math.ceil(images / config.batch_size)
    for name, took in seconds.items():
        training = steps * statistics.median(took)
        hours[name] = [training if name == MULTI_RATE else cells * training for cells in CELLS]
    hours["unfolding"] = [cells * unfolding for cells in CELLS]
    hours[f"--refine_epochs {REFINE} of all of them"] = [s * REFINE / EPOCHS for s in hours[MUON]]
    for size, of_size in of_cell.items():
        hours[f"all four steps, {size:,} images"] = [cells * sum(of_size.values()) for cells in CELLS]
    hours["report"] = [seconds_of_report(cells) for cells in CELLS]
    print(f"\n{'hours for a map':40s}" + "".join(f"{f'{cells} cells':>12}" for cells in CELLS))
    for name, values in hours.items():
        print(f"{name:40s}" + "".join(f"{s / 3600:12.2f}" for s in values))
    print(f"(evaluation of {test_images:,} test images by one process, n = 2 cells; other steps n = {n})")


def seconds_of_report(cells: int) -> float:
    """Seconds of plot_eval.py for a made batch of so many cells, without pictures of models."""
    rows, rng, betas = [], np.random.default_rng(0), np.geomspace(0.1, 10, math.ceil(cells**0.5))
    names = ("psnr", "is_mean", "svm_rbf_acc", "svm_rbf_acc_y")
    for y, z in itertools.islice(itertools.product(betas, betas), cells):
        ll = -20 * math.log(20 * y) - 5 * math.log(5 * z) - 300
        row = {"run": f"{y}-{z}", "beta_y": y, "beta_z": z, "kl_y": 20 / y, "kl_z": 5 / z, "ll": ll}
        row |= {"status": "finished", "vae_type": "HVAE"}
        rows.append(row | dict(zip(names, rng.random(4), strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "b").mkdir()
        write_text(Path(folder, "b", "eval_results.csv"), to_csv(rows, rows[0]))
        plot = [sys.executable, ROOT / "plot_eval.py", "--runs_dir", folder, "--run_batch_name", "b", "--device", "cpu"]
        start = time.monotonic()
        subprocess.run(plot, check=True, capture_output=True)
        return time.monotonic() - start
