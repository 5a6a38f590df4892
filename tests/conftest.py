"""What the tests share: tiny configurations, and the scripts run inside this process or as one of their own."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["TQDM_DISABLE"] = "1"  # before the scripts are imported
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is

import utils.threads  # noqa: F401, I001  before torch too, as scripts do: how long its threads spin

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is: kernels then run on the CPU, slowly

import train
from datasets.batches import Resident
from datasets.loading import Data
from datasets.table import lookup
from models.stack import Stack
from utils.config import Config
from utils.errors import ENDING_SIGNALS, run_script

ROOT = Path(__file__).parent.parent
STARTED: list = []  # processes
TINY = ["--conv_channels", "2", "--z_dims", "3", "--num_epochs", "2", "--batch_size", "500", "--device", "cpu"]
CELL = [*TINY[:4], "--num_epochs", "6", "--batch_size", "100", "--device", "cpu", "--save_every", "1"]


@pytest.fixture(autouse=True)
def one_thread_in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    while STARTED:  # no test leaves a process behind, or a pipe
        process = STARTED.pop()
        process.kill()
        process.communicate(timeout=60)


@pytest.fixture
def script(capfd):
    """Runs a script's main in this process; returns (exit status, stdout, stderr)."""

    def run(main, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run_script(lambda: main([str(a) for a in argv]))
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        out, err = capfd.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def trained(script):
    """Trains tiny digits models in ./runs with further flags; returns their run folders."""

    def run(*flags, batch="singles"):
        status, _, err = script(train.main, *TINY, "--run_batch_name", batch, *flags)
        assert status == 0, err
        return sorted(p for p in Path("runs", batch).iterdir())

    return run


@pytest.fixture
def interrupted(script, monkeypatch):
    """Runs train.py, with Ctrl-C in its n-th step."""

    def run(n, *flags):
        real, calls = Stack.step, []

        def stopping(self, *args):
            calls.append(None)
            if len(calls) == n:
                raise KeyboardInterrupt
            return real(self, *args)

        with monkeypatch.context() as m:
            m.setattr(Stack, "step", stopping)
            assert script(train.main, *flags)[0] == 130

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> str:
    """The digest of the weights of a training of CELL that nothing happens to."""
    root = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    assert train.main([*CELL, "--runs_dir", str(root)]) == 0
    return weights(next(root.glob("singles/*")))


def weights(path: Path) -> str:
    """The digest of a run's weights."""
    return hashlib.sha256((path / "vae.pth").read_bytes()).hexdigest()


def start(name, *argv, **where):
    """Starts a script in a process of its own, which ends with the test at the latest."""
    return python(ROOT / name, *argv, **where)


def python(*argv, **where):
    return popen([sys.executable, *map(str, argv)], OMP_NUM_THREADS="1", **where)


def popen(command: list, cwd=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env) -> subprocess.Popen:
    """Starts a process that ends with the test at the latest; a variable that is None is not set in it."""
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which pytest under nohup would hand on as ignored
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr, text=True))
    signal.signal(signal.SIGHUP, hangup)
    return STARTED[-1]


def random_data(config: Config, n: int = 8) -> Data:
    """Random images of the Config's shape; fixed."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *lookup(config).shape), dtype=torch.uint8, generator=g)
    split = Resident(images, torch.arange(n) % 10, torch.device("cpu"))
    return Data(split, split, 10)
