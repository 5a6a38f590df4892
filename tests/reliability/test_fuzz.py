"""Every reader meets files that were changed at random: a clear error or a right load, and nothing else.

Never a traceback, a file that hangs it, code that runs, or more than 1 GB. `pytest -m slow` makes 10,000 cases.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.loading import load_data
from models.classifiers import build_classifier, load_classifier
from tests.conftest import in_training
from tests.datasets.files import write_cifar10, write_mnist, write_svhn
from utils.config import Config
from utils.errors import UserError
from utils.evaluation.metrics import read_metrics
from utils.files import load_tensors, read_arrays, save_tensors, write_json
from utils.plane.cells import BETAS
from utils.plane.reading import read_plane
from utils.runs import Run, load_model
from utils.training.training import Training

CASES, KINDS = 10_000, 12  # of the slow run, over all kinds of files
FEW = 30  # of each kind in the default one
MEMORY = 2**30  # bytes more than there were
SECONDS = 60  # so long takes only what hangs, on however busy a machine
CPU = torch.device("cpu")
EXECUTED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
PLAIN = ("numpy", "_codecs", "collections", "torch", "copyreg", "builtins")  # modules that a pickle may name
executed, readers = [], []  # what ran while there were readers


def _audit(event, args):
    if readers and (event in EXECUTED or event == "pickle.find_class" and args[0].split(".")[0] not in PLAIN):
        executed.append((event, args))


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded():
    """Fails for what a reader must not do: run code, hang, or take more memory than it may."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    readers.append(1)
    try:
        yield
    finally:
        readers.clear()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not executed, executed


def told(read):
    """What a reader returns, or None where it refuses: in one line, and not because memory ran out."""
    try:
        with guarded():
            return read()
    except UserError as e:
        assert str(e).strip() and "Traceback" not in str(e)
        while e is not None:
            assert not isinstance(e, MemoryError) and "alloc" not in str(e).lower(), e
            e = e.__cause__ or e.__context__


F = b"\xff"
NUMBERS = [b"\0", F, b"\x7f", b"\x80", F * 4, F * 3 + b"\x7f", b"\x7f" + F * 3, F * 8, F * 7 + b"\x7f"]
interesting = st.sampled_from([*NUMBERS, b"PK\x01\x02", b"PK\x03\x04", b"\n", b"1e999", b"]" * 9, b"cos\nsystem\n"])
place = st.floats(0, 1, exclude_max=True, allow_subnormal=False)
size = st.integers(0, 8) | place | st.just(1.0)
bits, nothing, twice = st.integers(0, 7), st.just(b""), st.none()
edits = st.lists(st.tuples(place, size, bits | nothing | twice | interesting | st.binary(max_size=64)), min_size=1)


def damaged(data: bytes, changes) -> bytes:
    """At each place in turn a bit is flipped, or some bytes, or a share of all, become other ones or come twice."""
    for where, size, new in changes[:4]:
        i = int(where * len(data))
        j = i + (size if isinstance(size, int) else int(size**4 * len(data)) + 1)  # mostly a small share
        if isinstance(new, int):
            j, new = i + 1, bytes(byte ^ 1 << new for byte in data[i : i + 1])
        data = data[:i] + (data[i:j] * 2 if new is None else new) + data[j:]
    return data


