"""Every model of the paper: sizes, the outputs of the paper's code, and the combinations from training to reload."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.testing import assert_allclose
from torch.func import functional_call
from torch.testing import assert_close

from datasets.batches import Resident
from datasets.loading import Data
from models.build import build_model
from models.hvae import Noise, Terms
from models.stack import Stack
from models.tables import LATENTS, LIKELIHOODS, MODELS
from tests.conftest import ROOT, random_data, training_of
from tests.reliability.trials import first
from utils.config import Config
from utils.errors import UserError
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training.console import GridBar
from utils.training.saving import Interrupted
from utils.training.training import Setup, Training

REFERENCE = ROOT / "tests" / "reference_runs"
CPU = torch.device("cpu")
FIXED = "GaussianFixedSigma"
PARAMETERS = [
    (475_811, dict(dataset="CIFAR10", conv_channels=32, z_dims=32, px_y_family_ll=FIXED)),
    (122_713, dict(dataset="BinaryMNIST", conv_channels=16, z_dims=20)),
    (819_732, dict(dataset="CIFAR10", conv_channels=32, use_conv_z=True, px_y_family_ll="MoL")),
    (33_503_140, dict(dataset="ImageNet", conv_channels=192, px_y_family_ll="GaussianLearnedSigma")),
    (123_387, dict(dataset="BinaryMNIST", z_dims=10, qz_family="GumbelSoftmax", linear_y_with_dims=64)),
    (408_131, dict(vae_type="LVAE", dataset="SVHN", conv_channels=32, z_dims=32, px_y_family_ll=FIXED)),
    (566_996, dict(vae_type="LVAE", dataset="SVHN", conv_channels=32, use_conv_z=True)),
]


def test_parameter_counts():
    for parameters, settings in PARAMETERS:
        with torch.device("meta"):
            model = build_model(Config(**settings))
        assert sum(p.numel() for p in model.parameters()) == parameters, settings


@pytest.mark.parametrize("draws", first(1, 40, 400))
@pytest.mark.parametrize("name", ["hvae_fixed_cifar_gauss", "hvae_fixed_cifar_mol", "lvae_conv_svhn_learned"])
@torch.no_grad()
def test_runs_of_the_papers_code_give_its_outputs(name, draws):
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
        assert_allclose(value, golden[key], rtol=1e-4, atol=1e-4 * scale, err_msg=key)
    noise, means = generator(CPU, 0), []
    for _ in range(draws):
        terms = model(x, model.noise(len(x), noise))
        loss = terms.loss(run.config.beta_y, run.config.beta_z)
        means.append([t.mean().item() for t in (loss, terms.ll, terms.kl_z, terms.kl_y)])
    error = np.hypot(golden["mc_stderr"], scipy.stats.sem(means)) + 1e-5 * np.abs(means[0])
    assert (np.abs(np.mean(means, axis=0) - golden["mc_mean_loss_ll_klz_kly"]) < 4 * error).all()


AXES = dict(
    vae_type=MODELS,
    use_conv_z=(False, True),
    qz_family=LATENTS,
    px_y_family_ll=LIKELIHOODS,
    dataset=("MNIST", "CIFAR10", "ImageNet"),
    linear_y_with_dims=(-1, 6),
)
EVERY = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
SMALL = dict(conv_channels=4, z_dims=3, batch_size=4, num_epochs=2, warmup_epochs=0, sigma=0.3)


def allowed(s: dict) -> bool:
    """What the paper's models allow, as one independent statement (ImageNet's z is convolutional anyway)."""
    conv = s["use_conv_z"] or s["dataset"] == "ImageNet"
    if s["px_y_family_ll"] == "Bernoulli" and s["dataset"] != "MNIST":
        return False
    if s["vae_type"] == "BVAE":
        return not conv and s["qz_family"] == "DiagonalGaussian"
    if s["vae_type"] == "LVAE" and s["dataset"] == "ImageNet":
        return False
    return not (conv and (s["qz_family"] == "GumbelSoftmax" or s["linear_y_with_dims"] > 0))


def test_forbidden_combinations_are_refused_in_one_line():
    for settings in EVERY:
        if not allowed(settings):
            with pytest.raises(UserError, match=r"^--\w+: [^\n]+$"):
                Config(**settings, **SMALL)


def pairs(s: dict) -> set:
    return set(itertools.combinations(s.items(), 2))


def pairwise(every: list[dict]) -> list[dict]:
    """A few of the combinations, in which each two settings that go together do so."""
    few, left = [], set().union(*map(pairs, every))
    while left:
        few.append(max(every, key=lambda s: len(left & pairs(s))))
        left -= pairs(few[-1])
    return few


def cases() -> list:
    """All distinct combinations; the default suite takes a few, without the largest model, which takes minutes."""
    distinct = [s for s in EVERY if allowed(s) and (s["use_conv_z"] or s["dataset"] != "ImageNet")]
    few = [s for s in pairwise(distinct) if (s["px_y_family_ll"], s["dataset"]) != ("MoL", "ImageNet")]
    return [
        pytest.param(s, marks=[] if s in few else [pytest.mark.slow], id="-".join(map(str, s.values())))
        for s in distinct
    ]


def in_double(noise: Noise) -> Noise:
    return noise._replace(z=noise.z.double(), y=noise.y.double())


class Stopping:
    """Signals of which SIGTERM has come once the first epoch of a training is over."""

    def __init__(self, training: Training | None = None):
        self.training = training

    @property
    def received(self) -> int | None:
        return 15 if self.training and self.training.epoch == 1 else None


def train(run: Run, data: Data, state: dict | None = None, stop: bool = False) -> None:
    """Trains a run from a checkpoint; with `stop`, to the end of the first epoch."""
    training = Training([run], [state], Setup(CPU))
    training.train(data, Stopping(training if stop else None), GridBar([run], {}))


@pytest.fixture(scope="module", params=cases())
def case(request, tmp_path_factory) -> tuple[Run, Data, torch.Tensor]:
    """A training of two steps of a combination, its random images, and the test images as floats."""
    torch.set_num_threads(1)
    config = Config(**request.param, **SMALL)
    data = random_data(config, n=4 if config.image_shape[1] < 256 else 1)
    run = Run.of(config, tmp_path_factory.mktemp("whole"))
    run.create()
    with pytest.MonkeyPatch.context() as m:
        m.setattr("utils.training.log.N", 1)
        train(run, data)
        yield run, data, data.test.images.float() / 255


def test_two_steps_lower_the_loss(case):
    run, _, x = case
    torch.manual_seed(run.config.seed)
    losses = []
    for model in (build_model(run.config), load_model(run, CPU)):
        terms = model(x, model.noise(len(x), generator(CPU, 1)))
        losses.append(terms.loss(run.config.beta_y, run.config.beta_z).mean().item())
        assert (terms.kl_y > 0).all() and (terms.kl_z >= 0).all()
        assert (terms.kl_z == 0).all() == (run.config.vae_type == "BVAE")
    assert losses[1] < losses[0]


def test_an_interrupted_training_continues_to_the_same_bytes(case):
    whole, data, _ = case
    run = Run.of(whole.config, "resumed")
    run.create()
    with pytest.raises(Interrupted):
        train(run, data, stop=True)
    state = run.load_state()[0]
    assert state["epoch"] == 1
    train(run, data, state)
    assert (run.path / "vae.pth").read_bytes() == (whole.path / "vae.pth").read_bytes()


def test_a_stack_has_the_gradients_of_its_models_alone(case):
    """In float64."""
    run, _, x = case
    model, x = load_model(run, CPU).double(), x.double()
    noise = in_double(model.noise(len(x), generator(CPU, 2)))
    betas = torch.tensor([[0.1, 1.0], [10.0, 0.5]], dtype=torch.float64)
    stack = Stack(model, 2)
    loss = stack.terms(x, noise).loss(betas[:, :1], betas[:, 1:])
    loss.mean(1).sum().backward()
    for m in range(2):
        model.zero_grad()
        alone = model(x, noise).loss(*betas[m])
        alone.mean().backward()
        assert_close(loss[m], alone, rtol=1e-12, atol=1e-9)
        for name, p in model.named_parameters():
            atol = 1e-12 * max(1.0, p.grad.abs().max().item())
            assert_close(stack.parameters[name].grad[m], p.grad, rtol=1e-9, atol=atol)


def test_samples_and_reconstructions_are_images_and_repeat(case):
    run, _, x = case
    model = load_model(run, CPU)
    samples, from_z = model.sample(3, generator=generator(CPU, 3)), model.sample(z=model.q_z(x).mode)
    for images, n in ((samples, 3), (from_z, len(x)), (model.reconstruct(x), len(x))):
        assert images.shape == (n, *run.config.image_shape)
        assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))


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


def test_weights_under_the_names_of_the_papers_code_load(case):
    run, _, x = case
    if run.config.vae_type == "BVAE" or run.config.use_conv_z and x.shape[-1] == 28:
        pytest.skip("the paper's code has no such model")
    state = load_model(run, CPU).state_dict()
    layers = [n for n in dict.fromkeys(k.rpartition(".")[0] for k in state) if n != "likelihood"]
    names = dict(zip(layers, paper_names(run.config), strict=True)) | {"likelihood": ""}
    renamed = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}".strip("."): v for k, v in state.items()}
    shutil.copytree(run.path, "theirs")
    torch.save(dict(sorted(renamed.items(), reverse=True)), "theirs/vae.pth")
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


def test_loss_is_the_negative_elbo_at_betas_of_one():
    ll, kl_y, kl_z = torch.randn(3, 5).double()
    terms = Terms(ll, kl_y, kl_z)
    assert_close(terms.loss(), -(ll - kl_y - kl_z), rtol=0, atol=0)
    assert_close(terms.loss(0.5, 2.0), -ll + 0.5 * kl_y + 2 * kl_z)


def test_noise_is_drawn_anew_for_z_for_y_and_for_each_pass():
    model, g = build_model(Config(conv_channels=2, z_dims=3)), generator(CPU, 0)
    values = torch.cat([t.flatten() for _ in range(2) for t in model.noise(4, g)[:2]])
    assert len(values.unique()) == len(values) == 2 * 4 * (3 + 32)


@pytest.mark.parametrize("vae_type", MODELS)
def test_gradients_in_float64(vae_type):
    """The gradient of the loss against finite differences along random directions."""
    torch.manual_seed(0)
    model = build_model(Config(vae_type=vae_type, conv_channels=2, z_dims=3)).double()
    x, noise = torch.rand(4, 1, 28, 28).double(), in_double(model.noise(4, generator(CPU, 0)))
    for _ in range(3):
        direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}

        def loss(step, direction=direction):
            moved = {name: p.detach() + step * direction[name] for name, p in model.named_parameters()}
            return functional_call(model, moved, (x, noise)).loss(0.3, 3.0).sum()

        assert torch.autograd.gradcheck(loss, torch.zeros(1, dtype=torch.float64, requires_grad=True), rtol=1e-6)


def three(steps=3, betas=((0.1, 10.0), (1.0, 1.0), (10.0, 0.1)), poison=False):
    """The sums of each step and the stack of a few steps of models of these betas, in float64."""
    configs = [Config(conv_channels=8, z_dims=4, beta_y=y, beta_z=z, learning_rate=1e-3) for y, z in betas]
    training, g, history = training_of(*configs), generator("cpu", 0), []
    for p in training.stack.parameters.values():
        p.data = p.data.double()
        training.optimizer.state[p] = {}
    if poison:
        training.stack.parameters["decoder.0.0.weight"].data[1] = torch.nan
    for _ in range(steps):
        x, noise = torch.rand(16, 1, 28, 28, generator=g).double(), in_double(training.stack.model.noise(16, g))
        history.append(training.update(x, noise, *torch.tensor(betas).double().T))
    return torch.stack(history), training.stack


def test_after_ten_steps_a_cell_is_that_cell_alone():
    together, stack = three(10)
    assert together.shape == (10, 3, 4)
    for m, betas in enumerate([(0.1, 10.0), (1.0, 1.0), (10.0, 0.1)]):
        alone, one = three(10, [betas])
        assert_close(together[:, m], alone[:, 0], rtol=1e-11, atol=1e-9)
        for name, p in one.cell(0).items():
            assert_close(stack.cell(m)[name], p, rtol=1e-6, atol=1e-8)


def test_one_models_nan_leaves_its_neighbours_bitwise_alone():
    (sums, ill), (_, well) = three(poison=True), three()
    assert sums[-1, 1, 0].isnan()
    for m in (0, 2):
        for name, p in well.cell(m).items():
            assert torch.equal(ill.cell(m)[name], p)


def test_a_model_of_a_stack_shares_its_weights():
    """Else to log a cell would copy each of its tensors from the GPU and back."""
    stack = Stack(build_model(Config(conv_channels=2, z_dims=3)), 2)
    for name, p in stack.plain(1).named_parameters():
        assert p.data_ptr() == stack.parameters[name][1].data_ptr() and torch.equal(p, stack.parameters[name][1])


def test_evaluation_gives_means_over_images_not_over_batches():
    config = Config(conv_channels=4, z_dims=4)
    stack = Stack(build_model(config), 2)
    x = torch.rand(10, 1, 28, 28)
    ones = torch.ones(2)
    split = Resident((x * 255).to(torch.uint8), torch.zeros(10), CPU)
    whole = stack.evaluate(split, 10, generator("cpu", 0), ones, ones)
    # kl_z does not depend on the noise, so batches of 9 and 1 must give the same mean
    ragged = stack.evaluate(split, 9, generator("cpu", 0), ones, ones)
    assert_close(whole[:, 3], ragged[:, 3], rtol=1e-6, atol=0)
    assert_close(whole[:, 0], -whole[:, 1] + whole[:, 2] + whole[:, 3], rtol=1e-6, atol=1e-4)
