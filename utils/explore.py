"""Trained models in one's own Python: `load` a run, then encode, decode, sample, interpolate.

z and y are not independent: y contains all that the image is made from, z included. What y adds to z is its deviation
from p(y|z), `own` = (y - mean) / std, which is standard normal and independent of z under the model. So an image is a
pair (z, own): draw `own` and keep z, or change z and keep `own`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datasets.batches import chosen
from datasets.loading import Data, load_data
from models.latents import Gaussian
from models.own import given
from utils.cli import default_data_dir
from utils.config import Config
from utils.errors import UserError
from utils.images import tiled, to_pil
from utils.runs import Run, load_model
from utils.seeds import generator


class Latents(NamedTuple):
    """The latents of images: z (B, *z_shape), y (B, *y_shape), and what y adds to z, in stds of p(y|z)."""

    z: Tensor
    y: Tensor
    own: Tensor


def load(
    path: str | Path,
    data_dir: str | None = None,
    device: str = "cpu",
    dataset: str | None = None,
    networks: str | Path | None = None,
) -> "Loaded":
    """The model and the data of a run's folder.

    `dataset` says where own images are, if they have moved; `networks` is the file of a run's own networks.
    Raises UserError if the run, its weights or its data are missing or damaged, or if its model is a multi-rate one.
    """
    run = Run.open(Path(path))
    if networks is not None:
        given(networks)
    if run.config.is_conditioned:
        raise UserError(f"{path}: a multi-rate model; load one of the cells that were unfolded from it")
    device = torch.device(device)
    model = load_model(run, device).requires_grad_(False)
    data = load_data(run.config, data_dir or default_data_dir(), device, moved_to=dataset)
    return Loaded(run, run.config, model, data, device)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A trained model with its data; `model` has the distributions q_z, q_y, p_y and p_x themselves."""

    run: Run
    config: Config
    model: nn.Module
    data: Data
    device: torch.device

    def images(self, n: int, split: str = "test") -> tuple[Tensor, Tensor]:
        """n images of a split, (n, C, H, W) in [0, 1], of each class in proportion, and their labels."""
        return chosen(getattr(self.data, split), n)

    def encode(self, x: Tensor, seed: int | None = None) -> Latents:
        """The latents of images x (B, C, H, W): the posterior modes, or with a seed a sample of q(z|x) q(y|z,x)."""
        noise = None if seed is None else self._noise(len(x), seed)
        q_z = self.model.q_z(x)
        z = q_z.sample(noise.z) if noise else q_z.mode
        q_y, p_y = self.model.q_y(z, x), self.model.p_y(z)
        y = q_y.sample(noise.y) if noise else q_y.mode
        return Latents(z, y, (y - p_y.mean) / p_y.std)

    def decode(self, z: Tensor, own: Tensor | None = None, seed: int | None = None) -> Tensor:
        """The mean images (B, C, H, W) of z and of what y adds to it.

        Without `own`, y is the mean of p(y|z), or with a seed a sample of it.
        """
        p_y = self.model.p_y(z)
        if own is None:
            own = 0.0 if seed is None else self._noise(len(z), seed).y
        return self.model.mean_x(p_y.mean + p_y.std * own)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n images (n, C, H, W) of the generative model p(z) p(y|z) p(x|y)."""
        return self.model.sample(n, generator=generator(self.device, seed, "explore"))

    def interpolate(self, a: Tensor, b: Tensor, n: int = 8) -> Tensor:
        """n points (n, ...) on the line from a to b, ends included. Raises UserError where z is a category."""
        if self.model.family is not Gaussian and ((a == 0) | (a == 1)).all():
            raise UserError(f"{self.run.path}: its z is a category; there is nothing between two of them")
        return torch.stack([a + (b - a) * t for t in torch.linspace(0, 1, n, device=a.device)])

    def show(self, images: Tensor, columns: int = 8):
        """The images (B, C, H, W) in one picture of Pillow, in rows of so many."""
        return to_pil(tiled(images, columns))

    def _noise(self, n: int, seed: int):
        return self.model.noise(n, generator(self.device, seed, "explore"))
