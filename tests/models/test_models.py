"""Every model of the paper: sizes, the outputs of the paper's code, and all combinations from training to reload."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from models.build import build_model
from models.hvae import Terms
from models.stack import Stack
from models.tables import LATENTS, LIKELIHOODS, MODELS
from tests.conftest import ROOT, random_data
from utils.config import Config
from utils.errors import UserError
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training.chunk import Chunk
from utils.training.engine import Engine
from utils.training.loop import Interrupted, train

REFERENCE = ROOT / "tests" / "reference_runs"
CPU = torch.device("cpu")
FIXED = "GaussianFixedSigma"


@pytest.mark.parametrize(
    "parameters, settings",
    [
        (475_811, dict(dataset="CIFAR10", conv_channels=32, z_dims=32, px_y_family_ll=FIXED)),
        (122_713, dict(dataset="BinaryMNIST", conv_channels=16, z_dims=20)),
        (819_732, dict(dataset="CIFAR10", conv_channels=32, use_conv_z=True, px_y_family_ll="MoL")),
        (33_503_140, dict(dataset="ImageNet", conv_channels=192, px_y_family_ll="GaussianLearnedSigma")),
        (123_387, dict(dataset="BinaryMNIST", z_dims=10, qz_family="GumbelSoftmax", linear_y_with_dims=64)),
        (408_131, dict(vae_type="LVAE", dataset="SVHN", conv_channels=32, z_dims=32, px_y_family_ll=FIXED)),
        (566_996, dict(vae_type="LVAE", dataset="SVHN", conv_channels=32, use_conv_z=True)),
    ],
)
def test_parameter_counts(parameters, settings):
    assert sum(p.numel() for p in build_model(Config(**settings)).parameters()) == parameters


@pytest.mark.parametrize("name", ["hvae_fixed_cifar_gauss", "hvae_fixed_cifar_mol", "lvae_conv_svhn_learned"])
@torch.no_grad()
def test_runs_of_the_papers_code_give_its_outputs(name):
    run = Run.open(REFERENCE / name)
    model, golden = load_model(run, CPU), np.load(REFERENCE / name / "golden.npz")
    x, z = torch.from_numpy(golden["x_uint8"]).float() / 255, torch.from_numpy(golden["z"])
    q_z, p_y = model.q_z(x), model.p_y(z)
    q_y = model.q_y(z, x)
    ours = {"qz_mu": q_z.mean, "qz_std": q_z.std, "qy_mu": q_y.mean, "qy_std": q_y.std, "py_mu": p_y.mean}
    ours |= {"py_std": p_y.std, "fy": model.decoder(q_y.mean)[: len(golden["fy"])]}
    ours |= {"ll": model.p_x(q_y.mean).log_prob(x), "kl_z": q_z.rate(), "kl_y": q_y.kl(p_y)}
    for key, value in ours.items():
        scale = np.abs(golden[key]).max()
        np.testing.assert_allclose(value, golden[key], rtol=1e-4, atol=1e-4 * scale, err_msg=key)
    noise = generator(CPU, 0)
    draws = []
    for _ in range(400):
        terms = model(x, model.noise(len(x), noise))
        loss = terms.loss(run.config.beta_y, run.config.beta_z)
        draws.append([t.mean().item() for t in (loss, terms.ll, terms.kl_z, terms.kl_y)])
    error = np.hypot(golden["mc_stderr"], np.std(draws, axis=0) / 20) + 1e-5 * np.abs(draws[0])
    assert (np.abs(np.mean(draws, axis=0) - golden["mc_mean_loss_ll_klz_kly"]) < 4 * error).all()


def paper_names(config: Config) -> list[str]:
    """The layer names that the paper's code gives a model (in our order), spelled out case by case."""
    gumbel, linear = config.qz_family == "GumbelSoftmax", config.linear_y_with_dims > 0
    mol, large = config.px_y_family_ll == "MoL", config.image_shape[1] == 256
    top = ["qz_logit"] if gumbel else ["qz_mu", "qz_pre_sp"]

    def numbered(stem, n):
        return [f"{stem}.{2 * i}" for i in range(n)]

    if config.use_conv_z and config.vae_type == "LVAE":
        names = [*numbered("qz_convs_dy", 2), *numbered("qz_convs_dz", 2), *numbered("qy_convs_dy", 2)]
        return [*names, *numbered("py_deconvs", 2), *numbered("px_deconvs", 2 + mol)]
    if config.use_conv_z:
        names = [*numbered("qz_convs", 4 + 3 * large), *numbered("qy_conv_x", 2 + 2 * large)]
        names += [*numbered("qy_deconv_z", 2 + large), *numbered("qy_convs_zx", 2 + large)]
        return [*names, *numbered("py_deconvs", 2 + large), *numbered("px_deconvs", 2 + 2 * large + mol)]
    last = ["py_l1", "py_mu", "py_pre_sp", "px_l1" if linear else "px_conv1"]
    if config.vae_type == "LVAE":
        names = ["qz_conv1", "qz_conv2_dy", "qz_conv3", *top, "qy_conv1_dy", "qy_mu", "qy_pre_sp"]
        return [*names, *last, "px_conv2", "px_conv3"]
    names = ["qz_conv1", "qz_conv2", "qz_conv3", *top, "qy_conv1_x", "qy_conv2_x", "qy_l1_z", "qy_conv1_z"]
    return [*names, "qy_conv1_zx", "qy_mu", "qy_pre_sp", *last, *numbered("px_convs", 2 + mol)]


