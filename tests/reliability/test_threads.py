"""Threads: as many as asked for; a training goes on with the number that it began with."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from joblib import cpu_count

import train
import train_classifier
from tests.conftest import EVALUATION, ROOT, TINY, all_weights, popen
from tests.reliability.trials import ended, first, kill, launch, there, times, wait_until
from utils.errors import SPINS
from utils.files import load_tensors, read_json
from utils.machine import prepare

SQUARE = ["--beta_y", "0.5", "2", "--beta_z", "0.5", "2"]


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


def test_numbers_that_are_nearly_0_are_0_in_all_threads():
    """A layer that is given up has such gradients, and their products take twenty times as long."""
    says = "prepare('cpu', 2); print((torch.full((2**20,), 1e-40) * 1).any().item())"
    code = f"import torch\nfrom utils.machine import prepare\n{says}"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def test_openmp_is_told_to_wait_passively_before_torch_is_loaded():
    """A torch that says what it finds, and is no more; so are numpy's and scipy's products told of their thread."""
    says = "print(os.environ.get('GOMP_SPINCOUNT'), os.environ['OPENBLAS_NUM_THREADS'])"
    Path("torch.py").write_text(f"import os\n{says}\nos._exit(0)")
    env = env_without("OMP_", "GOMP_") | {"PYTHONPATH": os.getcwd()}
    for script in ("train.py", "train_classifier.py", "plot_eval.py", "eval_beta_grid.py"):
        flags = [] if script.startswith("train") else ["--run_batch_name", "b"]
        command = [sys.executable, ROOT / script, *flags]
        for policy, spins in (({}, SPINS), ({"OMP_WAIT_POLICY": "active"}, "None")):
            assert subprocess.check_output(command, env=env | policy, text=True).split() == [spins, "1"]


def test_a_training_goes_on_with_the_threads_it_began_with(passes, refused, interrupted):
    flags = [*TINY, "--save_every", "1"]
    for n in (1, 2):
        passes(train.main, *flags, "--threads", n, "--runs_dir", f"by{n}")
        assert torch.get_num_threads() == read_json(there("training.json", f"by{n}")[0])["sessions"][0]["threads"] == n
    assert all_weights("by1") != all_weights("by2")  # they sum in another order: else what follows could not fail
    by_one, by_two = (read_json(there("training.json", f"by{n}")[0])["test"] for n in (1, 2))
    assert by_one == pytest.approx(by_two, rel=1e-5)
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


def figures(folder: str) -> list[dict]:
    """What the training.json files of a folder say of the models."""
    results = (read_json(path) for path in there("training.json", folder))
    return [{name: result[name] for name in ("epoch", "parameters", "train", "test")} for result in results]


@pytest.fixture
def crowd():
    """Has two processes compute beside the test, when it is called."""
    return lambda: [popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]


@pytest.mark.parametrize("flags", first(1, [], ["--threads", "1"], ["--threads", "2"]))
@times(10)
def test_the_same_bytes_whatever_else_the_machine_does(trial, flags, crowd, passes):
    """A grid by one process alone, and by two beside a crowd of which one is killed: long, since two start."""
    command, threads = [*TINY, "--num_epochs", "3", "--save_every", "1", *SQUARE], int((flags or [0, cpu_count()])[1])
    passes(train.main, *command, "--threads", threads, "--runs_dir", "idle")
    crowd()
    command = ["train.py", *command, *flags]
    shared = [{"OMP_NUM_THREADS": None, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    pair = [launch(*command, "--runs_dir", "busy", **variables) for variables in shared]
    wait_until(lambda: there("resume.pth", "busy") or pair[trial % 2].poll() is not None)
    kill(pair[trial % 2])
    assert ended(pair[1 - trial % 2])[0] == 0
    passes(train.main, *command[1:], "--threads", threads, "--runs_dir", "busy")  # what the other one would have done
    assert all_weights("busy") == all_weights("idle") and len(all_weights("idle")) == 4
    assert figures("busy") == figures("idle")
    sessions = [session for path in there("training.json", "busy") for session in read_json(path)["sessions"]]
    assert {session["threads"] for session in sessions} == {threads}


@pytest.mark.slow
@times(10, 10)
def test_the_same_results_whatever_else_the_machine_does(trial, crowd, passes):
    """All steps of the evaluation of two cells, with one worker process alone and with two beside a crowd."""
    passes(train.main, *TINY, "--beta_y", "1", "2")
    passes(train_classifier.main, "--dataset", "Digits", "--num_epochs", "1", "--device", "cpu")
    shutil.copytree("runs", "busy")
    command = ["eval_beta_grid.py", *EVALUATION[:2], "--device", "cpu", "--all", "--with_classifier"]
    assert ended(launch(*command, OMP_NUM_THREADS=None), 600)[0] == 0
    crowd()
    assert ended(launch(*command, "--runs_dir", "busy", "--cpu_n", 2, OMP_NUM_THREADS=None), 600)[0] == 0
    for name in ("metrics.json", "eval_results.csv", "latents.npz", "per_image.npz"):
        ours, theirs = ([path.read_bytes() for path in there(name, folder)] for folder in ("busy", "runs"))
        assert ours == theirs and ours


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
