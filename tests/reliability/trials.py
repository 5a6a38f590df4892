"""What the trials share: how often each is made, quick trainings, and processes that are watched from outside."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import zygote
from tests.conftest import ROOT, STARTED, popen


def first(n: int, *values) -> list:
    """Values of a parameter, of which the default suite takes the first n."""
    return [pytest.param(value, marks=[pytest.mark.slow] if i >= n else []) for i, value in enumerate(values)]


def times(n: int, few: int = 2) -> pytest.MarkDecorator:
    """A test's `trial`: 0 to n - 1, of which the default suite makes the first few."""
    return pytest.mark.parametrize("trial", first(few, *range(n)))


def launch(name, *argv, before="", prefix=(), **where):
    """Starts a script in a new process, after Python statements that change its surroundings."""
    command = [*prefix, sys.executable, *(["-c", code_of(name, argv, before)] if before else [ROOT / name, *argv])]
    return popen(list(map(str, command)), **{"OMP_NUM_THREADS": "1", **where})


def quick(name, *argv, before="", prefix=(), **where):
    """`launch` for a process that is not killed: where it can, a fork of one that has imported everything."""
    if prefix or where or not zygote.can_fork():
        return launch(name, *argv, before=before, prefix=prefix, **where)
    STARTED.append(zygote.fork(name, list(map(str, argv)), code_of(name, argv, before) if before else None))
    return STARTED[-1]


def code_of(name, argv, before: str) -> str:
    """What runs a script after those statements."""
    return (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {[name, *map(str, argv)]!r}\n{before}\n"
        f"import {name.removesuffix('.py')} as script\nfrom utils.errors import run_script\nrun_script(script.main)"
    )


def ended(process, seconds: float = 120) -> tuple[int, str, str]:
    """Status, stdout and stderr of a process that ends within so many seconds; kills it otherwise, and fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"still there after {seconds} seconds: {out} {err}")
    assert "Traceback" not in (err or ""), err
    return process.returncode, out, err


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


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def are_gone(pids: list[int]) -> bool:
    def gone(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return all(map(gone, pids))


def kill(process, number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate()


def folder_of_images(root: Path, n: int = 12, size: int = 48) -> Path:
    """Two classes of n random images each."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def private_mounts() -> bool:
    """Whether file systems can be mounted that only a child process sees."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def mounted(where: str, size: str) -> list[str]:
    """A prefix to a command, which then sees a file system of that size there."""
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs "{where}" && exec "$@"', "sh"]
