"""How many threads compute on the CPU: those for which there is room beside what else runs on the machine.

OpenMP's threads wait for each other by spinning. Where others use the machine too, and the thread that is waited for
is not running at all, the rest spin for whole time slices: two threads beside two busy processes took twenty times as
long as one. So there are as many threads as there are free cores, and they spin briefly: OpenMP reads that setting when
torch is loaded, hence scripts import this module first. The number of threads changes the order of summation and so
the last digits: a training goes on with the number that it began with.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from utils.errors import end_quietly, heeded_signals

ROOT = Path(__file__).parent.parent
SPINS = "5000"  # about 50 microseconds: enough where nobody else computes; OpenMP's own choice is 3 milliseconds

if getattr(sys.modules["__main__"], "__file__", None) and Path(sys.modules["__main__"].__file__).parent == ROOT:
    for number in heeded_signals():  # until run_script has its own
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_quietly)

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


class Moment(NamedTuple):
    """A clock's seconds; those that this process's cores were idle in; those of computing by this process."""

    clock: float
    idle: float
    own: float


def moment() -> Moment | None:
    """Now; None where the system does not tell, as only Linux does."""
    try:
        cores, tick = os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK")
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except (OSError, AttributeError, ValueError):
        return None
    fields = {name: values for name, *values in (line.split() for line in lines if line.startswith("cpu"))}
    idle = sum(int(v) for core in cores for v in fields.get(f"cpu{core}", ())[3:5])  # idle, and waiting for a disk
    return Moment(time.monotonic(), idle / tick, sum(os.times()[:4]))


_before = moment()


def free_cores(before: Moment, now: Moment, cores: int) -> int:
    """How many of the process's cores were idle between two moments, or computed for this process; at least 1."""
    free = (now.idle - before.idle + now.own - before.own) / (now.clock - before.clock)
    return min(max(1, round(free)), cores)


def choose() -> int:
    """Threads to compute with from now on: OMP_NUM_THREADS, or the cores that were free since the last call."""
    global _before
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    from joblib import cpu_count  # a container's quota counts, which torch does not know of

    cores, now = cpu_count(), moment()
    if now is None or _before is None or now.clock - _before.clock < 1:  # a shorter time tells nothing
        return min(torch.get_num_threads(), cores)
    before, _before = _before, now
    return free_cores(before, now, cores)