def repacked(data: bytes, entry: float, changes) -> bytes:
    """An archive, one of whose entries is damaged and has the checksum of what it is now."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(result, "w") as copied:
        names = archive.namelist()
        chosen = names[0] if entry < 0.7 else names[int(entry * len(names))]  # mostly the pickle, or a header
        for name in names:
            content = archive.read(name)
            copied.writestr(name, damaged(content, changes) if name == chosen else content)
    return result.getvalue()


ODD = [10**400, "NaN", "\ud800", "../x", "x" * 300, "\0", [], {}, [[]], {"a": 1}, [1], "sha256"]
scalars = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.integers(-(2**70), 2**70) | st.floats(allow_subnormal=False)
)
scalars |= st.text(max_size=8) | st.sampled_from(ODD)


@st.composite
def changed_json(draw, data: bytes):
    """A JSON object of which some places hold something else, are gone, or are new."""
    values = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from([values, *(v for v in values.values() if isinstance(v, dict))]))
        key = draw(st.sampled_from([*node, "sha256"]) | st.text(max_size=6))
        if draw(st.integers(0, 2)):
            node[key] = copy.deepcopy(draw(scalars))  # which may be the same list or dictionary each time
        else:
            node.pop(key, None)
    text = json.dumps(values)
    return draw(st.sampled_from([text, text, text.replace(":", ":[" * 3000, 1), "[" * 100_000, text + text])).encode()


def fuzz(path: Path, read, check, n: int) -> None:
    """Has a file read after each of n changes; `check` gets what is read, the bytes, and whether they are `repacked`.

    The changes are the same ones whenever it is repeated, unless it is the long run.
    """
    original = path.read_bytes()
    changes = st.tuples(edits.map(lambda c: damaged(original, c)), st.just(False))
    if path.suffix == ".json":
        changes |= st.tuples(changed_json(original), st.just(False))
    if zipfile.is_zipfile(path):
        changes |= st.tuples(st.builds(repacked, st.just(original), place, edits), st.just(True))

    def case(change):
        path.write_bytes(change[0])
        try:
            result = told(read)
        finally:
            path.write_bytes(original)
        if result is not None:
            check(result, *change)

    how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=n, derandomize=n == FEW, **how)(given(changes)(case))()


@pytest.fixture(params=[FEW, pytest.param(CASES // KINDS + 1, marks=pytest.mark.slow)], ids=["few", "all"])
def cases(request):
    return request.param


@pytest.fixture
def run(evaluated) -> Run:
    """An evaluated run."""
    shutil.copytree(evaluated, "runs")
    return Run.open(next(Path("runs/singles").glob("NoName*")))


def test_config_json(run, cases):
    def check(config, data, _):
        values = json.loads(data)
        assert config == run.config or values.get("sha256") is None

    path = run.path / "config.json"
    fuzz(path, lambda: Config.from_json(path), check, cases)


def test_metrics_json(run, cases):
    def check(metrics, *_):
        json.dumps(metrics, allow_nan=False)
        assert all(isinstance(metrics.get(name, {}), dict) for name in ("steps", "files"))

    fuzz(run.path / "metrics.json", lambda: read_metrics(run.path), check, cases)


def test_training_json(run, cases):
    def check(read, *_):
        assert isinstance(read[0], str) and isinstance(read[1].get("train", {}), dict)

    fuzz(run.path / "training.json", lambda: (run.status, run.result), check, cases)


def test_csv(run, cases):
    def check(plane, *_):
        assert plane.cells
        assert all(np.isfinite(plane.values(name)).all() for name in (*BETAS, "kl_y", "kl_z", "rate"))

    path = run.path.with_name("eval_results.csv")
    fuzz(path, lambda: read_plane(path), check, cases)


def test_npz(run, cases):
    def check(arrays, _, is_repacked):
        assert all(isinstance(v, np.ndarray) and v.dtype != object for v in arrays.values())
        for name in set(arrays) & set(expected) if not is_repacked else ():  # it is what it was, as far as it is there
            np.testing.assert_array_equal(arrays[name], expected[name])

    path = run.path / "latents.npz"
    expected = read_arrays(path)
    fuzz(path, lambda: read_arrays(path), check, cases)


def check_data(data, *_) -> None:
    for split in (data.train, data.test):
        assert split.images.dtype == torch.uint8 and len(split.images) == len(split.labels) > 0
        assert split.labels.min() >= 0 and split.labels.max() < data.n_classes == 10, "labels that are none"


MNIST = "MNIST/raw/train-{}-idx{}-ubyte"
FILES = [
    ("MNIST", MNIST.format("images", 3), write_mnist),
    ("MNIST", MNIST.format("labels", 1), write_mnist),
    ("CIFAR10", "cifar-10-batches-py/data_batch_2", write_cifar10),
    ("SVHN", "test_32x32.mat", write_svhn),
]


@pytest.mark.parametrize("name, file, write", FILES)
def test_data_sets(name, file, write, cases):
    write(Path(), n=12)
    fuzz(Path(file), lambda: load_data(Config(dataset=name), ".", CPU), check_data, cases)


def same(tensors: dict, expected: dict) -> bool:
    return all(torch.equal(tensors[name], p) for name, p in expected.items())


def fuzz_model(path: Path, read, n: int) -> None:
    """`fuzz` of a model's weights: their shapes, and they themselves where checksums hold."""
    expected = read().state_dict()

    def check(model, _, is_repacked):
        state = model.state_dict()
        assert all(p.shape == expected[name].shape for name, p in state.items())
        assert is_repacked or same(state, expected)
        assert path.name == "classifier.pth" or all(p.isfinite().all() for p in state.values())

    fuzz(path, read, check, n)


