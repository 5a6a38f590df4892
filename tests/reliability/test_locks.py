"""Locks, with flock and without: one holder at a time, the dead replaced, the paused told, the held told of."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import train
from tests.conftest import CELL
from tests.reliability.trials import ended, kill, launch, quick, there, times, wait_until
from utils import locks
from utils.cli import grid_configs
from utils.config import Config
from utils.files import write_atomic
from utils.locks import Held, Lost, locked
from utils.runs import Run

WITHOUT = "import fcntl, os\ndef flock(*_): raise OSError({}, os.strerror({}))\nfcntl.flock = flock"
NO_FLOCK = WITHOUT.format(errno.ENOLCK, errno.ENOLCK)
QUICK = "\nfrom utils import locks; locks.BEAT, locks.STALE = 0.1, 1.0"


@pytest.fixture
def no_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "STALE", 0.5)
    locks._tell_of_lock_files.cache_clear()


def other(number: int, text: str) -> Path:
    """A lock file of another process."""
    path = Path(f".lock.{number}")
    path.write_text(text)
    return path


def elsewhere(pid: int = 7) -> str:
    return f"pid {pid} on host other\nanother machine"


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EBADF", "EINVAL"])
def test_without_flock_a_training_goes_on_with_a_note(number, script, monkeypatch):
    def flock(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", flock)
    locks._tell_of_lock_files.cache_clear()
    flags = [*CELL[:4], "--num_epochs", "2", "--batch_size", "2000", "--device", "cpu", "--beta_y", "1", "2"]
    status, _, err = script(train.main, *flags)
    assert status == 0 and err.count("note: this file system has no flock") == 1 and err.count("\n") == 1
    assert [p.read_text() for p in there(".lock.*")] == ["free"] * 2
    assert len(there("vae.pth")) == 2


def test_an_error_of_another_kind_is_not_taken_for_that(script, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    status, _, err = script(train.main, *CELL)
    assert status == 1 and "Input/output error" in err and "Traceback" not in err


def test_a_lock_file_is_touched_and_set_free(no_flock):
    with locked(Path()):
        (path,) = there(".lock.*", ".")
        assert path.name == ".lock.1" and f"pid {os.getpid()} on host {socket.gethostname()}" in path.read_text()
        first = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns > first, 5)
        with pytest.raises(Held, match=f"locked by pid {os.getpid()} on host"), locked(Path()):
            pass
    assert path.read_text() == "free"
    with locked(Path()):
        assert [p.name for p in there(".lock.*", ".")] == [".lock.2"]


def test_a_lock_of_a_living_process_elsewhere_is_waited_for(no_flock):
    path = other(3, elsewhere())
    with pytest.raises(Held, match="locked by pid 7 on host other"), locked(Path()):
        pass
    threading.Timer(0.3, path.write_text, ["free"]).start()
    with locked(Path(), patience=20):
        assert there(".lock.*", ".") == [Path(".lock.4")]


def test_a_dead_process_of_this_machine_is_replaced_at_once(no_flock):
    dead = launch("train.py", "--help")
    ended(dead)
    other(3, f"pid {dead.pid} on host {socket.gethostname()}\n{locks._machine()}")
    with locked(Path()):
        assert there(".lock.*", ".") == [Path(".lock.4")]


def test_a_process_of_another_container_of_the_same_name_is_not_taken_for_dead(no_flock):
    """Its number means nothing here."""
    other(3, f"pid 999999 on host {socket.gethostname()}\n another boot, another namespace")
    with pytest.raises(Held), locked(Path()):
        pass


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_lock_untouched_for_long_is_taken_over_whatever_the_clock_says(hours, no_flock):
    """In the past: nobody has touched it. In the future: the clock has been set back, and nobody has since."""
    path = other(3, elsewhere())
    then = time.time() + hours * 3600
    os.utime(path, (then, then))
    with locked(Path()):
        assert there(".lock.*", ".") == [Path(".lock.4")]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_lock_that_is_touched_is_alive_whatever_the_clock_says(hours, no_flock, monkeypatch):
    """The file system's clock is an hour off when we look; the holder touches its file as ever."""
    monkeypatch.setattr(locks._LockFile, "_now", lambda self: time.time_ns() + int(hours * 3600e9))
    path, done = other(3, elsewhere()), threading.Event()

    def beat():
        while not done.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held), locked(Path()):
            pass
    finally:
        done.set()
        thread.join()


