"""One conditioned model and the cells that are unfolded from it, as a user of train.py sees them."""

import json
from pathlib import Path

import pytest
import torch

import eval_beta_grid
import train
from models.conditioned import Conditioned
from models.stack import Stack
from tests.conftest import TINY, weights
from utils.files import digest_of, write_json
from utils.runs import Run, load_model

FLAGS = [*TINY, "--multi_rate", "--run_batch_name", "m"]
GRID = ["--beta_y", "0.1:10:3", "--beta_z", "0.5", "2"]


def cells_of(batch="m"):
    """The unfolded cells of a batch, by betas, and its conditioned models."""
    runs = [Run.open(p.parent) for p in Path("runs", batch).glob("*/config.json")]
    cells = {(r.config.beta_y, r.config.beta_z): r for r in runs if not r.config.is_conditioned}
    return cells, [r for r in runs if r.config.is_conditioned]


def test_every_cell_of_the_grid_is_an_ordinary_run(script):
    status, out, err = script(train.main, *FLAGS, *GRID)
    assert status == 0, err
    cells, (source,) = cells_of()
    assert set(cells) == {(y, z) for y in (0.1, 1, 10) for z in (0.5, 2)}
    assert (source.config.beta_y, source.config.beta_max_y) == (0.1, 10) and source.config.beta_max_z == 2
    model = load_model(source, torch.device("cpu"))
    assert isinstance(model, Conditioned)
    for (beta_y, beta_z), run in cells.items():
        assert run.status == "finished" and run.config.multi_rate
        assert run.config.source == digest_of(source.path / "vae.pth")
        expected = model.at(torch.tensor([beta_y, beta_z]).log10())
        for name, p in load_model(run, torch.device("cpu")).named_parameters():
            assert torch.equal(p, expected[name])
        test = run.result["test"]
        assert test["loss"] == pytest.approx(-test["ll"] + beta_y * test["kl_y"] + beta_z * test["kl_z"], rel=1e-6)
        assert f"{beta_y:10.5g} {beta_z:10.5g}" in out


def test_more_cells_are_unfolded_without_training(script, monkeypatch):
    assert script(train.main, *FLAGS, *GRID)[0] == 0
    cells, (source,) = cells_of()
    before = {run.path: weights(run.path) for run in [source, *cells.values()]}
    monkeypatch.setattr(Stack, "step", None)
    status, out, err = script(train.main, *FLAGS, "--beta_y", "0.3", "3", "--beta_z", "1")
    assert status == 0 and "already complete" in out, err
    cells, (same,) = cells_of()
    assert len(cells) == 8 and same == source
    assert {path: weights(path) for path in before} == before


def test_a_wider_grid_trains_another_model(script):
    assert script(train.main, *FLAGS, "--beta_y", "1", "2")[0] == 0
    assert script(train.main, *FLAGS, "--beta_y", "1", "20")[0] == 2  # its cells have (1, 1) in common
    status, _, err = script(train.main, *FLAGS[:-1], "n", "--beta_y", "1", "20")
    assert status == 0, err
    assert len(cells_of("n")[1]) == 1


def test_cells_whose_model_is_gone_are_told_of(script):
    assert script(train.main, *FLAGS, *GRID)[0] == 0
    _, (source,) = cells_of()
    source.path.rename("elsewhere")
    status, _, err = script(train.main, *FLAGS, "--beta_y", "0.3", "3", "--beta_z", "1")
    assert status == 2 and "a model that is not there any more" in err and err.count("\n") == 1


def test_a_collapsed_model_is_not_unfolded_unless_forced(script):
    assert script(train.main, *FLAGS, *GRID)[0] == 0
    cells, (source,) = cells_of()
    write_json(source.path / "training.json", source.result | {"collapsed": True})
    status, _, err = script(train.main, *FLAGS, "--beta_y", "0.3", "--beta_z", "1")
    assert status == 2 and "its z has collapsed" in err
    assert len(cells_of()[0]) == len(cells)
    assert script(train.main, *FLAGS, "--beta_y", "0.3", "--beta_z", "1", "--force")[0] == 0


@pytest.mark.parametrize("flags", [["--beta_y", "1"], ["--beta_y", "1e-3", "1e4"], ["--beta_y", "0", "1"]])
def test_ranges_that_cannot_be(flags, script):
    status, _, err = script(train.main, *FLAGS, *flags)
    assert status == 2 and err.count("\n") == 1 and not Path("runs").exists()


def test_it_is_resumed_bit_for_bit(script, interrupted):
    flags = [*FLAGS, *GRID, "--num_epochs", "4", "--batch_size", "300", "--save_every", "1"]
    assert script(train.main, *flags, "--runs_dir", "whole")[0] == 0
    interrupted(13, *flags)
    status, out, err = script(train.main, *flags)
    assert status == 0 and "resuming at epoch" in out, err
    for path in Path("whole/m").iterdir():
        assert weights(path) == weights(Path("runs/m", path.name))


def test_its_curves_are_of_single_betas(script):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert script(train.main, *FLAGS, *GRID)[0] == 0
    _, (source,) = cells_of()
    events = EventAccumulator(str(source.path)).Reload()
    points = {tag.rpartition("/")[0] for tag in events.Tags()["scalars"]} - {"train", "test"}
    assert points == {f"beta_y {y}, beta_z {z}" for y, z in ((0.1, 0.5), (0.1, 2), (10, 0.5), (10, 2), (1, 1))}
    result = json.loads((source.path / "training.json").read_text())
    for name, terms in result["points"].items():
        assert events.Scalars(f"{name}/kl_z")[-1].value == pytest.approx(terms["kl_z"], rel=1e-6)


def test_a_batch_of_unfolded_cells_is_evaluated_as_any_other(script):
    assert script(train.main, *FLAGS, *GRID)[0] == 0
    cells, _ = cells_of()
    flags = ["--run_batch_name", "m", "--device", "cpu", "--exclude_mi", "--exclude_fid"]
    status, out, err = script(eval_beta_grid.main, *flags)
    assert status == 0 and "6 of 6 runs evaluated" in out, err
    for run in cells.values():
        kl_z = json.loads((run.path / "metrics.json").read_text())["kl_z"]
        assert kl_z == pytest.approx(run.result["test"]["kl_z"], rel=0.2, abs=0.01)  # other noise


@pytest.mark.parametrize("flags", [["--vae_type", "BVAE"], ["--qz_family", "GumbelSoftmax", "--force"]])
def test_other_models_are_unfolded_too(script, flags):
    """A BVAE has one beta and no z that could collapse; a Gumbel temperature is that of the epoch."""
    status, _, err = script(train.main, *FLAGS, *flags, "--beta_y", "0.1", "10")
    assert status == 0, err
    cells, (source,) = cells_of()
    assert set(cells) == {(0.1, 1), (10, 1)}
    assert flags[1] != "BVAE" or source.result["collapsed"] is False
