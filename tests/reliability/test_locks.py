"""Locks, with flock and without: one holder at a time, the dead replaced, the paused told, the held told of."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train
from tests.conftest import CELL, ROOT, python
from tests.reliability.trials import ended, kill, launch, there, times, wait_until
from utils import locks
from utils.cli import grid_configs
from utils.files import write_atomic
from utils.locks import Held, Lost, locked
from utils.runs import Run

ONE = [*CELL, "--num_epochs", "1"]
GRID = [*ONE, "--beta_y", "1", "2", "3"]
ME = f"pid {os.getpid()} on host {socket.gethostname()}"
ELSEWHERE = "pid 7 on host other\nanother machine"
NO_FLOCK = f"import fcntl, os\ndef flock(*_): raise OSError({errno.ENOLCK}, '')\nfcntl.flock = flock"
DEAD = f"pid 999999999 on host {socket.gethostname()}\n{locks._machine()}"
START = "import os, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n{}\n"
START += "from utils.locks import Held, check, locked\n"
HOLDER = START + "with locked(Path(sys.argv[2])): print('held', flush=True); time.sleep(600)"
TAKER = """
end = time.monotonic() + 4
while time.monotonic() < end:
    try:
        with locked(Path(".")):
            inside = os.open("inside", os.O_CREAT | os.O_EXCL)  # fails if another is in, too
            time.sleep(0.001)
            check(Path("."))
            os.close(inside)
            os.unlink("inside")
            print("in", flush=True)
    except Held:
        time.sleep(0.001)
"""


def flock_that_fails(monkeypatch, number: int) -> None:
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_flock(monkeypatch):
    flock_that_fails(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "STALE", 0.5)


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def with_flock(request):
    if not request.param:
        request.getfixturevalue("no_flock")
    return request.param


def lock_file(number: int, text: str) -> Path:
    """A lock file of another process."""
    path = Path.cwd() / f".lock.{number}"
    path.write_text(text)
    return path


def lock_files() -> list[str]:
    return [path.name for path in there(".lock.*", ".")]


def new_runs(flags: list[str]) -> list[Run]:
    runs = [Run.of(config, "runs") for config in grid_configs(train.parse_args(flags))]
    for run in runs:
        run.create()
    return runs


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EBADF", "EINVAL"])
def test_without_flock_lock_files_hold(name, monkeypatch):
    flock_that_fails(monkeypatch, getattr(errno, name))
    with locked(Path()), pytest.raises(Held), locked(Path()):
        pass
    assert Path(".lock.1").read_text() == "free"


def test_an_error_of_another_kind_is_not_taken_for_that(refused, monkeypatch):
    flock_that_fails(monkeypatch, errno.EIO)
    assert "Input/output error" in refused(train.main, *CELL)


def test_a_lock_file_is_touched_and_set_free(no_flock, monkeypatch):
    """While it is touched it is alive, though the file system's clock is an hour off when we look."""
    monkeypatch.setattr(locks, "BEAT", 0.2)
    with locked(Path()):
        (path,) = there(".lock.*", ".")
        assert path.name == ".lock.1" and ME in path.read_text()
        first = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns > first, 5)
        for hours in (-1, 1):  # as it looks until it is touched again
            os.utime(path, (time.time() + 3600 * hours,) * 2)
            with pytest.raises(Held, match=f"locked by {ME}"), locked(Path()):
                pass
    assert path.read_text() == "free"
    with locked(Path()):
        assert lock_files() == [".lock.2"]


