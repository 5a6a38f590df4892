"""One conditioned model, the cells that are unfolded from it, and betas of rates that are asked for."""

import math
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from pytest import approx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_beta_grid
import train
from datasets.gaussian import Gaussian
from datasets.loading import load_data
from tests.conftest import GRID, TINY, UNFOLDED, all_weights, folder_of
from tests.reliability.trials import first
from utils.config import Config
from utils.files import digest_of, write_json
from utils.runs import Run, load_model
from utils.seeds import generator
from utils.training.betas import Betas
from utils.training.multi_rate import Search, collapsed, note_collapse
from utils.training.training import Training

CPU = torch.device("cpu")
UNFORCED = [flag for flag in UNFOLDED if flag != "--force"]
LONGER = [*TINY, "--num_epochs", "4", "--batch_size", "25", "--learning_rate", "2e-3", "--run_batch_name", "m"]
MULTI_RATE = [*LONGER, "--multi_rate", "--force", *GRID]


@pytest.fixture
def unfolded(multi_rate):
    """A copy of the runs of GRID in ./runs."""
    shutil.copytree(multi_rate, "runs")


def cells_of(batch="m"):
    """The unfolded cells of a batch, by betas, and its conditioned models."""
    runs = [Run.open(path.parent) for path in Path("runs", batch).glob("*/config.json")]
    cells = {(run.config.beta_y, run.config.beta_z): run for run in runs if not run.config.is_conditioned}
    return cells, [run for run in runs if run.config.is_conditioned]


def betas(*values) -> list[str]:
    """Flags of a cell or of a row of cells at beta_z = 1."""
    return ["--beta_z", "1", "--beta_y", *map(str, values)]


def test_every_cell_of_the_grid_is_an_ordinary_run(unfolded, passes):
    """It is evaluated as any other, and has the rates of the model, whose curves are of single betas."""
    out = passes(train.main, *UNFOLDED, *GRID)
    cells, (source,) = cells_of()
    assert set(cells) == {(y, z) for y in (0.1, 1, 10) for z in (0.5, 2)}
    assert (source.config.beta_y, source.config.beta_max_y) == (0.1, 10) and source.config.beta_max_z == 2
    model = load_model(source, CPU)
    for (beta_y, beta_z), run in cells.items():
        assert run.status == "finished" and run.config.multi_rate
        assert run.config.source == digest_of(source.path / "vae.pth")
        expected = model.weights_at(torch.tensor([beta_y, beta_z]).log10())
        for name, p in load_model(run, CPU).named_parameters():
            assert torch.equal(p, expected[name])
        test = run.result["test"]
        assert test["loss"] == approx(-test["ll"] + beta_y * test["kl_y"] + beta_z * test["kl_z"], rel=1e-6)
        assert f"{beta_y:10.5g} {beta_z:10.5g}" in out
    events = EventAccumulator(str(source.path)).Reload()
    points = {tag.rpartition("/")[0] for tag in events.Tags()["scalars"]} - {"train", "test"}
    assert points == {f"beta_y {y}, beta_z {z}" for y, z in ((0.1, 0.5), (0.1, 2), (10, 0.5), (10, 2), (1, 1))}
    for name, terms in source.result["points"].items():
        assert events.Scalars(f"{name}/kl_z")[-1].value == approx(terms["kl_z"], rel=1e-6)
    passes(eval_beta_grid.main, "--run_batch_name", "m", "--device", "cpu", "--exclude_fid")
    x = load_data(source.config, "data", CPU).test.images / 255
    for y, z in ((0.1, 0.5), (0.1, 2), (10, 0.5), (10, 2)):
        plain = load_model(cells[y, z], CPU)
        kl_y = plain(x, plain.noise(len(x), generator(CPU, 0, "points"))).kl_y.mean().item()
        assert kl_y == approx(source.result["points"][f"beta_y {y}, beta_z {z}"]["kl_y"], rel=1e-4)


