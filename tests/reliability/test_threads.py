"""Threads: as many as asked for; a training goes on with the number that it began with."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import ROOT, TINY, all_weights
from tests.reliability.trials import there
from utils.errors import SPINS
from utils.files import load_tensors, read_json
from utils.machine import prepare


def env_without(*names: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(names)}


def test_threads_are_a_setting(monkeypatch):
    """Those asked for; else OMP_NUM_THREADS, which torch has read; else the cores of this process."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    for variable, flag, threads in ((None, None, 3), (None, 2, 2), ("1", 2, 2), ("1", None, 1)):
        torch.set_num_threads(1)
        monkeypatch.setattr(os, "environ", env_without("OMP") | ({"OMP_NUM_THREADS": variable} if variable else {}))
        prepare("cpu", flag)
        assert torch.get_num_threads() == threads


def test_openmp_is_told_to_wait_passively_before_torch_is_loaded():
    """A torch that says what it finds, and is no more."""
    Path("torch.py").write_text("import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nos._exit(0)")
    env = env_without("OMP_", "GOMP_") | {"PYTHONPATH": os.getcwd()}
    for script in ("train.py", "train_classifier.py", "plot_eval.py", "eval_beta_grid.py"):
        flags = [] if script.startswith("train") else ["--run_batch_name", "b"]
        command = [sys.executable, ROOT / script, *flags]
        for policy, spins in (({}, SPINS), ({"OMP_WAIT_POLICY": "active"}, "None")):
            assert subprocess.check_output(command, env=env | policy, text=True).split() == [spins]


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
    code = "from utils.machine import keep_freed_memory as keep\nkeep()\nfor size in (0, 40_000_000, 0):\n"
    code += "    held = [b'1' * size for _ in range(10)]\n"
    code += "    print(int(open('/proc/self/statm').read().split()[1]) * 4096)"
    for tuning, least, most in (({}, 390e6, 500e6), ({"MALLOC_ARENA_MAX": "8"}, -1e6, 50e6)):
        env = env_without("MALLOC_") | tuning
        told = subprocess.check_output([sys.executable, "-c", code], env=env, cwd=ROOT, text=True)
        before, held, after = map(int, told.split())
        assert held - before > 390e6 and least < after - before < most
