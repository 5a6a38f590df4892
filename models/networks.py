"""The conv stacks that parametrise the models' distributions, for a vector z and for a convolutional z.

VectorZ and ConvZ build the same eight networks, from which models/hvae.py, lvae.py and bvae.py put
themselves together; so does a user's class (docs/own_networks.md). A network that parametrises a
distribution returns a tuple with one tensor for each of the distribution's parameters.
"""

import math

import torch
from torch import Tensor, nn

from utils.errors import UserError

from . import own

MOL_CHANNELS = 128  # hidden channels of the mixture of logistics' output head


def relu_between(*layers: nn.Module) -> nn.Sequential:
    """The layers with a ReLU between each two, none after the last, which gives a distribution's parameters."""
    *others, last = layers
    return nn.Sequential(*relu_after(*others), in_full(last))


def relu_after(*layers: nn.Module) -> nn.Sequential:
    """The layers with a ReLU after each."""
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())])


class Layer(nn.Module):
    """What the layers below share: one that is `in_full` computes in its weights' precision also under autocast."""

    full = False

    def forward(self, h: Tensor) -> Tensor:
        if not self.full:
            return super().forward(h)
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.to(self.weight.dtype))


class Linear(Layer, nn.Linear):
    """A linear layer."""


class Conv2d(Layer, nn.Conv2d):
    """A convolution."""


class ConvTranspose2d(Layer, nn.ConvTranspose2d):
    """A transposed convolution."""


def in_full(layer: Layer) -> Layer:
    """The layer, which gives a distribution's parameters: in bfloat16 small rates would come out wrong."""
    layer.full = True
    return layer


class Heads(nn.ModuleList):
    """One layer for each of a distribution's parameters; returns their outputs as a tuple."""

    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(h) for head in self)


class Halves(nn.Module):
    """Splits the channels into a distribution's two parameters."""

    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        return tuple(h.chunk(2, dim=1))