def test_more_cells_are_unfolded_without_training(unfolded, passes, refused, monkeypatch):
    before = all_weights()
    monkeypatch.setattr(Training, "update", None)
    assert "already complete" in passes(train.main, *UNFOLDED, *betas(0.3, 3))
    cells, (_,) = cells_of()
    assert len(cells) == 8 and before.items() < all_weights().items()
    refused(train.main, *UNFOLDED, *betas(3, 20))  # of another model, which cannot have (3, 1) in common


def best_code(beta_y: float, beta_z: float, layers: str = "yz") -> dict[str, float]:
    """The best code of D = 400 exp(-R / 20): all of R is in the cheaper layer, or in the one of `layers`."""
    betas = {layer: beta for layer, beta in (("y", beta_y), ("z", beta_z)) if layer in layers}
    layer = min(betas, key=betas.get)
    rate = max(0.0, 20 * math.log(20 / betas[layer]))
    terms = {"ll": -400 * math.exp(-rate / 20), "kl_y": 0.0, "kl_z": 0.0, f"kl_{layer}": rate}
    return {"loss": betas[layer] * rate - terms["ll"], **terms}


def planted(ys, zs, layers="yz", nowhere=()) -> dict[str, dict[str, float]]:
    """Terms of the best codes at the corners of a range; at some of them in one layer alone."""
    corners = {f"beta_y {y:.3g}, beta_z {z:.3g}": (y, z) for y in ys for z in zs}
    return {name: best_code(*betas, layers if betas in nowhere else "yz") for name, betas in corners.items()}


def test_a_layer_that_is_given_up_where_it_pays_is_told():
    """Nothing is told of the best codes of any range; of a code in the more expensive layer alone, by three times."""
    rng, config = np.random.default_rng(0), Config()
    for _ in range(200):
        ys, zs = (sorted(10 ** rng.uniform(-2, 2, size=2)) for _ in range(2))
        assert collapsed(config, planted(ys, zs)) == [] or max(ys[0], zs[0]) > 20  # of what no rate is worth
        for layer, other, low, most in (("y", "z", ys[0], zs[1]), ("z", "y", zs[0], ys[1])):
            where = (low, most) if layer == "y" else (most, low)
            if 3 * low < most < 15:
                (what,) = collapsed(config, planted(ys, zs, other, [where]))
                assert what.startswith(f"{layer} has collapsed, R({layer}") and f"beta_{layer} {low:.3g}" in what
    assert collapsed(config, planted((5, 10), (0.1, 10), "z", [(5, 0.1), (10, 0.1)])) == []  # y is not needed there
    assert len(collapsed(config, planted((30, 50), (30, 50)))) == 2
    assert collapsed(Config("BVAE"), planted((0.1, 10), (1,), "y", [(0.1, 1), (10, 1)])) == []


