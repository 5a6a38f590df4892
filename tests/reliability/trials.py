"""What the trials share: how often each is made, and processes that are watched from outside."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, popen


def first(n: int, *values) -> list:
    """Values of a parameter, of which the default suite takes the first n."""
    return [pytest.param(value, marks=[pytest.mark.slow] if i >= n else []) for i, value in enumerate(values)]


def times(n: int, few: int = 1) -> pytest.MarkDecorator:
    """A test's `trial`: 0 to n - 1, of which the default suite makes the first few."""
    return pytest.mark.parametrize("trial", first(few, *range(n)))


def launch(name, *argv, before="", prefix=(), **where):
    """Starts a script in a new process, after Python statements that change its surroundings."""
    start = [ROOT / name, *argv]
    if before:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {[name, *argv]!r}\n{before}\n"
        code += f"import {name.removesuffix('.py')} as script\n"
        start = ["-c", code + "from utils.errors import run_script\nrun_script(script.main)"]
    command = [*prefix, sys.executable, *start]
    return popen(list(map(str, command)), **{"OMP_NUM_THREADS": "1", **where})


def ended(process, seconds: float = 120) -> tuple[int, str, str]:
    """Status, stdout and stderr of a process that ends within so many seconds; fails otherwise."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still there after {seconds} seconds: {process.communicate()}")
    assert "Traceback" not in (err or ""), err
    return process.returncode, out, err


def kill(process, number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate()


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def there(pattern: str, folder: str = "runs") -> list[Path]:
    """Files of that name; while processes come and go, so may folders."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(Path(folder).rglob(pattern))
    return []


def training(*argv, until="resume.pth", **where):
    """A training in a new process, once it has written that file, or has ended."""
    process = launch("train.py", *argv, **where)
    wait_until(lambda: there(until) or process.poll() is not None)
    return process


def in_terminal(*argv, **variables) -> tuple[int, int]:
    """Starts a script in a terminal of 120 columns, for two minutes at most; returns its pid and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.alarm(120)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        env = {k: v for k, v in {**os.environ, **variables}.items() if k != "TQDM_DISABLE"}
        os.execve(sys.executable, [sys.executable, *map(str, argv)], env)
    return pid, terminal


probe = subprocess.run("unshare -m mount -t tmpfs tmpfs /mnt", shell=True, capture_output=True)
needs_mounts = pytest.mark.skipif(probe.returncode != 0, reason="cannot mount a file system that only a child sees")