def combinations():
    """Every combination of model, z, family, likelihood, size and y, as settings; allowed or not."""
    sizes = {28: "MNIST", 32: "CIFAR10", 256: "ImageNet"}
    for vae, conv, family, ll, size, linear in itertools.product(
        MODELS, (False, True), LATENTS, LIKELIHOODS, sizes, (-1, 6)
    ):
        yield dict(
            vae_type=vae, use_conv_z=conv, qz_family=family, px_y_family_ll=ll, dataset=sizes[size],
            linear_y_with_dims=linear, conv_channels=4, z_dims=3, batch_size=8, num_epochs=2, warmup_epochs=0,
            sigma=0.3,
        )  # fmt: skip


def allowed(s) -> bool:
    """What the paper's models allow, as one independent statement (ImageNet's z is convolutional anyway)."""
    conv = s["use_conv_z"] or s["dataset"] == "ImageNet"
    if s["px_y_family_ll"] == "Bernoulli" and s["dataset"] != "MNIST":
        return False
    if s["vae_type"] == "BVAE":
        return not conv and s["qz_family"] == "DiagonalGaussian"
    if s["vae_type"] == "LVAE" and s["dataset"] == "ImageNet":
        return False
    return not (conv and (s["qz_family"] == "GumbelSoftmax" or s["linear_y_with_dims"] > 0))


def label(s) -> str:
    return "-".join(str(v) for v in list(s.values())[:6])


@pytest.mark.parametrize("settings", [s for s in combinations() if not allowed(s)], ids=label)
def test_forbidden_combinations_are_refused_in_one_line(settings):
    with pytest.raises(UserError, match=r"^--\w+: [^\n]+$"):
        Config(**settings)


class StopAfterOneEpoch:
    """Signals that has received one, once the first epoch is over."""

    def __init__(self, chunk):
        self.chunk = chunk

    @property
    def received(self):
        return 15 if self.chunk.epoch == 1 else None


class NoSignals:
    received = None


def train_run(config, data, where, interrupt=False) -> Run:
    run = Run.of(config, where)
    run.create()
    chunk = Chunk([run], [None], Engine(config, 1, CPU))
    if interrupt:
        with pytest.raises(Interrupted):
            train(chunk, data, StopAfterOneEpoch(chunk))
        chunk = Chunk([run], [run.load_state()[0]], Engine(config, 1, CPU))
        assert chunk.epoch == 1
    train(chunk, data, NoSignals())
    return run


def timed(settings):
    """The largest model takes minutes; the others tell the default suite as much."""
    largest = settings["px_y_family_ll"] == "MoL" and settings["dataset"] == "ImageNet"
    return pytest.param(settings, marks=[pytest.mark.slow] if largest else [], id=label(settings))


DISTINCT = [s for s in combinations() if allowed(s) and (s["use_conv_z"] or s["dataset"] != "ImageNet")]


