"""A cell trained among others equals the same cell trained alone."""

import pytest
import torch

from datasets.batches import Resident
from models.build import build_model
from models.stack import Stack
from utils.config import Config
from utils.seeds import generator

BETAS = [(0.1, 10.0), (1.0, 1.0), (10.0, 0.1)]


def ten_steps(betas, dtype=torch.float32):
    config = Config(conv_channels=8, z_dims=4)
    torch.manual_seed(config.seed)
    stack = Stack(build_model(config).to(dtype), len(betas))
    optimizer = torch.optim.Adam(stack.parameters.values(), lr=1e-3)
    by, bz = torch.tensor(betas, dtype=dtype).T
    g, history = generator("cpu", 0), []
    for _ in range(10):
        x = torch.rand(16, 1, 28, 28, generator=g).to(dtype)
        noise = stack.model.noise(16, g)
        noise = noise._replace(z=noise.z.to(dtype), y=noise.y.to(dtype))
        history.append(stack.step(optimizer, x, noise, by, bz))
    return torch.stack(history), stack


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_alone_equals_in_a_chunk(dtype, rtol):
    together, stack = ten_steps(BETAS, dtype)
    assert together.shape == (10, 3, 4)
    for m, betas in enumerate(BETAS):
        alone, one = ten_steps([betas], dtype)
        torch.testing.assert_close(together[:, m], alone[:, 0], rtol=rtol, atol=1e-3 if rtol > 1e-6 else 1e-9)
        if dtype == torch.float64:
            for name, p in one.cell(0).items():
                torch.testing.assert_close(stack.cell(m)[name], p, rtol=1e-6, atol=1e-8)


def test_one_models_nan_leaves_its_neighbours_bitwise_alone():
    def three(poison):
        config = Config(conv_channels=4, z_dims=4)
        torch.manual_seed(0)
        stack = Stack(build_model(config), 3)
        if poison:
            with torch.no_grad():
                stack.parameters["decoder.0.0.weight"][1] = torch.nan
        optimizer = torch.optim.Adam(stack.parameters.values())
        g = generator("cpu", 0)
        for _ in range(3):
            x = torch.rand(8, 1, 28, 28, generator=g)
            sums = stack.step(optimizer, x, stack.model.noise(8, g), torch.ones(3), torch.ones(3))
        return stack, sums

    (ill, ill_sums), (well, _) = three(True), three(False)
    assert ill_sums[1, 0].isnan()
    for m in (0, 2):
        for name, p in well.cell(m).items():
            assert torch.equal(ill.cell(m)[name], p)


def test_evaluation_gives_means_over_images_not_over_batches():
    config = Config(conv_channels=4, z_dims=4)
    stack = Stack(build_model(config), 2)
    x = torch.rand(10, 1, 28, 28)
    ones = torch.ones(2)
    split = Resident((x * 255).to(torch.uint8), torch.zeros(10), torch.device("cpu"))
    whole = stack.evaluate(split, 10, generator("cpu", 0), ones, ones)
    # kl_z does not depend on the noise, so batches of 9 and 1 must give the same mean
    ragged = stack.evaluate(split, 9, generator("cpu", 0), ones, ones)
    torch.testing.assert_close(whole[:, 3], ragged[:, 3], rtol=1e-6, atol=0)
    torch.testing.assert_close(whole[:, 0], -whole[:, 1] + whole[:, 2] + whole[:, 3], rtol=1e-6, atol=1e-4)