def test_a_lock_of_a_living_process_elsewhere_is_waited_for_whatever_our_clock_says(no_flock, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    path = lock_file(3, ELSEWHERE)
    with pytest.raises(Held, match="locked by pid 7 on host other"), locked(Path()):
        pass
    threading.Timer(0.3, path.write_text, ["free"]).start()
    with locked(Path(), patience=20):
        assert lock_files() == [".lock.4"]


def test_a_dead_process_of_this_machine_is_replaced_at_once(no_flock):
    """On another machine or in another container, which may have this one's name, its number means nothing here."""
    path = lock_file(3, f"{DEAD} of another boot")
    with pytest.raises(Held), locked(Path()):
        pass
    path.write_text(DEAD)
    lock_file(2, DEAD)  # killed before it had removed it
    with locked(Path()):
        assert lock_files() == [".lock.4"]


@pytest.mark.parametrize("hours, text", [(-1, ELSEWHERE), (1, ELSEWHERE), (-1, "")])
def test_a_lock_untouched_for_long_is_taken_over_whatever_the_clock_says(hours, text, no_flock):
    """In the past: nobody has touched it. In the future: the clock has been set back, and nobody has since.

    An empty one is of a process that was killed before it had written it.
    """
    os.utime(lock_file(3, text), (time.time() + 3600 * hours,) * 2)
    with locked(Path()):
        assert lock_files() == [".lock.4"]


def test_whoever_was_taken_for_dead_writes_nothing(no_flock):
    file = Path("a")
    with locked(Path()):
        write_atomic(file, b"1")
        lock_file(2, locks.FREE)  # by a process that is done by now
        with pytest.raises(Lost, match="taken over by another process while"):
            locks.check(Path("../" + Path.cwd().name))
        lock_file(2, ELSEWHERE)
        with pytest.raises(Lost, match="taken over by pid 7 on host other while"):
            write_atomic(file, b"2")
    assert file.read_bytes() == b"1" and Path(".lock.2").read_text() == ELSEWHERE
    assert not there("*.tmp", ".")
    write_atomic(file, b"3")  # held no more, so no concern of the lock's


def test_a_slow_taker_gives_way(no_flock, monkeypatch):
    """It saw number 3 dead; meanwhile another took 4, ended, and a third took 5: its own 4 is no lock."""
    lock_file(5, ELSEWHERE)
    newest, seen = locks._newest, [3]
    monkeypatch.setattr(locks, "_newest", lambda folder: seen.pop() if seen else newest(folder))
    monkeypatch.setattr(locks, "_can_be_taken", lambda path: path.suffix == ".3")
    with pytest.raises(Held), locked(Path()):
        pass
    assert lock_files() == [".lock.5"]


@times(20, few=1)
def test_of_many_takers_one_is_in_at_a_time(trial):
    """Five processes take and leave one lock for four seconds; a dead one's file is there at first."""
    lock_file(1, DEAD)
    takers = [python("-c", START.format(NO_FLOCK) + TAKER, ROOT) for _ in range(5)]
    statuses, outputs, _ = zip(*map(ended, takers), strict=True)
    assert statuses == (0,) * 5 and "".join(outputs).count("in") > 20


@times(20, few=1)
def test_of_eight_that_find_a_dead_lock_one_wins(trial, no_flock):
    lock_file(1, DEAD)
    start = threading.Barrier(8)

    def take(_):
        start.wait()
        with contextlib.suppress(Held):
            return locks._take_number(Path())

    with ThreadPoolExecutor(8) as pool:
        assert [n for n in pool.map(take, range(8)) if n] == [2]
    assert lock_files() == [".lock.2"]


def test_256_locks_take_a_file_each(with_flock):
    files = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as held:
        for folder in map(Path, map(str, range(256))):
            folder.mkdir()
            held.enter_context(locked(folder))
        assert len(os.listdir("/proc/self/fd")) - files <= 256


@times(20, few=1)
def test_a_run_that_another_process_holds(trial, with_flock, passes, refused):
    """It is an error, told at once, if the holder is paused too; the holder dead, the run is trained."""
    (run,) = new_runs(ONE)
    holder = python("-c", HOLDER.format("" if with_flock else NO_FLOCK), ROOT, run.path)
    assert holder.stdout.readline() == "held\n"
    if with_flock:
        holder.send_signal(signal.SIGSTOP)
    who = f"pid {holder.pid} on host {socket.gethostname()}"
    assert f"locked by {who}" in refused(train.main, *ONE)
    kill(holder)
    passes(train.main, *ONE)
    assert run.status == "finished"


def test_in_a_grid_it_is_a_note(with_flock, script, refused, monkeypatch):
    """Cells that train together may all be another process's, and so may all of a process's share."""
    runs = new_runs(GRID)
    for n in (3, 1, 0):
        with contextlib.ExitStack() as held:
            for run in runs[:n]:
                held.enter_context(run.locked())
            status, _, err = script(train.main, *GRID, "--cells_at_once", "3")
        assert status == 0 and err.count("locked by") == err.count("it trains that one") == n and "error" not in err
        assert [run.status for run in runs] == ["unfinished"] * n + ["finished"] * (3 - n)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with runs[0].locked():
        status, _, err = script(train.main, *GRID, "--overwrite")
        assert status == 0 and "it trains that one" in err and "error" not in err
        monkeypatch.delenv("WORLD_SIZE")
        assert "locked by" in refused(train.main, *ONE, "--overwrite")
        status, out, _ = script(train.main, *GRID, "--overwrite")
        assert status == 0 and "cells at once" not in out  # the others are trained as all would be, one by one


@times(5, few=1)
def test_paused_for_longer_than_patience_it_stops_before_it_writes(trial, no_flock):
    """A training asleep by SIGSTOP, whose run is taken over meanwhile, wakes to one line; slow as it sleeps."""
    before = NO_FLOCK + "\nfrom utils import locks; locks.BEAT = 0.1"
    sleeper = launch("train.py", *CELL, "--num_epochs", "4000", before=before)
    wait_until(lambda: there("resume.pth") or sleeper.poll() is not None)
    time.sleep(0.05 * trial)
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(0.6)  # so that it has not been touched for longer than STALE
    (run,) = map(Run.open, Path("runs/singles").iterdir())
    with run.locked():
        files = {path: path.read_bytes() for path in run.path.iterdir()}
        sleeper.send_signal(signal.SIGCONT)
        status, _, err = ended(sleeper)
        assert status == 2 and f"taken over by {ME}" in err.splitlines()[-1]
        assert {path: path.read_bytes() for path in run.path.iterdir()} == files  # not even a curve went on
        run.load_state()
