"""What own networks must hold, checked on three images, on the CPU, before a training begins."""

import operator
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.errors import UserError

from . import own
from .conditioned import LAYERS, Conditioned
from .hvae import HVAE, Noise
from .stack import Stack
from .tables import MODELS

N = 3  # images
RANGE = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])  # of log10 betas
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # what two ways to compute the same differ by at most


@torch.random.fork_rng(devices=[])
def check_networks(config, stacked: bool) -> None:
    """Raises UserError naming the part or layer with which a Config's own networks cannot be trained, and why.

    `stacked` says whether several models train as one.
    """
    torch.manual_seed(0)
    model = MODELS[config.vae_type](config)
    if not model.family.convolutional and model.z_shape != (config.z_dims,):
        raise UserError(f"--networks: {config.qz_family} needs z_shape ({config.z_dims},), got {model.z_shape}")
    watch = Watch(model, config)
    conditioned = with_gates(watch, config) if config.is_conditioned else None
    watch.begin()
    with own.told(watch.path), torch.no_grad():
        for p in model.parameters():  # of layers that start at 0, nothing would show
            p += 0.1 * torch.randn_like(p)
    x, noise = torch.rand(N, *config.image_shape), (conditioned or model).noise(N, torch.default_generator)
    check_apart(watch, x, noise)
    check_kept(watch)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        watch.run(lambda: model(x, noise))
    check_gradients(watch, Stack(conditioned or model, 2 if stacked else 1), x, noise)
    if conditioned is not None:
        check_folding(watch, conditioned, x, noise)


class Call(NamedTuple):
    """A call of a module: its inputs and outputs, and whether it is a part."""

    is_part: bool
    inputs: list[Tensor]
    outputs: list[Tensor]


