"""It always ends: whatever is raised while images are streamed, whatever signal comes, whoever stops reading."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train
from datasets.batches import Streamed
from tests.conftest import CELL, ROOT, popen, python, weights
from tests.reliability.trials import (
    are_gone,
    children,
    ended,
    first,
    folder_of_images,
    kill,
    launch,
    mounted,
    private_mounts,
    quick,
    there,
    times,
    wait_until,
)
from utils.errors import UserError, held_back
from utils.files import load_tensors
from utils.training.chunk import Chunk

WITHIN = 10  # seconds in which a process ends, after whatever it was
STREAMED = ["--dataset", "pets", "--image_size", "256", "--conv_channels", "2", "--device", "cpu"]
TRAINING = [*STREAMED, "--num_epochs", "500", "--batch_size", "4"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")
needs_mounts = pytest.mark.skipif(not private_mounts(), reason="cannot mount a file system")


@pytest.fixture
def pets():
    return folder_of_images(Path("pets"), 60)


def in_training():
    """A training of streamed images, and its worker processes."""
    process = launch("train.py", *TRAINING)
    wait_until(lambda: there("events.out.*") or process.poll() is not None)
    workers = []
    while not workers and process.poll() is None:  # each epoch has its own
        time.sleep(0.1)
        workers = children(process.pid)
    assert workers
    return process, workers


def damage(pets):
    for path in (pets / "cat").iterdir():
        path.write_bytes(b"")


@needs_proc
def test_training_ends_at_a_damaged_image(pets):
    process, workers = in_training()
    for path in pets.rglob("*.png"):
        path.write_bytes(b"")
    start = time.monotonic()
    status, _, err = ended(process)
    assert time.monotonic() - start < WITHIN
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {pets.resolve()}/") and "damaged image" in err
    assert are_gone(workers)


@needs_proc
@pytest.mark.parametrize("script", ["eval_beta_grid.py", "plot_eval.py", "train_classifier.py"])
def test_other_scripts_end_at_a_damaged_image(script, pets):
    status, _, err = ended(quick("train.py", *STREAMED, "--num_epochs", "1", "--batch_size", "8"))
    assert status == 0, err
    batch = ["--run_batch_name", "singles", "--device", "cpu"]
    if script == "plot_eval.py":
        assert ended(quick("eval_beta_grid.py", *batch, "--exclude_mi", "--exclude_fid"))[0] == 0
    damage(pets)
    flags = {"eval_beta_grid.py": [*batch, "--exclude_mi", "--exclude_fid", "--force"], "plot_eval.py": batch}
    training = ["--dataset", "pets", "--image_size", "256", "--device", "cpu", "--num_epochs", "1"]
    seconds = 120 if script == "plot_eval.py" else 2 * WITHIN  # with the work before it, or that it does all the same
    status, out, err = ended(quick(script, *flags.get(script, training)), seconds)
    if script == "plot_eval.py":  # pictures are what it can do without
        assert status == 0 and "damaged image" in out
    else:
        assert status == (2 if script == "train_classifier.py" else 1) and "damaged image" in err


@needs_proc
@times(10, few=1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_end_streaming(number, trial, pets):
    process, _ = in_training()
    time.sleep(0.2 * trial)
    workers = children(process.pid)  # each epoch has its own
    for pid in (*workers, process.pid):  # as schedulers and terminals send them
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    start = time.monotonic()
    status, _, err = ended(process, 60)
    assert time.monotonic() - start < WITHIN
    assert status == 128 + number and "saved at epoch" in err and "rerun to continue" in err
    assert are_gone(workers)
    load_tensors(there("resume.pth")[0])


@needs_proc
@times(10, few=1)
def test_a_killed_worker_ends_the_training(trial, pets):
    process, workers = in_training()
    time.sleep(0.1 * trial)
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < 2 * WITHIN:
        if workers := children(process.pid) or workers:  # one that has nothing left to hand over is not missed
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
        time.sleep(0.5)
    status, _, err = ended(process, 1)
    assert status == 2 and "error: a process that reads images was killed" in err.splitlines()[-1]
    assert "--shm-size" in err
    assert are_gone(workers)


def test_a_worker_that_is_killed_while_others_start_is_told_of(pets, monkeypatch):
    def start(self):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("datasets.batches.DataLoader.__iter__", start)
    split = Streamed([(str(path), 0) for path in pets.rglob("*.png")], (3, 256, 256), torch.device("cpu"))
    with pytest.raises(UserError, match="a process that reads images was killed"):
        list(split.batches(2))


@pytest.mark.parametrize("seconds, seen", [(0.3, KeyboardInterrupt), (60, UserError)])
def test_a_signal_that_comes_to_workers_first_ends_this_process_as_ever(seconds, seen, pets, monkeypatch):
    """Sent to all processes, it kills those that are not yet prepared for it."""
    signaller = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))

    def start(self):
        signaller.start()
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    monkeypatch.setattr("datasets.batches.DataLoader.__iter__", start)
    split = Streamed([(str(path), 0) for path in pets.rglob("*.png")], (3, 256, 256), torch.device("cpu"))
    with pytest.raises(seen):
        list(split.batches(2))
    signaller.cancel()


@pytest.mark.parametrize(
    "e, told", [(RuntimeError("Too many open files. Communication"), "ulimit -n"), (None, "cropped")]
)
def test_whatever_is_raised_while_images_are_read_is_one_line(e, told, pets, monkeypatch):
    def fail(*_):
        raise e or MemoryError

    split = Streamed([(str(path), 0) for path in pets.rglob("*.png")], (3, 256, 256), torch.device("cpu"))
    if e is None:
        split.decoded.centre_crop = fail
    else:
        monkeypatch.setattr("datasets.batches.DataLoader.__iter__", fail)
    with pytest.raises(UserError, match=told):
        list(split.batches(2))


def test_a_signal_that_is_held_back_comes_later_and_to_no_process_started_meanwhile():
    seen, shows = [], "import signal; print(signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("here"))
    try:
        with held_back(signal.SIGUSR1):
            os.kill(os.getpid(), signal.SIGUSR1)
            shown = subprocess.run([sys.executable, "-c", shows], capture_output=True, text=True).stdout
            assert not seen and shown == "True\n"
        assert seen == ["here"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_while_the_interpreter_is_left_ends_it_quietly():
    code = "import atexit, os, signal, sys; sys.path.insert(0, sys.argv[1]); from utils.errors import run_script\n"
    code += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM)); run_script(lambda: 0)"
    status, _, err = ended(python("-c", code, ROOT))
    assert status == 128 + signal.SIGTERM and err == ""


def test_a_signal_in_the_last_save_of_a_multi_rate_model_ends_before_its_cells_unfold(script, monkeypatch):
    real, flags = Chunk.finish, [*CELL, "--num_epochs", "2", "--multi_rate", "--force", "--beta_y", "1", "2"]

    def finish(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with monkeypatch.context() as m:
        m.setattr(Chunk, "finish", finish)
        status, _, err = script(train.main, *flags)
    assert status == 128 + signal.SIGTERM and "rerun to continue" in err and len(there("vae.pth")) == 1
    assert script(train.main, *flags)[0] == 0 and len(there("vae.pth")) == 3


@needs_proc
@times(10, few=1)
def test_workers_end_with_a_killed_training(trial, pets):
    process, workers = in_training()
    time.sleep(0.1 * trial)
    kill(process)
    wait_until(lambda: are_gone(workers), WITHIN)


@needs_mounts
@times(5, few=1)
def test_a_small_dev_shm_is_named(trial):
    folder_of_images(Path("pets"), 80)
    flags = [*STREAMED, "--num_epochs", "2", "--batch_size", "120"]  # of 24 MB
    status, _, err = ended(quick("train.py", *flags, prefix=mounted("/dev/shm", "16m")), 120)
    assert status == 2 and err.splitlines()[-1].startswith("error: /dev/shm: too small (16 MB)")
    assert "--shm-size" in err


def test_a_reader_that_stops_leaves_no_worker(pets):
    """As a training does that ends within an epoch: the loop is left, its processes with it."""
    samples = [(str(path), 0) for path in sorted(pets.rglob("*.png"))]
    split = Streamed(samples, (3, 256, 256), torch.device("cpu"))
    batches = split.batches(2)
    next(batches)
    workers = children(os.getpid())
    batches.close()
    assert are_gone([pid for pid in workers if pid not in children(os.getpid())])
    samples[0] = ("nowhere.png", 0)
    with pytest.raises(UserError, match="nowhere.png: damaged image"):
        list(split.batches(2))


# --- who reads what is printed ---


@times(20)
@pytest.mark.parametrize("both", [False, True])
def test_a_pipe_that_is_closed_saves_and_ends_quietly(both, trial):
    long = [*CELL, "--num_epochs", "2000"]
    process = launch("train.py", *long, stderr=subprocess.STDOUT if both else subprocess.PIPE, TQDM_DISABLE=None)
    if both:
        process.stdout.readline()
        process.stdout.close()
        status, err = process.wait(120), ""
    else:  # nothing more is printed until the end: the end comes when it is
        process.stdout.close()
        wait_until(lambda: there("resume.pth") or process.poll() is not None)
        time.sleep(0.05 * trial)
        process.send_signal(signal.SIGHUP)
        err = process.stderr.read()
        status = process.wait(60)
        process.stderr.close()
    assert status == 128 + signal.SIGHUP and "Traceback" not in err and "Exception ignored" not in err
    assert both or "error" not in err


def test_head_1_of_everything(tmp_path):
    """`script | head -1`: help, a dry run and a short training all end without a word."""
    for argv in (["train.py", "--help"], ["train.py", "--dry_run", "--beta_y", "0.1:10:900"], ["plot_eval.py", "-h"]):
        process = launch(*argv, stdout=subprocess.PIPE)
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) in (0, 128 + signal.SIGHUP) and "Traceback" not in err and "Exception" not in err
        assert "error" not in err


@times(20)
def test_a_closed_terminal_saves_and_ends(trial):
    """The terminal's other end goes: SIGHUP comes, and whatever is printed from then on fails."""
    ours, theirs = pty.openpty()
    process = launch(
        "train.py", *CELL, "--num_epochs", "2000", **dict.fromkeys(("stdout", "stderr"), theirs), TQDM_DISABLE=None
    )
    os.close(theirs)
    os.set_blocking(ours, False)

    def running():
        while True:
            try:
                if not os.read(ours, 65536):
                    break
            except OSError:
                break
        return there("resume.pth") or process.poll() is not None

    wait_until(running)
    time.sleep(0.05 * trial)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    load_tensors(there("resume.pth")[0])


