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
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (texts[0].isdecimal() and texts[1].isdecimal() and int(texts[0]) < int(texts[1])):
        raise UserError(f"RANK and WORLD_SIZE: need whole numbers, 0 <= RANK < WORLD_SIZE, got {' and '.join(texts)}")
    return int(texts[0]), int(texts[1])


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
    """Returns once every process of torchrun is here; it would end the others as soon as one fails."""
    import torch
    import torch.distributed as dist

    if dist.is_torchelastic_launched() and place()[1] > 1:
        if not dist.is_initialized():
            join(torch.device("cpu"))
        dist.barrier()
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
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


class Lines(tqdm):
    """A progress bar for a file: lines, at most one every half minute, instead of one line drawn over and over."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"miniters": 1, "ascii": True, **kwargs, "mininterval": 30, "maxinterval": 1e9})

    @staticmethod
    def status_printer(file):
        last = ""

        def write(line: str) -> None:
            nonlocal last
            if line.strip() != last:  # the end of a bar is drawn several times
                last = line.strip()
                file.write(last + "\n")
                file.flush()

        return write


def progress(*args, **kwargs) -> tqdm:
    """A progress bar of the first process; the others show none. In a file it becomes lines."""
    kind = tqdm if sys.stderr.isatty() else Lines
    return kind(*args, **kwargs, **({} if is_first() else {"disable": True}))