def test_nothing_is_told_of_the_least_loss_of_the_known_plane():
    """At equal betas any layer may have the rate."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        (y, y_max), (z, z_max) = (sorted(10 ** rng.uniform(-1.5, 1.5, size=2)) for _ in range(2))
        points = {}
        for beta_y, beta_z in product((y, y_max), (z, z_max, y, y_max)):
            best = Gaussian().optimum(min(beta_y, beta_z), 0.2)
            of_z = rng.random() if beta_y == beta_z else float(beta_z < beta_y)
            terms = {"loss": best.loss, "ll": -best.D, "kl_y": (1 - of_z) * best.rate, "kl_z": of_z * best.rate}
            points[f"beta_y {beta_y:.6g}, beta_z {beta_z:.6g}"] = terms
        assert collapsed(Config(), points) == []


def test_what_was_seen_of_an_lvae_is_told(capsys):
    """At betas of 0.1, R(y|z) was 0.04 nats, where the code of another point is better by more than 5 nats."""
    seen = ((0.1, 0.1, 277.7, 0.04, 20.2), (0.1, 10, 269.1, 57.9, 0.0), (10, 0.1, 286.1, 1.1, 29.7))
    config = Config("LVAE", multi_rate=True, beta_y=0.1, beta_max_y=10.0, beta_z=0.1, beta_max_z=10.0)
    points = {}
    for y, z, d, kl_y, kl_z in (*seen, (10, 10, 314.4, 0.1, 2.9)):
        loss = d + y * kl_y + z * kl_z
        points[f"beta_y {y}, beta_z {z}"] = {"loss": loss, "ll": -d, "kl_y": kl_y, "kl_z": kl_z}
    assert collapsed(config, points) == ["y has collapsed, R(y|z) is 0.04 nats at beta_y 0.1, beta_z 0.1"]
    for epoch in range(61):
        note_collapse(config, epoch, 1.0, points)
        note_collapse(config, epoch, 0.5, points)  # while betas spread
    assert re.findall("after ([0-9]+) of 60", capsys.readouterr().err) == ["15", "24", "60"]


def test_models_that_are_gone_or_collapsed(unfolded, script, refused):
    cells, (source,) = cells_of()
    of_y = ["y has collapsed, R(y|z) is 0.1 nats at"]
    for has, flags, expected in ((True, UNFORCED, 2), (of_y, UNFORCED, 2), (False, UNFORCED, 0), (True, UNFOLDED, 0)):
        write_json(source.path / "training.json", source.result | {"collapsed": has})
        status, _, err = script(train.main, *flags, *betas(0.3))
        assert status == expected and ("--force" in err) == (status == 2), err
        assert status == 0 or ("y has collapsed, R(y|z)" if has == of_y else "z has collapsed;") in err
        assert len(cells_of()[0]) == len(cells) + (has is False or flags is UNFOLDED)
    source.path.rename("elsewhere")
    assert "--multi_rate: runs/m holds cells of a model" in refused(train.main, *UNFOLDED, *betas(0.4))


def test_it_is_resumed_bit_for_bit(passes, interrupted):
    flags = [*UNFOLDED, *betas(0.1, 10), "--num_epochs", "4", "--save_every", "1", "--refine_epochs", "3"]
    passes(train.main, *flags, "--runs_dir", "whole")
    interrupted(8, *flags)  # in the third epoch, in which betas spread
    interrupted(6 + 9 + 4, *flags)  # once the model is trained, and one cell, in the second epoch of the other
    out = passes(train.main, *flags, "--dry_run")
    assert "2 finished, 1 unfinished; 2 epochs left" in out and "unfinished at epoch 5 of 7" in out
    assert "resuming at epoch 5 of 7" in passes(train.main, *flags)
    assert all_weights("whole") == all_weights()


def test_refined_cells_go_on_from_what_is_unfolded(unfolded, passes, monkeypatch):
    """With Muon, along a cosine from the learning rate, after the model's epochs; beside unrefined ones."""
    before, real, rates, starts = all_weights(), Training.update, [], {}

    def update(self, *inputs):
        rates.append(self.optimizer.param_groups[0]["lr"])
        starts.setdefault(self.runs[0].config.beta_y, {n: p[0].clone() for n, p in self.stack.parameters.items()})
        return real(self, *inputs)

    monkeypatch.setattr(Training, "update", update)
    flags = [*UNFOLDED, "--beta_y", "0.1", "10", "--beta_z", "0.5", "--refine_epochs", "2"]
    passes(train.main, *flags)
    refined = {run.config.beta_y: run for run in map(Run.open, Path("runs/m").glob("*refine_epochs_2"))}
    unrefined, (source,) = cells_of()
    assert rates == approx([7e-3 / 2 * (1 + math.cos(math.pi * step / 6)) for step in range(6)] * 2)
    assert set(refined) == set(starts) == {0.1, 10} and before.items() < all_weights().items()
    for beta_y, run in refined.items():
        (path,) = Path("runs/m").glob(f"*Beta_y_{beta_y:.1f}-Beta_z_0.5-z_dim_3-muon-multi_rate")
        for name, p in load_model(Run.open(path), CPU).named_parameters():
            assert torch.equal(p, starts[beta_y][name])
        assert run.result["test"]["loss"] < Run.open(path).result["test"]["loss"]
        assert run.config.source == digest_of(source.path / "vae.pth") and len(run.result["sessions"]) == 2
        curve = EventAccumulator(str(run.path)).Reload().Scalars("test/loss")
        assert [event.step for event in curve] == [3, 4]
    assert passes(train.main, *flags).count("already complete") == 3