@times(20)
def test_slurms_warning_saves_and_the_same_command_continues(trial, undisturbed):
    process = launch("train.py", *CELL)
    wait_until(lambda: there("resume.pth") or process.poll() is not None)
    time.sleep(0.02 * trial)
    process.send_signal(signal.SIGUSR1)
    status, _, err = ended(process)
    if status != 0:  # it may have been done
        assert status == 128 + signal.SIGUSR1 and "saved at epoch" in err
    assert ended(quick("train.py", *CELL))[0] == 0
    assert weights(there("vae.pth")[0].parent) == undisturbed


def test_nohup_is_heeded():
    """Who started it so wants it to go on when the terminal closes."""
    process = launch("train.py", *CELL, prefix=["nohup"])
    wait_until(lambda: there("resume.pth") or process.poll() is not None)
    process.send_signal(signal.SIGHUP)
    assert ended(process)[0] == 0


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("locale", first(1, ASCII, {k: v for k, v in ASCII.items() if k != "PYTHONIOENCODING"}))
def test_an_ascii_locale_takes_any_name(locale):
    Path("größe").mkdir()
    flags = [*CELL[:4], "--num_epochs", "1", "--batch_size", "2000", "--device", "cpu"]
    named = ["--run_name", "β", "--run_batch_name", "b", "--runs_dir", "größe"]
    status, _, err = ended(quick("train.py", *flags, *named))
    assert status == 0, err
    batch = ["--run_batch_name", "b", "--runs_dir", "größe", "--device", "cpu"]
    status, out, err = ended(quick("eval_beta_grid.py", *batch, "--exclude_mi", "--exclude_fid", **locale))
    assert status == 0 and "1 of 1 runs evaluated" in out, err
    status, out, err = ended(quick("plot_eval.py", *batch, "--format", "png", **locale))
    assert status == 0, err
    folder_of_images(Path("ñandú"), 5)
    own = ["--dataset", "ñandú", "--image_size", "28", "--run_batch_name", "own", "--runs_dir", "größe", *flags]
    status, _, err = ended(quick("train.py", *own, **locale))
    assert status == 0, err
    status, out, err = ended(quick("eval_beta_grid.py", *batch, "--run_batch_name", "own", "--exclude_fid", **locale))
    assert status == 0, err
    status, _, err = ended(quick("eval_beta_grid.py", "--run_batch_name", "ñ", "--runs_dir", "größe", **locale))
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: --run_batch_name: no runs in gr")


