"""Checkpoints in the background, and the signals that ask a training to save one and end."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from utils.errors import heeded_signals

SHARE = 0.05  # the largest share of the training time that automatic checkpoints may take
LONGEST_UNSAVED = 600.0  # seconds after the last checkpoint, at which one is written within an epoch
WRITER = ThreadPoolExecutor(1)


class Interrupted(Exception):
    """A signal to end was received, and a checkpoint has been saved."""

    def __init__(self, number: int, epoch: int):
        super().__init__(number, epoch)
        self.signal, self.epoch = number, epoch


class Signals:
    """Records a signal to end instead of raising, so that training can save a checkpoint before it stops."""

    def __enter__(self):
        self.received = None
        self.before = {s: signal.signal(s, self._remember) for s in heeded_signals()}
        return self

    def _remember(self, number, frame):
        self.received = self.received or number

    def __exit__(self, *_):
        for number, handler in self.before.items():  # after a first signal, further ones must not interrupt the exit
            signal.signal(number, signal.SIG_IGN if self.received else handler)


class Saver:
    """Writes checkpoints in the background: every so many epochs, or (None) as often as SHARE allows."""

    def __init__(self, every: int | None = None):
        self.every, self.pending, self.cost, self.began = every, None, 0.0, time.monotonic()

    def start(self, write: Callable[[], None]) -> None:
        """Has a checkpoint written, once the one before is."""
        self.settle()
        self.began = began = time.monotonic()

        def timed():
            write()
            self.cost = time.monotonic() - began

        self.pending = WRITER.submit(timed)

    def settle(self) -> None:
        """Waits for the pending write; raises its exception if it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def is_due(self, epoch: int) -> bool:
        """Whether to save after that many epochs."""
        if self.every is not None:
            return epoch % self.every == 0
        written = self.pending is None or self.pending.done()
        return written and (time.monotonic() - self.began) * SHARE >= self.cost

    @property
    def is_overdue(self) -> bool:
        """Whether to save within an epoch."""
        return self.every is None and time.monotonic() - self.began > LONGEST_UNSAVED
