"""Units that are active by their own rate, and the latents that are written for use elsewhere."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

import eval_beta_grid
from datasets.batches import Resident
from datasets.loading import load_data
from models.hvae import Noise
from models.latents import Gaussian, RelaxedOneHot
from tests.evaluation.conftest import FAST
from utils.evaluation import latents
from utils.evaluation.latents import active_by_rate
from utils.evaluation.metrics import active_units
from utils.files import digest_of
from utils.runs import Run, load_model

CPU = torch.device("cpu")


def test_units_of_rates_that_are_known():
    """Every unit of y follows z, so Burda's count is all; three of them add more than 0.01 nats: shift^2 / 2 > 0.01."""
    shifts = torch.tensor([0.0, 0.1, 0.2, -0.2, 1.0])
    x = torch.linspace(-2, 2, 300)[:, None]
    model = SimpleNamespace(
        q_z=lambda x: Gaussian(torch.cat([x, 0 * x], 1), torch.tensor([0.1, 0.99]).expand(len(x), 2)),
        p_y=lambda z: Gaussian(z[:, :1].expand(-1, 5), torch.ones(len(z), 5)),
        q_y=lambda z, x: Gaussian(z[:, :1] + shifts, torch.ones(len(z), 5)),
        noise=lambda n, g: Noise(torch.randn(n, 2, generator=g), torch.randn(n, 5, generator=g)),
    )
    test = Resident(torch.zeros(300, 1, 1, 1, dtype=torch.uint8), torch.zeros(300), CPU)
    test.batches = lambda size: ((part, None) for part in x.split(size))
    subject = SimpleNamespace(model=model, test=test, generator=lambda *_: torch.Generator())
    assert active_by_rate(subject) == {"active_z_rate": 1, "active_y_rate": 3}
    assert active_units(model.q_y(model.q_z(x).mean, x).mean.numpy()) == 5


def test_rates_of_units_are_torchs_and_add_up():
    g = torch.Generator().manual_seed(0)
    q, p = (Gaussian(torch.randn(4, 3, 2, generator=g), torch.rand(4, 3, 2, generator=g) + 0.1) for _ in "qp")
    torch.testing.assert_close(q.kl_of_units(p), kl_divergence(Normal(*q), Normal(*p)))
    torch.testing.assert_close(q.kl(p), q.kl_of_units(p).sum((1, 2)))
    torch.testing.assert_close(q.rate_of_units(), kl_divergence(Normal(*q), Normal(0.0, 1.0)))
    one = RelaxedOneHot(torch.randn(4, 6, generator=g))
    torch.testing.assert_close(one.rate_of_units().sum(1), one.rate())


def test_the_latents_of_both_splits(batch, script):
    flags = [*FAST, "--latents", "train", "test"]
    status, out, err = script(eval_beta_grid.main, *flags)
    assert status == 0 and "steps: latents_train, latents_test" in out, err
    path = sorted(p for p in Path("runs/b").iterdir() if p.is_dir())[0]
    model, made = load_model(Run.open(path), CPU), digest_of(path / "latents_train.npz")
    data = load_data(Run.open(path).config, "data", CPU)
    for split, n in (("train", 1437), ("test", 360)):
        with np.load(path / f"latents_{split}.npz") as file:
            a = {name: torch.from_numpy(file[name]) for name in file.files}
        assert set(a) == {"index", "label", *(f"{v}_{k}" for v in "zy" for k in ("mean", "std", "sample"))}
        assert a["index"].tolist() == list(range(n)) and torch.equal(a["label"], getattr(data, split).labels)
        x = getattr(data, split).images / 255
        with torch.no_grad():
            q_z = model.q_z(x)
            q_y, joint = model.q_y(q_z.mean, x), model.q_y(a["z_sample"], x)
        for name, found in (("z", q_z), ("y", q_y)):
            torch.testing.assert_close(a[f"{name}_mean"], found.mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a[f"{name}_std"], found.std, rtol=1e-4, atol=1e-5)
        for drawn, q in ((a["z_sample"], q_z), (a["y_sample"], joint)):
            residual = ((drawn - q.mean) / q.std).flatten().double().numpy()
            assert (
                abs(residual.mean()) < 5 / len(residual) ** 0.5 and abs(residual.std() - 1) < 5 / len(residual) ** 0.5
            )
    changed = (path / "latents_train.npz").stat().st_mtime_ns
    assert script(eval_beta_grid.main, *flags)[0] == 0 and (path / "latents_train.npz").stat().st_mtime_ns == changed
    (path / "latents_train.npz").write_bytes(b"cut")
    assert script(eval_beta_grid.main, *flags)[0] == 0 and digest_of(path / "latents_train.npz") == made


def test_categories_have_no_std_and_images_without_classes_no_label(trained, script):
    Path("pets").mkdir()
    for i in range(10):
        Image.fromarray(np.full((28, 28), 20 * i, np.uint8)).save(f"pets/{i}.png")
    own = ["--dataset", "pets", "--image_size", "28", "--image_channels", "1", "--qz_family", "GumbelSoftmax"]
    (path,) = trained(*own, batch="b")
    assert script(eval_beta_grid.main, *FAST, "--latents", "test")[0] == 0
    with np.load(path / "latents_test.npz") as a:
        assert set(a.files) == {"index", "z_mean", "z_sample", "y_mean", "y_std", "y_sample"}
        np.testing.assert_allclose(a["z_mean"].sum(1), 1, rtol=1e-5)
        assert set(np.unique(a["z_sample"])) == {0, 1}
    assert not (path / "latents_train.npz").exists()


def test_latents_that_do_not_fit_are_refused(batch, script, monkeypatch):
    monkeypatch.setattr(latents, "memory", lambda: 1000)
    status, _, err = script(eval_beta_grid.main, *FAST, "--latents", "test")
    assert status == 1 and "--latents test: needs 604,800 bytes of memory, this machine has 1,000" in err


@pytest.mark.parametrize(
    "flags, message", [(["--latents"], "expected at least one"), (["--latents", "val"], "invalid")]
)
def test_other_splits_are_refused(flags, message, script):
    status, _, err = script(eval_beta_grid.main, *FAST, *flags)
    assert status == 2 and err.startswith("error: --latents: ") and message in err and err.count("\n") == 1


def test_columns_of_the_batch(batch, script):
    assert script(eval_beta_grid.main, *FAST, "--exclude_mi", "--exclude_fid")[0] == 0
    for row in batch():
        assert 0 <= int(row["active_z_rate"]) <= 6 and 0 <= int(row["active_y_rate"]) <= 64
        assert (int(row["active_y_rate"]) > 0) == (float(row["kl_y"]) > 0.1)
