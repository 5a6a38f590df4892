"""M models of one architecture as one: every parameter carries a leading M, the forward pass is vectorised."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .hvae import Noise, Terms

TERMS = ("loss", *Terms._fields)  # what training and evaluation report of a model, in this order


class Stack:
    """M copies of a model that train independently and in step.

    `parameters` maps the model's parameter names to leaf tensors (M, ...). All copies see the same images
    and the same noise; each has its own betas, (M,). One Adam over the stacked tensors is M separate Adams.
    With the precision "bf16" the networks' trunks train in bfloat16; their heads, rates and likelihoods do not.
    """

    def __init__(self, model: nn.Module, m: int, precision: str = "fp32"):
        self.model, self.m, self.low = model, m, precision == "bf16"
        self.part, self.sum_over_all = slice(None), lambda tensors: None  # of data-parallel processes: see Engine
        self.training_terms = self.terms
        self.parameters = {
            name: p.detach().expand(m, *p.shape).clone().requires_grad_() for name, p in model.named_parameters()
        }

    def terms(self, x: Tensor, noise: Noise) -> Terms:
        """Terms (M, B) of images x (B, C, H, W) under every model."""
        if self.m == 1:  # plain calls are faster than a vmap over one
            alone = {name: p.squeeze(0) for name, p in self.parameters.items()}
            return Terms(*[t.unsqueeze(0) for t in functional_call(self.model, alone, (x, noise))])
        return vmap(lambda p: functional_call(self.model, p, (x, noise)))(self.parameters)

    def compile(self, on: bool = True) -> None:
        """Lets the training step go through torch.compile."""
        self.training_terms = torch.compile(self.terms, fullgraph=True) if on else self.terms

    def step(self, optimizer, x: Tensor, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """One optimiser step of every model. Returns the batch's sums of loss, ll, kl_y, kl_z: (M, 4).

        `noise` is that of the whole batch, x may be this process's part of it.
        """
        n, noise = len(noise.y), self.own(noise)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low):
            terms = self.training_terms(x, noise)
        loss = terms.loss(beta_y[:, None], beta_z[:, None])
        optimizer.zero_grad()
        (loss.sum() / n).backward()
        sums = _sums(loss, terms)
        self.sum_over_all([*(p.grad for p in self.parameters.values()), sums])
        optimizer.step()
        return sums

    def own(self, noise: Noise) -> Noise:
        """This process's part of a whole batch's noise."""
        return noise._replace(z=noise.z[self.part], y=noise.y[self.part])

    @torch.no_grad()
    def evaluate(self, split, batch_size: int, generator, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """Means over all images of loss, ll, kl_y, kl_z, with one posterior sample each: (M, 4), float64."""
        sums = torch.zeros(self.m, len(TERMS), dtype=torch.float64, device=beta_y.device)
        for i, (x, _) in enumerate(split.batches(batch_size, part=self.part)):
            whole = min(batch_size, len(split) - i * batch_size)
            terms = self.terms(x, self.own(self.model.noise(whole, generator)))
            sums += _sums(terms.loss(beta_y[:, None], beta_z[:, None]), terms)
        self.sum_over_all([sums])
        return sums / len(split)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all parameters, stacked, from which `cell` can take a model later."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def cell(self, m: int, snapshot: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state_dict of model m, a copy on the CPU; as it is now, or as it was."""
        parameters = self.parameters if snapshot is None else snapshot
        return {name: p.detach()[m].cpu().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def load_cell(self, m: int, state: dict[str, Tensor]) -> None:
        """Sets model m from a state_dict."""
        for name, p in self.parameters.items():
            p[m] = state[name]

    def plain(self, m: int) -> nn.Module:
        """Model m as an ordinary module, until the next call."""
        self.model.load_state_dict(self.cell(m))
        return self.model


def _sums(loss: Tensor, terms: Terms) -> Tensor:
    """Sums over the images of loss, ll, kl_y, kl_z: (M, B) each -> (M, 4)."""
    return torch.stack([loss, *terms], dim=-1).detach().sum(1)