@pytest.mark.parametrize("flags", [["--vae_type", "BVAE"], ["--qz_family", "GumbelSoftmax", "--force"]])
def test_other_models_are_unfolded_too(passes, flags):
    """A BVAE has one beta and no z that could collapse; a Gumbel temperature is that of the epoch."""
    passes(train.main, *UNFORCED, *flags, "--beta_y", "0.1", "10")
    cells, (source,) = cells_of()
    assert set(cells) == {(0.1, 1), (10, 1)}
    assert flags[1] != "BVAE" or source.result["collapsed"] is False


@pytest.fixture(scope="module")
def searchable(tmp_path_factory) -> Path:
    """The runs of a multi-rate model whose rates depend on the betas; read only."""
    return folder_of(tmp_path_factory, *MULTI_RATE)


@pytest.fixture
def rates(searchable, monkeypatch):
    """A copy of that model in ./runs, and its rates R(y|z), R(z) in nats at given betas, of few images."""
    monkeypatch.setattr("utils.training.multi_rate.SEARCHED_IMAGES", 200)
    shutil.copytree(searchable, "runs")
    _, (source,) = cells_of()
    search = Search(load_model(source, CPU), load_data(source.config, "data", CPU), 25)
    return lambda *values: search.rates(np.log10(values))


def test_rates_that_are_asked_for_are_found(passes, rates):
    """Rates of the model itself, at betas off the grid, lead back to those rates; the table shows them in bits."""
    asked = rates(0.4, 1.1)
    bits = [f"{rate / math.log(2):.6f}" for rate in asked]
    targets = ["--rate_unit", "bits", "--target_rate_y", bits[0], "--target_rate_z", bits[1]]
    out = passes(train.main, *MULTI_RATE, *targets)
    (run,) = [run for run in cells_of()[0].values() if run.config.target_rate_z]
    assert run.config.target_rate_y == approx(asked[0], abs=1e-5)
    assert_allclose(rates(run.config.beta_y, run.config.beta_z), asked, rtol=0.03, atol=1e-3)
    line = next(line for line in out.splitlines() if re.match(rf" +{float(bits[0]):.4g} ", line))
    shown = [run.result[split]["kl_y"] / math.log(2) for split in ("train", "test")]
    assert [float(w) for w in line.split()[1:3]] == approx(shown, abs=1e-3) and "(bits per image)" in out


def test_one_rate_leaves_the_other_beta(passes, rates):
    asked = rates(0.7, 0.5)[0]
    passes(train.main, *MULTI_RATE, "--target_rate_y", f"{asked:.6f}")
    runs = {run.config.beta_z: run for run in cells_of()[0].values() if run.config.target_rate_y}
    assert set(runs) == {0.5, 2}
    for beta_z, run in runs.items():
        assert "Rate_y_" in run.path.name and f"Beta_z_{beta_z}" in run.path.name
        assert rates(run.config.beta_y, beta_z)[0] == approx(asked, rel=0.01)


def test_rates_out_of_reach_are_refused_with_the_nearest(refused, rates):
    before = set(Path("runs/m").iterdir())
    err = refused(train.main, *MULTI_RATE, "--target_rate_y", "5000")
    nearest, beta_y = (float(re.search(rf"{name} ([0-9.]+)", err)[1]) for name in (r"nearest: R\(y\|z\)", "beta_y"))
    assert "--target_rate_y" in err and beta_y == 0.1 and nearest == approx(rates(0.1, 0.5)[0], rel=1e-3)
    assert set(Path("runs/m").iterdir()) == before


