"""Muon takes the steps of PyTorch's own, of each stacked model alone, and continues exactly."""

import json

import pytest
import torch

from utils.config import Config
from utils.training.engine import Engine
from utils.training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalised

CPU = torch.device("cpu")
TINY = Config(conv_channels=2, z_dims=3, batch_size=8, optimizer="muon", learning_rate=1e-2)


@pytest.mark.parametrize("shape", [(2, 3, 4, 20), (2, 30, 5), (4, 4)])
def test_singular_values_follow_the_polynomial_and_singular_vectors_stay(shape):
    a, b, c = COEFFICIENTS
    matrices = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (s**2).sum(-1, keepdim=True).sqrt()
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalised(matrices), u @ torch.diag_embed(s) @ v, rtol=1e-10, atol=1e-10)
    assert ((s > 0.6) & (s < 1.3)).all()
    assert (orthogonalised(torch.zeros(2, 3, 4)) == 0).all()


def take_steps(optimizer, parameters, gradients):
    """The parameters after a step for each tuple of gradients; state as an Engine makes it."""
    for p in parameters:
        optimizer.state[p] |= {"step": torch.zeros(()), **{k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}}
    for of_each in gradients:
        for p, gradient in zip(parameters, of_each, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def leaves():
    g = torch.Generator().manual_seed(0)
    shapes = (1, 16, 40), (1, 30, 8), (1, 5)
    gradients = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(5)]
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes], gradients


def muon(gradients, on=True):
    parameters, _ = leaves()
    optimizer = Muon(parameters[:2], parameters[2:], lr=0.01)
    optimizer.on = on
    return take_steps(optimizer, parameters, gradients)


def test_weights_take_the_steps_of_pytorchs_muon_and_vectors_those_of_adam():
    (*weights, vector), gradients = leaves()
    before = [p.detach().clone() for p in weights]
    theirs = [torch.nn.Parameter(p.detach()[0].clone()) for p in weights]
    pytorchs = torch.optim.Muon(theirs, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for of_each in gradients:
        for p, gradient in zip(theirs, of_each, strict=False):
            p.grad = gradient[0].clone()
        pytorchs.step()
    *ours, ours_of_vector = muon(gradients)
    for p, q, start in zip(ours, theirs, before, strict=True):
        moved = (q - start[0]).norm().item()
        assert moved > 0.01 and (p[0] - q).norm() < 0.02 * moved  # PyTorch's products are in bfloat16
    alone = take_steps(torch.optim.Adam([vector], lr=0.01), [vector], [of_each[2:] for of_each in gradients])
    torch.testing.assert_close(ours_of_vector, alone[0])


def test_no_single_batch_decides():
    """A gradient of 1e12 counts as one of 100 times the momentum; of the models of a stack, only where it is."""
    g = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(2, 16, 40, generator=g)] for _ in range(60)]
    spoilt = [[gradient.clone() for gradient in of_each] for of_each in gradients]
    spoilt[1][0][1] *= 1e12
    steps = []
    for of_each in (gradients, spoilt):
        p = torch.nn.Parameter(torch.zeros(2, 16, 40))
        optimizer = Muon([p], [], lr=0.01)
        take_steps(optimizer, [p], of_each[:-1])
        before, momentum = p.detach().clone(), optimizer.state[p]["exp_avg"].clone()
        p.grad = of_each[-1][0].clone()
        optimizer.step()
        steps.append((p.detach() - before, momentum))
    (usual, momentum), (other, spoilt_momentum) = steps
    assert torch.equal(usual[0], other[0])
    assert (spoilt_momentum[1] - momentum[1]).norm() < 0.5 * momentum[1].norm()
    assert (other[1] - usual[1]).norm() < usual[1].norm()


def test_off_it_is_adam():
    parameters, gradients = leaves()
    expected = take_steps(torch.optim.Adam(parameters, lr=0.01), parameters, gradients)
    for p, q in zip(muon(gradients, on=False), expected, strict=True):
        assert torch.equal(p, q)


def steps(m, betas, n=4):
    engine = Engine(TINY, m, CPU)
    engine.restart(1)
    for i in range(n):
        g = torch.Generator().manual_seed(i)
        x = torch.rand(8, 1, 28, 28, generator=g)
        engine.step(x, engine.stack.model.noise(8, g), betas, torch.ones(m))
    return engine


def test_stacked_models_do_not_mix():
    both, second = steps(2, torch.tensor([0.1, 10.0])), steps(1, torch.tensor([10.0]))
    first = steps(1, torch.tensor([0.1]))
    for name, p in both.stack.parameters.items():
        torch.testing.assert_close(p[:1], first.stack.parameters[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p[1:], second.stack.parameters[name], rtol=1e-4, atol=1e-5)
    assert both.adam_steps == 4


def test_runs_that_do_not_say_were_trained_by_adam(tmp_path):
    for config in (Config(multi_rate=True, beta_max_y=10.0, beta_max_z=10.0), Config(optimizer="muon")):
        assert config.optimizer == "muon" and "-muon" in config.folder_name
        settings = json.loads(config.to_json())
        old = {k: v for k, v in settings.items() if k not in ("optimizer", "sha256")}
        (tmp_path / "config.json").write_text(json.dumps(old))
        read = Config.from_json(tmp_path / "config.json")
        assert read.optimizer == "adam" and "muon" not in read.folder_name
