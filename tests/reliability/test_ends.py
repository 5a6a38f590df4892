"""It always ends: whatever is raised while images are streamed, whatever signal comes, whoever stops reading."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

import eval_beta_grid
import plot_eval
import train
import train_classifier
from datasets.batches import Streamed
from tests.conftest import CELL, ROOT, TINY, popen, python
from tests.datasets.files import CPU, write_folder
from tests.reliability import trials
from tests.reliability.trials import ended, first, launch, there, times, wait_until
from utils.errors import ENDING_SIGNALS, UserError, signals_postponed
from utils.files import load_tensors
from utils.training.training import Training

WITHIN = 10  # seconds in which a process ends, after whatever it was
PETS = ["--dataset", "pets", "--image_size", "256", "--device", "cpu"]
STREAMED = [*PETS, "--conv_channels", "2"]
LONG = [*CELL, "--num_epochs", "2000"]
BATCH = ["--run_batch_name", "singles", "--device", "cpu"]
RATES = [*BATCH, "--exclude_mi", "--exclude_fid"]
PLOT = [*BATCH, "--format", "png"]


@pytest.fixture
def pets():
    write_folder(Path("pets"), (48, 48), n=60)
    return sorted(Path("pets").resolve().rglob("*.png"))


@pytest.fixture
def streamed(pets):
    return Streamed([(str(path), 0) for path in pets], (3, 256, 256), CPU)


def workers() -> list[int]:
    """The processes that read images for this one."""
    gc.collect()  # what an exception has left
    return [process.pid for process in multiprocessing.active_children() if process.daemon]


def send(number, *pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def damage(*paths):
    for path in paths:
        path.write_bytes(b"")


@pytest.fixture
def struck(script, at_step, pets):
    """Trains on streamed images until something happens in the n-th step; it must end soon after."""

    def run(n, what):
        def strike():
            moments.append(time.monotonic())
            assert workers()
            what(*workers())

        moments = []
        at_step(n, strike)
        status, _, err = script(train.main, *STREAMED, "--num_epochs", "500", "--batch_size", "4")
        assert time.monotonic() - moments[0] < WITHIN
        wait_until(lambda: not workers(), WITHIN)
        return status, err

    return run


def test_training_ends_at_a_damaged_image(struck, pets):
    status, err = struck(3, lambda *_: damage(*pets))
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith(f"error: {pets[0].parents[1]}/") and "damaged image" in last


def test_other_scripts_end_at_a_damaged_image(passes, refused):
    """More than five seconds, as images of 256 pixels are evaluated."""
    write_folder(Path("pets"), (48, 48), n=5)
    passes(train.main, *STREAMED, "--num_epochs", "1")
    passes(eval_beta_grid.main, *RATES)
    damage(*Path("pets").rglob("*.png"))
    assert "damaged image" in refused(train_classifier.main, *PETS, "--num_epochs", "1")
    for of_plots in (refused(eval_beta_grid.main, *RATES), passes(plot_eval.main, *PLOT)):  # which can do without
        assert "does not hold the images that the run was trained on" in " ".join(of_plots.split())
    assert not workers()


def test_a_failed_loader_has_closed_its_pipes(streamed, pets):
    """While its error still holds it: a finalizer and a thread would close one twice, or another file of its number."""
    damage(*pets)
    before = {*threading.enumerate()}
    with pytest.raises(UserError, match="damaged image") as error:
        list(streamed.subset(4).batches(1))
    wait_until(lambda: before.issuperset(threading.enumerate()), WITHIN)  # those that feed its pipes, too
    assert not workers() and error.tb


@pytest.mark.parametrize("number", first(1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
@times(10)
def test_signals_end_streaming(number, trial, struck):
    """They come to all processes, as schedulers and terminals send them."""
    status, err = struck(3 + trial, lambda *pids: send(number, *pids, os.getpid()))
    assert status == 128 + number and "saved at epoch" in err and "rerun to continue" in err
    load_tensors(there("resume.pth")[0])


@times(10)
def test_killed_workers_end_the_training(trial, struck):
    status, err = struck(3 + trial, lambda *pids: send(signal.SIGKILL, *pids))
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("error: a process that reads images") and "--shm-size" in last


CHILDREN = "/proc/{0}/task/{0}/children"


@pytest.mark.skipif(not Path(CHILDREN.format(os.getpid())).exists(), reason="as Linux lists processes")
@times(10)
def test_workers_end_with_a_killed_training(trial, pets):
    """They hold its pipes, which end with the last of them. Processes start, which takes seconds."""
    flags = [*STREAMED, "--num_epochs", "500", "--batch_size", "4"]
    process = trials.training(*flags, until="events.out.*")
    wait_until(Path(CHILDREN.format(process.pid)).read_text)
    time.sleep(0.3 + 0.1 * trial)  # once they have seen whose they are
    process.kill()
    process.communicate(timeout=WITHIN)


@trials.needs_mounts
@times(5)
def test_a_small_dev_shm_is_named(trial, pets):
    """It takes long since processes start."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"', "sh"]
    flags = [*STREAMED, "--num_epochs", "2", "--batch_size", "100"]  # of 20 MB
    status, _, err = ended(launch("train.py", *flags, prefix=small))
    assert status == 2 and "--shm-size" in err.splitlines()[-1]


