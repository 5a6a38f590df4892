"""Batches of images (B, C, H, W) in [0, 1] and labels (B,), on the training device."""

import atexit
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.errors import ENDING_SIGNALS, UserError, one_line
from utils.seeds import generator

from .folders import open_image, threads

Batch = tuple[Tensor, Tensor]
ALL = slice(None)
GRACE = 1.0  # seconds in which a signal that workers died of comes to this process, too
SHARED = "/dev/shm"  # where worker processes put what they read


def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: a permutation of n keyed by (seed, epoch)."""
    return torch.randperm(n, generator=generator("cpu", seed, epoch, "order"))


class Resident:
    """A split held on the device as one uint8 tensor and batched by index."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device):
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int) -> "Resident":
        """The first n images, or all if there are fewer."""
        return Resident(self.images[:n], self.labels[:n], self.images.device)

    def batches(
        self, batch_size: int, shuffle: tuple[int, int] | None = None, start: int = 0, part: slice = ALL
    ) -> Iterator[Batch]:
        """Batches from the start-th on, the last one perhaps smaller; shuffled by (seed, epoch) or in order.

        Of each batch only `part`: data-parallel processes take what is theirs.
        """
        if shuffle is None:
            parts = (slice(i, i + batch_size) for i in range(start * batch_size, len(self), batch_size))
        else:
            order = shuffled(len(self), *shuffle).to(self.images.device)
            parts = order.split(batch_size)[start:]
        for batch in parts:
            yield self.images[batch][part].float() / 255, self.labels[batch][part]


class _Decoded(Dataset):
    """Decodes and crops one image; its key (index, seed) makes random crops independent of the workers."""

    def __init__(self, samples: list[tuple[str, int]], channels: int, size: int):
        from torchvision.transforms import v2

        self.samples, self.channels = samples, channels
        self.random_crop = v2.Compose([v2.RandomResizedCrop(size), v2.PILToTensor()])
        self.centre_crop = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        index, seed = key
        path, label = self.samples[index]
        try:
            image = open_image(path, self.channels)
            if seed is None:
                return self.centre_crop(image), label
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.random_crop(image), label
        except (MemoryError, OSError, RuntimeError, ValueError) as e:
            raise UserError(f"{path}: cannot be cropped ({one_line(e)})") from e


def _quiet_worker(_: int) -> None:
    sys.stderr = io.StringIO()  # what fails reaches the training process; tracebacks of its threads, no user
    for number in ENDING_SIGNALS:  # the training process decides when they end
        signal.signal(number, signal.SIG_IGN)


def _end_workers(but: Sequence[multiprocessing.Process] = ()) -> None:
    """Ends the worker processes that are left, but for some: they ignore the SIGTERM by which Python would."""
    for child in multiprocessing.active_children():
        if child.daemon and child not in but:
            child.kill()


def _lost_workers(e: Exception) -> str | None:
    """What to tell of an error that says that worker processes were killed, or could not hand over what they read."""
    if "shared memory" in str(e) or "Bus error" in str(e):
        size = f"{shutil.disk_usage(SHARED).total >> 20:,} MB" if os.path.isdir(SHARED) else "its size"
        return f"{SHARED}: too small ({size}) for batches on their way (docker: --shm-size), or --batch_size too large"
    if "Too many open files" in str(e):
        return "too many open files for the processes that read images; raise the limit (ulimit -n)"
    handing_over = isinstance(e, (ConnectionError, EOFError, FileNotFoundError)) and "Caught" not in str(e)
    ended = "exited unexpectedly" in str(e) or "killed by signal" in str(e)
    if handing_over or "DataLoader worker" in str(e) and ended:
        return f"a process that reads images was killed: too little memory, or {SHARED} too small (docker: --shm-size)"
    return None


class Streamed:
    """A split decoded from its files by worker processes, ahead of the training.

    Training images are random resized crops, others the centre crop of the image resized.
    """

    def __init__(self, samples: list[tuple[str, int]], shape: tuple[int, int, int], device: torch.device):
        self.samples, self.shape, self.device = samples, shape, device
        self.decoded = _Decoded(samples, channels=shape[0], size=shape[1])
        self.workers = threads()

    def __len__(self) -> int:
        return len(self.samples)

    def first(self, n: int) -> "Streamed":
        """As of `Resident`."""
        return Streamed(self.samples[:n], self.shape, self.device)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([label for _, label in self.samples])

    def batches(
        self, batch_size: int, shuffle: tuple[int, int] | None = None, start: int = 0, part: slice = ALL
    ) -> Iterator[Batch]:
        """As of `Resident`."""
        if shuffle is None:
            keys = [(i, None) for i in range(len(self))]
        else:
            seeds = np.random.SeedSequence(shuffle).generate_state(len(self))
            keys = [(i, int(seeds[i])) for i in shuffled(len(self), *shuffle).tolist()]
        loader = DataLoader(
            self.decoded,
            batch_sampler=[keys[i : i + batch_size][part] for i in range(start * batch_size, len(keys), batch_size)],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4,
            worker_init_fn=_quiet_worker,
        )
        problem, others = None, multiprocessing.active_children()
        atexit.register(_end_workers, others)
        try:
            decoded = iter(loader)
            with contextlib.suppress(ValueError):  # on another thread, where torch sets no handler either
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise of a worker's end anywhere
            while (batch := next(decoded, None)) is not None:
                images, labels = (t.to(self.device, non_blocking=True) for t in batch)
                yield images.float() / 255, labels
        except UserError as e:  # from a worker it comes wrapped in that worker's traceback
            problem = str(e).rsplit("UserError: ", 1)[-1].strip()
        except (RuntimeError, OSError, EOFError) as e:
            problem = _lost_workers(e)
            if problem is None:
                raise
            time.sleep(GRACE)
        finally:  # where the caller stops early, too: torch would wait for 5 s for each that does not hear it
            _end_workers(others)
            atexit.unregister(_end_workers)
        if problem is not None:  # out here, where nothing holds the loader, so that its workers have ended
            raise UserError(problem)
