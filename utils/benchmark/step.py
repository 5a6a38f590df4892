"""One training step by number of cells, convolution backend, and eager or compiled; single models on CUDA streams."""

import argparse
import itertools
import statistics

import torch

from utils.benchmark.loops import (
    config_of,
    forever,
    or_say_why,
    plain_step,
    random_split,
    stepper,
)
from utils.benchmark.measuring import head, measure, peak_memory, row
from utils.errors import UserError
from utils.training.engine import Engine, clock


def step(args: argparse.Namespace) -> None:
    """Times a training step per model, by number of cells and convolution backend; eager, captured, compiled."""
    config, device, on_gpu = config_of(args), args.device, args.device.type == "cuda"
    split = random_split(config, 4 * args.batch_size, device)
    plain, batches = plain_step(config, device), forever(lambda: split.batches(args.batch_size, (0, 0)))
    modes = {"": {}} | ({"captured": {"capture": True}} if on_gpu else {})
    modes |= {"compiled": {"compile": True, "capture": on_gpu}} if args.compile else {}
    print(f"{config.vae_type}, {args.dataset}-shaped images, batch {args.batch_size}, {config.precision}, per model;")
    print("speed relative to a step of one model in plain PyTorch, timed alternately:")
    head()
    for m, backend, mode in itertools.product(args.cells or [1, 4], args.convolutions, modes):
        name = " ".join(filter(None, [f"{m} cell{'s' * (m > 1)},", backend, mode]))
        with or_say_why(name):
            peak_memory(device)
            ours = stepper(Engine(config, m, device, backend=backend, **modes[mode]), split)
            start = clock(device)
            ours()
            first = clock(device) - start
            seconds = measure({"plain": lambda: plain(next(batches)[0]), name: ours}, args.n, device)
            base = statistics.median(seconds["plain"])
            row(name, seconds[name], m, base, f"{peak_memory(device)}  first step {first:.1f} s")
            ours = None


def streams(args: argparse.Namespace) -> None:
    """Times captured steps of single models on 1, 4, 8 parallel CUDA streams, the alternative to stacking.

    Raises UserError without a GPU.
    """
    config, device = config_of(args), args.device
    if device.type != "cuda":
        raise UserError("--device: streams need a GPU")
    split = random_split(config, 4 * args.batch_size, device)
    print(f"{config.vae_type}, batch {args.batch_size}, {config.precision}, per model:")
    head()
    alone = None
    for k in args.cells or [1, 4, 8]:
        ours = [stepper(Engine(config, 1, device, args.compile, True), split) for _ in range(k)]
        places = [torch.cuda.Stream(device) for _ in range(k)]

        def side_by_side(ours=ours, places=places):
            for model_step, place in zip(ours, places, strict=True):
                place.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(place):
                    model_step()
            for place in places:
                torch.cuda.current_stream(device).wait_stream(place)

        seconds = measure({"": side_by_side}, args.n, device)[""]
        alone = alone or statistics.median(seconds) / k
        row(f"{k} streams", seconds, k, alone, peak_memory(device))