KILLED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
STARTING = "datasets.batches.DataLoader.__iter__"


def test_whatever_is_raised_while_images_are_read_is_one_line(streamed, monkeypatch):
    for error in (KILLED, RuntimeError("Too many open files. Communication"), ConnectionResetError()):
        monkeypatch.setattr(STARTING, Mock(side_effect=error))
        with pytest.raises(UserError, match="a process that reads images was killed .*ulimit -n"):
            list(streamed.batches(2))


def test_a_signal_that_comes_to_workers_first_ends_this_process_as_ever(streamed, monkeypatch):
    """Sent to all processes, it kills those that are not yet prepared for it."""

    def start(self):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        raise KILLED

    monkeypatch.setattr(STARTING, start)
    with pytest.raises(KeyboardInterrupt):
        list(streamed.batches(2))


def test_a_signal_that_is_held_back_comes_later_and_not_to_children():
    shows = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with pytest.raises(KeyboardInterrupt), signals_postponed(signal.SIGINT):
        os.kill(os.getpid(), signal.SIGINT)
        shown = subprocess.check_output([sys.executable, "-c", shows])
    assert shown == b"True\n"


def test_a_signal_while_the_interpreter_is_left_ends_it_quietly():
    code = "import atexit, os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
    code += "from utils.errors import run_script\n"
    code += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM)); run_script(lambda: 0)"
    status, _, err = ended(python("-c", code, ROOT))
    assert status == 128 + signal.SIGTERM and err == ""


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_while_libraries_are_imported_ends_it_quietly(number):
    """A torch that never comes."""
    begun = Path("importing")
    Path("torch.py").write_text("import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n")
    for script in ("train.py", "plot_eval.py"):
        process = launch(script, "--run_batch_name", "b", PYTHONPATH=os.getcwd())
        wait_until(lambda: begun.exists() or process.poll() is not None)  # noqa: B023
        process.send_signal(number)
        assert ended(process, 20) == (128 + number, "", "")
        begun.unlink()


def test_a_signal_in_a_multi_rate_models_last_save_ends_before_cells_unfold(script, passes, monkeypatch):
    real, flags = Training.finish, [*TINY, "--multi_rate", "--force", "--beta_y", "1", "2"]
    monkeypatch.setattr(Training, "finish", lambda *args: (send(signal.SIGTERM, os.getpid()), real(*args)))
    status, _, err = script(train.main, *flags)
    assert status == 128 + signal.SIGTERM and "rerun to continue" in err and len(there("vae.pth")) == 1
    passes(train.main, *flags)
    assert len(there("vae.pth")) == 3


