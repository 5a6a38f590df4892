"""Timing of candidates alternately: medians over repetitions, with quartiles and n."""

import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from utils.training.schedule import clock


def machine(device: torch.device) -> str:
    """One line with the device, the number of threads, and versions."""
    name, cpus = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpus.exists() and "model name" in (text := cpus.read_text()):
        name = text.partition("model name")[2].partition("\n")[0].strip("\t :")
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"


def measure(candidates: dict[str, Callable[[], object]], n: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds for n calls of each candidate, called alternately, after three calls of each."""
    seconds = {name: [] for name in candidates}
    for i in tqdm(range(-3, n), unit="round", leave=False):
        for name, call in candidates.items():
            start = clock(device)
            call()
            if i >= 0:
                seconds[name].append(clock(device) - start)
    return seconds


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def report(seconds: dict[str, list[float]], cells: dict[str, int], baseline: str) -> None:
    """Prints for each candidate milliseconds a cell, with quartiles and n, and its speed relative to the baseline."""
    print(f"{'':40s} {'median':>10} {'quartiles':>23} {'n':>5} {'speed':>8}")
    base = statistics.median(seconds[baseline]) / cells[baseline]
    for name, values in seconds.items():
        low, middle, high = (1e3 * q / cells[name] for q in quartiles(values))
        speed = f"{1e3 * base / middle:.2f} x"
        print(f"{name:40s} {middle:7.3f} ms {low:8.3f} .. {high:8.3f} {len(values):8d} {speed:>8}", flush=True)