def test_names_that_are_no_text_are_read_and_written_as_they_are():
    """A folder of a batch may be named by any bytes."""
    flags = [*CELL[:4], "--num_epochs", "1", "--batch_size", "2000", "--device", "cpu"]
    assert ended(quick("train.py", *flags))[0] == 0
    Path("runs/singles").rename("runs/b")
    next(Path("runs/b").iterdir()).rename(Path("runs/b", os.fsdecode(b"\xff\xfe")))
    batch = ["--run_batch_name", "b", "--device", "cpu"]
    status, out, err = ended(quick("eval_beta_grid.py", *batch, "--exclude_mi", "--exclude_fid"))
    assert status == 0 and "1 of 1 runs evaluated" in out, err
    assert Path("runs/b/eval_results.csv").read_bytes().splitlines()[1].startswith(b"\xff\xfe,finished,")
    status, out, err = ended(quick("plot_eval.py", *batch, "--format", "png"))
    assert status == 0 and "no pictures" not in out, err


def test_an_error_of_the_system_that_names_no_file_is_one_line():
    before = "import datasets.loading as loading\ndef fails(*_): raise OSError(5, 'Input/output error')\n"
    before += "loading.load_data = fails"
    status, _, err = ended(quick("train.py", *CELL, before=before))
    assert status == 2 and err == "error: the system: Input/output error\n"


