"""The training's speed: the paper's grid, a step, its convolutions, streams, the loader; what a precision changes."""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, vmap
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datasets.batches import Resident, Streamed
from datasets.loading import Data
from models.build import build_model
from models.stack import TERMS
from utils.benchmark.measuring import copy_bandwidth, head, measure, peak_memory, report, row
from utils.config import Config
from utils.engine import Engine, clock, doublings, fastest
from utils.errors import UserError, is_out_of_memory, one_line
from utils.runs import Run
from utils.seeds import generator
from utils.training import Chunk, train

MODELS, EPOCHS = 441, 500  # the paper's grid


def config_of(args: argparse.Namespace, **settings) -> Config:
    names = "dataset", "conv_channels", "z_dims", "batch_size", "precision"
    return Config(**{name: getattr(args, name) for name in names} | settings)


def random_split(config: Config, n: int, device: torch.device) -> Resident:
    images = torch.randint(0, 256, (n, *config.image_shape), generator=generator("cpu", 0), dtype=torch.uint8)
    return Resident(images, torch.zeros(n, dtype=torch.long), device)


def forever(iterable_of: Callable) -> Iterator:
    while True:
        yield from iterable_of()


def stepper(engine: Engine, split: Resident) -> Callable[[], Tensor]:
    """Our training step, from the images' bytes on."""
    config, device = engine.config, engine.device
    noise_g, ones = generator(device, 0), torch.ones(engine.stack.m, device=device)
    batches = forever(lambda: split.batches(config.batch_size, (0, 0)))

    def step():
        x = next(batches)[0]
        return engine.step(x, engine.stack.model.noise(len(x), noise_g), ones, ones)

    return step


