"""Residual networks, for images of 28, 32, 64 or 128 pixels; y has a quarter of them along each side."""

from torch import nn

from models.networks import Conv2d, ConvTranspose2d, Halves, Heads, Linear, in_full


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.change = nn.Sequential(nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 1))

    def forward(self, h):
        return h + self.change(h)


class Residual:
    def __init__(self, image_shape, c, z_dims, y_dims):
        self.colours, self.side, _ = image_shape
        self.c, self.z_dims = c, z_dims
        self.z_shape, self.y_shape = (z_dims,), (c, self.side // 4, self.side // 4)
        self.flat = c * (self.side // 4) ** 2

    def trunk(self):
        halvings = [nn.Conv2d(i, self.c, 4, stride=2, padding=1) for i in (self.colours, self.c)]
        return nn.Sequential(halvings[0], Block(self.c), halvings[1], Block(self.c))

    x_branch = trunk

    def z_head(self, n_heads):
        return nn.Sequential(nn.Flatten(), Heads(in_full(Linear(self.flat, self.z_dims)) for _ in range(n_heads)))

    def z_branch(self):
        return nn.Sequential(nn.Linear(self.z_dims, self.flat), nn.Unflatten(1, self.y_shape), Block(self.c))

    def y_joint(self):
        return nn.Sequential(nn.Conv2d(2 * self.c, self.c, 1), *self.y_bottom_up())

    def y_bottom_up(self):
        return nn.Sequential(Block(self.c), in_full(Conv2d(self.c, 2 * self.c, 3, padding=1)), Halves())

    def y_prior(self):
        return nn.Sequential(*self.z_branch(), *self.y_bottom_up())

    def decoder(self, outputs, hidden):
        up = nn.ConvTranspose2d(self.c, self.c, 4, stride=2, padding=1)
        last = in_full(ConvTranspose2d(self.c, outputs, 4, stride=2, padding=1))
        return nn.Sequential(Block(self.c), up, Block(self.c), last)