@pytest.mark.parametrize("error", ["OSError(116, 'Stale file handle')", "OSError('odd')", "BlockingIOError(11, 'no')"])
def test_a_write_that_fails_names_the_file(error):
    before = f"import os, utils.files\ndef fails(fd): raise {error}\nos.fsync = fails"
    before += "\nutils.files._try_to_write = print"  # else the folder is refused before anything is written
    status, _, err = ended(quick("train.py", *CELL, before=before))
    assert status == 1 and err.count("\n") == 1 and "config.json: cannot be written" in err
    assert not there("*.tmp") and not there("config.json")


@pytest.mark.parametrize("script", ["train.py", "eval_beta_grid.py"])
def test_variables_that_are_left_over_are_told(script):
    flags = [*CELL[:4], "--num_epochs", "1", "--batch_size", "2000", "--device", "cpu", "--beta_y", "1:5:5"]
    if script != "train.py":
        assert ended(quick("train.py", *flags))[0] == 0
        flags = ["--run_batch_name", "singles", "--device", "cpu", "--exclude_mi", "--exclude_fid"]
    status, out, err = ended(quick(script, *flags, WORLD_SIZE="3"))
    assert status == 0, err
    assert out.count("RANK 0 of WORLD_SIZE 3: takes 2 of 5 runs") == 1
    status, out, _ = ended(quick(script, *flags, WORLD_SIZE="1"))
    assert status == 0 and "WORLD_SIZE" not in out


@pytest.mark.parametrize("where", first(2, ">&- 2>&-", ">/dev/full", ">&-", "2>&-", "2>/dev/full"))
def test_outputs_that_are_closed_or_full_do_not_end_a_training(where):
    command = ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, str(ROOT / "train.py"), *CELL]
    process = popen(command, OMP_NUM_THREADS="1", TQDM_DISABLE=None)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in out + err and "rror" not in out + err
    assert there("vae.pth")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("script", ["train.py", "plot_eval.py"])
def test_a_signal_while_libraries_are_imported_ends_it_quietly(script, number):
    """A torch that never comes."""
    Path("torch.py").write_text("import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n")
    process = launch(script, "--run_batch_name", "b", PYTHONPATH=os.getcwd())
    if script == "plot_eval.py":  # it may need no torch before the flags are read
        wait_until(lambda: there("importing", ".") or process.poll() is not None)
    else:
        wait_until(lambda: there("importing", "."))
    process.send_signal(number)
    status, out, err = ended(process, 20)
    assert status == 128 + number and out == err == ""


def test_the_share_of_a_process_is_told_by_a_dry_run_too():
    flags = [*CELL, "--beta_y", "1:5:5", "--dry_run"]
    status, out, err = ended(quick("train.py", *flags, WORLD_SIZE="3", RANK="1"))
    assert status == 0 and "RANK 1 of WORLD_SIZE 3: takes 2 of 5 runs" in out and out.count("  new\n") == 2, err
