"""Every reader meets files that were changed at random: a clear error or a right load, and nothing else.

Never a traceback, a file that hangs it, code that runs, or more than 1 GB. `pytest -m slow` makes 10,000 cases.
"""

import contextlib
import copy
import functools
import io
import json
import os
import pickle
import resource
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from datasets.loading import load_data
from models.build import build_model
from models.classifiers import build_classifier, load_classifier
from utils.config import Config
from utils.errors import UserError
from utils.evaluation.subject import metrics_of
from utils.files import read_arrays, save_tensors, to_csv, write_json
from utils.plane.cells import BETAS, METRICS, SETTINGS, read_plane
from utils.runs import Run, load_model
from utils.training.chunk import Chunk
from utils.training.engine import Engine

CASES = 10_000  # of the slow run, over all kinds of files
FEW = 30  # of each kind in the default one
MEMORY = 2**30  # bytes more than there were
SECONDS = 60  # so long takes only what hangs, on however busy a machine
CPU = torch.device("cpu")
SMALL = Config(conv_channels=2, z_dims=3)
EXECUTED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
PLAIN = ("numpy", "_codecs", "collections", "torch", "copyreg", "builtins")  # modules that a pickle may name

watched = []  # what was executed while a reader ran; None while none does
watching = False


def _audit(event, args):
    if watching and (event in EXECUTED or event == "pickle.find_class" and args[0].split(".")[0] not in PLAIN):
        watched.append((event, args))


sys.addaudithook(_audit)


class Hangs(BaseException):
    """A reader did not come back."""


def _hangs(*_):
    raise Hangs


@contextlib.contextmanager
def guarded():
    """Fails for what a reader must not do: run code, hang, or take more memory than it may."""
    global watching
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    watching = True
    try:
        yield
    finally:
        watching = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not watched, watched


def told(read, allowed=(UserError,)):
    """What a reader returns, or None where it refuses: in one line, and not because memory ran out."""
    try:
        with guarded():
            return read()
    except allowed as e:
        causes = []
        cause = e
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        assert not any(isinstance(c, MemoryError) or "alloc" in str(c).lower() for c in causes), causes
        assert str(e).strip() and "Traceback" not in str(e)
        return None


# --- ways to damage a file ---

INTERESTING = [b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff"]
INTERESTING += [
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"\n",
    b"1e999",
    b"]" * 9,
    b"cos\nsystem\n",
]
place = st.floats(0, 1, exclude_max=True)
edit = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("put"), place, st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), place, st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("truncate"), place, st.none()),
    st.tuples(st.just("remove"), place, place),
    st.tuples(st.just("repeat"), place, place),
)
edits = st.lists(edit, min_size=1, max_size=4)


def damaged(data: bytes, changes) -> bytes:
    for kind, where, what in changes:
        i = int(where * len(data))
        if kind == "flip" and data:
            data = data[:i] + bytes([data[i] ^ 1 << what]) + data[i + 1 :]
        elif kind == "put":
            data = data[:i] + what + data[i + len(what) :]
        elif kind == "insert":
            data = data[:i] + what + data[i:]
        elif kind == "truncate":
            data = data[:i]
        elif kind in ("remove", "repeat"):
            j = min(len(data), i + int(what**4 * len(data)) + 1)  # mostly short
            data = data[:i] + (data[i:j] * 2 if kind == "repeat" else b"") + data[j:]
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


archives = st.one_of(edits.map(lambda c: (None, c)), st.tuples(place, edits))


def damaged_archive(data: bytes, change) -> bytes:
    entry, changes = change
    return damaged(data, changes) if entry is None else repacked(data, entry, changes)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, "NaN", "\ud800", "../x", "x" * 300, "\0", [], {}, [[]], {"a": 1}, [1], "sha256"]),
)  # fmt: skip


