"""What is to be known of a GPU on which this project runs for the first time; within eight minutes."""

import dataclasses
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL

import torch

from datasets.loading import Data
from models.hvae import Noise
from utils.benchmark.evaluation import multi_rate
from utils.benchmark.step import CLASSES, machine, measure, patterns, stepper
from utils.config import Config
from utils.errors import UserError, one_line
from utils.files import write_json
from utils.runs import Run
from utils.seeds import generator
from utils.training import capture
from utils.training.schedule import free, use_precision
from utils.training.training import Setup, Training

SECONDS, REPORT = 480, Path("gpu_report.json")
STEPS = 10  # whose losses are compared
SMALL = 2**29  # bytes of memory, into which 32 cells do not fit
ROOT = Path(__file__).parents[2]
TRAIN = ["train.py", "--beta_y", "0.5", "2", "--num_epochs", "200", "--save_every", "1"]
MANY = ["--beta_y", "0.1:10:32", "--cells_at_once", "32", "--batch_size", "256", "--num_epochs", "1"]
CLASSIFIER = ["train_classifier.py", "--dataset", "Digits", "--num_epochs", "2"]
EVALUATE = ["eval_beta_grid.py", "--run_batch_name", "singles", "--all", "--n_samples", "1000"]
TESTS = ["-m", "pytest", "-n", "0", "tests/training/test_gpu.py"]
LIMITED = """import sys, torch; torch.cuda.set_per_process_memory_fraction({share}); sys.path.insert(0, {root!r})
import train; sys.exit(train.main(sys.argv[1:]))"""
Rows = Iterator[tuple[str, Callable[[], str]]]  # what is measured, and how


def gpu(config: Config, cells: list[int], n: int, device: torch.device) -> None:
    """Prints a Markdown table of what is measured, and writes it to gpu_report.json, row by row.

    What fails is a row as well. Raises UserError without a GPU.
    """
    if device.type != "cuda":
        raise UserError("gpu: this machine has no GPU that PyTorch can use")
    end, rows = time.monotonic() + SECONDS, {"machine": machine(device)}
    print(f"| | {rows['machine']} |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, call in itertools.chain(
            agreements(config, device), times(config, cells, n, device), commands(Path(folder), end, device)
        ):
            try:
                rows[name] = call() if time.monotonic() < end else "left out: no time"
            except Exception as e:
                rows[name] = f"FAILED: {type(e).__name__}: {one_line(e)}"
            free(device)  # out here, where the exception holds nothing any more
            print(f"| {name} | {rows[name]} |", flush=True)
            write_json(REPORT, rows)


def times(config: Config, cells: list[int], n: int, device: torch.device) -> Rows:
    """Of a step and its memory, by precision, cells at once and way; of one by Muon, a multi-rate model, evaluation."""

    def timed(config: Config, m: int, how: str) -> str:
        torch.cuda.reset_peak_memory_stats(device)
        use_precision(config.precision)
        split = patterns(config, 20 * config.batch_size, device)
        (seconds,) = measure({"step": stepper(config, m, split, how)}, n, device).values()
        memory = torch.cuda.max_memory_allocated(device) / 2**20
        failed = ", but the capture failed" if how == "auto" and capture.failed else ""
        return f"{1e3 * statistics.median(seconds) / m:.3f} ms a cell and step, {memory:.0f} MiB{failed}"

    def evaluated(how: str) -> str:
        use_precision(config.precision)
        split = patterns(config, 20 * config.batch_size, device)
        training = Training([Run(Path(), config)], [None], Setup(device, compile=how))
        evaluate = functools.partial(training.evaluate, Data(split, split, CLASSES))
        (seconds,) = measure({"evaluation": evaluate}, n, device).values()
        return f"{1e3 * statistics.median(seconds) / 20:.3f} ms a batch"

    ways = {"eager": "off", "captured": "auto"}
    for precision, m, (way, how) in itertools.product(("fp32", "tf32", "bf16"), cells, ways.items()):
        of_precision = dataclasses.replace(config, precision=precision)
        yield f"{precision}, {m} at once, {way}", lambda c=of_precision, m=m, how=how: timed(c, m, how)
    kinds = {"Muon": dataclasses.replace(config, optimizer="muon"), "multi-rate": multi_rate(config)}
    for name, of_kind in kinds.items():
        yield f"{name}, {of_kind.precision}, captured", lambda c=of_kind: timed(c, 1, "auto")
    for way, how in ways.items():
        yield f"evaluation, {config.precision}, {way}", lambda how=how: evaluated(how)


