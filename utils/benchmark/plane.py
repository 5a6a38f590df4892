"""What a map of the paper's grid costs: its loop, trainings of their own, or one multi-rate training."""

import argparse
import dataclasses
import math
import statistics
import tempfile
import time

from datasets.loading import Data
from models.build import build_model
from utils.benchmark.grid import EPOCHS, MODELS
from utils.benchmark.loops import config_of, like_the_papers, random_split, stepper
from utils.benchmark.measuring import measure, report
from utils.config import Config
from utils.evaluation.batch import run_step
from utils.evaluation.subject import Bench, Subject
from utils.runs import Run
from utils.training.engine import Engine
from utils.training.unfold import folded

OWN, BY_MUON, ONE_FOR_ALL = "own trainings", "own trainings by Muon", "multi-rate training"
THEIRS = "like the paper's code"


def plane(args: argparse.Namespace) -> None:
    """Hours for 441 cells x 500 epochs, from training steps, and from a few cells that are unfolded and evaluated.

    A multi-rate training is one training; how long it must be to be as good as its cells' own is not measured here.
    """
    config, device, n = config_of(args, num_epochs=EPOCHS), args.device, args.images or 50_000
    on_gpu, steps = device.type == "cuda", math.ceil(n / args.batch_size)
    print(f"{config.vae_type}, {n:,} {args.dataset}-shaped random images, batch {args.batch_size}, {config.precision}")
    ends = {"beta_y": 0.1, "beta_z": 0.1, "beta_max_y": 10.0, "beta_max_z": 10.0}
    conditioned = dataclasses.replace(
        config, multi_rate=True, lr_schedule=None, optimizer=None, warmup_epochs=None, **ends
    )
    split, m = random_split(config, n, device), max(args.cells or [1])
    how = (device, on_gpu, on_gpu, args.convolutions[0])
    candidates = {THEIRS: like_the_papers(config, split, device), OWN: stepper(Engine(config, m, *how), split)}
    candidates[BY_MUON] = stepper(Engine(dataclasses.replace(config, optimizer="muon"), m, *how), split)
    candidates[ONE_FOR_ALL] = stepper(Engine(conditioned, 1, *how), split)
    units = dict.fromkeys(candidates, 1) | {OWN: m, BY_MUON: m}
    seconds = measure(candidates, args.n, device)
    report(seconds, units, OWN)
    candidates.clear()
    data = Data(split, random_split(config, max(1, n // 5), device), 10)
    unfolding, evaluating = each_cell(conditioned, args.n, data, device)
    for name, took in (("unfolding", unfolding), ("evaluating, step 1", evaluating)):
        low, middle, high = statistics.quantiles(took, n=4)
        print(
            f"{name}: {middle:.2f} s a cell ({low:.2f} .. {high:.2f}, n = {len(took)}, {len(data.test):,} test images)"
        )
    unfolding, evaluating = statistics.median(unfolding), statistics.median(evaluating)
    training = {name: statistics.median(took) / units[name] * steps * EPOCHS / 3600 for name, took in seconds.items()}
    print(f"\n{'hours for a map':40s} {'49 cells':>12} {f'{MODELS} cells':>12}")

    def line(name, hours_of):
        print(f"{name:40s} {hours_of(49):12.2f} {hours_of(MODELS):12.2f}")

    for name in (THEIRS, OWN, BY_MUON):
        line(name, lambda cells, name=name: cells * training[name])
    for times in (1, 4):
        name = f"{ONE_FOR_ALL}, {times} x {EPOCHS} epochs"
        line(name, lambda cells, times=times: times * training[ONE_FOR_ALL] + cells * unfolding / 3600)
    line("evaluating, step 1, of either", lambda cells: cells * evaluating / 3600)


def each_cell(config: Config, n: int, data: Data, device) -> tuple[list[float], list[float]]:
    """Seconds to unfold and to evaluate (rates, PSNR, latents) each of n cells of an untrained conditioned model."""
    model, unfolding, evaluating = build_model(config).to(device).eval(), [], []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, folder, folder)
        bench._data[config.dataset, config.image_shape] = data
        for i in range(n):
            ends = {"beta_y": 0.1 + 9.9 * i / n, "beta_max_y": None, "beta_max_z": None, "source": "0" * 64}
            run, start = Run.of(dataclasses.replace(config, **ends), folder), time.monotonic()
            run.create()
            run.finish(*folded(model, run, data, device))
            unfolded = time.monotonic()
            run_step(Subject(run, bench), "rates", force=True)
            unfolding.append(unfolded - start)
            evaluating.append(time.monotonic() - unfolded)
    return unfolding, evaluating
