"""Threads: as many as there are free cores; the number a training began with, whatever the machine does now."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

import train
from tests.conftest import ROOT, TINY, all_weights
from tests.reliability.trials import there
from utils import threads
from utils.files import load_tensors, read_json
from utils.threads import Moment, free_cores

IDLE_OWN_CORES_FREE = [(20, 0, 2, 2), (15, 5, 2, 2), (0, 10, 2, 1), (10, 0, 2, 1), (0, 0, 2, 1), (640, 0, 4, 4)]
IDLE_OWN_CORES_FREE += [(340, 300, 64, 64), (300, 40, 64, 34), (4, 12, 2, 2), (0, 13, 2, 1), (0, 20, 2, 2)]


def test_free_cores_were_idle_or_computed_for_us():
    """Over ten seconds; cores that others used are not free."""
    for idle, own, cores, free in IDLE_OWN_CORES_FREE:
        assert free_cores(Moment(0.0, 9.0, 7.0), Moment(10.0, 9.0 + idle, 7.0 + own), cores) == free


@pytest.mark.skipif(threads.moment() is None, reason="reads what Linux tells")
def test_the_systems_figures_add_up():
    """A while of our own computing on one core: at most the others were idle meanwhile."""
    before = now = threads.moment()
    while now.own - before.own < 0.5:
        now = threads.moment()
    passed, cores = now.clock - before.clock, len(os.sched_getaffinity(0))
    assert passed >= 0.45 and 0.5 <= now.own - before.own < 0.9
    assert 0 <= now.idle - before.idle <= (cores - 1) * passed + 0.5


def test_what_is_chosen(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "_before", Moment(0.0, 0.0, 0.0))
    for moment, cores, chosen in (
        (Moment(0.5, 4.0, 0.0), 8, 1),  # too early to tell: as it is, which is 1 in tests
        (Moment(2.0, 12.0, 1.0), 8, 6),  # 12 of 16 seconds idle, and half a core is ours
        (Moment(12.0, 12.0, 31.0), 8, 3),  # since then
        (Moment(22.0, 92.0, 31.0), 2, 2),  # in a container with a quota of two
    ):
        monkeypatch.setattr(threads, "moment", lambda: moment)  # noqa: B023
        monkeypatch.setattr("joblib.cpu_count", lambda: cores)  # noqa: B023
        assert threads.choose() == chosen
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.choose() == 1


def test_openmp_is_told_before_torch_is_loaded():
    """It reads its settings when it is loaded, so no script may import torch before: here it cannot be imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); sys.modules |= {'torch': None, 'numpy': None}\n"
    code += "try: __import__(sys.argv[2])\nexcept ImportError: print(os.environ.get('GOMP_SPINCOUNT'))"
    scripts = [*(path.stem for path in ROOT.glob("*.py")), "utils.benchmark.__main__"]
    assert len(scripts) == 6
    for script in scripts:
        told = subprocess.check_output([sys.executable, "-c", code, ROOT, script], env=env, text=True)
        assert told.split() == [threads.SPINS], script


def test_a_training_goes_on_with_the_threads_it_began_with(passes, refused, interrupted):
    flags = [*TINY, "--save_every", "1"]
    for n in (1, 2):
        passes(train.main, *flags, "--threads", n, "--runs_dir", f"by{n}")
        assert torch.get_num_threads() == read_json(there("training.json", f"by{n}")[0])["threads"] == n
    assert all_weights("by1") != all_weights("by2")  # they sum in another order: else what follows could not fail
    interrupted(5, *flags, "--threads", 2)
    assert load_tensors(there("resume.pth")[0])["threads"] == 2
    torch.set_num_threads(1)
    shutil.copytree("runs", "other")
    passes(train.main, *flags)
    assert all_weights() == all_weights("by2")
    told = passes(train.main, *flags, "--runs_dir", "other", "--threads", 1)
    assert "--threads 1: the checkpoint was saved with 2" in told
    for wrong in ("0", "x", "5000"):
        assert "--threads" in refused(train.main, *TINY, "--threads", wrong)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_kept_unless_the_user_tunes_it():
    """Resident bytes before, with and after 400 MB."""
    code = "from utils.memory import keep_freed\nkeep_freed()\nfor size in (0, 40_000_000, 0):\n"
    code += "    held = [b'1' * size for _ in range(10)]\n"
    code += "    print(int(open('/proc/self/statm').read().split()[1]) * 4096)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    for kept, more in ((True, {}), (False, {"MALLOC_ARENA_MAX": "8"})):
        told = subprocess.check_output([sys.executable, "-c", code], env=env | more, cwd=ROOT, text=True)
        before, held, after = map(int, told.split())
        assert held - before > 390e6 and (after - before > 390e6) is kept and (after - before < 50e6) is not kept
