"""Where the evaluation of a cell spends its time: cells of an untrained multi-rate model, unfolded and evaluated."""

import dataclasses
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from tqdm import tqdm

from datasets.loading import Data
from models.build import build_model
from models.classifiers import build_classifier, evaluator
from utils.benchmark.step import CLASSES, patterns, quartiles
from utils.config import Config
from utils.evaluation.run import EvaluatedRun, Evaluation
from utils.evaluation.steps import STEPS, fits
from utils.runs import Run
from utils.training.multi_rate import folded
from utils.training.schedule import clock

PARTS = {  # of the evaluation, as the README counts its steps; step 3 is taken apart below
    "step 1, rates, PSNR, latents": ("rates", "units"),
    "step 1, samples": ("is", "fid_classifier"),
    "step 2, mutual information": ("mi_z", "mi_y"),
    "step 4, reconstructions": ("recons",),
}


def evaluate(config: Config, test_images: int, some: int, n: int, device: torch.device) -> None:
    """Prints seconds a cell for unfolding and for each step, step 3 by classifier and latent; of all or some images."""
    seconds = seconds_of_cells(multi_rate(config), test_images, [test_images, some], n, device)
    what = f"{test_images:,} test images; as many samples, training images and chosen test images as above"
    print(f"{config.dataset}'s shape: {what}; seconds a cell, n = {n}:")
    print(f"{'':40s}" + "".join(f"{f'{size:,} images':>30}" for size in seconds))
    for name in sorted(seconds[some]):
        values = (quartiles(of_size[name]) for of_size in seconds.values())
        print(f"{name:40s}" + "".join(f"{middle:10.2f} {low:8.2f} .. {high:8.2f}" for low, middle, high in values))
    sums = (sum(map(statistics.median, of_size.values())) for of_size in seconds.values())
    print(f"{'all':40s}" + "".join(f"{total:10.2f}{'':20s}" for total in sums).rstrip())


def multi_rate(config: Config) -> Config:
    """The Config of a multi-rate model for betas from 0.1 to 10."""
    ends = {"beta_y": 0.1, "beta_z": 0.1, "beta_max_y": 10.0, "beta_max_z": 10.0}
    usual = dict.fromkeys(("lr_schedule", "optimizer", "warmup_epochs"))
    return dataclasses.replace(config, multi_rate=True, **usual, **ends)


def seconds_of_cells(
    config: Config, images: int, sizes: list[int], cells: int, device: torch.device
) -> dict[int, dict[str, list[float]]]:
    """Seconds of unfolding and of each part of the evaluation, for several cells of a multi-rate model.

    By how many samples, training images and chosen test images are used.
    """
    model, seconds = build_model(config).to(device).eval(), {size: defaultdict(list) for size in sizes}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = clock(device)
        yield
        seconds[evaluation.n_samples][name].append(clock(device) - start)

    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(device, folder, folder)
        data = Data(patterns(config, images, device), patterns(config, images, device), CLASSES)
        classifier = evaluator(build_classifier(config, CLASSES), device), "random"
        evaluation.data, evaluation.classifiers = lambda _: data, lambda _: [classifier]
        for i, size in tqdm([*product(range(cells), sizes)], unit="cell", leave=False):
            evaluation.n_samples = evaluation.probe_images = evaluation.test_images = size
            one = {"beta_y": 0.1 + i / cells, "beta_max_y": None, "beta_max_z": None, "source": "0" * 64}
            run = Run.of(dataclasses.replace(config, **one), folder)
            run.create()
            with timed("unfolding"):
                run.finish(*folded(model, run, data, device))
            evaluated = EvaluatedRun(run, evaluation)
            for part, names in PARTS.items():
                with timed(part):
                    for step in (STEPS[name] for name in names):
                        evaluated.record(step, step.compute(evaluated))
            with timed("step 3, latents"):
                jobs = fits(evaluated, paper=False)
            for (name, key), fit in jobs.items():
                with timed(f"step 3, {name} on {key}"):
                    fit()
    return seconds
