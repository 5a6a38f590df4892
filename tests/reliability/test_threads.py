"""Threads: as many as there are free cores; the number a training began with, whatever the machine does now."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import CELL, ROOT, weights
from tests.reliability.trials import ended, launch, quick, there, times, wait_until
from utils import threads
from utils.files import load_tensors, read_json
from utils.threads import Moment, free_cores

needs_two = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread")


@pytest.mark.parametrize(
    "idle, own, cores, free",
    [(20, 0, 2, 2), (15, 5, 2, 2), (0, 10, 2, 1), (10, 0, 2, 1), (0, 0, 2, 1), (640, 0, 4, 4), (340, 300, 64, 64)]
    + [(300, 40, 64, 34), (4, 12, 2, 2), (0, 13, 2, 1), (0, 20, 2, 2)],
)
def test_free_cores_were_idle_or_computed_for_us(idle, own, cores, free):
    """Over ten seconds; cores that others used are not free."""
    before = Moment(100.0, 1000.0, 7.0)
    assert free_cores(before, Moment(110.0, 1000.0 + idle, 7.0 + own), cores) == free


@pytest.mark.skipif(threads.moment() is None, reason="reads what Linux tells")
def test_the_systems_figures_add_up():
    """A second of our own computing on one core: at most the others were idle meanwhile."""
    before = threads.moment()
    while threads.moment().own - before.own < 1:
        sum(range(10_000))
    now = threads.moment()
    passed, cores = now.clock - before.clock, len(os.sched_getaffinity(0))
    assert passed >= 0.95 and 1 <= now.own - before.own < 1.5
    assert 0 <= now.idle - before.idle <= (cores - 1) * passed + 0.5


def test_what_is_chosen(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    now = [Moment(0.0, 0.0, 0.0)]
    monkeypatch.setattr(threads, "moment", lambda: now[0])
    monkeypatch.setattr(threads, "_before", now[0])
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    now[0] = Moment(0.5, 4.0, 0.0)
    assert threads.choose() == 1  # too early to tell: as it is, which is 1 in tests
    now[0] = Moment(2.0, 12.0, 1.0)
    assert threads.choose() == 6  # 12 of 16 seconds idle, and half a core is ours
    now[0] = Moment(12.0, 12.0, 31.0)
    assert threads.choose() == 3  # since then
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    now[0] = Moment(22.0, 92.0, 31.0)
    assert threads.choose() == 2  # in a container with a quota of two
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.choose() == 1


def test_openmp_is_told_before_torch_is_loaded():
    """It reads its settings when it is loaded, so no script may import torch before."""
    for script in (
        "train",
        "train_classifier",
        "eval_beta_grid",
        "eval_beta_single",
        "plot_eval",
        "utils.benchmark.__main__",
    ):
        code = (
            "import sys, os\nclass Spy:\n    def find_spec(self, name, *_):\n        if name in ('torch', 'numpy'):\n"
            f"            print(name, os.environ.get('GOMP_SPINCOUNT')); os._exit(0)\n"
            f"sys.meta_path.insert(0, Spy())\nsys.path.insert(0, {str(ROOT)!r})\nimport {script}"
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
        assert told.split()[1] == threads.SPINS, (script, told)


def test_threads_as_asked(script):
    import train

    before = torch.get_num_threads()
    try:
        assert script(train.main, *CELL, "--threads", "2")[0] == 0
        assert torch.get_num_threads() == 2
        assert read_json(there("training.json")[0])["threads"] == 2
    finally:
        torch.set_num_threads(before)
    for wrong in ("0", "x", "5000"):
        status, _, err = script(train.main, *CELL, "--threads", wrong)
        assert status == 2 and err.startswith("error: --threads: must be") and err.count("\n") == 1


@needs_two
@times(25, few=1)
def test_a_training_goes_on_with_the_threads_it_began_with(trial, undisturbed):
    """Killed at any moment, its machine loaded now: two threads sum in another order than one, so bits would differ."""
    assert ended(quick("train.py", *CELL, "--threads", 2, "--runs_dir", "whole"))[0] == 0
    expected = weights(there("vae.pth", "whole")[0].parent)
    assert expected != undisturbed  # by one thread: else this could not fail
    process = launch("train.py", *CELL, "--threads", 2)
    wait_until(lambda: there("resume.pth") or process.poll() is not None)
    time.sleep(0.02 * trial)
    process.send_signal(signal.SIGKILL if trial % 2 else signal.SIGTERM)
    process.communicate()
    assert there("vae.pth") or load_tensors(there("resume*.pth")[0])["threads"] == 2  # one at least, while it is saved
    status, out, err = ended(quick("train.py", *CELL, OMP_NUM_THREADS="1"))
    assert status == 0, err
    assert weights(there("vae.pth")[0].parent) == expected


def test_another_number_is_told():

    process = launch("train.py", *CELL, "--threads", 2, "--num_epochs", "500")
    wait_until(lambda: there("resume.pth") or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    process = launch("train.py", *CELL, "--threads", 1, "--num_epochs", "500")
    wait_until(lambda: len(there("events.out.*")) > 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, out, _ = ended(process)
    assert "--threads 1: the checkpoint was saved with 2; last digits may differ" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="knows what is free on Linux only")
def test_the_benchmark_shows_an_idle_and_a_loaded_machine():
    from tests.conftest import python

    command = ["-m", "utils.benchmark", "threads", "--n", 2, "--dataset", "Digits", "--conv_channels", 4]
    status, out, err = ended(python(*command, "--z_dims", 4, "--batch_size", 32, cwd=ROOT), 600)
    assert status == 0, err
    assert "as the machine is" in out and re.search(r"beside \d+ busy processes", out)
    assert len(re.findall(r"^\d+ threads?.* ms ", out, re.MULTILINE)) == 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
@pytest.mark.parametrize("kept, surroundings", [(True, {}), (False, {"MALLOC_ARENA_MAX": "8"})], ids=["kept", "asked"])
def test_freed_memory_is_kept_unless_the_user_tunes_it(kept, surroundings):
    """Resident bytes before, with and after 400 MB."""
    code = """
from utils.memory import keep_freed
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
keep_freed()
print(resident(), end=" ")
held = [b"1" * 40_000_000 for _ in range(10)]
print(resident(), end=" ")
del held
print(resident())
"""
    others = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    said = subprocess.check_output([sys.executable, "-c", code], env=others | surroundings, cwd=ROOT, text=True)
    before, held, after = map(int, said.split())
    assert held - before > 390e6 and (after - before > 390e6) is kept and (after - before < 50e6) is not kept
