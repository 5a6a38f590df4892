"""Files are whole or not there, and what could run code is refused."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

from utils.errors import UserError
from utils.files import load_tensors, save_tensors, write_atomic
from utils.runs import Run, load_model

CPU = torch.device("cpu")


def test_disk_full_leaves_the_old_file(monkeypatch):
    path = Path("file")
    write_atomic(path, b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"file: disk full: needs 1,000 bytes, has [\d,]+$"):
        write_atomic(path, b"x" * 1000)
    assert path.read_bytes() == b"old" and os.listdir() == ["file"]


def test_weights_as_others_save_them(trained):
    (path,) = trained()
    state = load_tensors(path / "vae.pth")

    def prefixed(prefix):
        return {prefix + name: p for name, p in state.items()}

    half = {name: p.half() for name, p in state.items()}
    for saved, expected in (
        (prefixed("module."), state),
        (prefixed("module._orig_mod."), state),
        ({"state_dict": prefixed("_orig_mod._orig_mod."), "epoch": 3}, state),
        ({"model_state_dict": state, "optimizer_state_dict": {}}, state),
        ({name: p.double() for name, p in state.items()}, state),
        (half, {name: p.float() for name, p in half.items()}),
    ):
        torch.save(saved, path / "vae.pth")
        loaded = load_model(Run.open(path), CPU).state_dict()
        assert_close({name: loaded[name] for name in expected}, expected, rtol=0, atol=0)


def test_weights_that_hold_no_numbers_are_refused(trained):
    (path,) = trained()
    state = load_tensors(path / "vae.pth")
    save_tensors(path / "vae.pth", {k: v.int() for k, v in state.items()})
    with pytest.raises(UserError, match="vae.pth: .*not all of them are floating-point"):
        load_model(Run.open(path), CPU)
