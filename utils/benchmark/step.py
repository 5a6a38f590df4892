"""A training step, and what it is compared with: one in plain PyTorch, and one like the paper's code."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datasets.batches import Resident
from models.build import build_model
from utils.benchmark.timing import measure, report
from utils.config import Config
from utils.runs import Run
from utils.seeds import generator
from utils.training.training import Setup, Training

THEIRS, PLAIN = "like the paper's code", "plain PyTorch, data on the device"


def step(config: Config, images: int, cells: list[int], compile: bool, n: int, device: torch.device) -> None:
    """Times a training step per cell: of one cell and of stacked cells; eager, on a GPU captured, and compiled."""
    split = random_split(config, min(images, 20 * config.batch_size), device)
    batches, plain = forever(lambda: split.batches(config.batch_size, (0, 0))), plain_step(config, device)
    candidates = {THEIRS: like_the_papers(config, split, device), PLAIN: lambda: plain(next(batches)[0])}
    sizes, ways = dict.fromkeys(candidates, 1), {"eager": "off"}
    if device.type == "cuda":
        ways["captured"] = "auto"
    if compile:
        ways["compiled"] = "on"
    for m, (way, how) in itertools.product(cells, ways.items()):
        name = f"{m} cell, {way}" if m == 1 else f"{m} cells, {way}"
        candidates[name], sizes[name] = stepper(config, m, split, how), m
    name = f"{config.vae_type}, {config.dataset}'s shape, batch {config.batch_size}, {config.precision}"
    print(f"{name}; a step, by cell:")
    report(measure(candidates, n, device), sizes, THEIRS)
    if device.type == "cuda":
        print(f"memory of all together: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")


def random_split(config: Config, n: int, device: torch.device) -> Resident:
    """A split of n random images."""
    images = torch.randint(0, 256, (n, *config.image_shape), generator=generator("cpu", 0), dtype=torch.uint8)
    return Resident(images, torch.zeros(n, dtype=torch.long), device)


def forever(iterable_of: Callable) -> Iterator:
    """The items of one iterable after another, without end."""
    while True:
        yield from iterable_of()


def stepper(config: Config, m: int, split: Resident, compile: str = "auto") -> Callable[[], Tensor]:
    """This project's training step of m cells, including the conversion of images from bytes."""
    training = Training([Run(Path(), config)] * m, [None] * m, Setup(split.images.device, compile=compile))
    training.begin_epoch(steps=100_000)
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
        p_y = Normal(*model.p_y(z))
        q_y = Normal(*model.q_y_given(z, x, None))
        ll = model.p_x(q_y.rsample()).log_prob(x)
        kl_y = kl_divergence(q_y, p_y).flatten(1).sum(1)
        kl_z = kl_divergence(q_z, Normal(torch.zeros_like(z), torch.ones_like(z))).flatten(1).sum(1)
        optimizer.zero_grad()
        loss = (-ll + config.beta_y * kl_y + config.beta_z * kl_z).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


class Pictures(torch.utils.data.Dataset):
    """PIL images that are converted to tensors one by one."""

    def __init__(self, images: Tensor):
        self.pictures = [v2.functional.to_pil_image(image) for image in images]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return v2.functional.to_dtype(v2.functional.pil_to_tensor(self.pictures[i]), scale=True)


def like_the_papers(config: Config, split: Resident, device: torch.device) -> Callable[[], float]:
    """A step like that of the paper's code: converts images one by one, and reads the loss back every time."""
    loader = DataLoader(Pictures(split.images[: 20 * config.batch_size].cpu()), config.batch_size, shuffle=True)
    batches, plain = forever(lambda: loader), plain_step(config, device)
    return lambda: plain(next(batches).to(device)).item()