def test_this_machines_own_clock_does_not_matter(no_flock, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    other(3, elsewhere())
    with pytest.raises(Held), locked(Path()):
        pass


def test_whoever_was_taken_for_dead_writes_nothing(no_flock):
    with locked(Path()):
        write_atomic(Path("a"), b"1")
        other(2, elsewhere())  # as another process would, after a while
        with pytest.raises(Lost, match="taken over by pid 7 on host other while this process was paused"):
            write_atomic(Path("a"), b"2")
        with pytest.raises(Lost):
            locks.check(Path("../" + Path.cwd().name))
    assert Path("a").read_bytes() == b"1" and Path(".lock.2").read_text() == elsewhere()
    assert not there("*.tmp", ".")
    write_atomic(Path("a"), b"3")  # held no more, so no concern of the lock's


def test_a_taker_that_is_done_by_now_is_another_process(no_flock):
    with locked(Path()):
        other(2, locks.FREE)
        with pytest.raises(Lost, match="taken over by another process while"):
            locks.check(Path())


def test_a_slow_taker_gives_way(no_flock, monkeypatch):
    """It saw number 3 dead; meanwhile another took 4, ended, and a third took 5: its own 4 is no lock."""
    other(5, elsewhere())
    highest, seen = locks._LockFile._highest, [3]
    monkeypatch.setattr(locks._LockFile, "_highest", lambda self: seen.pop() if seen else highest(self))
    monkeypatch.setattr(locks._LockFile, "_can_be_taken", lambda self, number: number == 3)
    with pytest.raises(Held), locked(Path()):
        pass
    assert there(".lock.*", ".") == [Path(".lock.5")]


TAKER = """
import sys, os, time
sys.path.insert(0, sys.argv[1])
{no_flock}
from pathlib import Path
from utils.locks import locked, Held, check
end = time.monotonic() + 6
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


def test_a_held_cell_is_a_note_where_it_is_all_of_a_processs_share(script, monkeypatch):
    grid = [*CELL, "--num_epochs", "1", "--beta_y", "1", "2", "3"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert script(train.main, *grid)[0] == 0
    (first,) = Path("runs/singles").iterdir()
    (first / "vae.pth").unlink()
    with locked(first):
        status, _, err = script(train.main, *grid, "--overwrite")
    assert status == 0 and "locked by" in err and "it trains that one" in err and "error" not in err


def test_a_finished_run_that_is_held_is_told_of_if_it_is_to_be_trained_again(script):
    assert script(train.main, *CELL, "--num_epochs", "1")[0] == 0
    (run,) = Path("runs/singles").iterdir()
    with locked(run):
        status, _, err = script(train.main, *CELL, "--num_epochs", "1", "--overwrite")
    assert status == 1 and err.startswith("error: ") and "locked by" in err


@times(20, few=1)
def test_of_many_takers_one_is_in_at_a_time(trial):
    """Five processes take and leave one lock for six seconds; a dead one's file is there at first."""
    other(1, f"pid 999999999 on host x\n{locks._machine()}")
    from tests.conftest import ROOT, python

    code = TAKER.format(no_flock=NO_FLOCK)
    takers = [python("-c", code, ROOT) for _ in range(5)]
    results = [ended(taker) for taker in takers]
    assert all(status == 0 for status, _, _ in results), results
    assert sum(out.count("in") for _, out, _ in results) > 20


@times(20, few=1)
def test_of_two_that_find_a_dead_lock_one_wins(trial, no_flock):
    other(1, f"pid 999999999 on host x\n{locks._machine()}")
    results, start = [], threading.Barrier(8)

    def take():
        lock = locks._LockFile(Path())
        start.wait()
        results.append(lock._take())

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(results) == 1 and there(".lock.*", ".") == [Path(".lock.2")]


# --- several processes on one grid ---


HOLDER = "import sys, time; sys.path.insert(0, sys.argv[1])\n{}\nfrom utils.runs import Run; from pathlib import Path\n"
HOLDER += "with Run.open(Path(sys.argv[2])).locked():\n    print('held', flush=True); time.sleep(600)"


def holding(path: Path, before: str = ""):
    from tests.conftest import ROOT, python

    process = python("-c", HOLDER.format(before), ROOT, path)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("before", ["", NO_FLOCK])
@times(20, few=1)
def test_a_run_that_another_process_holds(before, trial):
    """Alone it is an error, told at once; its holder dead, it is trained."""
    flags = [*CELL[:4], "--num_epochs", "1", "--batch_size", "2000", "--device", "cpu"]
    run = Run.of(Config(conv_channels=2, z_dims=3, num_epochs=1, batch_size=2000), "runs")
    run.create()
    holder = holding(run.path, before)
    status, _, err = ended(quick("train.py", *flags, before=before))
    assert status == 1 and f"locked by pid {holder.pid} on host {socket.gethostname()}" in err
    kill(holder)
    status, _, err = ended(quick("train.py", *flags, before=before))
    assert status == 0 and run.status == "finished", err


@pytest.mark.parametrize("before", ["", NO_FLOCK])
def test_in_a_grid_it_is_a_note(before):
    flags = [*CELL[:4], "--num_epochs", "1", "--batch_size", "2000", "--device", "cpu", "--beta_y", "1", "2", "3"]
    run = Run.of(Config(conv_channels=2, z_dims=3, num_epochs=1, batch_size=2000, beta_y=2.0), "runs")
    run.create()
    holder = holding(run.path, before)
    status, _, err = ended(quick("train.py", *flags, before=before))
    assert status == 0 and f"note: {run.path}: locked by pid {holder.pid} on host" in err
    assert len(there("vae.pth")) == 2 and run.status == "unfinished"
    kill(holder)
    status, _, err = ended(quick("train.py", *flags, before=before))
    assert status == 0 and len(there("vae.pth")) == 3 and "locked by" not in err


@times(5, few=1)
def test_paused_for_longer_than_patience_it_stops_before_it_writes(trial):
    """Asleep by SIGSTOP, it is taken for dead on another machine (so its number is hidden), and wakes to one line."""
    hidden = "\nlocks._machine = lambda: str(os.getpid())"
    before = NO_FLOCK + QUICK + hidden
    flags = [*CELL, "--num_epochs", "4000"]
    sleeper = launch("train.py", *flags, before=before)
    wait_until(lambda: there("resume.pth") or sleeper.poll() is not None)
    time.sleep(0.05 * trial)
    sleeper.send_signal(signal.SIGSTOP)
    try:
        time.sleep(1.5)  # so that it has not been touched for longer than STALE
        taker = launch("train.py", *flags, before=before)
        wait_until(lambda: there(".lock.2") or taker.poll() is not None)
        wait_until(lambda: len(there("events.out.*")) == 2 or taker.poll() is not None)
        theirs = there("events.out.*")
        sizes = {path: path.stat().st_size for path in theirs}
    finally:
        sleeper.send_signal(signal.SIGCONT)
    status, _, err = ended(sleeper)
    assert status == 2 and err.splitlines()[-1].startswith("error: ") and f"taken over by pid {taker.pid}" in err
    own = min(theirs, key=lambda path: path.stat().st_mtime)
    assert own.stat().st_size == sizes[own]  # not even a curve went on
    assert taker.poll() is None
    taker.send_signal(signal.SIGTERM)
    status, _, err = ended(taker)
    assert status == 143 and "saved at epoch" in err, err
    Run.open(there("config.json")[0].parent).load_state()


def test_paused_with_flock_it_keeps_its_lock():
    process = launch("train.py", *CELL, "--num_epochs", "4000")
    wait_until(lambda: there("resume.pth") or process.poll() is not None)
    process.send_signal(signal.SIGSTOP)
    try:
        status, _, err = ended(quick("train.py", *CELL, "--num_epochs", "4000"))
        assert status == 1 and f"locked by pid {process.pid}" in err
    finally:
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_a_folder_that_was_being_made_is_removed_once_its_maker_is_dead():
    before = "import os, utils.runs\nutils.runs.write_text = lambda *_: os.kill(os.getpid(), 9)"
    assert ended(quick("train.py", *CELL, before=before))[0] == -signal.SIGKILL
    assert len(there("*.tmp")) == 1
    mine = locks.unfinished_folder(Path("runs/singles/run"))
    others = mine.with_name(".1234567-89abcdef-01234567.tmp")  # of another machine
    mine.mkdir()
    others.mkdir()
    assert ended(quick("train.py", *CELL))[0] == 0
    assert {p.name for p in there("*.tmp")} == {mine.name, others.name}


def test_cells_that_are_all_held_are_noted(script):
    """Cells that train together may all be another process's."""
    flags = [*CELL, "--beta_y", "1", "2", "3", "--cells_at_once", "3"]
    runs = [Run.of(config, "runs") for config in grid_configs(train.parse_args(flags))]
    with contextlib.ExitStack() as held:
        for run in runs:
            run.create()
            held.enter_context(run.locked())
        status, _, err = script(train.main, *flags)
    assert status == 0 and err.count("note: ") == 3 and err.count("it trains that one") == 3
    assert script(train.main, *flags)[0] == 0