def test_rates_and_ranges_that_cannot_be(refused):
    for message, *flags in (
        ("--target_rate_z: must be > 0", "--target_rate_z", "-1"),
        ("--target_rate_y: must be > 0", "--target_rate_y", "0"),
        ("--target_rate_z: BVAE has no z", "--target_rate_z", "3", "--vae_type", "BVAE"),
        ("hold less than 1.099 nats", "--target_rate_z", "1.2", "--qz_family", "GumbelSoftmax"),
        ("--target_rate_z", "--target_rate_z", "two"),
        ("--multi_rate", "--multi_rate", *betas(1)),
        ("--refine_epochs: must be >= 1", "--multi_rate", *betas(1, 2), "--refine_epochs", "0"),
        ("--refine_epochs: trains cells that --multi_rate", "--refine_epochs", "3"),
        ("--beta_y", "--multi_rate", *betas(1e-3, 1e4)),
        ("--beta_y", "--multi_rate", *betas(0, 1)),
    ):
        assert message in refused(train.main, *TINY, *flags) and not Path("runs").exists()


def test_a_rate_of_a_layer_of_one_beta_is_refused_with_what_it_is(script):
    status, _, err = script(train.main, *UNFOLDED, "--beta_y", "0.1", "10", "--target_rate_z", "50")
    assert status == 2 and "error: --target_rate_z" in err and err.count("at beta_y") == 2 and "beta_z 1" in err


@pytest.mark.parametrize("how", first(1, ["12", "30", "BVAE"], ["60", "100", "HVAE"]))
def test_betas_are_steered_to_the_rates_asked_for(how, passes):
    flags = [*LONGER, "--num_epochs", how[0], "--batch_size", how[1], "--vae_type", how[2], "--conv_channels", "4"]
    flags += ["--z_dims", "6", "--lr_schedule", "tail", "--target_rate_y", "12"]
    passes(train.main, *flags)
    (run,) = cells_of()[0].values()
    assert run.config.target_rate_y == 12 and run.config.beta_y != 1 and run.config.beta_z == 1
    assert run.result["train"]["kl_y"] == approx(12, rel=0.05)
    test = run.result["test"]
    assert test["loss"] == approx(-test["ll"] + run.config.beta_y * test["kl_y"] + test["kl_z"], rel=1e-4)
    assert "already complete" in passes(train.main, *flags)


def test_steering_is_the_dual_ascent_of_its_docstring():
    """Against a plain loop over one cell: averaged log rates, the clamped error, and nothing before or after."""
    config = Config(target_rate_y=4.0, num_epochs=10, warmup_epochs=1)
    steered, steps, log_beta, averaged = Betas([config], CPU), 200, 0.0, None
    rng = np.random.default_rng(0)
    for step in range(steps):
        rate = float(rng.uniform(2, 30))
        steered.steer(torch.tensor([[0.0, 0.0, 8 * rate, 8 * 3.0]]), 8, step / steps, steps)
        if 0.1 <= step / steps < 0.9:
            averaged = math.log(rate) if averaged is None else averaged + (math.log(rate) - averaged) / 20
            log_beta += 30 / steps * min(1, max(-1, averaged - math.log(4)))
    assert steered.y.item() == approx(math.exp(log_beta), rel=1e-4) and steered.z.item() == 1


def test_steering_starts_at_the_betas_of_a_multi_rate_model(script, rates, monkeypatch):
    _, (source,) = cells_of()
    write_json(source.path / "training.json", source.result | {"collapsed": False})  # one this small does collapse
    asked, starts = rates(0.4, 1.1), []

    def update(self, x, noise, beta_y, beta_z):
        starts.append((beta_y.item(), beta_z.item()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "update", update)
    targets = ["--target_rate_y", f"{asked[0]:.6f}", "--target_rate_z", f"{asked[1]:.6f}", "--warmup_epochs", "0"]
    assert script(train.main, *LONGER, *targets)[0] == 130
    assert_allclose(rates(*starts[0]), asked, rtol=0.03, atol=1e-3)
