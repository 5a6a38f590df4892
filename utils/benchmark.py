"""How fast it is, measured here and now: `python -m utils.benchmark train|grid|mi|probes|inception`.

Every figure is a median over repetitions, with the spread between the quartiles and n. Compare figures of one run only;
ratios are taken between measurements that alternate.
"""

import argparse
import itertools
import math
import platform
import resource
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from datasets import DATASETS, Resident
from models import build_model
from utils.cli import Parser, whole
from utils.config import Config
from utils.engine import Engine, clock, use_precision
from utils.errors import run_script
from utils.information import gaussian_mi
from utils.metrics import inception_score
from utils.probes import PROBES, fit_probe, split
from utils.seeds import generator


def machine(device: torch.device) -> str:
    """One line on what this runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(
    candidates: dict[str, Callable[[], object]], n: int, device: torch.device, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of n calls of each candidate, taken in turns after a warm-up."""
    seconds = {name: [] for name in candidates}
    for i in tqdm(range(-warmup, n), unit="round", leave=False):
        for name, call in candidates.items():
            start = clock(device)
            call()
            took = clock(device) - start
            if i >= 0:
                seconds[name].append(took)
    return seconds


def report(seconds: dict[str, list[float]], units: dict[str, int], baseline: str) -> None:
    """A table: median, quartiles and n of each, per unit of work, and the ratio to the baseline."""
    print(f"{'':34s} {'median':>10} {'quartiles':>19} {'n':>5} {'speed':>8}")
    base = statistics.median(seconds[baseline]) / units[baseline]
    for name, values in seconds.items():
        low, middle, high = (1e3 * q / units[name] for q in statistics.quantiles(values, n=4))
        ratio = f"{1e3 * base / middle:.2f} x"
        print(f"{name:34s} {middle:7.3f} ms {low:8.3f} .. {high:7.3f} {len(values):5d} {ratio:>8}")