class Watch:
    """A model whose calls are kept while it is run, and the outputs of whose parts must have the right shapes."""

    def __init__(self, model: HVAE, config):
        self.model, self.path = model, own.file_of(config.networks)[0]
        z, y = [model.z_shape] * model.family.n_heads, [model.y_shape] * 2
        self.wanted = {"z_head": z, "y_joint": y, "y_bottom_up": y, "y_prior": y}
        self.wanted["decoder"] = (model.likelihood.outputs, *config.image_shape[1:])
        self.running: list[str] = []
        self.calls: dict[tuple[str, int], Call] = {}  # by the module's name, and how often it was called before

    def begin(self) -> None:
        """Keeps calls from now on, with outputs as the hooks that are there leave them."""
        for name, module in self.model.named_modules():
            if name and not name.startswith("likelihood"):
                module.register_forward_pre_hook(lambda module, inputs, name=name: self.running.append(name))
                module.register_forward_hook(lambda *of_call, name=name: self.ended(name, *of_call))

    def run(self, forward: Callable) -> dict[tuple[str, int], Call]:
        """Calls `forward`; the calls of modules. Raises UserError naming the layer that fails, and why."""
        self.running, self.calls = [], {}
        with own.told(self.path, lambda: f", {self.place(self.running[-1])}" if self.running else ""):
            forward()
        return self.calls

    def ended(self, name: str, module: nn.Module, inputs: tuple, out) -> None:
        """Keeps a call. Raises UserError if it is of a part, and its outputs are not what the model needs."""
        self.running.pop()
        part = getattr(module, "own_part", None)
        before = sum(called == name for called, _ in self.calls)
        self.calls[name, before] = Call(part is not None, tensors(inputs), tensors(out))
        if part == "z_branch":  # along whose channels those of the images are laid
            self.wanted["x_branch"] = ("C", *out.shape[2:])
        if part not in self.wanted:
            return
        wanted, got = self.wanted[part], shape_of(out)
        if part == "x_branch":
            got = got[:1] + ("C",) + got[2:]
        right = tuple((N, *shape) for shape in wanted) if isinstance(wanted, list) else (N, *wanted)
        if got != right:
            raise UserError(f"--networks: {self.path}, {part}: must give {right} for {N} images, gives {got}")
        for t in tensors(out) if part != "x_branch" else ():
            if t.dtype != torch.float32:
                why = "with --precision bf16, its last layers are in_full (models/networks.py)"
                raise UserError(f"--networks: {self.path}, {part}: must give torch.float32, gives {t.dtype}; {why}")

    def place(self, name: str) -> str:
        """A module or a parameter of the model, by the name of its part, and its kind."""
        first, *others = name.split(".")
        kind = operator.attrgetter(name)(self.model)
        return ".".join([getattr(self.model, first).own_part, *others]) + f" ({type(kind).__name__})"

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises UserError of a module or a parameter."""
        raise UserError(f"--networks: {self.path}, {self.place(name)}: {why}")


def tensors(values) -> list[Tensor]:
    """Those among the inputs or outputs of a module."""
    return [t for t in (values if isinstance(values, tuple | list) else [values]) if isinstance(t, Tensor)]


def shape_of(out) -> tuple | str:
    """The shape of a module's output, or those of a tuple's tensors; of anything else its type."""
    if isinstance(out, tuple | list):
        return tuple(shape_of(t) for t in out)
    return tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__


def first_difference(one: dict, other: dict, images: slice) -> str | None:
    """Where two runs come apart, of which parts give other outputs for some images: the module's name.

    It gives other outputs for the same inputs. None if they do not come apart.
    """
    pairs = {key: (call, other[key]) for key, call in one.items() if key in other}

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.allclose(s[images].float(), t[images].float(), **CLOSE) for s, t in zip(a, b, strict=True))

    if all(same(a.outputs, b.outputs) for a, b in pairs.values() if a.is_part):
        return None
    apart = (name for (name, _), (a, b) in pairs.items() if not same(a.outputs, b.outputs) and same(a.inputs, b.inputs))
    return next(apart, None)


@torch.no_grad()
def check_apart(watch: Watch, x: Tensor, noise: Noise) -> None:
    """Refuses what lets an image depend on the others of its batch, on chance, or on training or evaluation."""
    others = [torch.cat([t[:1], t[1:].flip(0) + 0.5]) for t in (x, noise.z, noise.y)]
    alone = watch.run(lambda: watch.model(x, noise))
    watch.model.eval()
    among = watch.run(lambda: watch.model(others[0], noise._replace(z=others[1], y=others[2])))
    watch.model.train()
    if (name := first_difference(alone, among, slice(1))) is not None:
        watch.refuse(name, "gives other outputs with other images in the batch, by chance, or in evaluation")


def check_kept(watch: Watch) -> None:
    """Refuses what a state_dict holds beside parameters, and parameters under two names."""
    unkept = set(watch.model.state_dict()) - {name for name, _ in watch.model.named_parameters()}
    if unkept:
        why = "is a buffer, which persistent=False would keep out of the weights, or shared by two layers or parts"
        watch.refuse(min(unkept), why)


def check_gradients(watch: Watch, stack: Stack, x: Tensor, noise: Noise) -> None:
    """Refuses what cannot be stacked, and parameters without a gradient."""

    def forward():
        stack.terms(x, noise).loss().sum().backward()

    try:
        watch.run(forward)
    except UserError as e:
        if stack.m == 1:
            raise
        raise UserError(f"{e}; --cells_at_once 1 would train one model at a time") from e
    for name in (name for name, p in stack.parameters.items() if p.grad is None):
        watch.refuse(name.removeprefix("model."), "has no part in the loss; leave it out")


def with_gates(watch: Watch, config) -> Conditioned:
    """The model with gates far from doing nothing. Refuses layers whose weights have none."""
    for name, module in watch.model.named_modules():
        if isinstance(module, LAYERS) and module.bias is None:
            watch.refuse(name, "--multi_rate needs its bias")
        others = not isinstance(module, LAYERS) and not name.startswith("likelihood")
        if others and any(True for _ in module.parameters(recurse=False)):
            gated = "Conv2d, ConvTranspose2d and Linear; without weights (affine=False) it may stay"
            watch.refuse(name, f"--multi_rate scales and shifts the weights of {gated}")
    with own.told(watch.path):
        conditioned = Conditioned(watch.model, RANGE, config.image_shape, config.sharing)
    for p in (conditioned.gates.weight, *conditioned.further):
        nn.init.normal_(p, 0, 0.1)
    return conditioned


@torch.no_grad()
def check_folding(watch: Watch, conditioned: Conditioned, x: Tensor, noise: Noise) -> None:
    """Refuses layers into which scale and shift do not fold, as their weights are used otherwise than by a call."""
    log_betas = torch.tensor([0.5, -0.5])
    weights = conditioned.weights_at(log_betas)
    gated = watch.run(lambda: conditioned(x, noise._replace(log_betas=log_betas.expand(N, 2))))
    folded = watch.run(lambda: functional_call(watch.model, weights, (x, noise)))
    if (name := first_difference(gated, folded, slice(N))) is not None:
        watch.refuse(name, "--multi_rate cannot fold its scale and shift into the weights")
