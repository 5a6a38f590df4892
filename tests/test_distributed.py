"""Several processes give what one gives: cells shared by torchrun or a script, and one cell's batches shared."""

import json
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from pytest import approx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_beta_grid
import train
import train_classifier
from datasets.loading import Data
from tests.conftest import ROOT, TINY, all_weights, python
from tests.reliability.trials import ended, wait_until
from utils.distributed import share
from utils.errors import UserError
from utils.files import load_tensors
from utils.machine import prepare
from utils.training.schedule import check_batches

GRID = [*TINY, "--beta_y", "1", "2", "--beta_z", "1", "2"]
EVALUATE = ["--run_batch_name", "grid", "--device", "cpu", "--exclude_fid"]
SHARED = [*TINY, "--beta_y", "0.5", "2", "--batch_size", "250", "--run_batch_name", "shared"]
MULTI_RATE = ["--multi_rate", "--force", "--learning_rate", "1e-4", "--refine_epochs", "1"]
REFINED = [*GRID, *MULTI_RATE, "--run_batch_name", "refined"]
LONGER = [*TINY, "--num_epochs", "4", "--batch_size", "100", "--save_every", "1"]
TOGETHER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import eval_beta_grid, train
from utils.training.training import Training
begin, end, real, steps = dist.init_process_group, dist.destroy_process_group, Training.update, []
longer = [*{LONGER}, "--data_parallel", "--run_batch_name"]
dist.init_process_group = lambda *args, **more: dist.is_initialized() or begin(*args, **more)  # once for all trainings
dist.destroy_process_group = lambda: None

def stopping(self, *args):
    steps.append(None)
    if len(steps) == 20 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, *args)

assert train.main({[*GRID, "--run_batch_name", "grid"]}) == 0
assert eval_beta_grid.main({EVALUATE}) == 0
assert train.main({REFINED}) == 0
for more in ([], {MULTI_RATE}):
    assert train.main([*{SHARED}, "--data_parallel", *more]) == 0
assert train.main([*longer, "whole"]) == 0
for batch in ("stopped", "switched"):
    steps.clear()
    Training.update = stopping
    assert train.main([*longer, batch]) == 128 + signal.SIGTERM
    Training.update = real
