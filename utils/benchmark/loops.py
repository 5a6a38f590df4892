"""The training steps that are compared: ours, plain PyTorch, and one that works like the paper's code."""

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
    names = "dataset", "conv_channels", "z_dims", "batch_size", "precision"
    return Config(**{name: getattr(args, name) for name in names} | settings)


def random_split(config: Config, n: int, device: torch.device) -> Resident:
    images = torch.randint(0, 256, (n, *config.image_shape), generator=generator("cpu", 0), dtype=torch.uint8)
    return Resident(images, torch.zeros(n, dtype=torch.long), device)


def forever(iterable_of: Callable) -> Iterator:
    while True:
        yield from iterable_of()


def stepper(engine: Engine, split: Resident) -> Callable[[], Tensor]:
    """Our training step, from the images' bytes on."""
    config, device = engine.config, engine.device
    noise_g, ones = generator(device, 0), torch.ones(engine.stack.m, device=device)
    batches = forever(lambda: split.batches(config.batch_size, (0, 0)))

    def step():
        x = next(batches)[0]
        return engine.step(x, engine.stack.model.noise(len(x), noise_g), ones, ones)

    return step


def plain_step(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A training step of the same mathematics written plainly: torch.distributions, its KLs, and Adam."""
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
    """PIL images, made tensors one by one."""

    def __init__(self, images: Tensor):
        self.pictures = [v2.functional.to_pil_image(image) for image in images]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return v2.functional.to_dtype(v2.functional.pil_to_tensor(self.pictures[i]), scale=True)


def like_the_papers(config: Config, split: Resident, device: torch.device) -> Callable[[], float]:
    """A step that works the way the paper's code does: images decoded one by one, the loss read back every time."""
    loader = DataLoader(Pictures(split.images[: 20 * config.batch_size].cpu()), config.batch_size, shuffle=True)
    batches, plain = forever(lambda: loader), plain_step(config, device)
    return lambda: plain(next(batches).to(device)).item()


@torch.no_grad()
def run_once(model: nn.Module, config: Config, device: torch.device) -> None:
    """A forward pass over one batch, for its hooks."""
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    model(x, model.noise(len(x), torch.Generator(device)))


@contextlib.contextmanager
def or_say_why(name: str) -> Iterator[None]:
    """Goes on with the next one where something cannot run here."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        print(f"{name:40s} {'out of memory' if is_out_of_memory(e) else one_line(e)}", flush=True)
