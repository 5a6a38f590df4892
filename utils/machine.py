"""What a script computes on: the device, the number of CPU threads, and how memory is kept."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, let_signals_raise, one_line

if TYPE_CHECKING:
    import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def prepare(name: str | None, threads: int | None) -> "torch.device":
    """Imports torch, sets it to compute with so many threads, and returns the device of that name.

    None stands for a GPU if there is one, and for OMP_NUM_THREADS, or else as many threads as the process may use
    cores. `cuda` is the GPU that torchrun or srun means for this process. Raises UserError for a device that is not
    there.
    """
    import torch  # takes seconds; a signal ends the process, as an exception could leave torch half imported

    let_signals_raise()
    with warnings.catch_warnings(record=True) as told:  # of a GPU or a driver that is too old, several lines each
        warnings.simplefilter("always")
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cpu" and told:
            raise UserError(f"--device: the GPU cannot be used ({one_line(told[0].message)}); cpu does without")
        device = device_of(name)
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        from joblib import cpu_count  # heeds affinity and a container's quota, which torch does not know of

        threads = cpu_count()
    if threads is not None:
        torch.set_num_threads(threads)
    take_denormals_for_0()
    call_mkl_once()
    keep_freed_memory()
    return device


def device_of(name: str) -> "torch.device":
    """The device of that name, if it computes; raises UserError otherwise."""
    import torch

    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can train")
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.zeros(1, device=device).add_(1).item()  # nothing less tells that torch has kernels for a GPU so old
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches where CUDA is set to, not where its tensors are
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device: {name} is not available on this machine; try cpu ({one_line(e)})") from e
    return device


def take_denormals_for_0() -> None:
    """Has numbers below 1e-38 be 0 in this thread and those that it begins: their products take twenty times as long.

    numpy 2.0 warns if it first looks at a type thereafter.
    """
    import numpy as np
    import torch

    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)


def call_mkl_once() -> None:
    """Calls the functions that torch takes from MKL once, on this thread alone.

    Where two threads are the first to call one at a time, one of them may compute by its fast version, of 4 digits.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        for name in (
            "exp",
            "expm1",
            "log",
            "log1p",
            "log2",
            "log10",
            "sqrt",
            "erf",
            "erfc",
            "erfinv",
            "sin",
            "cos",
            "tanh",
        ):
            getattr(torch, name)(torch.full((8,), 0.5, dtype=dtype))


@functools.cache  # every cell keeps it
def name_of(device: "torch.device") -> str:
    """What the maker calls the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for what comes next, unless MALLOC_* are set.

    The system clears memory page by page before it hands it out anew, which takes part of every training step on a CPU
    (docs/performance.md).
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError):  # no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(MMAP_MAX, 0)
            mallopt(TRIM_THRESHOLD, -1)