@st.composite
def changed_json(draw, values):
    """A JSON object of which some places hold something else, are gone, or are new."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        node = values
        while True:
            key = draw(st.sampled_from(sorted(node) or [""]))
            inner = node.get(key)
            if isinstance(inner, dict) and inner and draw(st.booleans()):
                node = inner
                continue
            break
        how = draw(st.sampled_from(["set", "remove", "add"]))
        if how == "remove":
            node.pop(key, None)
        else:
            node[key if how == "set" else draw(st.text(max_size=6))] = draw(scalars)
    text = json.dumps(values)
    return draw(st.sampled_from([text, text, text.replace(":", ":[" * 3000, 1), "[" * 100_000, text + text])).encode()


# --- valid files, made once ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small valid files of every kind that is read."""
    root = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    run = Run(root / "run", SMALL)
    run.create()
    torch.manual_seed(0)
    model = build_model(SMALL)
    save_tensors(run.path / "vae.pth", model.state_dict())
    chunk = Chunk([Run(root / "resume", SMALL)], [None], Engine(SMALL, 1, CPU))
    chunk.runs[0].create()
    chunk.epoch, chunk.step = 1, 2
    chunk.history, chunk.noise = torch.zeros(3, 1, 4), torch.Generator()
    chunk.save()
    chunk.settle()
    (root / "resume" / "resume.pth").rename(run.path / "state")
    steps, files = {"rates": "0123456789abcdef"}, {"latents.npz": "0123456789abcdef"}
    write_json(run.path / "metrics.json", {"psnr": 20.5, "n": 3, "steps": steps, "files": files, "weights": "ab"})
    terms = {"loss": 1.5, "ll": -1.0, "kl_y": 0.25, "kl_z": 0.25}
    write_json(
        run.path / "training.json", {"status": "finished", "epoch": 2, "seconds": 1.0, "train": terms, "test": terms}
    )
    latents = {name: rng.standard_normal((20, 3)).astype(np.float32) for name in ("qz_mu", "qz_std", "qy_mu")}
    np.savez(root / "latents.npz", labels=np.arange(20) % 10, **latents)
    columns = ["run", "status", *SETTINGS, *list(METRICS)[:8], "kl_z", "kl_y"]
    rows = [
        {
            "run": f"r{i}",
            "status": "finished",
            **vars(SMALL),
            "beta_y": i,
            "kl_y": 1.5,
            "kl_z": 2.0,
            "ll": -i,
            "psnr": 3,
        }
        for i in range(4)
    ]
    (root / "eval_results.csv").write_text(to_csv(rows, list(dict.fromkeys(columns))))
    (root / "classifier").mkdir()
    write_json(root / "classifier" / "config.json", {"dataset": "Digits", "n_classes": 10})
    save_tensors(root / "classifier" / "classifier.pth", build_classifier(Config(), 10).state_dict())

    raw = root / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = (np.arange(12) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
        header = b"\0\0\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (12).to_bytes(4, "big") + labels.tobytes())
    cifar = root / "data" / "cifar-10-batches-py"
    cifar.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [1, 2, 3, 9], "batch_label": name}
        (cifar / name).write_bytes(pickle.dumps(batch, protocol=2))
    from scipy.io import savemat

    for split in ("train", "test"):
        x = rng.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
        savemat(
            root / "data" / f"{split}_32x32.mat", {"X": x, "y": np.array([[1], [2], [10], [4], [5], [6]], np.uint8)}
        )
    return root


@contextlib.contextmanager
def replaced(path: Path, data: bytes):
    original = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(original)


KINDS = ["config", "metrics", "training", "csv", "npz", "idx", "idx labels", "CIFAR10", "SVHN", "weights", "state"]
KINDS += ["classifier"]


def fuzz(strategy, check, n: int) -> None:
    """Gives a check so many cases of a strategy; the same ones whenever it is repeated, unless it is the long run."""
    no_health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    how = settings(max_examples=n, deadline=None, derandomize=n == FEW, database=None, phases=phases)
    settings(how, suppress_health_check=no_health)(given(strategy)(check))()


