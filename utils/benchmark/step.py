"""A training step, and what it is compared with: one in plain PyTorch, and one like the paper's code."""

import itertools
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as images_as
from tqdm import tqdm

from datasets.batches import Resident
from models.build import build_model
from utils.config import Config
from utils.machine import name_of
from utils.runs import Run
from utils.training.schedule import clock
from utils.training.training import Setup, Training

CLASSES = 10
THEIRS, PLAIN = "like the paper's code", "plain PyTorch, data on the device"


def machine(device: torch.device) -> str:
    """One line with the device, the number of threads, and versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name_of(device)}, {torch.get_num_threads()} threads, {versions}"


def measure(candidates: dict[str, Callable], n: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds for n calls of each candidate, called alternately, after three calls of each."""
    seconds = {name: [] for name in candidates}
    for _ in tqdm(range(n + 3), unit="round", leave=False):
        for name, call in candidates.items():
            start = clock(device)
            call()
            seconds[name].append(clock(device) - start)
    return {name: values[3:] for name, values in seconds.items()}


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def report(seconds: dict[str, list[float]]) -> None:
    """Prints each candidate's milliseconds, with quartiles and n, and its speed relative to the first."""
    print(f"{'':40s} {'median':>10} {'quartiles':>23} {'n':>5} {'speed':>8}")
    base = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        low, middle, high = quartiles(values)
        times = f"{1e3 * middle:7.3f} ms {1e3 * low:8.3f} .. {1e3 * high:8.3f}"
        print(f"{name:40s} {times} {len(values):8d} {base / middle:6.2f} x", flush=True)


def step(config: Config, images: int, cells: list[int], compile: bool, n: int, device: torch.device) -> None:
    """Times a training step per cell: of one cell and of stacked cells; eager, on a GPU captured, and compiled."""
    split = patterns(config, min(images, 20 * config.batch_size), device)
    batches, plain = forever(lambda: split.batches(config.batch_size, (0, 0))), plain_step(config, device)
    candidates = {THEIRS: like_the_papers(config, split, device), PLAIN: lambda: plain(next(batches)[0])}
    sizes, ways = {}, {"eager": "off"}
    if device.type == "cuda":
        ways["captured"] = "auto"
    if compile:
        ways["compiled"] = "on"
    for m, (way, how) in itertools.product(cells, ways.items()):
        name = f"{m} cell, {way}" if m == 1 else f"{m} cells, {way}"
        candidates[name], sizes[name] = stepper(config, m, split, how), m
    name = f"{config.vae_type}, {config.dataset}'s shape, batch {config.batch_size}"
    print(f"{name}, {config.precision}; a step, by cell:")
    seconds = measure(candidates, n, device).items()
    report({name: [s / sizes.get(name, 1) for s in values] for name, values in seconds})
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"memory of all together: {memory:.2f} GiB")


def patterns(config: Config, n: int, device: torch.device) -> Resident:
    """n images of noisy patterns, one a class."""
    rng, labels = np.random.default_rng(0), np.arange(n) % CLASSES
    means = rng.normal(128, 40, (CLASSES, *config.image_shape))
    images = rng.normal(means[labels], 40).clip(0, 255).astype(np.uint8)
    return Resident(torch.from_numpy(images), torch.from_numpy(labels), device)


def forever(iterable_of: Callable) -> Iterator:
    """The items of one iterable after another, without end."""
    while True:
        yield from iterable_of()


def stepper(config: Config, m: int, split: Resident, compile: str = "auto") -> Callable[[], Tensor]:
    """This project's training step of m cells, including the conversion of images from bytes."""
    setup = Setup(split.images.device, compile=compile)
    training = Training([Run(Path(), config)] * m, [None] * m, setup)
    training.begin_epoch(steps=100_000)
    training._set_spread(float(config.is_conditioned))  # as in most of a training
    batches = forever(lambda: split.batches(config.batch_size, (0, 0)))

    def step():
        x = next(batches)[0]
        return training.step(x, len(x))

    return step


def plain_step(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The same training step in plain PyTorch: torch.distributions, their KL divergences, and Adam."""
    model = build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)

    def step(x):
        q_z = Normal(*model.q_z(x))
        z = q_z.rsample()
        p_y, q_y = Normal(*model.p_y(z)), Normal(*model.q_y_given(z, x, None))
        ll = model.p_x(q_y.rsample()).log_prob(x)
        kl_y = kl_divergence(q_y, p_y).flatten(1).sum(1)
        kl_z = kl_divergence(q_z, Normal(torch.zeros_like(z), torch.ones_like(z))).flatten(1).sum(1)
        optimizer.zero_grad()
        loss = (-ll + config.beta_y * kl_y + config.beta_z * kl_z).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def like_the_papers(config: Config, split: Resident, device: torch.device) -> Callable[[], float]:
    """A step like that of the paper's code: converts images one by one, and reads the loss back every time."""

    def tensors(pictures: list) -> Tensor:
        return torch.stack([images_as.to_dtype(images_as.pil_to_tensor(p), scale=True) for p in pictures])

    pictures = [images_as.to_pil_image(image.cpu()) for image in split.images]
    loader = DataLoader(pictures, config.batch_size, shuffle=True, collate_fn=tensors)
    batches, plain = forever(lambda: loader), plain_step(config, device)
    return lambda: plain(next(batches).to(device)).item()
