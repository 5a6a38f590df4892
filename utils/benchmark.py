"""How fast it is, measured here and now: `python -m utils.benchmark train`.

Every figure is a median over repetitions, with the spread between the quartiles and n. Compare figures of one run only;
ratios are taken between measurements that alternate.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

from datasets import DATASETS
from models import build_model
from models.stack import Stack
from utils.config import Config, Parser, whole
from utils.errors import run_script
from utils.seeds import generator


def machine(device: torch.device) -> str:
    """One line on what this runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def measure(
    candidates: dict[str, Callable[[], object]], n: int, device: torch.device, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of n calls of each candidate, taken in turns after a warm-up."""
    seconds = {name: [] for name in candidates}
    for i in tqdm(range(-warmup, n), unit="round", leave=False):
        for name, call in candidates.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(seconds: dict[str, list[float]], units: dict[str, int], baseline: str) -> None:
    """A table: median, quartiles and n of each, per unit of work, and the ratio to the baseline."""
    print(f"{'':34s} {'median':>10} {'quartiles':>19} {'n':>5} {'speed':>8}")
    base = statistics.median(seconds[baseline]) / units[baseline]
    for name, values in seconds.items():
        low, middle, high = (1e3 * q / units[name] for q in statistics.quantiles(values, n=4))
        ratio = f"{1e3 * base / middle:.2f} x"
        print(f"{name:34s} {middle:7.3f} ms {low:8.3f} .. {high:7.3f} {len(values):5d} {ratio:>8}")


def plain_step(config: Config, device: torch.device) -> Callable[[torch.Tensor], None]:
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
        (-ll + config.beta_y * kl_y + config.beta_z * kl_z).mean().backward()
        optimizer.step()

    return step


def train(args: argparse.Namespace) -> None:
    """Step and epoch of one cell, of M stacked cells, and of the same mathematics written plainly."""
    config = Config(
        dataset=args.dataset, conv_channels=args.conv_channels, z_dims=args.z_dims, batch_size=args.batch_size
    )
    g = generator(args.device, 0)
    images = torch.randint(0, 256, (4 * args.batch_size, *config.image_shape), generator=g, device=args.device)
    images = images.to(torch.uint8)
    plain = plain_step(config, args.device)

    def batch():
        i = torch.randint(len(images), (args.batch_size,), generator=g, device=args.device)
        return images[i].float() / 255

    def stacked(m):
        stack = Stack(build_model(config).to(args.device), m)
        optimizer = torch.optim.Adam(stack.parameters.values(), lr=config.learning_rate, fused=True)
        ones = torch.ones(m, device=args.device)

        def step():
            x = batch()
            stack.step(optimizer, x, stack.model.noise(len(x), g), ones, ones)

        return step

    candidates = {"plain": lambda: plain(batch())}
    units = {"plain": 1}
    for m in args.cells:
        name = f"{m} cell{'s stacked' * (m > 1)}"
        candidates[name], units[name] = stacked(m), m
    print(f"{config.vae_type}, {args.dataset}-shaped random images, batch {args.batch_size}, per model and step:")
    seconds = measure(candidates, args.n, args.device)
    report(seconds, units, baseline="plain")
    steps = math.ceil(args.images / args.batch_size)
    print(f"per model and epoch of {args.images:,} images ({steps} steps):")
    for name, values in seconds.items():
        print(f"{name:34s} {statistics.median(values) / units[name] * steps:8.2f} s")


def at_least_two(text: str) -> int:
    """A number of repetitions that has quartiles."""
    if whole(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return int(text)


BENCHMARKS = {"train": train}


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--dataset", default="CIFAR10", choices=DATASETS, help="shape of the images (default: CIFAR10)")
    parser.add_argument("--conv_channels", type=whole, default=32, help="(default: 32)")
    parser.add_argument("--z_dims", type=whole, default=32, help="(default: 32)")
    parser.add_argument("--batch_size", type=whole, default=256, help="(default: 256)")
    parser.add_argument("--images", type=whole, default=50_000, help="images an epoch (default: 50000)")
    parser.add_argument(
        "--cells", type=whole, nargs="+", default=[1, 4], help="numbers of stacked cells (default: 1 4)"
    )
    parser.add_argument("--n", type=at_least_two, default=20, help="repetitions (default: 20)")
    args = parser.parse(argv)
    print(machine(args.device))
    BENCHMARKS[args.what](args)
    return 0


if __name__ == "__main__":
    run_script(main)
