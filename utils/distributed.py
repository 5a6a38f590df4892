"""Several processes on one grid: which of them this one is, what it takes, and waiting for the others.

torchrun tells each process its place in environment variables; so can a script (RANK, WORLD_SIZE) where the
processes share nothing but the run folders, as the tasks of a SLURM array do.
"""

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

LONG = timedelta(days=30)  # a process may wait as long as another one trains


def place() -> tuple[int, int]:
    """This process's rank, and how many there are. Raises UserError for variables that make no sense."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"RANK and WORLD_SIZE: need whole numbers, 0 <= RANK < WORLD_SIZE, got {rank} and {world}")
    return int(rank), int(world)


def is_first() -> bool:
    """Whether this process speaks for all; true without others."""
    return place()[0] == 0


def share(items: list, named: str = "runs") -> list:
    """Every WORLD_SIZE-th item, from the RANK-th on; says so, lest the variables are left over from something else."""
    rank, world = place()
    if world > 1:
        print(f"RANK {rank} of WORLD_SIZE {world}: takes {len(items[rank::world])} of {len(items)} {named}", flush=True)
    return items[rank::world]


def join(device: "torch.device") -> None:
    """Lets the processes of torchrun talk to each other, through the GPUs if that is where they train."""
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONG)


def wait_for_all() -> None:
    """Returns once every process of torchrun is here."""
    import torch
    import torch.distributed as dist

    if dist.is_torchelastic_launched() and place()[1] > 1:
        if not dist.is_initialized():
            join(torch.device("cpu"))
        dist.barrier()


def leave() -> None:
    """Waits for every process of torchrun, which would end the others as soon as one fails, and parts from them."""
    import torch.distributed as dist

    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def largest_of_all(value: int, device: "torch.device") -> int:
    """The largest of the processes' values."""
    import torch
    import torch.distributed as dist

    value = torch.tensor(value, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def from_first(value):
    """The first process's value."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


class Lines(tqdm):
    """A progress bar for a file: lines, at most one every half minute, instead of one line drawn over and over."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"miniters": 1, "ascii": True, **kwargs, "mininterval": 30, "maxinterval": 1e9})

    @staticmethod
    def status_printer(file):
        lines = [""]

        def write(line: str) -> None:
            if line.strip() != lines[-1]:  # the end of a bar is drawn several times
                lines[:] = [line.strip()]
                print(lines[-1], file=file, flush=True)

        return write


def progress(*args, **kwargs) -> tqdm:
    """A progress bar of the first process; the others show none. In a file it becomes lines."""
    if not is_first():
        kwargs["disable"] = True
    return (tqdm if sys.stderr.isatty() else Lines)(*args, **kwargs)
