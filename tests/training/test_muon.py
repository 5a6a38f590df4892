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


def test_weights_take_the_steps_of_pytorchs_muon_and_vectors_those_of_adam():
    g = torch.Generator().manual_seed(0)
    weights, vector = [torch.randn(1, 16, 40, generator=g), torch.randn(1, 30, 8, generator=g)], torch.randn(1, 5)
    ours = [torch.nn.Parameter(p.clone()) for p in (*weights, vector)]
    muon = Muon(ours, lr=0.01)
    for p in ours[:2]:
        muon.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
    theirs = [torch.nn.Parameter(p[0].clone()) for p in (*weights, vector)]
    others = torch.optim.Muon(theirs[:2], lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    others = [others, torch.optim.Adam(theirs[2:], lr=0.01)]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad[0].clone()
        for optimizer in (muon, *others):
            optimizer.step()
    for p, q, before in zip(ours, theirs, (*weights, vector), strict=True):
        moved = (q - before[0]).norm().item()
        assert moved > 0.01 and (p[0] - q).norm() < (0.02 * moved if p.dim() > 2 else 1e-6)  # theirs is in bfloat16


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
