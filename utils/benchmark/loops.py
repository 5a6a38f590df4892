"""The training steps that are compared: this project's, plain PyTorch, and one like the paper's code."""

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datasets.batches import Resident
from models.build import build_model
from utils.config import Config
from utils.errors import is_out_of_memory, one_line
from utils.seeds import generator
from utils.training.engine import Engine


def config_of(args: argparse.Namespace, **settings) -> Config:
    """The Config of a benchmark's flags, with `settings` changed."""
    names = "dataset", "conv_channels", "z_dims", "batch_size", "precision"
    return Config(**{name: getattr(args, name) for name in names} | settings)


def random_split(config: Config, n: int, device: torch.device) -> Resident:
    """A split of n random images."""
    images = torch.randint(0, 256, (n, *config.image_shape), generator=generator("cpu", 0), dtype=torch.uint8)
    return Resident(images, torch.zeros(n, dtype=torch.long), device)


def forever(iterable_of: Callable) -> Iterator:
    """The items of one iterable after another, without end."""
    while True:
        yield from iterable_of()


def stepper(engine: Engine, split: Resident) -> Callable[[], Tensor]:
    """This project's training step, including the conversion of images from bytes."""
    config, device = engine.config, engine.device
    noise_g, ones = generator(device, 0), torch.ones(engine.stack.m, device=device)
    batches = forever(lambda: split.batches(config.batch_size, (0, 0)))

    def step():
        x = next(batches)[0]
        return engine.step(x, engine.stack.model.noise(len(x), noise_g), ones, ones)

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


@torch.no_grad()
def run_once(model: nn.Module, config: Config, device: torch.device) -> None:
    """A forward pass over one random batch, which triggers the model's hooks."""
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    model(x, model.noise(len(x), torch.Generator(device)))


@contextlib.contextmanager
def or_say_why(name: str) -> Iterator[None]:
    """Prints the error of a candidate that fails, so that the benchmark continues with the next."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        print(f"{name:40s} {'out of memory' if is_out_of_memory(e) else one_line(e)}", flush=True)