@pytest.fixture(params=[FEW, pytest.param(CASES // len(KINDS) + 1, marks=pytest.mark.slow)], ids=["few", "all"])
def cases(request):
    return request.param


def texts(path: Path):
    """Changes of a JSON file, by bytes and by structure."""
    original = path.read_bytes()
    by_bytes = edits.map(functools.partial(damaged, original))
    return st.one_of(by_bytes, changed_json(json.loads(original)))


def test_config_json(made, cases):
    path = made / "run" / "config.json"

    def check(data):
        with replaced(path, data):
            found = told(lambda: Config.from_json(path))
        if found is not None and "sha256" in json.loads(data):
            assert found == SMALL or json.loads(data)["sha256"] is None

    fuzz(texts(path), check, cases)


def test_metrics_json(made, cases):
    run = Run(made / "run", SMALL)

    def check(data):
        with replaced(run.path / "metrics.json", data):
            found = told(lambda: metrics_of(run))
        if found is not None:
            json.dumps(found, allow_nan=False)
            assert all(isinstance(found.get(name, {}), dict) for name in ("steps", "files"))

    fuzz(texts(run.path / "metrics.json"), check, cases)


def test_training_json(made, cases):
    run = Run(made / "run", SMALL)

    def check(data):
        with replaced(run.path / "training.json", data):
            found = told(lambda: (run.status, run.result))
        if found is not None:
            assert isinstance(found[0], str) and isinstance(found[1].get("train", {}), dict)

    fuzz(texts(run.path / "training.json"), check, cases)


def test_csv(made, cases):
    path = made / "eval_results.csv"

    def check(changes):
        with replaced(path, damaged(path.read_bytes(), changes)):
            plane = told(lambda: read_plane(path))
        if plane is not None:
            assert plane.cells and all(
                np.isfinite(plane.values(name)).all() for name in (*BETAS, "kl_y", "kl_z", "rate")
            )

    fuzz(edits, check, cases)


def test_npz(made, cases):
    path = made / "latents.npz"
    expected = read_arrays(path)

    def check(change):
        with replaced(path, damaged_archive(path.read_bytes(), change)):
            found = told(lambda: read_arrays(path))
        if found is not None and change[0] is None:  # its checksums hold, so it is what it was, as far as it is there
            for name in set(found) & set(expected):
                np.testing.assert_array_equal(found[name], expected[name])
        if found is not None:
            assert all(isinstance(v, np.ndarray) and v.dtype != object for v in found.values())

    fuzz(archives, check, cases)


def fuzz_data(made, name: str, file: str, cases: int) -> None:
    fuzz(edits, lambda changes: check_data(made, name, made / "data" / file, changes), cases)


def check_data(made, name: str, path: Path, changes) -> None:
    with replaced(path, damaged(path.read_bytes(), changes)):
        data = told(lambda: load_data(Config(dataset=name), str(made / "data"), CPU))
    if data is not None:
        for split in (data.train, data.test):
            assert split.images.dtype == torch.uint8 and len(split.images) == len(split.labels) > 0
            assert split.labels.min() >= 0 and split.labels.max() < data.n_classes == 10, "labels that are none"


@pytest.mark.parametrize("part", ["images-idx3-ubyte", "labels-idx1-ubyte"])
def test_idx(part, made, cases):
    fuzz_data(made, "MNIST", f"MNIST/raw/train-{part}", cases)


def test_cifar10(made, cases):
    batch = "cifar-10-batches-py/data_batch_2"
    many = [("put", 0.0, b"b\x00\x00\x00A"), ("flip", 0.0, 5)]  # numbers an entry as the 1,090,519,040th
    check_data(made, "CIFAR10", made / "data" / batch, many)
    fuzz_data(made, "CIFAR10", batch, cases)


def test_svhn(made, cases):
    fuzz_data(made, "SVHN", "test_32x32.mat", cases)


def test_weights(made, cases):
    run = Run(made / "run", SMALL)
    expected = load_model(run, CPU).state_dict()

    def check(change):
        with replaced(run.path / "vae.pth", damaged_archive((run.path / "vae.pth").read_bytes(), change)):
            model = told(lambda: load_model(run, CPU))
        if model is not None:
            for name, p in model.state_dict().items():
                assert p.isfinite().all() and p.shape == expected[name].shape
                assert change[0] is not None or torch.equal(p, expected[name])

    fuzz(archives, check, cases)


def test_resume_states(made, cases):
    run, state = Run(made / "resume", SMALL), (made / "run" / "state").read_bytes()
    engine = Engine(SMALL, 1, CPU)
    (run.path / "resume.pth").write_bytes(state)
    expected = run.load_state()[0]

    def read():
        found = run.load_state()[0]
        return found, Chunk([run], [found], engine)

    def check(change):
        (run.path / "resume.pth").write_bytes(damaged_archive(state, change))
        found = told(read)
        if found is not None and change[0] is None:
            for key in ("weights", "exp_avg", "exp_avg_sq"):
                assert all(torch.equal(found[0][key][name], p) for name, p in expected[key].items())
            assert found[1].epoch == 1 and found[1].step == 2

    fuzz(archives, check, cases)


def test_classifiers(made, cases):
    path = made / "classifier" / "classifier.pth"
    expected = load_classifier(path, Config(), CPU)[0].state_dict()

    def check(change):
        with replaced(path, damaged_archive(path.read_bytes(), change)):
            found = told(lambda: load_classifier(path, Config(), CPU))
        if found is not None:
            for name, p in found[0].state_dict().items():
                assert p.shape == expected[name].shape and (change[0] is not None or torch.equal(p, expected[name]))

    fuzz(archives, check, cases)


def test_these_guards_see_what_they_guard_against():
    """Code that runs, memory that is taken, a reader that hangs: each is seen."""
    with pytest.raises(AssertionError), guarded():
        os.system("true")
    watched.clear()
    with pytest.raises(MemoryError), guarded():
        np.ones(2**28)
    with pytest.raises(AssertionError):
        told(lambda: _wrap(MemoryError()))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Hangs), guarded():
        patch.setattr(sys.modules[__name__], "SECONDS", 0.1)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while True:
            pass


def _wrap(cause):
    raise UserError("damaged") from cause
