"""Files are whole or not there, and what could run code is refused."""

import errno
import os
import random
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import start
from tests.reliability.trials import times
from utils.errors import UserError
from utils.files import load_tensors, read_arrays, save_tensors, write_atomic
from utils.runs import Run, load_model


def test_disk_full_leaves_the_old_file(monkeypatch):
    path = Path("file")
    write_atomic(path, b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file: disk full: needs 1,000 bytes, has [\d,]+$"):
        write_atomic(path, b"x" * 1000)
    assert path.read_bytes() == b"old" and len(list(Path().iterdir())) == 1


def test_every_flipped_bit_of_the_weights_is_seen_or_harmless(trained):
    (path,) = trained()
    run, original = Run.open(path), (path / "vae.pth").read_bytes()
    expected = load_tensors(path / "vae.pth")
    rng = random.Random(0)
    tail = original.rindex(b"PK\x01\x02") - 2000  # where the archive's directory is
    places = [rng.randrange(len(original)) for _ in range(60)] + [
        rng.randrange(tail, len(original)) for _ in range(200)
    ]
    for place in [*places, 29]:
        damaged = bytearray(original)
        damaged[place] ^= 1 << rng.randrange(8)
        (path / "vae.pth").write_bytes(damaged)
        try:
            state = load_model(run, torch.device("cpu")).state_dict()
        except UserError as e:
            assert "vae.pth: " in str(e) and "\n" not in str(e)
        else:
            assert all(torch.equal(state[k], v) for k, v in expected.items())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_that_run_code_are_refused(trained):
    (path,) = trained()
    torch.save({"x": Malicious()}, path / "vae.pth")
    with pytest.raises(UserError, match="vae.pth: .*refused"):
        load_model(Run.open(path), torch.device("cpu"))
    assert not Path("executed").exists()


SAVER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from utils.runs import save_tensors
i = 0
while True:
    i += 1
    save_tensors(Path("x.pth"), {{"i": torch.full((20000,), float(i))}})
"""


@times(200)
def test_kill_9_inside_a_save_leaves_a_whole_file(trial):
    root = str(Path(train.__file__).parent)
    Path("saver.py").write_text(SAVER.format(root=root))
    save_tensors(Path("x.pth"), {"i": torch.zeros(20000)})
    process = start(Path("saver.py").resolve())
    end = time.monotonic() + 60
    while load_tensors(Path("x.pth"))["i"][0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.Random(trial).uniform(0, 0.3))
    process.kill()
    process.wait()
    values = load_tensors(Path("x.pth"))["i"]
    assert values[0] > 0 and (values == values[0]).all()


def wrapped(state, how):
    match how:
        case "module":
            return {f"module.{k}": v for k, v in state.items()}
        case "compiled, then parallel":
            return {f"module._orig_mod.{k}": v for k, v in state.items()}
        case "state_dict":
            return {"state_dict": {f"_orig_mod._orig_mod.{k}": v for k, v in state.items()}, "epoch": 3}
        case "model_state_dict":
            return {"model_state_dict": state, "optimizer_state_dict": {}}
        case "double":
            return {k: v.double() for k, v in state.items()}
    return {k: v.half().float() for k, v in state.items()}


@pytest.mark.parametrize(
    "how", ["module", "compiled, then parallel", "state_dict", "model_state_dict", "double", "half"]
)
def test_weights_as_others_save_them(how, trained):
    (path,) = trained()
    run = Run.open(path)
    state = load_tensors(path / "vae.pth")
    expected = wrapped(state, how) if how == "half" else state
    torch.save({k: v.half() for k, v in state.items()} if how == "half" else wrapped(state, how), path / "vae.pth")
    loaded = load_model(run, torch.device("cpu")).state_dict()
    for name, p in expected.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], p)


def test_weights_that_are_no_floating_point_are_refused(trained):
    (path,) = trained()
    save_tensors(path / "vae.pth", {k: v.int() for k, v in load_tensors(path / "vae.pth").items()})
    with pytest.raises(UserError, match=r"the weights do not fit .* \(not all of them are floating-point tensors\)"):
        load_model(Run.open(path), torch.device("cpu"))


def test_weights_of_torch_before_1_6_say_how_to_save_them_anew(trained):
    (path,) = trained()
    state = load_tensors(path / "vae.pth")
    torch.save(state, path / "vae.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="in the format of torch before 1.6; python -c") as e:
        load_model(Run.open(path), torch.device("cpu"))
    command = shlex.split(str(e.value).partition("python ")[2].removesuffix(" saves it anew"))
    subprocess.run([sys.executable, *command], check=True)
    for name, p in load_model(Run.open(path), torch.device("cpu")).state_dict().items():
        assert torch.equal(p, state[name])


@pytest.mark.parametrize("read", [load_tensors, read_arrays])
def test_an_archive_that_would_fill_the_memory_is_refused(read):
    with zipfile.ZipFile("bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**27))
    with pytest.raises(UserError, match="bomb: .*would inflate to 134,217,728 bytes"):
        read(Path("bomb"))