def agreements(config: Config, device: torch.device) -> Rows:
    """Of the losses of captured steps with those on the CPU, with the same weights, images and noise."""

    def difference(config: Config) -> str:
        use_precision("fp32")
        trainings = [Training([Run(Path(), config)], [None], Setup(d)) for d in (torch.device("cpu"), device)]
        for training in trainings:
            training._set_spread(float(config.is_conditioned))
        g, fast, errors, one = generator("cpu", 0), None, [], torch.ones(1)
        for _ in range(STEPS):
            x = torch.rand(config.batch_size, *config.image_shape, generator=g)
            noise = trainings[0].stack.model.noise(len(x), g)
            there = Noise(*(None if t is None else t.to(device) for t in noise))
            there = x.to(device), there, one.to(device), one.to(device)
            fast = fast or capture.prepared(trainings[1], there, capture=True, compile=False)
            right, ours = trainings[0].update(x, noise, one, one)[0, 0].item(), fast(*there)[0, 0].item()
            errors.append(abs(ours - right) / abs(right))
        failed = ", but the capture failed" if capture.failed else ""
        return f"losses differ by {max(errors):.1e} of themselves, at most{failed}"

    config = dataclasses.replace(config, batch_size=32)
    kinds = {name: dataclasses.replace(config, vae_type=name) for name in ("HVAE", "LVAE", "BVAE")}
    kinds |= {"mixture of logistics": dataclasses.replace(config, px_y_family_ll="MoL")}
    kinds |= {"Muon": dataclasses.replace(config, optimizer="muon"), "multi-rate": multi_rate(config)}
    for name, of_kind in kinds.items():
        yield f"{name}, as on the CPU", lambda c=of_kind: difference(c)


def commands(folder: Path, end: float, device: torch.device) -> Rows:
    """The project's scripts, in a folder: stopped, resumed, evaluated, with too little memory; and its tests."""
    here = ["--device", device.type]

    def line(told: str, *argv, where: Path = folder) -> str:
        """The first line of a command's output that tells so. Raises RuntimeError without one, or if it fails."""
        left = max(1.0, end - time.monotonic())
        done = subprocess.run([sys.executable, *argv], cwd=where, capture_output=True, text=True, timeout=left)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        found = [line for line in lines if told in line]
        if done.returncode or not found:
            raise RuntimeError(f"status {done.returncode}, {lines[-1] if lines else 'without a word'}")
        return found[0]

    def stopped() -> str:
        process = subprocess.Popen(
            [sys.executable, ROOT / TRAIN[0], *TRAIN[1:], *here], cwd=folder, stdout=DEVNULL, stderr=DEVNULL
        )
        while process.poll() is None and not [*folder.glob("runs/*/*/resume.pth")] and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        return f"status {process.wait()}"

    def limited() -> str:
        share = SMALL / torch.cuda.get_device_properties(device).total_memory
        return line("halving", "-c", LIMITED.format(share=share, root=str(ROOT)), *MANY, *here)

    yield "a training, stopped (status 143)", stopped
    for name, told, (script, *flags) in (
        ("it is resumed", "resuming at epoch", TRAIN),
        ("a classifier", "test accuracy", CLASSIFIER),
        ("the evaluation", "runs evaluated", EVALUATE),
    ):
        yield name, lambda told=told, argv=(ROOT / script, *flags, *here): line(told, *argv)
    yield f"32 cells in {SMALL >> 20} MiB", limited
    yield "the tests", lambda: line(" passed", *TESTS, where=ROOT)
