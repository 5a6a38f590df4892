"""Steps by one thread and by several, on the machine as it is and beside a busy process on every core."""

import contextlib
import json
import os
import statistics
import subprocess
import sys

from utils.benchmark.measuring import head, row
from utils.threads import SPINS

BUSY = "while True: pass"
SECONDS = """
import json, sys
import utils.threads
import torch
torch.set_num_threads(int(sys.argv[1]))
from utils.memory import keep_freed
if sys.argv[3] == "kept":
    keep_freed()
from types import SimpleNamespace
from utils.benchmark.measuring import measure
from utils.benchmark.loops import config_of, random_split, stepper
from utils.training.engine import Engine
cpu, settings = torch.device("cpu"), SimpleNamespace(**json.loads(sys.argv[2]))
config = config_of(settings)
step = stepper(Engine(config, 1, cpu), random_split(config, 4 * config.batch_size, cpu))
print(json.dumps(measure({"step": step}, settings.n, cpu)["step"]))
"""
OPENMPS = "300000"  # what it would spin by itself


def seconds_of_steps(threads: int, spins: str, freed: str, args) -> list[float]:
    """Seconds of each of n steps in a process of its own, since spinning is settled when torch is loaded."""
    names = ("dataset", "conv_channels", "z_dims", "batch_size", "precision", "n")
    settings = json.dumps({name: getattr(args, name) for name in names})
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    surroundings |= {"GOMP_SPINCOUNT": spins, "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SECONDS, str(threads), settings, freed]
    return json.loads(subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, check=True, text=True).stdout)


@contextlib.contextmanager
def busy(processes: int):
    """So many processes that compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def threads(args) -> None:
    """Steps of one cell on an idle and on a loaded machine.

    `brief` is how our threads wait, `long` how OpenMP's do; freed memory is kept, unless it is said to be given back.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    candidates = {
        "1 thread": (1, SPINS, "kept"),
        "1 thread, freed memory given back": (1, SPINS, "given back"),
        f"{cores} threads, long waits": (cores, OPENMPS, "kept"),
        f"{cores} threads, brief waits": (cores, SPINS, "kept"),
    }
    for others in (0, cores):
        head(f"beside {others} busy processes" if others else "as the machine is")
        base = None
        for name, settings in candidates.items():
            with busy(others):
                seconds = seconds_of_steps(*settings, args)
            base = base or statistics.median(seconds)
            row(name, seconds, 1, base)
