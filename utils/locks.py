"""One process at a time in a folder, whatever the file system: a held lock ends with its process, however it dies.

Where flock works, the kernel keeps `.lock`. Elsewhere (some NFS, FUSE and Lustre mounts) files `.lock.1`, `.lock.2`
and so on stand for it, each created exclusively: the one of the highest number is the holder's. Numbers only rise, so
of two processes that take over a dead one's lock by creating the next, one wins; and whoever was taken for dead, asleep
say, finds a higher number than its own when it is about to write. The holder touches its file now and then; times are
compared with what the file system calls now, never with this machine's clock.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)
BEAT = 5.0  # seconds between the touches of a lock file
STALE = 60.0  # seconds without one, after which the holder is taken for dead
GLANCE = 0.2  # seconds in which whoever only asks for the holder has let go again
FREE = "free"  # what a lock file says once its holder is done
_held: dict[Path, "_LockFile"] = {}  # of this process, by the folder's real path


class Held(UserError):
    """Another process holds the folder; the message tells which."""


def left_to(e: Held) -> None:
    """Says that what another process holds is left to it."""
    print(f"note: {e}; it trains that one", file=sys.stderr)


class Lost(UserError):
    """Another process has taken over a folder that this one held."""


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Holds a folder for this process, which ends with it however it dies.

    Raises Held when another process holds it, after so many seconds.
    """
    began = time.monotonic()
    with open(folder / ".lock", "a+", encoding="utf-8", errors="replace") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno in NO_FLOCK:
                    file = None
                    break
                if e.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() >= began + max(patience, GLANCE):
                    file.seek(0)
                    raise Held(f"{folder}: locked by {file.read().strip() or 'another process'}") from e
                time.sleep(0.05)
        if file is None:
            _tell_of_lock_files()
            with _LockFile(folder).held(began + patience):
                _remove_unfinished(folder)
                yield
            return
        file.truncate(0)
        file.write(_me())
        file.flush()
        _remove_unfinished(folder)
        yield


def check(folder: Path) -> None:
    """Raises Lost if this process held the folder by a lock file and was taken for dead; called before a write."""
    lock = _held.get(Path(os.path.realpath(folder))) if _held else None
    if lock is not None:
        lock.check()


def holder(folder: Path) -> str | None:
    """Which process holds a folder, e.g. `pid 7 on host h`; None if none does."""
    try:
        with open(folder / ".lock", encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once
                return None
            except OSError as e:
                if e.errno in (errno.EAGAIN, errno.EACCES):
                    return file.read().strip() or "another process"
                if e.errno not in NO_FLOCK:
                    raise
        lock = _LockFile(folder)
        number = lock._highest()
        return lock._holder(number) if number and not lock._can_be_taken(number) else None
    except OSError:  # no such folder, or none of ours to read
        return None


def _me() -> str:
    return f"pid {os.getpid()} on host {socket.gethostname()}"


@functools.cache
def _machine() -> str:
    """Names this machine's process numbers, which machines and containers of one host name do not share."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _remove_unfinished(folder: Path) -> None:
    """Removes what processes left that were killed while they wrote."""
    for stale in folder.glob(".*.tmp"):
        if not stale.is_dir():
            stale.unlink(missing_ok=True)


def unfinished_folder(folder: Path) -> Path:
    """Where to make a folder that is to appear whole; `remove_abandoned` knows by the name whose it is."""
    return folder.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{_mark()}.tmp")


def remove_abandoned(parent: Path) -> None:
    """Removes what processes of this machine left that were killed while they made a folder there."""
    for left in parent.glob(f".*-{_mark()}.tmp") if _machine() else ():
        pid = left.name[1:].partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _mark() -> str:
    return hashlib.sha256(_machine().encode()).hexdigest()[:8]


@functools.cache
def _tell_of_lock_files() -> None:
    print(
        "note: this file system has no flock; run folders are held by lock files, and those of a process that "
        f"died on another machine are taken over after {STALE:g} seconds",
        file=sys.stderr,
    )


class _LockFile:
    """A folder's lock as a file of its own; see above."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0

    def _path(self, number: int) -> Path:
        return self.folder / f".lock.{number}"

    def _highest(self) -> int:
        numbers = [name.removeprefix(".lock.") for name in os.listdir(self.folder) if name.startswith(".lock.")]
        return max((int(n) for n in numbers if n.isdecimal()), default=0)

    @contextlib.contextmanager
    def held(self, end: float) -> Iterator[None]:
        """Holds it; waits until then, in monotonic seconds, for another process that does."""
        while not self._take():
            if time.monotonic() >= end:
                raise Held(f"{self.folder}: locked by {self._holder(self._highest())}")
            time.sleep(0.05)
        key, done = Path(os.path.realpath(self.folder)), threading.Event()
        beating = threading.Thread(target=self._beat, args=(done,), daemon=True)
        beating.start()
        _held[key] = self
        try:
            yield
        finally:
            del _held[key]
            done.set()
            beating.join()
            with contextlib.suppress(OSError):
                if self._highest() == self.number:
                    self._path(self.number).write_text(FREE, encoding="utf-8")

    def _take(self) -> bool:
        """Creates the file of the next number, if the one there is free or its holder dead; whether it is ours then."""
        there = self._highest()
        if there and not self._can_be_taken(there):
            return False
        mine = self._path(there + 1)
        try:
            with open(mine, "x", encoding="utf-8") as file:
                file.write(f"{_me()}\n{_machine()}")
        except FileExistsError:  # another process was first
            return False
        if self._highest() != there + 1:  # we were slow, and others have been and gone
            mine.unlink(missing_ok=True)
            return False
        self.number = there + 1
        for number in range(there, 0, -1):  # of processes that are done or dead
            try:
                self._path(number).unlink()
            except FileNotFoundError:
                break
        return True

    def _holder(self, number: int) -> str:
        try:
            text = self._path(number).read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        first = text.partition("\n")[0]
        return first if first and first != FREE else "another process"  # which may be done by now

    def _can_be_taken(self, number: int) -> bool:
        path = self._path(number)
        try:
            who, _, machine = path.read_text(encoding="utf-8", errors="replace").partition("\n")
            if who == FREE:
                return True
            pid = who.split()[1] if who.startswith("pid ") else ""
            if machine and machine == _machine() and pid.isdecimal() and not _is_alive(int(pid)):
                return True
            last = path.stat().st_mtime_ns
            if abs(self._now() - last) < STALE * 1e9:
                return False
            time.sleep(2 * BEAT)  # or has the clock been set? One that is alive will have touched it meanwhile.
            return path.stat().st_mtime_ns == last
        except FileNotFoundError:  # another process has taken it over
            return False

    def _now(self) -> int:
        """What the file system calls now, in nanoseconds: a new file's time."""
        probe = self.folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(OSError):  # gone, when it was taken over: `check` will tell
                os.utime(self._path(self.number))

    def check(self) -> None:
        """Raises Lost if another process has taken it over."""
        highest = self._highest()
        if highest != self.number:
            raise Lost(
                f"{self.folder}: taken over by {self._holder(highest)} while this process was paused or could not "
                "reach it; this one stops here, and has written nothing since"
            )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
