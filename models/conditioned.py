"""One model for the whole plane of betas: every layer's outputs are scaled and shifted by a function of the betas.

The scale and shift of a layer's output channel fold into that channel's weights and bias. Layers that work at the
resolution of y or below, a third of the computing, have further weights, which add up in proportions that depend on the
betas. So at fixed betas the conditioned model *is* an ordinary one, with an ordinary state_dict. It knows layers, not
models. (You Only Train Once: Dosovitskiy & Djolonga, ICLR 2020; for one beta of a VAE, by gates: Multi-Rate VAE, Bae et
al., ICLR 2023.)
"""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from .hvae import Noise, Terms

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
HIDDEN = 32  # units of the hypernetwork's two hidden layers
MARGIN = 0.15  # of the range of log betas, on either side: drawn as well, as gates are learnt worst at the edges
OWN = ("hypernetwork", "gates")  # the modules that are not the model's, but for its further weights
ANYWHERE = 0.25  # of the images: their betas are drawn from the whole range from the start


class Sharing(NamedTuple):
    """What betas share, and how they are trained together."""

    further: int  # weights that layers at the resolution of y have besides their own
    exponents: tuple[float, float]  # of beta_y and beta_z, by which images weigh in the objective
    learning_rates: tuple[float, float]  # over --learning_rate: until betas spread, and then


SHARING = {  # that of earlier versions, and today's
    1: Sharing(0, (-0.15, 0.5), (1.0, 3.5)),
    2: Sharing(3, (-0.15, 0.0), (0.25, 1.0)),
}
MIX = 0.5  # of the further weights at the corners of the range, where the layer's own count as 1


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

    def __init__(self, model: nn.Module, log_range: Tensor, image_shape: tuple[int, int, int], sharing: int = 2):
        super().__init__()
        self.model, self.sharing = model, SHARING[sharing]
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
        n = self.sharing.further
        coarse = coarse_layers(model, self.layers, image_shape) if n else []
        self.mixed = {name: range(n * i, n * i + n) for i, name in enumerate(coarse)}  # where their further weights are
        weights = (model.get_submodule(name).weight for name, indices in self.mixed.items() for _ in indices)
        self.further = nn.ParameterList([torch.zeros_like(weight) for weight in weights])
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
        """Weights (B,) of images in the objective: 1 at the start, powers of their betas with all betas in use."""
        log_beta_y, log_beta_z = log_betas.unbind(-1)
        of_y, of_z = self.sharing.exponents
        return 10 ** (self.spread.to(log_betas) * (of_y * log_beta_y + of_z * log_beta_z))

    def proportions(self, log_betas: Tensor) -> Tensor:
        """Those of the further weights, (..., 3), at log10 betas (..., 2): bilinear in these, 0 at the centre."""
        low, high = self.log_range.to(log_betas)
        y, z = (2 * (log_betas - low) / (high - low).clamp_min(1e-6) - 1).unbind(-1)
        return MIX * self.spread.to(log_betas) * torch.stack([y, z, y * z], -1)

    def further_of(self, name: str) -> list[Tensor]:
        """The further weights of a layer, none if it has none."""
        return [self.further[i] for i in self.mixed.get(name, ())]

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
        for name in self.mixed:
            tensors[f"{name}.further"] = torch.stack(self.further_of(name))
            tensors[f"{name}.proportions"] = self.proportions(log_betas)
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
            if name.endswith((".further", ".proportions")):  # these add nothing there
                continue
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
            for part, further in zip(self.proportions(log_betas), self.further_of(name), strict=False):
                weight = weight + part * further
            output = output_dimension(self.model.get_submodule(name))
            state[f"{name}.weight"] = weight * scale.view([-1 if d == output else 1 for d in range(weight.dim())])
            state[f"{name}.bias"] = state[f"{name}.bias"] * scale + shift
        for name in self.others:
            scale, shift = folded[name]
            state[name] = (state[name] * scale + shift).view_as(state[name])
        return state


def coarse_layers(model: nn.Module, layers: list[str], image_shape: tuple[int, int, int]) -> list[str]:
    """Those of the layers that work on no more positions than y has."""
    positions, model = {}, copy.deepcopy(model).to_empty(device="cpu")  # from a meta device, too

    def count(name: str):
        def hook(layer, inputs, out):
            image = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else out
            positions[name] = math.prod(image.shape[2:])

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_hook(count(name))
    with torch.no_grad(), torch.device("cpu"):
        model(torch.zeros(1, *image_shape), model.noise(1, torch.Generator(), torch.ones(())))
    return [name for name in layers if positions.get(name, math.inf) <= math.prod(model.y_shape[1:])]


def output_dimension(layer: nn.Module) -> int:
    """That of a layer's weight."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def add_gate(layer: nn.Module) -> None:
    """Makes a layer scale and shift its output channels, once it is given its `scale` and `shift`, (B, C) each.

    Given `further` weights (K, ...) and `proportions` (B, K), it adds to its outputs what these give.
    """
    for name in ("scale", "shift", "further", "proportions"):
        layer.register_buffer(name, None, persistent=False)
    layer.register_forward_hook(_gate)


def _gate(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    if layer.scale is None:
        return out
    if layer.further is not None:
        low = torch.is_autocast_enabled(out.device.type) and not getattr(layer, "full", False)
        with torch.autocast(out.device.type, enabled=low):
            out = out + mixture(layer, inputs[0].to(out.dtype)).view_as(out)
    scale, shift = (t.to(out.dtype).view(*t.shape, *[1] * (out.dim() - 2)) for t in (layer.scale, layer.shift))
    return torch.addcmul(shift, out, scale)


def mixture(layer: nn.Module, x: Tensor) -> Tensor:
    """What the further weights of a layer give for x (B, ...), in their proportions: (B, outputs)."""
    weight = torch.cat(layer.further.unbind(), output_dimension(layer))
    if isinstance(layer, nn.Linear):
        each = functional.linear(x, weight)
    elif isinstance(layer, nn.ConvTranspose2d):
        how = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        each = functional.conv_transpose2d(x, weight, None, *how)
    else:
        each = functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    proportions = layer.proportions.to(each.dtype)
    return torch.einsum("bk,bkn->bn", proportions, each.view(*proportions.shape, -1))
