"""M models of one architecture as a single one: parameters are stacked (M, ...), the forward pass is vmapped."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.parallel import DistributedDataParallel

from utils.errors import is_out_of_memory, one_line

from .hvae import Noise, Terms

TERMS = ("loss", *Terms._fields)  # what training and evaluation report of a model, in this order
LARGE = 256  # pixels, from which on channels_last memory is 1.6 times as fast on a CPU


class Stack:
    """M copies of a model that train independently, in lockstep.

    `parameters` maps the model's parameter names to leaf tensors (M, ...). All copies see the same images and the
    same noise; each has its own betas, (M,). One Adam on the stacked tensors is equivalent to M separate ones.
    With precision "bf16", hidden layers run in bfloat16; output layers, rates and likelihoods run in float32.
    """

    def __init__(self, model: nn.Module, m: int, precision: str = "fp32"):
        self.model, self.m, self.low = model, m, precision == "bf16"
        self.compiled, self.compiled_batch = None, 0
        self.parallel, self.world, self.part = None, 1, slice(None)  # of data-parallel processes: see `distribute`
        self.parameters = {
            name: nn.Parameter(p.detach().expand(m, *p.shape).clone()) for name, p in model.named_parameters()
        }

    def terms(self, x: Tensor, noise: Noise) -> Terms:
        """Terms (M, B) of images x (B, C, H, W) under every model, computed eagerly."""
        if x.shape[-1] >= LARGE:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.m == 1:  # plain calls are faster than a vmap over one
            alone = {name: p.squeeze(0) for name, p in self.parameters.items()}
            return Terms(*[t.unsqueeze(0) for t in functional_call(self.model, alone, (x, noise))])
        return vmap(lambda p: functional_call(self.model, p, (x, noise)))(self.parameters)

    def compile(self, batch_size: int) -> None:
        """Compiles `terms` for batches of that size; a smaller one, such as an epoch's last, runs eagerly."""
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 1000  # all engines of a process count towards this limit
        self.compiled, self.compiled_batch = torch.compile(self.terms, fullgraph=True), batch_size

    def fast_terms(self, x: Tensor, noise: Noise) -> Terms:
        """`terms`, compiled if `compile` was called for this batch size and compiling succeeds."""
        if self.compiled and len(x) == self.compiled_batch:
            try:
                return self.compiled(x, noise)
            except Exception as e:
                if is_out_of_memory(e):
                    raise
                self.compiled = None
                print(f"note: the step cannot be compiled, continuing without: {one_line(e)}", flush=True)
        return self.terms(x, noise)

    def distribute(self, rank: int, world: int) -> None:
        """Makes this process take its part of every batch, and averages the gradients over the processes."""
        self.world, self.part = world, slice(rank, None, world)
        self.parallel = DistributedDataParallel(_Terms(self))

    def step(self, optimizer, x: Tensor, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """One optimiser step of all models. Returns the sums over the batch of loss, ll, kl_y, kl_z: (M, 4).

        `noise` is for the whole batch; x (B, C, H, W) is the part of it that this process takes.
        """
        n, noise = len(noise.y), self.own(noise)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low):
            terms = (self.parallel or self.fast_terms)(x, noise)
        loss = _loss(terms, noise, beta_y, beta_z)
        objective = loss if noise.log_betas is None else loss * self.model.weights(noise.log_betas)
        optimizer.zero_grad()
        (objective.sum() * (self.world / n)).backward()
        optimizer.step()
        return self._of_all(_sums(loss, terms))

    def own(self, noise: Noise) -> Noise:
        """This process's part of the noise for a whole batch."""
        return noise.of(self.part)

    @torch.no_grad()
    def evaluate(self, split, batch_size: int, generator, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """Means over all images of loss, ll, kl_y, kl_z, with one posterior sample each: (M, 4), float64."""
        sums = torch.zeros(self.m, len(TERMS), dtype=torch.float64, device=beta_y.device)
        for i, (x, _) in enumerate(split.batches(batch_size, part=self.part)):
            whole = min(batch_size, len(split) - i * batch_size)
            noise = self.own(self.model.noise(whole, generator))
            terms = self.fast_terms(x, noise)
            sums += _sums(_loss(terms, noise, beta_y, beta_z), terms)
        return self._of_all(sums) / len(split)

    def _of_all(self, sums: Tensor) -> Tensor:
        """The sums over all data-parallel processes."""
        if self.parallel:
            dist.all_reduce(sums)
        return sums

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all stacked parameters, for `cell`."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def cell(self, m: int, snapshot: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state_dict of model m, copied to the CPU; from the snapshot, if one is given."""
        parameters = self.parameters if snapshot is None else snapshot
        return {name: p.detach()[m].cpu().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def load_cell(self, m: int, state: dict[str, Tensor]) -> None:
        """Loads model m from a state_dict."""
        for name, p in self.parameters.items():
            p[m] = state[name]

    def plain(self, m: int) -> nn.Module:
        """Model m as an ordinary module, valid until the next call."""
        self.model.load_state_dict(self.cell(m))
        return self.model


class _Terms(nn.Module):
    """A stack's parameters and terms as a module, as DistributedDataParallel requires."""

    def __init__(self, stack: Stack):
        super().__init__()
        self.weights, self.forward = nn.ParameterList(stack.parameters.values()), stack.fast_terms


def _loss(terms: Terms, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
    """The objective (M, B) of terms (M, B) at betas (M,), which are factors of an image's own betas, if it has some."""
    beta_y, beta_z = beta_y[:, None], beta_z[:, None]
    if noise.log_betas is not None:
        own = 10**noise.log_betas
        beta_y, beta_z = beta_y * own[:, 0], beta_z * own[:, 1]
    return terms.loss(beta_y, beta_z)


def _sums(loss: Tensor, terms: Terms) -> Tensor:
    """Sums over the images of loss, ll, kl_y, kl_z: (M, B) each -> (M, 4)."""
    return torch.stack([loss, *terms], dim=-1).detach().sum(1)
