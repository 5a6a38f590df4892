"""One model for the whole plane of betas: every layer's outputs are scaled and shifted by a function of the betas.

The scale and shift of a layer's output channel fold into that channel's weights and bias, so at fixed betas the
conditioned model *is* an ordinary one, with an ordinary state_dict. It knows layers, not models. (You Only Train Once:
Dosovitskiy & Djolonga, ICLR 2020; for one beta of a VAE, by gates: Multi-Rate VAE, Bae et al., ICLR 2023.)
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .hvae import Noise, Terms

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
HIDDEN = 32  # units of the hypernetwork's two hidden layers
MARGIN = 0.15  # of the range of log betas, on either side: drawn as well, as gates are learnt worst at the edges
WEIGHT = (-0.15, 0.5)  # exponents of beta_y and beta_z: how images weigh in the objective
OWN = ("hypernetwork", "gates")  # the modules that are not the model's
ANYWHERE = 0.25  # of the images: their betas are drawn from the whole range from the start


class Conditioned(nn.Module):
    """A model and the hypernetwork that scales and shifts its layers, given the betas of each image.

    `log_range` (2, 2) is log10 of the smallest and of the largest (beta_y, beta_z) that it is trained for. At `start`,
    log10 of (beta_y, beta_z), both latents are in use: the middle of the range of beta_y, the smallest beta_z. In
    training, the betas of most images are drawn around it, from the share `spread` of the range. Over all that are
    drawn, scales are 1 and shifts 0 on average, as images weigh in the objective, whatever the hypernetwork: what all
    betas share is left to the layers, which learn it as an ordinary model does. With gates that could move all scales
    together, z collapsed before it came into use; with other averages, they lowered a learned sigma at some betas and
    raised it at others.
    """

    def __init__(self, model: nn.Module, log_range: Tensor):
        super().__init__()
        self.model = model
        start = torch.stack([log_range[:, 0].mean(), log_range[0, 1]])
        places = torch.cartesian_prod(*[torch.arange(0.5, 8) / 8] * 2)  # (64, 2), all over the range, and evenly
        buffers = {"log_range": log_range, "start": start, "spread": torch.ones(()), "places": places}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.layers = [name for name, layer in model.named_modules() if isinstance(layer, LAYERS)]
        within = {f"{name}.{part}" for name in self.layers for part in ("weight", "bias")}
        self.others = [name for name, _ in model.named_parameters() if name not in within]  # a learned sigma
        self.sizes = [model.get_submodule(name).bias.numel() for name in self.layers]
        self.sizes += [model.get_parameter(name).numel() for name in self.others]
        self.hypernetwork = nn.Sequential(nn.Linear(2, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
        self.gates = nn.Linear(HIDDEN, 2 * sum(self.sizes), bias=False)
        nn.init.zeros_(self.gates.weight)  # so that training starts at the ordinary model, whatever the betas
        self.family, self.z_shape, self.y_shape = model.family, model.z_shape, model.y_shape
        for name in self.layers:
            add_gate(model.get_submodule(name))

    def scales_and_shifts(self, log_betas: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For every layer, and every parameter outside layers, a scale and a shift (..., C) at log10 betas (..., 2)."""
        low, high = self.log_range.to(log_betas)
        u = self.places.to(log_betas)
        around, anywhere = self.drawn(u, self.spread), self.drawn(u)
        shares = (1 - ANYWHERE) * self.image_weights(around), ANYWHERE * self.image_weights(anywhere)
        weights, places = torch.cat(shares), (log_betas, torch.cat([around, anywhere]))
        here, average = (self.hypernetwork(2 * (v - low) / (high - low).clamp_min(1e-6) - 1) for v in places)
        scales, shifts = self.gates(here - weights @ average / weights.sum()).chunk(2, -1)
        each = zip((1 + scales).split(self.sizes, -1), shifts.split(self.sizes, -1), strict=True)
        return dict(zip([*self.layers, *self.others], each, strict=True))

    def drawn(self, u: Tensor, spread: Tensor | float = 1.0) -> Tensor:
        """log10 of the betas at places u (..., 2), 0 to 1, in the range and MARGIN, shrunk by `spread` to `start`."""
        (low, high), start = self.log_range.to(u), self.start.to(u)
        return start + spread * (low + (high - low) * ((1 + 2 * MARGIN) * u - MARGIN) - start)

    def noise(self, n: int, generator: torch.Generator, temperature: Tensor | None = None) -> Noise:
        """The model's noise, and betas, log-uniform over the range and MARGIN: most shrunk by `spread` to the start."""
        noise = self.model.noise(n, generator, temperature)
        u = torch.rand(n, 3, generator=generator, device=generator.device)
        around, anywhere = self.drawn(u[:, :2], self.spread), self.drawn(u[:, :2])
        return noise._replace(log_betas=torch.where(u[:, 2:] < ANYWHERE, anywhere, around))

    def image_weights(self, log_betas: Tensor) -> Tensor:
        """Weights (B,) of images in the objective: 1 at the start, beta_y^-0.15 beta_z^0.5 with all betas in use."""
        # where z is given up, at large beta_z, a code has least in common with the others, so it is learnt last
        log_beta_y, log_beta_z = log_betas.unbind(-1)
        return 10 ** (self.spread.to(log_betas) * (WEIGHT[0] * log_beta_y + WEIGHT[1] * log_beta_z))

    def points(self) -> dict[str, Tensor]:
        """The corners of the range, its centre, and betas of 1 if they lie within; log10 of the betas, (2,)."""
        (y, z), (y_max, z_max) = self.log_range
        points = [torch.stack([a, b]) for a in (y, y_max) for b in (z, z_max)]
        points += [self.log_range.mean(0), torch.zeros_like(y).expand(2)]
        inside = [p for p in points if ((self.log_range[0] <= p) & (p <= self.log_range[1])).all()]
        return {"beta_y {:.3g}, beta_z {:.3g}".format(*(10**p).tolist()): p for p in inside}

    def forward(self, x: Tensor, noise: Noise) -> Terms:
        """ll, kl_y, kl_z of images x (B, C, H, W), each with the model of its own betas, `noise.log_betas` (B, 2)."""
        with torch.autocast(x.device.type, enabled=False):
            tensors = self.gated(noise.log_betas)
        return functional_call(self.model, tensors, (x, noise))

    def gated(self, log_betas: Tensor) -> dict[str, Tensor]:
        """Gates of layers, and parameters outside layers, (B, 1, 1, 1), of each image at its log10 betas (B, 2)."""
        tensors, gates = {}, self.scales_and_shifts(log_betas)
        for name in self.layers:
            tensors[f"{name}.scale"], tensors[f"{name}.shift"] = gates[name]
        for name in self.others:
            scale, shift = gates[name]
            where, _, last = name.rpartition(".")
            parameter = getattr(self.model.get_submodule(where), last)  # in a stack it is a plain tensor
            tensors[name] = (parameter * scale + shift).view(-1, 1, 1, 1)
        return tensors

    @torch.no_grad()
    def centre(self) -> nn.Module:
        """A copy of the model with the gates of the centre of the range: an ordinary model."""
        model = copy.deepcopy(self.model)
        for name, tensor in self.gated(self.log_range.mean(0, keepdim=True).to(self.gates.weight)).items():
            where, _, last = name.rpartition(".")
            part = model.get_submodule(where)
            if name in self.others:
                tensor = nn.Parameter(tensor.view_as(getattr(part, last)))
            setattr(part, last, tensor)
        return model

    def reconstruct(self, x: Tensor) -> Tensor:
        """Of the model in the centre of the range."""
        return self.centre().reconstruct(x)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Of the model in the centre of the range."""
        return self.centre().sample(n, generator=generator)

    def psnr(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Of the model in the centre of the range."""
        return self.centre().psnr(batches)

    def weights_at(self, log_betas: Tensor) -> dict[str, Tensor]:
        """The ordinary model's parameters at one pair of log10 betas, (2,); differentiable."""
        state, folded = dict(self.model.named_parameters()), self.scales_and_shifts(log_betas)
        for name in self.layers:
            (scale, shift), weight = folded[name], state[f"{name}.weight"]
            output = 1 if isinstance(self.model.get_submodule(name), nn.ConvTranspose2d) else 0
            state[f"{name}.weight"] = weight * scale.view([-1 if d == output else 1 for d in range(weight.dim())])
            state[f"{name}.bias"] = state[f"{name}.bias"] * scale + shift
        for name in self.others:
            scale, shift = folded[name]
            state[name] = (state[name] * scale + shift).view_as(state[name])
        return state


def add_gate(layer: nn.Module) -> None:
    """Makes a layer scale and shift its output channels, once it is given its `scale` and `shift`, (B, C) each."""
    for name in ("scale", "shift"):
        layer.register_buffer(name, None, persistent=False)
    layer.register_forward_hook(_gate)


def _gate(layer: nn.Module, _, out: Tensor) -> Tensor:
    if layer.scale is None:
        return out
    scale, shift = (t.to(out.dtype).view(*t.shape, *[1] * (out.dim() - 2)) for t in (layer.scale, layer.shift))
    return torch.addcmul(shift, out, scale)