class VectorZ:
    """Networks of the models with a vector z, for images of 28 to 128 pixels; c channels, Z = z_dims.

    28 pixels are halved twice, to 7; 32, 64 and 128 as often as it takes to 8.
    `y_dims` > 0 makes y a vector too (`--linear_y_with_dims`).
    """

    def __init__(self, image_shape: tuple[int, int, int], c: int, z_dims: int, y_dims: int):
        self.image_channels, size, _ = image_shape
        self.c, self.z_dims, self.y_dims = c, z_dims, y_dims
        self.side = 7 if size == 28 else 8
        self.further = int(math.log2(size // self.side)) - 2  # halvings beyond two
        self.mid = {"kernel_size": 4, **({"stride": 1} if self.side == 7 else {"stride": 2, "padding": 1})}
        self.z_shape = (z_dims,)
        self.y_shape = (y_dims,) if y_dims > 0 else (c, 4, 4)

    def _down(self, i: int, o: int) -> nn.Module:
        return Conv2d(i, o, 4, stride=2, padding=1)

    def _up(self, i: int, o: int) -> nn.Module:
        return ConvTranspose2d(i, o, 4, stride=2, padding=1)

    def trunk(self) -> nn.Module:
        first = self._down(self.image_channels, self.c)
        return relu_after(first, *[self._down(self.c, self.c) for _ in range(1 + self.further)])

    def z_head(self, n_heads: int) -> nn.Module:
        heads = Heads(in_full(Linear(self.c * 16, self.z_dims)) for _ in range(n_heads))
        return nn.Sequential(relu_after(Conv2d(self.c, self.c, **self.mid)), nn.Flatten(), heads)

    x_branch = trunk

    def z_branch(self) -> nn.Module:
        return nn.Sequential(
            relu_after(Linear(self.z_dims, self.c * 16)),
            nn.Unflatten(1, (self.c, 4, 4)),
            relu_after(ConvTranspose2d(self.c, self.c, **self.mid)),
        )

    def y_joint(self) -> nn.Module:
        return self._y_head(2 * self.c)

    def y_bottom_up(self) -> nn.Module:
        return self._y_head(self.c)

    def _y_head(self, i: int) -> nn.Module:
        c, shared = self.c, relu_after(Conv2d(i, self.c, **self.mid))
        if self.y_dims > 0:
            return nn.Sequential(shared, nn.Flatten(), Heads(in_full(Linear(c * 16, self.y_dims)) for _ in range(2)))
        return nn.Sequential(shared, Heads(in_full(Conv2d(c, c, 3, padding=1)) for _ in range(2)))

    def y_prior(self) -> nn.Module:
        dims = self.y_dims if self.y_dims > 0 else self.c * 16
        heads = Heads(nn.Sequential(in_full(Linear(dims // 2, dims)), nn.Unflatten(1, self.y_shape)) for _ in range(2))
        return nn.Sequential(relu_after(Linear(self.z_dims, dims // 2)), heads)

    def decoder(self, outputs: int, hidden: int | None) -> nn.Module:
        c = self.c
        if self.y_dims > 0:
            first = relu_after(Linear(self.y_dims, c * self.side**2))
            first.append(nn.Unflatten(1, (c, self.side, self.side)))
        else:
            first = relu_after(ConvTranspose2d(c, c, **self.mid))
        head = [] if hidden is None else [Conv2d(hidden, outputs, 3, padding=1)]  # made first: seeds give weights
        ups = [self._up(c, c) for _ in range(1 + self.further)]
        return nn.Sequential(first, relu_between(*ups, self._up(c, hidden or outputs), *head))


class ConvZ:
    """Networks of the models with a convolutional z, for images of 28, 32, 64, 128 or 256 pixels; c channels.

    y has 7 or 8 pixels, of 256 pixels 16. 28 pixels shrink as 28-14-7-4, so the step from 4 back to 7 has no output
    padding.
    """

    def __init__(self, image_shape: tuple[int, int, int], c: int):
        self.image_channels, size, _ = image_shape
        self.c = c
        self.large = size == 256
        side = 7 if size == 28 else 16 if self.large else 8
        self.pad_from_4 = 0 if size == 28 else 1
        self.further = int(math.log2(size // side)) - 2  # halvings between x and y beyond two
        self.z_shape, self.y_shape = (c, 4, 4), (c, side, side)

    def _down(self, i: int, o: int) -> nn.Module:
        return Conv2d(i, o, 5, stride=2, padding=2)

    def _same(self, i: int, o: int, kernel_size: int) -> nn.Module:
        return Conv2d(i, o, kernel_size, padding=kernel_size // 2)

    def _up(self, i: int, o: int, output_padding: int = 1) -> nn.Module:
        return ConvTranspose2d(i, o, 5, stride=2, padding=2, output_padding=output_padding)

    def _times(self, n: int, layer) -> list[nn.Module]:
        return [layer(self.c, self.c) for _ in range(n)]

    def trunk(self) -> nn.Module:
        first = self._down(self.image_channels, self.c)
        return relu_after(first, *self._times(self.further + self.large, self._down), self._same(self.c, self.c, 3))

    def z_head(self, n_heads: int) -> nn.Module:
        c = self.c
        return nn.Sequential(relu_between(self._down(c, 3 * c), self._down(3 * c, 2 * c)), Halves())

    def x_branch(self) -> nn.Module:
        c = self.c
        return relu_after(self._down(self.image_channels, c), *self._times(1 + self.further, self._down))

    def z_branch(self) -> nn.Module:
        c = self.c
        ups = [self._up(c, c, self.pad_from_4), *self._times(self.large, self._up)]
        return relu_after(*ups, ConvTranspose2d(c, c, 3, padding=1))

    def y_joint(self) -> nn.Module:
        n = 2 + self.large
        return nn.Sequential(relu_between(*[self._same(2 * self.c, 2 * self.c, 5) for _ in range(n)]), Halves())

    def y_bottom_up(self) -> nn.Module:
        c = self.c
        return nn.Sequential(relu_between(self._down(c, 3 * c), self._same(3 * c, 2 * c, 5)), Halves())

    def y_prior(self) -> nn.Module:
        c, wide = self.c, self.c + self.c // 2
        up = self._up(c, wide, self.pad_from_4)
        last = ConvTranspose2d(wide, 2 * c, 3, padding=1)
        return nn.Sequential(relu_between(*self._times(self.large, self._up), up, last), Halves())

    def decoder(self, outputs: int, hidden: int | None) -> nn.Module:
        c = self.c
        ups = self._times(1 + self.further, self._up)
        if hidden is None:
            return relu_between(*ups, self._up(c, outputs))
        return relu_between(*ups, self._up(c, hidden), self._same(hidden, outputs, 3))


class Own:
    """The networks of a user's class; each part that is built knows its name, as `own_part`.

    Raises UserError for one that is missing, or no module.
    """

    def __init__(self, identity: str, *settings):
        self.path, _ = own.file_of(identity)
        with own.told(self.path):
            self.networks = own.class_of(identity)(*settings)
        with own.told(self.path, lambda: ", z_shape and y_shape"):
            self.z_shape, self.y_shape = (tuple(map(int, getattr(self.networks, n))) for n in ("z_shape", "y_shape"))

    def __getattr__(self, name: str):
        def build(*args) -> nn.Module:
            with own.told(self.path, lambda: f", {name}"):
                module = getattr(self.networks, name)(*args)
            if not isinstance(module, nn.Module):
                raise UserError(f"--networks: {name} must return an nn.Module, got {type(module).__name__}")
            module.own_part = name
            return module

        return build


def networks_of(config) -> VectorZ | ConvZ | Own:
    """The networks that a Config says."""
    settings = config.image_shape, config.conv_channels, config.z_dims, config.linear_y_with_dims
    if config.networks:
        return Own(config.networks, *settings)
    return ConvZ(*settings[:2]) if config.use_conv_z else VectorZ(*settings)
