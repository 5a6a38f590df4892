"""One process at a time in a folder, whatever the file system: a held lock ends with its process, however it dies.

Where flock works, the kernel keeps `.lock`. Elsewhere (some NFS, FUSE and Lustre mounts) files `.lock.1`, `.lock.2`
and so on stand for it, each created exclusively: the one of the highest number is the holder's. Numbers only rise, so
of two processes that take over a dead one's lock by creating the next, one wins; and whoever was taken for dead, asleep
say, finds a higher number than its own when it is about to write. The holder touches its file now and then; times are
compared with what the file system calls now, never with this machine's clock.

The library filelock does not do for this. It takes over a dead process's lock by a rename that exchanges two files,
which NFS, Lustre and many FUSE mounts refuse; one that is killed before it has written its file blocks all others.
"""

import contextlib
import errno
import fcntl
import functools
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils.errors import UserError

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)
BEAT = 5.0  # seconds between the touches of a lock file
STALE = 60.0  # seconds without one, after which the holder is taken for dead
GLANCE = 0.2  # seconds in which whoever only asks for the holder has let go again
FREE = "free"  # what a lock file says once its holder is done
_numbers_held: dict[Path, int] = {}  # of this process's lock files, by the folder's real path


class Held(UserError):
    """Another process holds the folder; the message tells which."""


class Lost(UserError):
    """Another process has taken over a folder that this one held."""


def note_held(e: Held) -> None:
    """Prints that another process trains what it holds."""
    print(f"note: {e}; it trains that one", file=sys.stderr)


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Holds a folder for this process, which ends with it however it dies.

    Raises Held when another process holds it, after so many seconds.
    """
    end = time.monotonic() + patience
    with open(folder / ".lock", "a+", encoding="utf-8", errors="replace") as file:
        while (is_ours := _flock(file, fcntl.LOCK_EX)) is False:
            if time.monotonic() >= max(end, end - patience + GLANCE):
                raise Held(f"{folder}: locked by {_owner(folder / '.lock')}")
            time.sleep(0.05)
        if is_ours:
            file.truncate(0)
            file.write(_me())
            file.flush()
        with contextlib.nullcontext() if is_ours else _locked_by_file(folder, end):
            for stale in folder.glob(".*.tmp"):  # of processes that were killed while they wrote
                if not stale.is_dir():
                    stale.unlink(missing_ok=True)
            yield


def check(folder: Path) -> None:
    """Raises Lost if this process held the folder by a lock file and was taken for dead; called before a write."""
    number = _numbers_held.get(Path(os.path.realpath(folder))) if _numbers_held else None
    if number is not None and (newest := _newest(folder)) != number:
        raise Lost(
            f"{folder}: taken over by {_owner(_path(folder, newest))} while this process was paused or could not "
            "reach it; this one stops here, and has written nothing since"
        )


def holder(folder: Path) -> str | None:
    """Which process holds a folder, e.g. `pid 7 on host h`; None if none does."""
    try:
        with open(folder / ".lock", encoding="utf-8", errors="replace") as file:
            is_free = _flock(file, fcntl.LOCK_SH)  # let go at once
            if is_free is not None:
                return None if is_free else _owner(folder / ".lock")
        newest = _newest(folder)
        return _owner(_path(folder, newest)) if newest and not _can_be_taken(folder, newest) else None
    except OSError:  # no such folder, or none of ours to read
        return None


def _flock(file: TextIO, kind: int) -> bool | None:
    """Whether the kernel gives us the lock of that kind; None if the file system has no such locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if e.errno in NO_FLOCK:
            return None
        raise


def _owner(path: Path) -> str:
    """Which process a lock file is of."""
    try:
        process = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        process = ""
    return process if process not in ("", FREE) else "another process"  # which may be done by now


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


@contextlib.contextmanager
def _locked_by_file(folder: Path, end: float) -> Iterator[None]:
    """Holds a folder by a lock file; waits until then, in monotonic seconds, for another process that does."""
    while not (number := _take(folder)):
        if time.monotonic() >= end:
            raise Held(f"{folder}: locked by {_owner(_path(folder, _newest(folder)))}")
        time.sleep(0.05)
    key, path, done = Path(os.path.realpath(folder)), _path(folder, number), threading.Event()
    beating = threading.Thread(target=_beat, args=(path, done), daemon=True)
    beating.start()
    _numbers_held[key] = number
    try:
        yield
    finally:
        del _numbers_held[key]
        done.set()
        beating.join()
        with contextlib.suppress(OSError):
            if _newest(folder) == number:
                path.write_text(FREE, encoding="utf-8")


def _take(folder: Path) -> int:
    """Creates the file of the next number if the newest can be taken; returns that number, or 0 if it is not ours."""
    newest = _newest(folder)
    if newest and not _can_be_taken(folder, newest):
        return 0
    path = _path(folder, newest + 1)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{_me()}\n{_machine()}")
    except FileExistsError:  # another process was first
        return 0
    if _newest(folder) != newest + 1:  # we were slow, and others have been and gone
        path.unlink(missing_ok=True)
        return 0
    for number in _numbers(folder):
        if number <= newest:  # of a process that is done or dead
            _path(folder, number).unlink(missing_ok=True)
    return newest + 1


def _can_be_taken(folder: Path, number: int) -> bool:
    """Whether the process of that lock file is done, or dead: has not touched it for long, and does not now."""
    path = _path(folder, number)
    try:
        process, _, machine = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        if process == FREE or machine and machine == _machine() and not _is_alive(process):
            return True
        last = path.stat().st_mtime_ns
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp") as new:
            now = os.stat(new.name).st_mtime_ns  # as the file system tells the time
        if abs(now - last) < STALE * 1e9:
            return False
        time.sleep(2 * BEAT)  # or has the clock been set? One that is alive will have touched it meanwhile.
        return path.stat().st_mtime_ns == last
    except FileNotFoundError:  # another process has taken it over
        return False


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process.split()[1]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, IndexError):  # another user's, or not to be read
        return True
    return True


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):  # gone, when it was taken over: `check` will tell
            os.utime(path)


def _path(folder: Path, number: int) -> Path:
    return folder / f".lock.{number}"


def _numbers(folder: Path) -> list[int]:
    names = (name.removeprefix(".lock.") for name in os.listdir(folder) if name.startswith(".lock."))
    return [int(name) for name in names if name.isdecimal()]


def _newest(folder: Path) -> int:
    return max(_numbers(folder), default=0)
