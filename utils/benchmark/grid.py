"""The time that the paper's grid takes, from training steps of one cell and of stacked cells, and from whole epochs."""

import argparse
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.loading import Data
from models.build import build_model
from utils.benchmark.loops import (
    config_of,
    forever,
    like_the_papers,
    plain_step,
    random_split,
    run_once,
    stepper,
)
from utils.benchmark.measuring import copy_bandwidth, measure, peak_memory, report
from utils.config import Config
from utils.runs import Run
from utils.training.chunk import Chunk
from utils.training.engine import Engine, doublings, fastest
from utils.training.loop import train

MODELS, EPOCHS = 441, 500  # the paper's grid


def grid(args: argparse.Namespace) -> None:
    """Estimates the hours for the paper's grid, 441 models x 500 epochs.

    First from steps of one cell and of stacked cells, compared with plain loops; then from whole epochs of a chunk
    in the training loop, with evaluation, logging and checkpoints.
    """
    config, device, on_gpu = config_of(args), args.device, args.device.type == "cuda"
    n, theirs = args.images or 50_000, "like the paper's code"
    split, steps, backend = random_split(config, n, device), math.ceil(n / args.batch_size), args.convolutions[0]
    print(f"{config.vae_type}, {n:,} {args.dataset}-shaped random images, batch {args.batch_size}, {config.precision}")
    sizes = args.cells or [1, 4]
    if on_gpu:
        size, backend = fastest(config, args.cells or doublings(MODELS), device, args.convolutions)
        sizes = [1, size]
        print(f"fastest: {size} cells at once, convolution backend {backend}")
    peak_memory(device)
    batches, plain = forever(lambda: split.batches(args.batch_size, (0, 0))), plain_step(config, device)
    candidates = {theirs: like_the_papers(config, split, device)}
    candidates["plain, data on the device"] = lambda: plain(next(batches)[0])
    units = dict.fromkeys(candidates, 1)
    for m in dict.fromkeys([1, *sizes]):
        name = f"{m} cells stacked" if m > 1 else "1 cell"
        units[name], candidates[name] = m, stepper(Engine(config, m, device, on_gpu, on_gpu, backend), split)
    seconds = measure(candidates, args.n, device)
    report(seconds, units, theirs)
    copy, traffic = copy_bandwidth(device), activations(config, device) * 4  # written and read, forward and backward
    print(f"memory bandwidth (copy): {copy:.1f} GB/s; a step moves at least {traffic / 1e6:.0f} MB per model")
    each = {name: statistics.median(values) / units[name] for name, values in seconds.items()}
    for name, took in each.items():
        hours = took * steps * MODELS * EPOCHS / 3600
        print(
            f"{name:40s} {3600 / (took * steps):10.1f} models x epochs per hour, the grid in {hours:9.1f} hours, "
            f"{traffic / took / 1e9:7.1f} GB/s"
        )
    best = min((name for name in units if "cell" in name), key=each.get)
    if on_gpu:
        print(f"peak memory of all of these together: {peak_memory(device).strip()}")
    candidates.clear()
    plain = batches = None
    data = Data(split, random_split(config, max(1, n // 5), device), 10)
    first, epochs = whole_epochs(config, units[best], backend, args.epochs or (20 if on_gpu else 1), data, device)
    took = statistics.median(epochs)
    hours = (math.ceil(MODELS / units[best]) * EPOCHS * took + first) / 3600
    paper = each[theirs] * steps * MODELS * EPOCHS / 3600
    print(
        f"{best}, whole epochs with evaluation, logging and checkpoints: {took:.2f} s (n = {len(epochs)}, "
        f"{min(epochs):.2f} .. {max(epochs):.2f}), first epoch {first:.1f} s{peak_memory(device)}"
    )
    print(
        f"the grid takes {hours:.2f} hours; a loop {theirs}, without evaluation, logging and checkpoints, takes "
        f"{paper:.2f} hours: {paper / hours:.1f} x"
    )


def whole_epochs(
    config: Config, m: int, backend: str, n: int, data: Data, device: torch.device
) -> tuple[float, list[float]]:
    """Seconds for a chunk's first epoch, which includes compilation, and for each of the n epochs after it."""
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        configs = [dataclasses.replace(config, num_epochs=n + 1, beta_y=1.0 + i / m) for i in range(m)]
        runs = [Run.of(c, folder) for c in configs]
        for run in runs:
            run.create()
        started = time.time()
        engine = Engine(configs[0], m, device, on_gpu, on_gpu, backend)
        train(Chunk(runs, [None] * m, engine), data, SimpleNamespace(received=None))
        events = EventAccumulator(str(runs[0].path), size_guidance={"scalars": 0}).Reload()
        times = [e.wall_time for e in events.Scalars("train/loss")]
    return times[0] - started, [b - a for a, b in itertools.pairwise(times)]


def activations(config: Config, device: torch.device) -> int:
    """Bytes of the outputs of all layers in a forward pass of one model over one batch."""
    model, sizes = build_model(config).to(device), []
    width = 2 if config.precision == "bf16" else 4
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(
                lambda _, __, out: sizes.append(out.numel() * width if hasattr(out, "numel") else 0)
            )
    run_once(model, config, device)
    return sum(sizes)
