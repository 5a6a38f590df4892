"""Muon takes the steps of PyTorch's own, of each stacked model alone, and continues exactly."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.conftest import training_of
from utils.config import Config
from utils.training.optimizers import COEFFICIENTS, ITERATIONS, Muon, orthogonalised

TINY = Config(conv_channels=2, z_dims=3, batch_size=8, optimizer="muon", learning_rate=1e-2)


SHAPES = (6, 4, 20), (2, 30, 5), (4, 4, 4), (1, 20, 4), (3, 4, 7)


@pytest.mark.parametrize("at_once", [False, True])
def test_singular_values_follow_the_polynomial(at_once):
    a, b, c = COEFFICIENTS
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(shape, dtype=torch.float64, generator=g) for shape in SHAPES]
    for matrices, ours in zip(blocks, orthogonalised(blocks, at_once), strict=True):
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        s = s / (s**2).sum(-1, keepdim=True).sqrt()
        for _ in range(ITERATIONS):
            s = a * s + b * s**3 + c * s**5
        assert_close(ours, u @ torch.diag_embed(s) @ v, rtol=1e-9, atol=1e-9)
        assert ((s > 0.6) & (s < 1.3)).all()
    assert all((x == 0).all() for x in orthogonalised([torch.zeros(2, 3, 4), torch.zeros(2, 5, 3)], at_once))


def take_steps(optimizer, parameters, gradients):
    """The parameters after a step for each list of gradients; state as that of a training."""
    for p in parameters:
        optimizer.state[p] |= {"step": torch.zeros(()), **{k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}}
    for of_each in gradients:
        for p, gradient in zip(parameters, of_each, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def test_weights_take_pytorchs_steps_and_vectors_adams():
    """Off, all take those of Adam."""
    g = torch.Generator().manual_seed(0)
    shapes = (1, 16, 40), (1, 30, 8), (1, 5)
    gradients = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(5)]
    before = [torch.randn(shape, generator=g) for shape in shapes]
    of_adam, of_muon, of_muon_off = ([torch.nn.Parameter(p.clone()) for p in before] for _ in range(3))
    theirs = [torch.nn.Parameter(p[0].clone()) for p in before[:2]]
    pytorchs = torch.optim.Muon(theirs, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for of_each in gradients:
        for p, gradient in zip(theirs, of_each, strict=False):
            p.grad = gradient[0].clone()
        pytorchs.step()
    take_steps(torch.optim.Adam(of_adam, lr=0.01), of_adam, gradients)
    take_steps(Muon(of_muon[:2], of_muon[2:], lr=0.01), of_muon, gradients)
    off = Muon(of_muon_off[:2], of_muon_off[2:], lr=0.01)
    off.on = False
    take_steps(off, of_muon_off, gradients)
    for p, q, start in zip(of_muon[:2], theirs, before, strict=False):
        moved = (q - start[0]).norm().item()
        assert moved > 0.01 and (p[0] - q).norm() < 0.02 * moved  # PyTorch's products are in bfloat16
    assert_close(of_muon[2], of_adam[2])
    assert all(map(torch.equal, of_muon_off, of_adam))


def test_no_single_batch_decides():
    """A gradient of 1e12 counts as one of 100 times the momentum; of the models of a stack, only where it is."""
    g = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(2, 16, 40, generator=g)] for _ in range(60)]
    spoilt = [[gradient.clone() for gradient in of_each] for of_each in gradients]
    spoilt[1][0][1] *= 1e12
    steps, momenta = [], []
    for of_each in (gradients, spoilt):
        p = torch.nn.Parameter(torch.zeros(2, 16, 40))
        optimizer = Muon([p], [], lr=0.01)
        before = take_steps(optimizer, [p], of_each[:-1])[0].clone()
        momenta.append(optimizer.state[p]["exp_avg"].clone())
        p.grad = of_each[-1][0].clone()
        optimizer.step()
        steps.append(p.detach() - before)
    (usual, other), (momentum, spoilt_momentum) = steps, momenta
    assert torch.equal(usual[0], other[0])
    assert (spoilt_momentum[1] - momentum[1]).norm() < 0.5 * momentum[1].norm()
    assert (other[1] - usual[1]).norm() < usual[1].norm()


def test_stacked_models_do_not_mix():
    def trained(*betas):
        training = training_of(*[dataclasses.replace(TINY, beta_y=beta) for beta in betas])
        training.begin_epoch(4)
        for i in range(4):
            training.step(torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(i)), 8)
        assert training.state(0)["adam_steps"] == 4
        return training.stack.parameters

    both, first, second = trained(0.1, 10.0), trained(0.1), trained(10.0)
    for name, p in both.items():
        assert_close(p, torch.cat([first[name], second[name]]), rtol=1e-4, atol=1e-5)


def test_runs_that_do_not_say_were_trained_by_adam():
    for config in (Config(multi_rate=True, beta_max_y=10.0, beta_max_z=10.0), Config(optimizer="muon")):
        assert config.optimizer == "muon" and "-muon" in config.folder_name
        settings = json.loads(config.to_json())
        old = {k: v for k, v in settings.items() if k not in ("optimizer", "sha256")}
        Path("config.json").write_text(json.dumps(old))
        read = Config.from_json(Path("config.json"))
        assert read.optimizer == "adam" and "muon" not in read.folder_name
