"""Timing of candidates alternately: medians over repetitions, with quartiles and n."""

import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from utils.training.engine import clock


def machine(device: torch.device) -> str:
    """One line with the device, the number of threads, and versions."""
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
    """Seconds for n calls of each candidate, called alternately, after `warmup` calls of each."""
    seconds = {name: [] for name in candidates}
    for i in tqdm(range(-warmup, n), unit="round", leave=False):
        for name, call in candidates.items():
            start = clock(device)
            call()
            took = clock(device) - start
            if i >= 0:
                seconds[name].append(took)
    return seconds


def head(what: str = "") -> None:
    """Prints the header of a table of `row`s."""
    print(f"{what:40s} {'median':>10} {'quartiles':>19} {'n':>5} {'speed':>8}")


def row(name: str, seconds: list[float], unit: float, base: float, more: str = "") -> None:
    """Prints median and quartiles per unit of work, n, and the speed relative to `base` seconds per unit."""
    low, middle, high = (1e3 * q / unit for q in statistics.quantiles(seconds, n=4))
    speed = f"{1e3 * base / middle:.2f} x"
    print(f"{name:40s} {middle:7.3f} ms {low:8.3f} .. {high:7.3f} {len(seconds):5d} {speed:>8}{more}", flush=True)


def report(seconds: dict[str, list[float]], units: dict[str, float], baseline: str) -> None:
    """Prints a row for each candidate, with its speed relative to the baseline."""
    head()
    base = statistics.median(seconds[baseline]) / units[baseline]
    for name, values in seconds.items():
        row(name, values, units[name], base)


def copy_bandwidth(device: torch.device) -> float:
    """Bandwidth of a copy within the device's memory in GB/s, counting reads and writes."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9


def peak_memory(device: torch.device) -> str:
    """Peak GPU memory since the last call, as text; empty on a CPU."""
    if device.type != "cuda":
        return ""
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return f"  {peak / 2**30:6.2f} GiB"