def test_weights(run, cases):
    fuzz_model(run.path / "vae.pth", lambda: load_model(run, CPU), cases)


def test_classifiers(cases):
    path = Path("classifier.pth")
    write_json(Path("config.json"), {"dataset": "Digits", "n_classes": 10})
    save_tensors(path, build_classifier(Config(), 10).state_dict())
    fuzz_model(path, lambda: load_classifier(path, Config(), CPU)[0], cases)


def test_resume_states(cases):
    """A damaged one falls back to the one before: never silently another state than one that was saved."""
    (run,), training = in_training(1)
    for foreign in ({"a": 1}, {"weights": {}, "epoch": 0}, [1]):
        torch.save(foreign, run.path / "resume.pth")
        with pytest.raises(UserError, match=f"{run.path}/resume.pth: damaged"):
            run.load_state()
    training.begin_epoch(3)
    training.steps_done = 2
    for training.epoch in (1, 2):
        for p in training.stack.parameters.values():
            p.data += 1
        training.save()
    training.saver.settle()
    newest, previous = run.path / "resume.pth", run.path / "resume.prev.pth"
    saved = [load_tensors(newest), load_tensors(previous)]

    def read():
        state, problems = run.load_state()
        return state, problems, Training([run], [state], training.setup)

    def check(loaded, _, is_repacked):
        state, problems, resumed = loaded
        assert len(problems) <= 1 and all(f"{newest}: " in line for line in problems)
        if problems or not is_repacked:
            expected = saved[len(problems)]
            assert all(same(state[key], expected[key]) for key in ("weights", "exp_avg", "exp_avg_sq"))
            assert resumed.epoch == state["epoch"] == expected["epoch"] and resumed.steps_done == 2

    fuzz(newest, read, check, cases)
    previous.write_bytes(b"damaged, too")
    fuzz(newest, read, check, cases)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pickles_that_run_code_are_refused_and_run_nothing():
    """Weights, in three formats, a resume state, a classifier, results, a data set."""
    run, code = Run.of(Config(conv_channels=2, z_dims=3), "runs"), Hostile()
    run.create()
    vae, resume, classifier = (run.path / f"{name}.pth" for name in ("vae", "resume", "classifier"))
    old = {"_use_new_zipfile_serialization": False}
    for write, read in [
        (lambda: torch.save({"x": code}, vae), lambda: load_model(run, CPU)),
        (lambda: torch.save({"x": code}, vae, **old), lambda: load_model(run, CPU)),
        (lambda: vae.write_bytes(pickle.dumps(code)), lambda: load_model(run, CPU)),
        (lambda: torch.save({"weights": code}, resume), run.load_state),
        (lambda: torch.save(code, classifier), lambda: load_classifier(classifier, Config(), CPU)),
        (lambda: np.savez("a.npz", x=np.array([code], object)), lambda: read_arrays(Path("a.npz"))),
        (lambda: write_cifar10(Path(), data=lambda _: code), lambda: load_data(Config(dataset="CIFAR10"), ".", CPU)),
    ]:
        write()
        with pytest.raises(UserError):
            read()
        assert not Path("executed").exists()
    pickle.loads(pickle.dumps(code))  # it would have
    assert Path("executed").exists()


def test_these_guards_see_what_they_guard_against(monkeypatch):
    """Code that runs, memory that is taken, a reader that hangs: each is seen."""
    with pytest.raises(AssertionError), guarded():
        os.system("true")
    executed.clear()
    with pytest.raises(MemoryError), guarded():
        np.ones(2**28)
    too_large = UserError("damaged")
    too_large.__cause__ = MemoryError()
    with pytest.raises(AssertionError):
        told(Mock(side_effect=too_large))
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt), guarded():
        threading.Event().wait()
