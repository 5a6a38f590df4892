"""The throughput of the data loader for image files, compared with the training step."""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.batches import Streamed
from utils.benchmark.loops import (
    config_of,
)
from utils.benchmark.measuring import measure, report
from utils.errors import UserError
from utils.seeds import generator
from utils.training.engine import Engine, clock


def loader(args: argparse.Namespace) -> None:
    """Images per second that the loader decodes and crops, compared with those that the ImageNet model trains on."""
    device, n = args.device, args.images or 2_000
    config = config_of(args, dataset="ImageNet")
    if n < 2 * config.batch_size:
        raise UserError(f"--images: must be at least two batches ({2 * config.batch_size}), got {n}")
    with tempfile.TemporaryDirectory() as folder:
        rng, paths = np.random.default_rng(0), []
        for i in range(min(n, 200)):  # files of ImageNet's usual size, about 500 x 375 and 100 kB
            paths.append(Path(folder, f"{i}.jpg"))
            rough = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            rough.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
        size = sum(p.stat().st_size for p in paths) / len(paths) / 1e3
        samples = [(str(paths[i % len(paths)]), 0) for i in range(n)]
        split = Streamed(samples, config.image_shape, device)
        start, counts = clock(device), []
        for i, (x, _) in enumerate(split.batches(config.batch_size, (0, 0))):
            counts.append(len(x))
            if i == 0:  # excludes the start of the workers
                start, counts = clock(device), []
        decoded = sum(counts) / (clock(device) - start)
    files = f"{n:,} JPEG files of 500 x 375 and {size:.0f} kB"
    print(f"loader: {split.workers} workers, {files}: {decoded:.0f} images/s")
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    candidates = {}
    ones, on_gpu = torch.ones(1, device=device), device.type == "cuda"
    for backend in args.convolutions:
        engine = Engine(config, 1, device, args.compile, on_gpu, backend)
        noise = engine.stack.model.noise(len(x), generator(device, 0))
        candidates[f"step, {backend}"] = lambda engine=engine, noise=noise: engine.step(x, noise, ones, ones)
    seconds = measure(candidates, args.n, device, warmup=1)
    report(seconds, dict.fromkeys(seconds, 1), next(iter(seconds)))
    for name, values in seconds.items():
        trained = config.batch_size / statistics.median(values)
        print(f"{name:40s} {trained:.0f} images/s; the loader decodes {decoded / trained:.1f} x as many")
