"""M models of one architecture as a single one: parameters are stacked (M, ...), the forward pass is vmapped."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .hvae import Noise, Terms

TERMS = ("loss", *Terms._fields)  # what training and evaluation report of a model, in this order
LARGE = 256  # pixels, from which on channels_last memory is 1.6 times as fast on a CPU


class Stack:
    """M copies of a model that train independently, in lockstep.

    `parameters` maps the model's parameter names to leaf tensors (M, ...). All copies see the same images and the same
    noise; each has its own betas, (M,). With precision "bf16", hidden layers run in bfloat16; output layers, rates and
    likelihoods run in float32. Data-parallel processes, of which `place` is (rank, world), take a `part` of each batch.
    """

    def __init__(self, model: nn.Module, m: int, precision: str = "fp32", place: tuple[int, int] = (0, 1)):
        self.model, self.m, self.low = model, m, precision == "bf16"
        self.world, self.part = place[1], slice(place[0], None, place[1])
        self.parameters = {
            name: nn.Parameter(p.detach().expand(m, *p.shape).clone()) for name, p in model.named_parameters()
        }

    def terms(self, x: Tensor, noise: Noise) -> Terms:
        """Terms (M, B) of images x (B, C, H, W) under every model."""
        if x.shape[-1] >= LARGE:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.m == 1:  # plain calls are faster than a vmap over one
            alone = {name: p.squeeze(0) for name, p in self.parameters.items()}
            return Terms(*[t.unsqueeze(0) for t in functional_call(self.model, alone, (x, noise))])
        return vmap(lambda p: functional_call(self.model, p, (x, noise)))(self.parameters)

    @torch.no_grad()
    def sums(self, x: Tensor, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """Sums over images x (B, C, H, W) of loss, ll, kl_y, kl_z: (M, 4)."""
        terms = self.terms(x, noise)
        return sums_of(losses(terms, noise, beta_y, beta_z), terms)

    @torch.no_grad()
    def evaluate(
        self, split, batch_size: int, generator, beta_y: Tensor, beta_z: Tensor, fast: Callable | None = None
    ) -> Tensor:
        """Means over all images of loss, ll, kl_y, kl_z, with one posterior sample each: (M, 4), float64.

        `fast` is another implementation of `sums`, for whole batches.
        """
        total = torch.zeros(self.m, len(TERMS), dtype=torch.float64, device=beta_y.device)
        for i, (x, _) in enumerate(split.batches(batch_size, part=self.part)):
            n = min(batch_size, len(split) - i * batch_size)
            noise = self.model.noise(n, generator).of(self.part)
            total += (fast if fast and n == batch_size else self.sums)(x, noise, beta_y, beta_z)
        return self.of_all(total) / len(split)

    def of_all(self, values: Tensor) -> Tensor:
        """The values, summed in place over all data-parallel processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all stacked parameters, for `cell`."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def cell(self, m: int, snapshot: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state_dict of model m, copied to the CPU; from the snapshot, if one is given."""
        parameters = self.parameters if snapshot is None else snapshot
        return {name: p.detach()[m].cpu().clone() for name, p in parameters.items()}

    def plain(self, m: int) -> nn.Module:
        """Model m as an ordinary module that shares the stack's weights, until the next call."""
        for name, p in self.model.named_parameters():
            p.data = self.parameters[name].detach()[m]
        return self.model


def losses(terms: Terms, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
    """The losses (M, B) of terms (M, B) at betas (M,), which are factors of an image's own betas, if it has some."""
    beta_y, beta_z = beta_y[:, None], beta_z[:, None]
    if noise.log_betas is not None:
        own = 10**noise.log_betas
        beta_y, beta_z = beta_y * own[:, 0], beta_z * own[:, 1]
    return terms.loss(beta_y, beta_z)


def sums_of(loss: Tensor, terms: Terms) -> Tensor:
    """Sums over the images of loss, ll, kl_y, kl_z: (M, B) each -> (M, 4)."""
    return torch.stack([loss, *terms], dim=-1).detach().sum(1)