@pytest.mark.parametrize("settings", [timed(settings) for settings in DISTINCT])
def test_allowed_combinations_train_resume_stack_reload_and_sample(settings, monkeypatch):
    monkeypatch.setattr("utils.training.pictures.N", 1)
    config = Config(**settings)
    data = random_data(config, n=8 if config.image_shape[1] < 256 else 1)
    run = train_run(config, data, "whole")
    x = data.test.images.float() / 255

    # two steps make the loss fall
    torch.manual_seed(config.seed)
    before, after = build_model(config), load_model(run, CPU)
    losses = []
    for model in (before, after):
        terms = model(x, model.noise(len(x), generator(CPU, 1)))
        losses.append(terms.loss(config.beta_y, config.beta_z).mean().item())
        assert (terms.kl_y >= 0).all() and (terms.kl_z >= 0).all()
    assert losses[1] < losses[0]

    # interrupted and resumed: the same bytes
    again = train_run(config, data, "resumed", interrupt=True)
    assert (again.path / "vae.pth").read_bytes() == (run.path / "vae.pth").read_bytes()

    # alone = in a chunk: terms and gradients in float64
    model = after.double()
    noise = model.noise(len(x), generator(CPU, 2))
    noise = noise._replace(z=noise.z.double(), y=noise.y.double())
    betas = torch.tensor([[0.1, 1.0], [10.0, 0.5]], dtype=torch.float64)
    together, grads = Stack(model, 2), []
    loss = together.terms(x.double(), noise).loss(betas[:, :1], betas[:, 1:])
    loss.mean(1).sum().backward()
    for m in range(2):
        model.zero_grad()
        model(x.double(), noise).loss(*betas[m]).mean().backward()
        for name, p in model.named_parameters():
            grads.append((together.parameters[name].grad[m], p.grad))
    for ours, expected in grads:
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12 * max(1.0, expected.abs().max().item()))

    # pictures
    model = load_model(run, CPU)
    samples, from_z = model.sample(3, generator=generator(CPU, 3)), model.sample(z=model.q_z(x).mode)
    for images, n in ((samples, 3), (from_z, len(x)), (model.reconstruct(x), len(x))):
        assert images.shape == (n, *config.image_shape)
        assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(x), rtol=0, atol=0)

    # the same weights under the names of the paper's code
    if settings["vae_type"] != "BVAE" and not (settings["use_conv_z"] and config.image_shape[1] == 28):
        state = model.state_dict()
        layers = [n for n in dict.fromkeys(k.rpartition(".")[0] for k in state) if n != "likelihood"]
        names = dict(zip(layers, paper_names(config), strict=True)) | {"likelihood": ""}
        renamed = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}".strip("."): v for k, v in state.items()}
        shuffled = dict(sorted(renamed.items(), reverse=True))
        shutil.copytree(run.path, "theirs")
        torch.save(shuffled, "theirs/vae.pth")
        ours = load_model(Run.open(Path("theirs")), CPU).state_dict()
        assert all(torch.equal(ours[k], v) for k, v in state.items())


def test_old_configs_of_the_paper_lack_keys():
    shutil.copytree(REFERENCE / "hvae_fixed_cifar_gauss", "old")
    config = json.loads(Path("old/config.json").read_text())
    del config["vae_type"], config["use_conv_z"]
    Path("old/config.json").write_text(json.dumps(config))
    run = Run.open(Path("old"))
    assert (run.config.vae_type, run.config.use_conv_z, run.config.sigma) == ("HVAE", False, 0.71)
    load_model(run, CPU)


def test_loss_is_the_negative_elbo_at_betas_one_and_weighted_otherwise():
    ll, kl_y, kl_z = torch.randn(3, 5).double()
    terms = Terms(ll, kl_y, kl_z)
    torch.testing.assert_close(terms.loss(), -(ll - kl_y - kl_z), rtol=0, atol=0)
    torch.testing.assert_close(terms.loss(0.5, 2.0), -ll + 0.5 * kl_y + 2 * kl_z)


@pytest.mark.parametrize("vae_type", MODELS)
def test_gradients_in_float64(vae_type):
    """The gradient of the loss against finite differences along random directions."""
    config = Config(vae_type=vae_type, conv_channels=2, z_dims=3)
    torch.manual_seed(0)
    model = build_model(config).double()
    x = torch.rand(4, 1, 28, 28).double()
    noise = model.noise(4, generator(CPU, 0))
    noise = noise._replace(z=noise.z.double(), y=noise.y.double())
    parameters = list(model.parameters())

    def loss():
        return model(x, noise).loss(0.3, 3.0).sum()

    grads = torch.autograd.grad(loss(), parameters)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += step * d
            values.append(loss().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += 1e-6 * d
        expected = (values[0] - values[1]) / 2e-6
        ours = sum((a * d).sum() for a, d in zip(grads, direction, strict=True)).item()
        assert ours == pytest.approx(expected, rel=1e-6)


def test_bvae_has_no_rate_of_z():
    config = Config(vae_type="BVAE", conv_channels=4)
    model = build_model(config)
    terms = model(torch.rand(5, 1, 28, 28), model.noise(5, generator(CPU, 0)))
    assert (terms.kl_z == 0).all() and (terms.kl_y > 0).all()