assert train.main([*longer, "stopped"]) == 0
end()
"""


def curves(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard has of the runs in a folder, epoch by epoch."""
    (path,) = folder.glob("NoName*")
    events = EventAccumulator(str(path)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_two_processes_give_what_one_gives(passes, interrupted):
    """Cells shared, then the batches of each, stopped and continued; it takes long since three processes start."""
    interrupted(20, *LONGER, "--run_batch_name", "switched")  # from one process to two and back to one
    Path("together.py").write_text(TOGETHER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    status, out, err = ended(python(*launcher, "together.py"), 300)
    assert status == 0, err
    passes(train.main, *GRID, "--run_batch_name", "grid", "--runs_dir", "alone")
    assert all_weights("runs/grid") == all_weights("alone/grid") and len(all_weights("runs/grid")) == 4
    passes(train.main, *REFINED, "--runs_dir", "alone")
    assert all_weights("runs/refined") == all_weights("alone/refined") and len(all_weights("runs/refined")) == 5
    assert out.count("takes 2 of 4 cells") == 2 and out.count("The runs are in runs/refined") == 1
    assert out.count("The runs are in runs/grid") == 1 and out.count("2 of 2 runs evaluated") == 2
    for path in Path("runs/grid").glob("*/training.json"):  # one table, of all cells
        assert out.count(f"{json.loads(path.read_text())['test']['loss']:10.2f} ") == 1
    passes(eval_beta_grid.main, *EVALUATE, "--runs_dir", "alone")
    ours, expected = (Path(root, "grid/eval_results.csv").read_bytes() for root in ("runs", "alone"))
    assert ours == expected
    for more in ([], MULTI_RATE):  # each process has its part of a last batch of 110
        passes(train.main, *SHARED, "--runs_dir", "alone", *more)
    names = [path.name for path in Path("runs/shared").iterdir()]
    for name in names:
        ours, expected = (load_tensors(Path(root, "shared", name, "vae.pth")) for root in ("runs", "alone"))
        for name, weights in expected.items():  # as wholes: of a gradient of almost 0, Adam's steps are rounding
            share = 1e-4 if name.startswith("further.") else 1e-5  # these have only been added to from 0
            assert (ours[name] - weights).norm() <= share * weights.norm(), name
    assert len(names) == 5  # two cells, and two of a multi-rate model
    assert "rerun to continue" in err and "resuming at epoch" in out
    assert "resuming at epoch 3 of 4" in passes(train.main, *LONGER, "--run_batch_name", "switched")
    passes(train.main, *LONGER, "--run_batch_name", "alone")
    ours, expected = (curves(Path("runs", batch)) for batch in ("switched", "alone"))
    assert ours.keys() == expected.keys() and all(ours[tag] == approx(expected[tag], rel=1e-5) for tag in ours)
    assert len(expected["train/loss"]) == 4
    assert all_weights("runs/stopped") == all_weights("runs/whole") and len(all_weights("runs/whole")) == 1


FAULTS = {"an error": "raise RuntimeError('a fault')", "a kill": "os.kill(os.getpid(), signal.SIGKILL)"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("flags", [["--data_parallel"], ["--beta_y", "1", "2"]], ids=str)
def test_a_process_that_fails_ends_the_others(fault, flags):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from utils.errors import run_script
from utils.training.training import Training
real, rank, steps = Training.update, os.environ["RANK"], []
open(f"pid{{rank}}", "w").write(str(os.getpid()))

def failing(self, *args):
    steps.append(None)
    if len(steps) == 20 and rank == "1":
        open("failed", "w").close()
        {FAULTS[fault]}
    return real(self, *args)

Training.update = failing
run_script(lambda: train.main({[*LONGER, "--num_epochs", "100000", *flags]}))
"""
    Path("failing.py").write_text(code)
    process = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "failing.py")
    wait_until(lambda: Path("failed").exists() or process.poll() is not None)
    start = time.monotonic()
    process.communicate(timeout=60)
    print(f"{time.monotonic() - start:.1f} seconds")
    assert process.returncode and Path("failed").exists()
    assert not [pid for pid in (Path(f"pid{i}").read_text() for i in range(2)) if Path("/proc", pid).exists()]


def test_batches_need_several_processes_but_not_too_many(refused, monkeypatch):
    err = refused(train.main, *TINY, "--data_parallel")
    assert err.startswith("error: --data_parallel: ") and "torchrun" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    with pytest.raises(UserError, match="--batch_size: leaves a last batch of 1 images for 2 processes"):
        check_batches(Data(range(1437), range(360), 10), 718)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    """That of its number there, as torchrun or else srun tells it; GPUs that are none."""
    for name, value in (("is_available", True), ("device_count", 4), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
    monkeypatch.setattr(torch, "zeros", Mock())
    of_srun, of_torchrun = {"SLURM_LOCALID": "3"}, {"LOCAL_RANK": "5", "SLURM_LOCALID": "0"}
    for variables, index in (({}, 0), (of_srun, 3), (of_torchrun, 1)):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            assert prepare(None, 1) == prepare("cuda", 1) == torch.device("cuda", index)


def test_a_gpu_that_cannot_be_used_is_refused(monkeypatch):
    """One for which torch has no kernels, which an empty tensor does not tell, and one whose driver is too old."""
    failing = Mock(side_effect=RuntimeError("CUDA error: no kernel image is available\nand more"))
    for name, value in (("is_available", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
    with monkeypatch.context() as context:
        context.setattr(torch, "zeros", Mock(return_value=Mock(add_=failing)))
        for name in (None, "cuda", "cuda:1"):
            with pytest.raises(
                UserError, match=r"^--device: cuda(:1)? is .* cpu \(CUDA error: no kernel image [^\n]*$"
            ):
                prepare(name, 1)
    old = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn(old, stacklevel=1)))
    with pytest.raises(UserError, match=r"^--device: the GPU cannot be used \(CUDA .* \(found version 11040\)"):
        prepare(None, 1)
    assert prepare("cpu", 1) == torch.device("cpu")


def test_the_tasks_of_an_array_share_by_their_variables(passes, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert share(list(range(7))) == list(range(7))[int(rank) :: 2]
        passes(train.main, *TINY, "--beta_y", "1", "2", "3", "--run_batch_name", "b")
        assert len(all_weights("runs")) == {"0": 2, "1": 3}[rank]
    out = passes(train_classifier.main, "--dataset", "Digits", "--seed", "1")
    assert out == "RANK 1 of WORLD_SIZE 2: takes 0 of 1 classifiers\n"
    for rank in ("3", "-1", "x", ""):
        monkeypatch.setenv("RANK", rank)
        assert refused(train.main, *TINY).startswith("error: RANK and WORLD_SIZE: ")
