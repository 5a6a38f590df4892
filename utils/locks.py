"""One process at a time in a folder, whatever the file system: a held lock ends with its process, however it dies.

Where flock works, the kernel keeps `.lock`. Elsewhere (some NFS, FUSE and Lustre mounts) files `.lock.1`, `.lock.2`
and so on stand for it, each created exclusively: the one of the highest number is the holder's. Numbers only rise, so
of two processes that take over a dead one's lock by creating the next, one wins; and whoever was taken for dead, asleep
say, finds a higher number than its own when it is about to write. The holder touches its file now and then; times are
compared with what the file system calls now, never with this machine's clock.

The library filelock takes over a dead process's lock by a rename that exchanges two files, which NFS, Lustre and many
FUSE mounts refuse; one that is killed before it has written its file blocks all others.
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
_numbers_held: dict[str, int] = {}  # of this process's lock files, by the folder's real path


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
    end = time.monotonic() + max(patience, GLANCE)
    with open(folder / ".lock", "a+", encoding="utf-8", errors="replace") as file:
        while True:
            try:
                number = _take_file(file, folder)
                break
            except Held:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.05)
        with _kept(folder, number) if number else contextlib.nullcontext():
            for stale in folder.glob(".*.tmp"):  # of processes that were killed while they wrote
                if not stale.is_dir():
                    stale.unlink(missing_ok=True)
            yield


def check(folder: Path) -> None:
    """Raises Lost if this process held the folder by a lock file and was taken for dead; called before a write."""
    number = _numbers_held.get(os.path.realpath(folder)) if _numbers_held else None
    if number is not None and (newest := _newest(folder)) != number:
        why = "while this process was paused or could not reach it; this one stops here, and has written nothing since"
        raise Lost(f"{folder}: taken over by {_owner(_path(folder, newest))} {why}")


def holder(folder: Path) -> str | None:
    """Which process holds a folder, e.g. `pid 7 on host h`; None if none does."""
    try:
        with open(folder / ".lock", encoding="utf-8") as file:
            is_free = _flock(file, fcntl.LOCK_SH)  # let go at once
        if is_free is not None:
            return None if is_free else _owner(folder / ".lock")
        newest = _path(folder, _newest(folder))
        return _owner(newest) if newest.exists() and not _can_be_taken(newest) else None
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
    process = ""
    with contextlib.suppress(OSError):
        process = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
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


def _take_file(file: TextIO, folder: Path) -> int:
    """Locks the file `.lock`, or creates the one of a number, which is returned. Raises Held."""
    is_ours = _flock(file, fcntl.LOCK_EX)
    if is_ours is None:
        return _take_number(folder)
    if not is_ours:
        raise Held(f"{folder}: locked by {_owner(folder / '.lock')}")
    file.truncate(0)
    file.write(_me())
    file.flush()
    return 0


def _take_number(folder: Path) -> int:
    """Creates the file of the next number if the newest can be taken, and returns that number. Raises Held."""
    newest = _newest(folder)
    path, mine = _path(folder, newest), _path(folder, newest + 1)
    if newest and not _can_be_taken(path):
        raise Held(f"{folder}: locked by {_owner(path)}")
    try:
        with open(mine, "x", encoding="utf-8") as file:
            file.write(f"{_me()}\n{_machine()}")
    except FileExistsError as e:  # another process was first
        raise Held(f"{folder}: locked by {_owner(mine)}") from e
    if (now := _newest(folder)) != newest + 1:  # we were slow, and others have been and gone
        mine.unlink(missing_ok=True)
        raise Held(f"{folder}: locked by {_owner(_path(folder, now))}")
    for number in _numbers(folder):
        if number <= newest:  # of a process that is done or dead
            _path(folder, number).unlink(missing_ok=True)
    return newest + 1


def _can_be_taken(path: Path) -> bool:
    """Whether the process of that lock file is done, or dead: has not touched it for long, and does not now."""
    try:
        process, _, machine = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        if process == FREE:
            return True
        if machine and machine == _machine():
            with contextlib.suppress(PermissionError):  # another user's
                os.kill(int(process.split()[1]), 0)
        last = path.stat().st_mtime_ns
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp") as new:
            now = os.stat(new.name).st_mtime_ns  # as the file system tells the time
        if abs(now - last) < STALE * 1e9:
            return False
        time.sleep(2 * BEAT)  # or has the clock been set? One that is alive will have touched it meanwhile.
        return path.stat().st_mtime_ns == last
    except ProcessLookupError:
        return True
    except FileNotFoundError:  # another process has taken it over
        return False


@contextlib.contextmanager
def _kept(folder: Path, number: int) -> Iterator[None]:
    """Touches this process's lock file now and then, and sets it free at the end."""
    key, path, done = os.path.realpath(folder), _path(folder, number), threading.Event()
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
