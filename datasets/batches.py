"""Batches of images (B, C, H, W) in [0, 1] and labels (B,), on the training device."""

import atexit
import contextlib
import io
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.errors import ENDING_SIGNALS, UserError, one_line
from utils.seeds import generator

from .folders import Sample, centre_crop, decoders, open_image

Batch = tuple[Tensor, Tensor]
ALL = slice(None)
GRACE = 1.0  # seconds in which a signal that workers died of comes to this process, too
LOSS = "a process that reads images was killed or could not hand them over: too little memory, /dev/shm too small "
LOSS += "(docker: --shm-size), --batch_size too large, or too few open files allowed (ulimit -n)"


def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: a permutation of n keyed by (seed, epoch)."""
    return torch.randperm(n, generator=generator("cpu", seed, epoch, "order"))


def subset(labels: Tensor, n: int) -> Tensor:
    """Indices of n images, or of all if there are fewer: random, always the same, of each label in proportion.

    Whatever begins it is such a choice as well.
    """
    order = torch.randperm(len(labels), generator=generator("cpu", 0, "subset"))
    shares = torch.zeros(len(labels), dtype=torch.float64)  # of its class that come up to each image, in that order
    sizes = labels.unique(return_counts=True)[1].tolist()
    by_class = order[labels[order].argsort(stable=True)]
    shares[by_class] = torch.cat([(torch.arange(size, dtype=torch.float64) + 0.5) / size for size in sizes])
    return order[shares[order].argsort(stable=True)][:n]


class Resident:
    """A split held on the device as one uint8 tensor and batched by index."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device):
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, n: int) -> "Resident":
        """Of n images, as `subset` chooses them."""
        chosen = subset(self.labels.cpu(), n).to(self.labels.device)
        return Resident(self.images[chosen], self.labels[chosen], self.images.device)

    def batches(
        self, batch_size: int, shuffle: tuple[int, int] | None = None, start: int = 0, part: slice = ALL
    ) -> Iterator[Batch]:
        """Batches from the start-th on, shuffled by (seed, epoch) or in order.

        Of each batch only `part`: data-parallel processes take what is theirs.
        """
        if shuffle is None:
            first = range(start * batch_size, len(self), batch_size)
            batches = [slice(i, i + batch_size) for i in first]
        else:
            order = shuffled(len(self), *shuffle).to(self.images.device)
            batches = order.split(batch_size)[start:]
        for batch in batches:
            yield self.images[batch][part].float() / 255, self.labels[batch][part]


def _quiet_worker(_: int) -> None:
    sys.stderr = io.StringIO()  # what fails reaches the training process; tracebacks of its threads, no user
    for number in ENDING_SIGNALS:  # the training process decides when they end
        signal.signal(number, signal.SIG_IGN)


def _is_loss(e: Exception) -> bool:
    """Whether workers were killed, or could not hand over what they read."""
    lost = "shared memory|Bus error|Too many open files|exited unexpectedly|killed by signal"
    handing_over = isinstance(e, (ConnectionError, EOFError, FileNotFoundError)) and "Caught" not in str(e)
    return handing_over or re.search(lost, str(e)) is not None


class Streamed(Dataset):
    """A split decoded by worker processes: random resized crops in training, else centre crops."""

    def __init__(self, samples: list[Sample], shape: tuple[int, int, int], device: torch.device):
        from torchvision.transforms import v2

        self.samples, self.shape, self.device, self.workers = samples, shape, device, decoders()
        self.random_crop = v2.Compose([v2.RandomResizedCrop(shape[1]), v2.PILToTensor()])
        self.centre_crop = centre_crop(shape[1])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        """An image of that index, and its label; the seed, and no worker, makes its random crop."""
        index, seed = key
        path, label = self.samples[index]
        image = open_image(path, channels=self.shape[0])
        try:
            if seed is None:
                return self.centre_crop(image), label
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.random_crop(image), label
        except (MemoryError, OSError, RuntimeError, ValueError) as e:  # of one that is extremely thin
            raise UserError(f"{path}: cannot be cropped ({one_line(e)})") from e

    def subset(self, n: int) -> "Streamed":
        """As of `Resident`."""
        return Streamed([self.samples[i] for i in subset(self.labels, n)], self.shape, self.device)

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
            self,
            batch_sampler=[keys[i : i + batch_size][part] for i in range(start * batch_size, len(keys), batch_size)],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4,
            worker_init_fn=_quiet_worker,
        )
        children = multiprocessing.active_children
        others, workers, decoded = children(), [], None

        def end_workers() -> None:  # they ignore the SIGTERM by which Python would end them at its exit
            for worker in workers:
                worker.kill()

        atexit.register(end_workers)
        try:
            try:
                decoded = iter(loader)
            finally:
                workers += [child for child in children() if child not in others]
            with contextlib.suppress(ValueError):  # on another thread, where torch sets no handler either
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise of a worker's end anywhere
            while (batch := next(decoded, None)) is not None:
                images, labels = (t.to(self.device, non_blocking=True) for t in batch)
                yield images.float() / 255, labels
        except UserError as e:  # from a worker it comes wrapped in that worker's traceback
            raise UserError(str(e).rsplit("UserError: ", 1)[-1].strip()) from None
        except (RuntimeError, OSError, EOFError) as e:
            if not _is_loss(e):
                raise
            time.sleep(GRACE)
            raise UserError(LOSS) from e
        finally:  # where the caller stops early, too: torch would wait for what the workers are reading
            end_workers()
            atexit.unregister(end_workers)
            if decoded is not None:  # else a finalizer does it after those of its pipes, and closes another file's
                decoded._shutdown_workers()


def chosen(split: Resident | Streamed, n: int) -> Batch:
    """n images (n, C, H, W) of a split with their labels, or all if there are fewer, as `subset` chooses them."""
    images, labels = zip(*split.subset(n).batches(250), strict=True)
    return torch.cat(images), torch.cat(labels)