def test_nohup_is_heeded(passes, at_step):
    """Who started it so wants it to go on when the terminal closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(4, lambda: send(signal.SIGHUP, os.getpid()))
    passes(train.main, *TINY)


@pytest.mark.parametrize("both", first(1, True, False))
@times(20)
def test_a_pipe_that_is_closed_saves_and_ends_quietly(both, trial):
    process = launch("train.py", *LONG, stderr=subprocess.STDOUT if both else subprocess.PIPE, TQDM_DISABLE=None)
    process.stdout.readline()
    if not both:  # nothing more is printed until the end: the end comes when it is
        wait_until(lambda: there("resume.pth") or process.poll() is not None)
        time.sleep(0.05 * trial)
        process.send_signal(signal.SIGHUP)
    process.stdout.close()
    status, _, err = ended(process, 60)
    assert status == 128 + signal.SIGHUP
    assert both or "Exception ignored" not in err and "error" not in err


@times(20)
def test_a_closed_terminal_saves_and_ends(trial):
    """The terminal's other end goes: SIGHUP comes, and whatever is printed from then on fails."""
    pid, terminal = trials.in_terminal(ROOT / "train.py", *LONG)
    while not there("resume.pth"):
        os.read(terminal, 65536)
    time.sleep(0.05 * trial)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    load_tensors(there("resume.pth")[0])


SCRIPTS = """
import sys; sys.path.insert(0, sys.argv.pop(1))
import eval_beta_grid, plot_eval, train
from utils.errors import run_script
calls = zip((train, eval_beta_grid, plot_eval, eval_beta_grid), " ".join(sys.argv[1:]).split(" && "))
run_script(lambda: max(script.main(argv.split(" ")) for script, argv in calls))
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", first(1, ASCII | {"PYTHONIOENCODING": "ascii"}, ASCII))
def test_an_ascii_locale_takes_any_name(locale):
    """All scripts, in one process. More than five seconds, as libraries are imported there."""
    write_folder(Path("ñandú"))
    Path("größe").mkdir()
    Path("scripts.py").write_text(SCRIPTS)
    training = [*TINY, "--run_name", "β", "--dataset", "ñandú", "--image_size", "28"]
    words = []
    for flags in (training, RATES, PLOT, ["--run_batch_name", "ñ"]):
        words += [*flags, "--runs_dir", "größe", "&&"]
    status, out, err = ended(python("scripts.py", ROOT, *words[:-1], **locale))
    assert status == 2 and err.splitlines()[-1].startswith("error: --run_batch_name: no runs in gr"), err
    assert "1 of 1 runs evaluated" in out and there("*.png", "größe/singles/figures")


def test_names_that_are_no_text_are_read_and_written_as_they_are(passes, trained):
    """A folder of a batch may be named by any bytes."""
    (path,) = trained()
    path.rename(path.with_name(os.fsdecode(b"\xff\xfe")))
    assert "1 of 1 runs evaluated" in passes(eval_beta_grid.main, *RATES)
    table = Path("runs/singles/eval_results.csv").read_bytes()
    assert table.splitlines()[1].startswith(b"\xff\xfe,finished,")
    passes(plot_eval.main, *PLOT)


def test_a_write_that_fails_names_the_file(refused, monkeypatch):
    for error in (OSError(116, "Stale file handle"), OSError("odd"), BlockingIOError(11, "no")):
        monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
        assert "config.json: cannot be written" in refused(train.main, *CELL)
        assert not there("*.tmp") and not there("config.json")


OUTPUTS = (">/dev/full 2>&-", ">&- 2>&-", ">/dev/full", ">&-", "2>&-", "2>/dev/full")


@pytest.mark.parametrize("where", first(1, *OUTPUTS))
def test_outputs_that_are_closed_or_full_do_not_end_a_training(where):
    command = ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, str(ROOT / "train.py"), *TINY]
    status, out, err = ended(popen(command, OMP_NUM_THREADS="1", TQDM_DISABLE=None))
    assert status == 0 and "rror" not in out + err and there("vae.pth")
