"""What the tests share: tiny configurations, and the scripts run inside this process or as one of their own."""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

os.environ["TQDM_DISABLE"] = "1"  # before the scripts are imported
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is

import torch

import eval_beta_grid
import train
from datasets.batches import Resident
from datasets.loading import Data
from datasets.table import lookup
from utils.config import Config
from utils.errors import ENDING_SIGNALS, run_script
from utils.runs import Run
from utils.training.training import Setup, Training

ROOT = Path(__file__).parent.parent
STARTED: list = []  # processes
TINY = ["--conv_channels", "2", "--z_dims", "3", "--num_epochs", "2", "--batch_size", "500", "--device", "cpu"]
CELL = [*TINY[:4], "--num_epochs", "6", "--batch_size", "100", "--device", "cpu", "--save_every", "1"]
EVALUATION = ["--run_batch_name", "singles", "--device", "cpu", "--exclude_fid"]
UNFOLDED = [*TINY, "--multi_rate", "--force", "--run_batch_name", "m"]
GRID = ["--beta_y", "0.1:10:3", "--beta_z", "0.5", "2"]


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
def passes(script):
    """Runs a script's main in this process, which must end well; returns stdout."""

    def run(main, *argv):
        status, out, err = script(main, *argv)
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refused(script):
    """Runs a script's main in this process, which must end with one line on stderr; returns it."""

    def run(main, *argv):
        status, _, err = script(main, *argv)
        assert status in (1, 2) and err.startswith(("error: ", "failed: ")) and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def at_step(monkeypatch):
    """Has `act` called before the n-th training step from now on."""

    def plan(n, act):
        real, calls = Training.update, []

        def update(self, *args, **more):
            calls.append(None)
            if len(calls) == n:
                act()
            return real(self, *args, **more)

        monkeypatch.setattr(Training, "update", update)

    return plan


@pytest.fixture
def interrupted(script, at_step):
    """Runs train.py, with Ctrl-C in its n-th step: what is not saved by then is lost."""

    def run(n, *flags):
        at_step(n, Mock(side_effect=KeyboardInterrupt))
        assert script(train.main, *flags)[0] == 130

    return run


def folder_of(tmp_path_factory, *flags) -> Path:
    """The runs of a training that nothing happens to."""
    root = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    assert train.main([*flags, "--runs_dir", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The runs of a training of TINY; read only."""
    return folder_of(tmp_path_factory, *TINY)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> str:
    """The digest of the weights of a training of CELL."""
    return weights(next(folder_of(tmp_path_factory, *CELL).glob("singles/*")))


@pytest.fixture(scope="session")
def multi_rate(tmp_path_factory) -> Path:
    """The runs of a multi-rate model unfolded into GRID; read only."""
    return folder_of(tmp_path_factory, *UNFOLDED, *GRID)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory) -> Path:
    """The evaluated runs of three cells; read only."""
    root = folder_of(tmp_path_factory, *TINY, "--beta_y", "1", "2", "3")
    assert eval_beta_grid.main([*EVALUATION, "--runs_dir", str(root)]) == 0
    return root


@pytest.fixture
def trained(passes, tiny):
    """Trains tiny digits models in ./runs with further flags; returns their run folders."""

    def run(*flags, batch="singles"):
        if flags or batch != "singles":
            passes(train.main, *TINY, "--run_batch_name", batch, *flags)
        else:
            shutil.copytree(tiny, "runs", dirs_exist_ok=True)
        return sorted(p for p in Path("runs", batch).iterdir())

    return run


def weights(path: Path) -> str:
    """The digest of a run's weights."""
    return hashlib.sha256((path / "vae.pth").read_bytes()).hexdigest()


def of_documents(name: str):
    """A script in docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def all_weights(folder: str = "runs") -> dict[str, str]:
    """The digests of the weights of all runs in a folder, by their names."""
    return {path.parent.name: weights(path.parent) for path in Path(folder).rglob("vae.pth")}


def training_of(*configs: Config, **setup) -> Training:
    """A training of cells of which nothing is written unless it is saved."""
    setup = Setup(torch.device("cpu"), **setup)
    return Training([Run.of(config, "runs") for config in configs], [None] * len(configs), setup)


def in_training(n_cells: int = 2, **settings) -> tuple[list[Run], Training]:
    """Runs that have just been made, and their training."""
    settings = {"conv_channels": 2, "z_dims": 3, "batch_size": 4, **settings}
    runs = [Run.of(Config(beta_y=1.0 + i, **settings), "runs") for i in range(n_cells)]
    for run in runs:
        run.create()
    return runs, training_of(*[run.config for run in runs])


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