def plain_step(config: Config, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
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


def train(args: argparse.Namespace) -> None:
    """Step and epoch of one cell, of M stacked cells, and of the same mathematics written plainly."""
    config = Config(
        dataset=args.dataset, conv_channels=args.conv_channels, z_dims=args.z_dims, batch_size=args.batch_size
    )
    g = generator(args.device, 0)
    pool = torch.randint(0, 256, (4 * args.batch_size, *config.image_shape), generator=g, device=args.device)
    pool = pool.to(torch.uint8)
    plain = plain_step(config, args.device)

    def batch():
        i = torch.randint(len(pool), (args.batch_size,), generator=g, device=args.device)
        return pool[i].float() / 255

    def stacked(m, compile):
        engine, ones = Engine(config, m, args.device, compile), torch.ones(m, device=args.device)

        def step():
            x = batch()
            engine.step(x, engine.stack.model.noise(len(x), g), ones, ones)

        return step

    candidates = {"plain": lambda: plain(batch())}
    units = {"plain": 1}
    for m, compile in itertools.product(args.cells, ("off", "on") if args.compile else ("off",)):
        name = f"{m} cell{'s stacked' * (m > 1)}{', compiled' * (compile == 'on')}"
        candidates[name], units[name] = stacked(m, compile), m
    print(f"{config.vae_type}, {args.dataset}-shaped random images, batch {args.batch_size}, per model and step:")
    seconds = measure(candidates, args.n, args.device)
    report(seconds, units, baseline="plain")
    images = args.images or 50_000
    steps = math.ceil(images / args.batch_size)
    print(f"per model and epoch of {images:,} images ({steps} steps):")
    for name, values in seconds.items():
        print(f"{name:34s} {statistics.median(values) / units[name] * steps:8.2f} s")


def grid(args: argparse.Namespace) -> None:
    """The paper's grid, 441 models x 500 epochs of 50,000 images: predicted from whole steps of a chunk.

    Against our own single cell, and against a loop that works the way the paper's code does: images decoded by
    PIL one by one, copied to the device, and a loss read back at every step.
    """
    config = Config(
        dataset=args.dataset, conv_channels=args.conv_channels, z_dims=args.z_dims, batch_size=args.batch_size,
        precision=args.precision,
    )  # fmt: skip
    use_precision(config.precision)
    n, device = args.images or 50_000, args.device
    g = generator("cpu", 0)
    images = torch.randint(0, 256, (n, *config.image_shape), generator=g, dtype=torch.uint8)
    split = Resident(images, torch.zeros(n, dtype=torch.long), device)
    steps, models, epochs = math.ceil(n / args.batch_size), 441, 500
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def forever(iterable_of):
        while True:
            yield from iterable_of()

    def ours(m):
        engine, noise_g, ones = Engine(config, m, device), generator(device, 0), torch.ones(m, device=device)
        batches = forever(lambda: split.batches(args.batch_size, (0, 0)))

        def step():
            x = next(batches)[0]
            engine.step(x, engine.stack.model.noise(len(x), noise_g), ones, ones)

        return step

    def theirs():
        loader = DataLoader(Pictures(images[: 20 * args.batch_size]), args.batch_size, shuffle=True)
        batches, plain = forever(lambda: loader), plain_step(config, device)

        def step():
            plain(next(batches).to(device)).item()

        return step

    candidates, units = {"like the paper's code": theirs()}, {"like the paper's code": 1}
    for m in dict.fromkeys([1, *args.cells]):
        name = f"{m} cell{'s stacked' * (m > 1)}"
        candidates[name], units[name] = ours(m), m
    print(f"{config.vae_type}, {args.dataset}-shaped random images, batch {args.batch_size}, {config.precision}:")
    seconds = measure(candidates, args.n, device)
    report(seconds, units, baseline="like the paper's code")
    copy, traffic = copy_bandwidth(device), activations(config, device) * 4  # each written and read, forth and back
    print(f"copying within the device's memory: {copy:.1f} GB/s; {traffic / 1e6:.0f} MB a model and step, at least")
    for name, values in seconds.items():
        each = statistics.median(values) / units[name]
        hours = each * steps * models * epochs / 3600
        print(
            f"{name:34s} {3600 / (each * steps):10.1f} models x epochs an hour, the grid in {hours:9.1f} hours, "
            f"{traffic / each / 1e9:7.1f} GB/s"
        )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


class Pictures(torch.utils.data.Dataset):
    """PIL images, made tensors one by one."""

    def __init__(self, images: torch.Tensor):
        self.pictures = [v2.functional.to_pil_image(image) for image in images]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> torch.Tensor:
        return v2.functional.to_dtype(v2.functional.pil_to_tensor(self.pictures[i]), scale=True)


def activations(config: Config, device: torch.device) -> int:
    """Bytes of all layers' outputs in a forward pass of one model over one batch."""
    model, sizes = build_model(config).to(device), []
    width = 2 if config.precision == "bf16" else 4
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(
                lambda _, __, out: sizes.append(out.numel() * width if hasattr(out, "numel") else 0)
            )
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    with torch.no_grad():
        model(x, model.noise(len(x), torch.Generator(device)))
    return sum(sizes)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy within the device's memory, reading and writing counted."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9


def mi(args: argparse.Namespace) -> None:
    """The mutual information of z against a loop of its definition, which is timed on a few of the images."""
    n, d, few = args.images or 10_000, args.z_dims, 100
    g = generator(args.device, 0)
    means = torch.rand(n, d, generator=g, device=args.device) * 6 - 3
    stds = torch.full_like(means, 0.1)
    labels = torch.randint(0, 10, (n,), generator=g, device=args.device)
    samples = means + stds * torch.randn(means.shape, generator=g, device=args.device)

    def plain():
        values = []
        for i in range(few):
            log_p = Normal(means, stds).log_prob(samples[i]).double().sum(1)
            own = log_p[labels == labels[i]]
            values.append((own.logsumexp(0) - math.log(len(own))) - (log_p.logsumexp(0) - math.log(n)))
        return torch.stack(values).mean()

    name = f"plain loop (of {few} images, x {n / few:g})"
    candidates = {name: plain, "gaussian_mi": lambda: gaussian_mi(samples, means[:, None], stds[:, None], labels)}
    print(f"mutual information of {n:,} images, z of {d} dimensions, standard error and shuffled null included:")
    report(measure(candidates, args.n, args.device, warmup=1), {name: few / n, "gaussian_mi": 1}, baseline=name)
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def probes(args: argparse.Namespace) -> None:
    """The logistic probe against the paper code's: saga, 100 iterations, five seeds."""
    n, d = args.images or 2_000, args.z_dims
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, n)
    latents = (rng.normal(size=(10, d))[labels] + rng.normal(size=(n, d))).astype(np.float32)
    train_part, test_part = split(n)

    def plain():
        for seed in range(5):
            model = LogisticRegression(solver="saga", max_iter=100, random_state=seed)
            model.fit(latents[train_part], labels[train_part]).score(latents[test_part], labels[test_part])

    candidates = {"saga, 5 seeds": plain} | {
        name: lambda name=name: fit_probe(name, latents, labels, "", False) for name in PROBES
    }
    print(f"probes on {n:,} latents of {d} dimensions:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = measure(candidates, args.n, args.device, warmup=1)
    report(seconds, dict.fromkeys(candidates, 1), baseline="saga, 5 seeds")


def inception(args: argparse.Namespace) -> None:
    """The inception score against a loop over images with scipy's entropy."""
    n = args.images or 10_000
    log_p = torch.log_softmax(3 * torch.randn(n, 10, generator=generator(args.device, 0), device=args.device), 1)
    p = log_p.exp().cpu().numpy()

    def plain():
        scores = []
        for part in np.array_split(p, 5):
            marginal = part.mean(0)
            scores.append(math.exp(np.mean([scipy.stats.entropy(row, marginal) for row in part])))
        return scores

    print(f"inception score of {n:,} samples:")
    candidates = {"plain loop": plain, "inception_score": lambda: inception_score(log_p)}
    report(measure(candidates, args.n, args.device, warmup=1), dict.fromkeys(candidates, 1), baseline="plain loop")


def at_least_two(text: str) -> int:
    """A number of repetitions that has quartiles."""
    if whole(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text}")
    return int(text)


BENCHMARKS = {"train": train, "grid": grid, "mi": mi, "probes": probes, "inception": inception}


def main(argv=None) -> int:
    parser = Parser(__doc__, files=False)
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--dataset", default="CIFAR10", choices=DATASETS, help="shape of the images (default: CIFAR10)")
    parser.add_argument("--conv_channels", type=whole, default=32, help="(default: 32)")
    parser.add_argument("--z_dims", type=whole, default=32, help="(default: 32)")
    parser.add_argument("--batch_size", type=whole, default=256, help="(default: 256)")
    parser.add_argument("--images", type=whole, help="images (default: train 50000, probes 2000, others 10000)")
    parser.add_argument(
        "--cells", type=whole, nargs="+", default=[1, 4], help="numbers of stacked cells (default: 1 4)"
    )
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="(default: fp32)")
    parser.add_argument("--compile", action="store_true", help="the compiled step as well")
    parser.add_argument("--n", type=at_least_two, default=20, help="repetitions (default: 20)")
    args = parser.parse(argv)
    print(machine(args.device))
    BENCHMARKS[args.what](args)
    return 0


if __name__ == "__main__":
    run_script(main)
