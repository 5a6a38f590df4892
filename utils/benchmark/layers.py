"""Each convolution and its gradients with every convolution backend."""

import argparse
import contextlib
import copy
import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models.build import build_model
from utils.benchmark.loops import (
    config_of,
    or_say_why,
    run_once,
)
from utils.benchmark.measuring import head, measure, row


def layers(args: argparse.Namespace) -> None:
    """Times each convolution of stacked models and its two gradients with every convolution backend, and by im2col."""
    config, device, inputs = config_of(args), args.device, {}
    model = build_model(config).to(device)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, x, out, name=name: inputs.update({name: (x[0].shape, out.shape)}))
    run_once(model, config, device)
    low = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for m, name in itertools.product(args.cells or [8, 49], inputs):
        (_, c, h, w), (_, n, h_out, w_out) = inputs[name]
        layer = model.get_submodule(name)
        layer._forward_hooks.clear()
        moved = config.batch_size * m * (c * h * w + n * h_out * w_out) * low.itemsize
        plain = {}
        head(f"{m} x {name}: {c} x {h} x {w} -> {n} x {h_out} x {w_out}")
        for backend in [*args.convolutions, "im2col"]:
            for what, call in layer_calls(layer, backend, m, (config.batch_size, c, h, w), (h_out, w_out), low, device):
                with or_say_why(f"  {backend}, {what}"):
                    seconds = measure({what: call}, args.n, device)[what]
                    speed = f"  {moved / statistics.median(seconds) / 1e9:7.1f} GB/s"
                    base = plain.setdefault(what, statistics.median(seconds) / m)
                    row(f"  {backend}, {what}", seconds, m, base, speed)


def layer_calls(
    layer: nn.Module, backend: str, m: int, shape: tuple, size: tuple, low: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable]]:
    """The forward pass of a layer of m models, and its gradients with respect to the input and the weights."""
    layer = copy.deepcopy(layer)
    if backend == "kernels":
        from models.kernels import use_kernels

        use_kernels(nn.Sequential(layer))
    parameters = {k: torch.stack([p.detach()] * m).requires_grad_() for k, p in layer.named_parameters()}
    x = torch.randn(m, *shape, device=device).to(low)
    if backend != "plain":
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    x.requires_grad_()
    one = (
        (lambda p, x: by_im2col(layer, size, p, x))
        if backend == "im2col"
        else lambda p, x: functional_call(layer, p, (x,))
    )

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=low == torch.bfloat16):
            return vmap(one)(parameters, x)

    yield "forward", forward
    with contextlib.suppress(RuntimeError):  # the caller has printed the error
        out = forward()
        grad = torch.randn_like(out)
        yield "gradient w.r.t. input", lambda: torch.autograd.grad(out, x, grad, retain_graph=True)
        yield (
            "gradient w.r.t. weights",
            lambda: torch.autograd.grad(out, [*parameters.values()], grad, retain_graph=True),
        )


def by_im2col(layer: nn.Module, size: tuple[int, int], p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A convolution with an output of the given size, as a matrix product with the unfolded patches."""
    w, b, how = p["weight"].flatten(1), p["bias"][:, None, None], {"padding": layer.padding, "stride": layer.stride}
    if layer.transposed:
        return F.fold(w.T @ x.flatten(2), size, layer.kernel_size, **how) + b
    return (w @ F.unfold(x, layer.kernel_size, **how)).unflatten(-1, size) + b