def plain_step(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A training step of the same mathematics written plainly: torch.distributions, its KLs, and Adam."""
    model = build_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)

    def step(x):
        q_z = Normal(*model.q_z(x))
        z = q_z.rsample()
        p_y = Normal(*model.p_y(z))
        q_y = Normal(*model.q_y_given(z, x, None))
        ll = model.p_x(q_y.rsample()).log_prob(x)
        kl_y = kl_divergence(q_y, p_y).flatten(1).sum(1)
        kl_z = kl_divergence(q_z, Normal(torch.zeros_like(z), torch.ones_like(z))).flatten(1).sum(1)
        optimizer.zero_grad()
        loss = (-ll + config.beta_y * kl_y + config.beta_z * kl_z).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


class Pictures(torch.utils.data.Dataset):
    """PIL images, made tensors one by one."""

    def __init__(self, images: Tensor):
        self.pictures = [v2.functional.to_pil_image(image) for image in images]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return v2.functional.to_dtype(v2.functional.pil_to_tensor(self.pictures[i]), scale=True)


def like_the_papers(config: Config, split: Resident, device: torch.device) -> Callable[[], float]:
    """A step that works the way the paper's code does: images decoded one by one, the loss read back every time."""
    loader = DataLoader(Pictures(split.images[: 20 * config.batch_size].cpu()), config.batch_size, shuffle=True)
    batches, plain = forever(lambda: loader), plain_step(config, device)
    return lambda: plain(next(batches).to(device)).item()


def grid(args: argparse.Namespace) -> None:
    """The paper's grid, 441 models x 500 epochs: steps of one cell and of stacked ones, beside plain loops.

    Then whole epochs of a chunk through the real training loop, with its evaluation, logs and saves.
    """
    config, device, on_gpu = config_of(args), args.device, args.device.type == "cuda"
    n, theirs = args.images or 50_000, "like the paper's code"
    split, steps, route = random_split(config, n, device), math.ceil(n / args.batch_size), args.convolutions[0]
    print(f"{config.vae_type}, {n:,} {args.dataset}-shaped random images, batch {args.batch_size}, {config.precision}")
    sizes = args.cells or [1, 4]
    if on_gpu:
        size, route = fastest(config, args.cells or doublings(MODELS), device, args.convolutions)
        sizes = [1, size]
        print(f"fastest: {size} cells at once, convolutions: {route}")
    peak_memory(device)
    batches, plain = forever(lambda: split.batches(args.batch_size, (0, 0))), plain_step(config, device)
    candidates = {theirs: like_the_papers(config, split, device)}
    candidates["plain, data on the device"] = lambda: plain(next(batches)[0])
    units = dict.fromkeys(candidates, 1)
    for m in dict.fromkeys([1, *sizes]):
        name = f"{m} cells stacked" if m > 1 else "1 cell"
        units[name], candidates[name] = m, stepper(Engine(config, m, device, on_gpu, on_gpu, route), split)
    seconds = measure(candidates, args.n, device)
    report(seconds, units, theirs)
    copy, traffic = copy_bandwidth(device), activations(config, device) * 4  # each written and read, forth and back
    print(f"copying within the device's memory: {copy:.1f} GB/s; {traffic / 1e6:.0f} MB a model and step, at least")
    each = {name: statistics.median(values) / units[name] for name, values in seconds.items()}
    for name, took in each.items():
        hours = took * steps * MODELS * EPOCHS / 3600
        print(
            f"{name:40s} {3600 / (took * steps):10.1f} models x epochs an hour, the grid in {hours:9.1f} hours, "
            f"{traffic / took / 1e9:7.1f} GB/s"
        )
    best = min((name for name in units if "cell" in name), key=each.get)
    if on_gpu:
        print(f"peak memory, all of these together: {peak_memory(device).strip()}")
    candidates.clear()
    plain = batches = None
    data = Data(split, random_split(config, max(1, n // 5), device), 10)
    first, epochs = whole_epochs(config, units[best], route, args.epochs or (20 if on_gpu else 1), data, device)
    took = statistics.median(epochs)
    hours = (math.ceil(MODELS / units[best]) * EPOCHS * took + first) / 3600
    paper = each[theirs] * steps * MODELS * EPOCHS / 3600
    print(
        f"{best}, whole epochs with evaluation, logs and saves: {took:.2f} s (n = {len(epochs)}, {min(epochs):.2f} .. "
        f"{max(epochs):.2f}), the first {first:.1f} s{peak_memory(device)}"
    )
    print(
        f"so the grid takes {hours:.2f} hours; {paper:.2f} by the steps alone of a loop {theirs}: {paper / hours:.1f} x"
    )


def whole_epochs(
    config: Config, m: int, route: str, n: int, data: Data, device: torch.device
) -> tuple[float, list[float]]:
    """Seconds of a chunk's first epoch, in which it is compiled, and of each of the n after it."""
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        configs = [dataclasses.replace(config, num_epochs=n + 1, beta_y=1.0 + i / m) for i in range(m)]
        runs = [Run.of(c, folder) for c in configs]
        for run in runs:
            run.create()
        started = time.time()
        engine = Engine(configs[0], m, device, on_gpu, on_gpu, route)
        train(Chunk(runs, [None] * m, engine), data, SimpleNamespace(received=None))
        events = EventAccumulator(str(runs[0].path), size_guidance={"scalars": 0}).Reload()
        times = [e.wall_time for e in events.Scalars("train/loss")]
    return times[0] - started, [b - a for a, b in itertools.pairwise(times)]


def activations(config: Config, device: torch.device) -> int:
    """Bytes of all layers' outputs in a forward pass of one model over one batch."""
    model, sizes = build_model(config).to(device), []
    width = 2 if config.precision == "bf16" else 4
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(
                lambda _, __, out: sizes.append(out.numel() * width if hasattr(out, "numel") else 0)
            )
    run_once(model, config, device)
    return sum(sizes)


@torch.no_grad()
def run_once(model: nn.Module, config: Config, device: torch.device) -> None:
    """A forward pass over one batch, for its hooks."""
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    model(x, model.noise(len(x), torch.Generator(device)))


def step(args: argparse.Namespace) -> None:
    """One training step, per model: numbers of cells, ways of convolving; as written, captured, compiled."""
    config, device, on_gpu = config_of(args), args.device, args.device.type == "cuda"
    split = random_split(config, 4 * args.batch_size, device)
    plain, batches = plain_step(config, device), forever(lambda: split.batches(args.batch_size, (0, 0)))
    ways = {"": {}} | ({"captured": {"capture": True}} if on_gpu else {})
    ways |= {"compiled": {"compile": True, "capture": on_gpu}} if args.compile else {}
    print(f"{config.vae_type}, {args.dataset}-shaped images, batch {args.batch_size}, {config.precision}, per model;")
    print("speed beside that of a loop written plainly, one model, timed in turns:")
    head()
    for m, route, way in itertools.product(args.cells or [1, 4], args.convolutions, ways):
        name = " ".join(filter(None, [f"{m} cell{'s' * (m > 1)},", route, way]))
        with or_say_why(name):
            peak_memory(device)
            ours = stepper(Engine(config, m, device, route=route, **ways[way]), split)
            start = clock(device)
            ours()
            first = clock(device) - start
            seconds = measure({"plain": lambda: plain(next(batches)[0]), name: ours}, args.n, device)
            base = statistics.median(seconds["plain"])
            row(name, seconds[name], m, base, f"{peak_memory(device)}  first step {first:.1f} s")
            ours = None


@contextlib.contextmanager
def or_say_why(name: str) -> Iterator[None]:
    """Goes on with the next one where something cannot run here."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        print(f"{name:40s} {'out of memory' if is_out_of_memory(e) else one_line(e)}", flush=True)


def layers(args: argparse.Namespace) -> None:
    """Each convolution of stacked models, its gradient by the input and by the weights, by every way of convolving."""
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
        for route in [*args.convolutions, "im2col"]:
            for what, call in layer_calls(layer, route, m, (config.batch_size, c, h, w), (h_out, w_out), low, device):
                with or_say_why(f"  {route}, {what}"):
                    seconds = measure({what: call}, args.n, device)[what]
                    speed = f"  {moved / statistics.median(seconds) / 1e9:7.1f} GB/s"
                    base = plain.setdefault(what, statistics.median(seconds) / m)
                    row(f"  {route}, {what}", seconds, m, base, speed)


def layer_calls(
    layer: nn.Module, route: str, m: int, shape: tuple, size: tuple, low: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable]]:
    """A layer of m models: forward, and back to the input and to the weights."""
    layer = copy.deepcopy(layer)
    if route == "kernels":
        from models.kernels import use_kernels

        use_kernels(nn.Sequential(layer))
    parameters = {k: torch.stack([p.detach()] * m).requires_grad_() for k, p in layer.named_parameters()}
    x = torch.randn(m, *shape, device=device).to(low)
    if route != "plain":
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    x.requires_grad_()
    one = (
        (lambda p, x: by_im2col(layer, size, p, x))
        if route == "im2col"
        else lambda p, x: functional_call(layer, p, (x,))
    )

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=low == torch.bfloat16):
            return vmap(one)(parameters, x)

    yield "forward", forward
    with contextlib.suppress(RuntimeError):  # what does not run has been told of
        out = forward()
        grad = torch.randn_like(out)
        yield "gradient by input", lambda: torch.autograd.grad(out, x, grad, retain_graph=True)
        yield "gradient by weights", lambda: torch.autograd.grad(out, [*parameters.values()], grad, retain_graph=True)


def by_im2col(layer: nn.Module, size: tuple[int, int], p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A convolution, with an output of that size, as a product of matrices with the patches written out."""
    w, b, how = p["weight"].flatten(1), p["bias"][:, None, None], {"padding": layer.padding, "stride": layer.stride}
    if layer.transposed:
        return F.fold(w.T @ x.flatten(2), size, layer.kernel_size, **how) + b
    return (w @ F.unfold(x, layer.kernel_size, **how)).unflatten(-1, size) + b


def streams(args: argparse.Namespace) -> None:
    """Captured single models side by side on 1, 4, 8 streams: what a GPU gives without stacking."""
    config, device = config_of(args), args.device
    if device.type != "cuda":
        raise UserError("--device: streams are of a GPU, which is not there")
    split = random_split(config, 4 * args.batch_size, device)
    print(f"{config.vae_type}, batch {args.batch_size}, {config.precision}, per model:")
    head()
    alone = None
    for k in args.cells or [1, 4, 8]:
        ours = [stepper(Engine(config, 1, device, args.compile, True), split) for _ in range(k)]
        places = [torch.cuda.Stream(device) for _ in range(k)]

        def side_by_side(ours=ours, places=places):
            for model_step, place in zip(ours, places, strict=True):
                place.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(place):
                    model_step()
            for place in places:
                torch.cuda.current_stream(device).wait_stream(place)

        seconds = measure({"": side_by_side}, args.n, device)[""]
        alone = alone or statistics.median(seconds) / k
        row(f"{k} streams", seconds, k, alone, peak_memory(device))


def loader(args: argparse.Namespace) -> None:
    """Images a second that the loader decodes and crops, beside those that ImageNet's model trains on."""
    device, n = args.device, args.images or 2_000
    config = config_of(args, dataset="ImageNet")
    if n < 2 * config.batch_size:
        raise UserError(f"--images: must be two batches at least, {2 * config.batch_size}, got {n}")
    with tempfile.TemporaryDirectory() as folder:
        rng, paths = np.random.default_rng(0), []
        for i in range(min(n, 200)):  # files of ImageNet's usual size, about 500 x 375 and 100 kB
            paths.append(Path(folder, f"{i}.jpg"))
            rough = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            rough.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
        size = sum(p.stat().st_size for p in paths) / len(paths) / 1e3
        samples = [(str(paths[i % len(paths)]), 0) for i in range(n)]
        split = Streamed(samples, config.image_shape, device)
        start, counts = clock(device), []
        for i, (x, _) in enumerate(split.batches(config.batch_size, (0, 0))):
            counts.append(len(x))
            if i == 0:  # the workers have started
                start, counts = clock(device), []
        decoded = sum(counts) / (clock(device) - start)
    files = f"{n:,} JPEG files of 500 x 375 and {size:.0f} kB"
    print(f"loader: {split.workers} workers, {files}: {decoded:.0f} images/s")
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    candidates = {}
    ones, on_gpu = torch.ones(1, device=device), device.type == "cuda"
    for route in args.convolutions:
        engine = Engine(config, 1, device, args.compile, on_gpu, route)
        noise = engine.stack.model.noise(len(x), generator(device, 0))
        candidates[f"step, {route}"] = lambda engine=engine, noise=noise: engine.step(x, noise, ones, ones)
    seconds = measure(candidates, args.n, device, warmup=1)
    report(seconds, dict.fromkeys(seconds, 1), next(iter(seconds)))
    for name, values in seconds.items():
        trained = config.batch_size / statistics.median(values)
        print(f"{name:40s} {trained:.0f} images/s: the loader feeds {decoded / trained:.1f} x as many")


def precision(args: argparse.Namespace) -> None:
    """What a precision changes in the test figures of finished runs, beside what the seed changes in them."""
    folder = Path(args.runs or "")
    runs = [Run.open(p.parent) for p in sorted(folder.glob("*/config.json"))] if args.runs else []
    runs = [run for run in runs if run.status == "finished" and run.result]
    figures, names = {}, (*TERMS, "psnr")
    for run in runs:
        c = run.config
        test = [run.result["test"][name] for name in names]
        figures.setdefault((c.beta_y, c.beta_z), {}).setdefault(c.precision, {})[c.seed] = np.array(test, float)
    free = {"beta_y": 1.0, "beta_z": 1.0, "seed": 0, "precision": "fp32", "run_name": ""}
    if len({dataclasses.replace(run.config, **free) for run in runs}) > 1:
        raise UserError(f"{folder}: holds runs that differ in more than betas, seed and precision")
    figures = {betas: by for betas, by in figures.items() if len(by.get("fp32", ())) > 1}
    if not figures:
        raise UserError("precision: needs a folder of finished runs, fp32 ones of several seeds among them: runs/BATCH")
    print(f"{'beta_y':>8} {'beta_z':>8} {'':12} {'n':>3}" + "".join(f" {name:>20}" for name in names))

    def line(betas, name, values, spread):
        cells = "".join(f" {m:10.3f} +- {s:6.3f}" for m, s in zip(np.mean(values, 0), spread, strict=True))
        print(f"{betas[0]:8.4g} {betas[1]:8.4g} {name:12} {len(values):3}{cells}")

    for betas, by in sorted(figures.items()):
        for name in sorted(by, key=lambda name: (name != "fp32", name)):
            values = [*by[name].values()]
            line(betas, name, values, np.std(values, 0, ddof=1) if len(values) > 1 else np.full(len(names), np.nan))
            differences = [by[name][seed] - by["fp32"][seed] for seed in by[name] if seed in by["fp32"]]
            if name != "fp32" and len(differences) > 1:
                line(betas, " - fp32", differences, np.std(differences, 0, ddof=1) / len(differences) ** 0.5)
    print("(means and standard deviations over seeds, of differences seed by seed the standard error;")
    print(" test images, nats per image, psnr in dB)")
