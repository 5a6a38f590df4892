"""A grid meets what happens in hours: kills, full disks, folders that become read-only, files that were damaged."""

import contextlib
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.loading import load_data
from models.classifiers import load_classifier
from tests.conftest import CELL, ROOT, weights
from tests.reliability.trials import (
    ended,
    first,
    kill,
    launch,
    private_mounts,
    quick,
    there,
    times,
    wait_until,
)
from utils.config import Config
from utils.errors import UserError
from utils.files import load_tensors, read_arrays, read_json, write_json
from utils.runs import Run, load_model

needs_mounts = pytest.mark.skipif(not private_mounts(), reason="cannot mount a file system")
NOBODY = 65534


def all_weights(runs_dir="runs") -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in there("vae.pth", runs_dir)}


def last_save() -> float:
    """When a file of weights was last written; such files come and go."""
    times = [0.0]
    for path in there("*.pth"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


# --- kills ---


@pytest.mark.parametrize(
    "kills, cells, epochs, begin",
    [(3, 8, 10, quick), pytest.param(50, 20, 60, launch, marks=pytest.mark.slow)],
    ids=["3 kills", "50 kills"],
)
def test_two_processes_on_a_grid_killed_at_random(kills, cells, epochs, begin):
    """The same command in two processes, of which one is killed whenever something has been saved; the bytes of one."""
    grid = [*CELL[:4], "--num_epochs", epochs, "--batch_size", "400", "--device", "cpu", "--save_every", "2"]
    grid += ["--beta_y", f"0.1:10:{cells // 4}", "--beta_z", "0.1:10:4"]
    assert ended(quick("train.py", *grid, "--runs_dir", "whole"), 1800)[0] == 0
    expected = all_weights("whole")
    assert len(expected) == cells
    chance, done = random.Random(0), 0
    pair = [begin("train.py", *grid) for _ in range(2)]
    while done < kills:
        before = time.time()
        wait_until(lambda: last_save() > before, 300)  # noqa: B023
        time.sleep(chance.uniform(0, 0.5))
        victim = chance.randrange(2)
        if pair[victim].poll() is None:
            kill(pair[victim])
            done += 1
        else:
            pair[victim].communicate()
            assert pair[victim].returncode == 0
        assert len(all_weights()) < cells or done == kills, f"done before the kills were, after {done}"
        pair[victim] = begin("train.py", *grid)
    for process in pair:
        status, _, err = ended(process, 1800)
        assert status == 0, err
    status, out, err = ended(quick("train.py", *grid), 1800)
    assert status == 0 and "locked by" not in err
    assert all_weights() == expected
    assert not there("resume*") and not there("*.tmp")


@times(50, few=0)  # test_threads.py has a quick one
def test_kill_9_of_a_training_by_two_threads(trial):
    threads = ["--threads", "2"]
    assert ended(quick("train.py", *CELL, *threads, "--runs_dir", "whole"))[0] == 0
    process = launch("train.py", *CELL, *threads)
    wait_until(lambda: there("resume.pth") or process.poll() is not None)
    time.sleep(random.Random(trial).uniform(0, 0.7))
    kill(process)
    unfinished = bool(there("resume*.pth"))
    status, out, err = ended(quick("train.py", *CELL, *threads))
    assert status == 0 and ("resuming at epoch" in out) == unfinished, err
    assert list(all_weights().values()) == list(all_weights("whole").values())


WHEN = {
    "mid-batch": "from models.stack import Stack as Where; name = 'step'",
    "mid-save": "from utils.runs import Run as Where; name = 'save_state'",
}
SIGNALLED = """
import os
{where}
real, calls = getattr(Where, name), []
def watched(self, *args):
    calls.append(1)
    if len(calls) == {call}:
        for _ in range({times}):
            os.kill(os.getpid(), {number})
    return real(self, *args)
setattr(Where, name, watched)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("when, twice", [("mid-batch", 1), ("mid-save", 1), ("mid-batch", 2)])
@times(20, few=1)
def test_signals_in_a_batch_in_a_save_and_twice(when, twice, number, trial, undisturbed):
    call = random.Random(trial).randrange(1, 5 if when == "mid-save" else 75)
    before = SIGNALLED.format(where=WHEN[when], call=call, times=twice, number=int(number))
    status, _, err = ended(quick("train.py", *CELL, before=before))
    assert status == 128 + number, err
    assert "saved at epoch" in err and "rerun to continue: python" in err
    status, out, err = ended(quick("train.py", *CELL))
    assert status == 0 and "resuming at epoch" in out, err
    assert weights(there("vae.pth")[0].parent) == undisturbed


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A batch of three evaluated runs; read only."""
    root = tmp_path_factory.mktemp("evaluated")
    grid = [*CELL[:4], "--num_epochs", "2", "--batch_size", "500", "--device", "cpu", "--beta_y", "1", "2", "3"]
    assert ended(quick("train.py", *grid, cwd=root))[0] == 0
    assert ended(quick("eval_beta_grid.py", *EVALUATION, cwd=root))[0] == 0
    return root


EVALUATION = ["--run_batch_name", "singles", "--device", "cpu", "--exclude_fid"]


@times(20, few=1)
def test_kill_9_during_an_evaluation(trial, evaluated):
    """The same command again does what is missing only, and the figures are equal."""
    shutil.copytree(evaluated / "runs", "runs")
    expected = Path("runs/singles/eval_results.csv").read_bytes()
    for path in (*there("metrics.json"), *there("latents.npz"), *there("eval_results.csv")):
        path.unlink()
    process = launch("eval_beta_grid.py", *EVALUATION)
    wait_until(lambda: there("metrics.json") or process.poll() is not None)
    time.sleep(random.Random(trial).uniform(0, 0.5))
    kill(process)
    done = {path: path.stat().st_mtime_ns for path in there("metrics.json") if "mi_y" in read_json(path)["steps"]}
    assert ended(quick("eval_beta_grid.py", *EVALUATION))[0] == 0
    assert Path("runs/singles/eval_results.csv").read_bytes() == expected
    assert {path: path.stat().st_mtime_ns for path in done} == done


# --- disks ---


def contents(folder) -> dict[str, bytes]:
    """Of the files that readers look at."""
    names = ("config.json", "vae.pth", "training.json", "metrics.json", "latents.npz", "eval_results.csv")
    return {str(p): p.read_bytes() for name in names for p in there(name, folder)}


def in_a_small_disk(fill: str) -> list[str]:
    """A prefix: ./runs is a disk of 2.5 MB, with what `before` holds and a filler; `after` is how it ends."""
    script = f'mount -t tmpfs -o size=2500k tmpfs runs && cp -a before/. runs && {{ {fill}; }}; "$@"; s=$?; '
    script += "rm -f runs/filler; cp -a runs/. after; exit $s"
    for name in ("runs", "before", "after"):
        Path(name).mkdir(exist_ok=True)
    return ["unshare", "-m", "sh", "-c", script, "sh"]


def filler(left: int) -> str:
    """Shell that fills the disk up to so many bytes."""
    return f"head -c $(( $(df -B1 --output=avail runs | tail -1) - {left} )) /dev/zero > runs/filler"


@needs_mounts
@pytest.mark.parametrize("left", first(1, 300_000, 0, 100_000, 700_000))
def test_a_disk_that_fills_up_during_a_grid(left):
    """At the first config.json or at a later checkpoint: one line; what is there is whole, and it goes on with room."""
    grid = [*CELL, "--beta_y", "1", "2", "3"]
    status, _, err = ended(quick("train.py", *grid, prefix=in_a_small_disk(filler(left))))
    assert status in (1, 2) and err.count("\n") == (1 if left else 3), (
        err
    )  # none of the three can begin, or one goes on
    for line in err.splitlines():
        assert line.startswith("error: runs/singles/NoName-")
        assert re.search(r"disk full: needs [\d,]+ bytes, has [\d,]+$|No space left .*; [\d,]+ bytes are free", line), (
            line
        )
    assert not [path for path in there(".*.tmp", "after") if path.is_dir()]
    for path in there("config.json", "after"):
        run = Run.open(path.parent)
        run.load_state()
        if run.status == "finished":
            load_model(run, torch.device("cpu"))
    shutil.rmtree("runs")
    shutil.copytree("after", "runs")
    assert ended(quick("train.py", *grid))[0] == 0
    assert ended(quick("train.py", *grid, "--runs_dir", "whole"))[0] == 0
    assert all_weights() == all_weights("whole") and len(all_weights()) == 3


@needs_mounts
def test_a_disk_that_is_full_when_results_are_written(evaluated):
    """The old figures stay as they are."""
    Path("before").mkdir()
    shutil.copytree(evaluated / "runs", "before", dirs_exist_ok=True)
    command = launch("eval_beta_grid.py", *EVALUATION, "--force", prefix=in_a_small_disk(filler(0)))
    status, out, err = ended(command)
    assert status in (1, 2) and "disk full: needs " in err and ", has " in err
    before, after = contents("before"), contents("after")
    assert {k.removeprefix("after"): v for k, v in after.items()} == {
        k.removeprefix("before"): v for k, v in before.items()
    }


def test_a_file_that_may_grow_no_further():
    """As with a quota by file: a resume state of some 30 kB in files of at most 8 kB."""
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    status, _, err = ended(quick("train.py", *CELL, before=before))
    assert status == 2 and re.fullmatch(r"error: runs/singles/.* cannot be written \(File too large.*\)\n", err), err
    assert not there("resume.pth")


@pytest.fixture
def for_anyone():
    """A folder that other users can get to, as which nobody works there."""
    folder = Path(tempfile.mkdtemp(prefix="trial"))
    folder.chmod(0o777)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(folder, ignore_errors=True)


def as_nobody() -> list[str]:
    """A prefix to a command: root may write anywhere, so it becomes another user."""
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []


def can_be_nobody() -> bool:
    if os.getuid() != 0:
        return True
    test = f"open({str(ROOT / 'train.py')!r}); import torch"
    try:
        return subprocess.run([*as_nobody(), sys.executable, "-c", test], capture_output=True).returncode == 0
    except OSError:
        return False


needs_nobody = pytest.mark.skipif(not can_be_nobody(), reason="another user cannot read the project, or Python")


@needs_nobody
def test_no_permission_is_told_before_the_first_epoch(for_anyone, evaluated):
    folder = for_anyone
    (folder / "runs").mkdir()
    (folder / "runs").chmod(0o555)
    status, out, err = ended(quick("train.py", *CELL, prefix=as_nobody(), cwd=folder))
    assert status == 2 and err == "error: runs: cannot write there (Permission denied); choose another --runs_dir\n"
    (folder / "runs").chmod(0o777)
    shutil.rmtree(folder / "runs")
    shutil.copytree(evaluated / "runs", folder / "runs")
    for path in (folder / "runs").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    status, out, err = ended(quick("eval_beta_grid.py", *EVALUATION, "--force", prefix=as_nobody(), cwd=folder))
    assert status in (1, 2) and "Permission denied" in err and "runs/singles" in err
    plotting = ["--run_batch_name", "singles", "--device", "cpu"]
    status, out, err = ended(quick("plot_eval.py", *plotting, prefix=as_nobody(), cwd=folder, MPLCONFIGDIR=folder))
    assert (
        status == 2 and "cannot write there (Permission denied); choose another --out" in err and err.count("\n") == 1
    )


@needs_nobody
@times(3, few=1)
def test_a_run_folder_that_becomes_read_only_half_way(trial, for_anyone):
    """One line that names it; the last state is whole, and the training goes on once it can."""
    folder, long = for_anyone, [*CELL[:4], "--num_epochs", "300", *CELL[6:]]
    process = launch("train.py", *long, prefix=as_nobody(), cwd=folder)
    wait_until(lambda: there("resume.prev.pth", folder) or process.poll() is not None)
    time.sleep(0.1 * trial)
    run = there("config.json", folder)[0].parent
    run.chmod(0o555)
    status, _, err = ended(process)
    assert status == 2, err
    assert err.splitlines()[-1].startswith("error: runs/singles/") and "Permission denied" in err.splitlines()[-1]
    state, problems = Run.open(run).load_state()
    assert state["epoch"] >= 1 and not problems
    again = launch("train.py", *long, prefix=as_nobody(), cwd=folder)
    status, _, err = ended(again)
    assert status == 2 and "cannot write there" in err
    run.chmod(0o777)
    process = launch("train.py", *long, prefix=as_nobody(), cwd=folder)
    wait_until(lambda: len(there("events.out.*", folder)) > 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    status, out, _ = ended(process)
    assert status in (0, 143) and f"resuming at epoch {state['epoch']} " in out


@needs_nobody
def test_a_grids_read_only_cell_does_not_keep_the_others_from_training(for_anyone):
    """It became so after the check at the start: the others are trained, and it is named at the end."""
    grid = [*CELL[:4], "--num_epochs", "1", "--batch_size", "2000", "--device", "cpu", "--beta_y", "1", "2", "3"]
    before = (
        "from utils.training import schedule\nreal = schedule.train_all\ndef later(runs, *rest):\n"
        "    runs[1].create()\n"
        "    runs[1].path.chmod(0o555)\n    return real(runs, *rest)\nschedule.train_all = later"
    )
    process = launch("train.py", *grid, before=before, prefix=as_nobody(), cwd=for_anyone)
    status, out, err = ended(process)
    assert status == 1 and len(there("vae.pth", for_anyone)) == 2
    assert err.startswith("error: runs/singles/") and "Permission denied" in err and err.count("\n") == 1


# --- damage ---


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run with two resume states; read only."""
    root = tmp_path_factory.mktemp("half_way")
    process = launch("train.py", *CELL, "--num_epochs", "5000", cwd=root)
    wait_until(lambda: there("resume.prev.pth", root) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    return root


@times(120, few=6)
def test_a_damaged_state_falls_back_or_is_refused(trial, half_way):
    """Truncated or with flipped bits, the newest or both: never silently another state than one that was saved."""
    shutil.copytree(half_way / "runs", "runs")
    run, chance = Run.open(there("config.json")[0].parent), random.Random(trial)
    saved = [load_tensors(run.path / name) for name in ("resume.pth", "resume.prev.pth")]
    both = trial % 3 == 0
    for name in ("resume.pth", "resume.prev.pth")[: 1 + both]:
        data = bytearray((run.path / name).read_bytes())
        if trial % 2:
            data = data[: chance.randrange(len(data))]
        else:
            for _ in range(chance.randrange(1, 5)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (run.path / name).write_bytes(data)
    try:
        state, problems = run.load_state()
    except UserError as e:
        assert both and "no undamaged checkpoint is left" in str(e)
        return
    assert len(problems) <= 1 and all("resume.pth: damaged" in line for line in problems)
    of = saved[1 if problems else 0]
    assert state["epoch"] == of["epoch"]
    assert all(
        torch.equal(state[key][n], p) for key in ("weights", "exp_avg", "exp_avg_sq") for n, p in of[key].items()
    )


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def classifier(path):
    write_json(path / "config.json", {"dataset": "Digits", "n_classes": 10})
    return load_classifier(path, Config(), torch.device("cpu"))


def cifar10(path):
    return load_data(Config(dataset="CIFAR10"), str(path), torch.device("cpu"))


def cifar_files(path):
    folder = path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": Hostile(), "labels": [1]}))


@pytest.mark.parametrize(
    "write, read",
    [
        (lambda p: torch.save({"x": Hostile()}, p / "vae.pth"), lambda p: load_model(Run.open(p), torch.device("cpu"))),
        (
            lambda p: (p / "vae.pth").write_bytes(pickle.dumps(Hostile())),
            lambda p: load_model(Run.open(p), torch.device("cpu")),
        ),
        (
            lambda p: torch.save({"x": Hostile()}, p / "vae.pth", _use_new_zipfile_serialization=False),
            lambda p: load_model(Run.open(p), torch.device("cpu")),
        ),
        (lambda p: torch.save({"weights": Hostile()}, p / "resume.pth"), lambda p: Run.open(p).load_state()),
        (lambda p: torch.save(Hostile(), p / "classifier.pth"), classifier),
        (
            lambda p: np.savez(p / "latents.npz", labels=np.array([Hostile()], object)),
            lambda p: read_arrays(p / "latents.npz"),
        ),
        (cifar_files, cifar10),
    ],
    ids=["weights", "bare pickle", "old format", "resume state", "classifier", "results", "data set"],
)
def test_pickles_that_run_code_are_refused_and_run_nothing(write, read):
    run = Run.of(Config(conv_channels=2, z_dims=3), "runs")
    run.create()
    write(run.path)
    with pytest.raises(UserError):
        read(run.path)
    assert not Path("executed").exists() and not (run.path / "executed").exists()
    pickle.loads(pickle.dumps(Hostile()))  # it would have
    assert Path("executed").exists()
