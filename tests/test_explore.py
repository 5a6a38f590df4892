"""Models in one's own Python: what README.md and docs/tour.ipynb show, from any folder, and what is refused."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tests.conftest import ROOT
from utils.errors import UserError
from utils.explore import load
from utils.runs import load_model
from utils.seeds import generator

CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [[], ["--vae_type", "LVAE", "--use_conv_z"], ["--linear_y_with_dims", "4"]])
def test_an_image_is_what_z_holds_and_what_y_adds(flags, trained):
    (path,) = trained(*flags)
    run = load(path)
    x, labels = run.images(6)
    model = load_model(run.run, CPU)

    def mean_of(y):
        return model.p_x(y).mean.clamp(0, 1)

    for seed in (None, 3):
        z, y, own = run.encode(x, seed)
        assert_close(run.decode(z, own), mean_of(y), rtol=0, atol=1e-5)
    mode = run.encode(x)
    assert_close(run.decode(mode.z, mode.own), model.reconstruct(x), rtol=0, atol=1e-5)
    assert torch.equal(run.encode(x, 3).y, y) and labels.shape == (6,)
    assert not torch.equal(run.encode(x, 4).y, y)
    drawn, again, other = (run.decode(z, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    assert_close(run.decode(z), mean_of(model.p_y(z).mean))
    middle = (z[0] + z[1]) / 2
    assert_close(run.interpolate(z[0], z[1], 5)[::2], torch.stack([z[0], middle, z[1]]))
    sample = run.sample(3, seed=5)
    assert sample.shape == (3, 1, 28, 28) and not sample.requires_grad
    assert torch.equal(sample, model.sample(3, generator=generator(CPU, 5, "explore")))


def test_categories_and_models_without_z(trained):
    run = load(trained("--qz_family", "GumbelSoftmax", batch="g")[0])
    q = run.encode(run.images(4)[0], seed=0)
    assert (q.z.sum(1) == 1).all() and run.decode(q.z.roll(1, 0), q.own).shape == (4, 1, 28, 28)
    with pytest.raises(UserError, match="its z is a category"):
        run.interpolate(q.z[0], q.z[1])
    run.interpolate(q.own[0], q.own[1])
    run = load(trained("--vae_type", "BVAE", batch="v")[0])
    q = run.encode(run.images(4)[0])
    assert_close(q.own, q.y)
    assert q.z.shape == (4, 0) and run.decode(q.z, q.own).shape == (4, 1, 28, 28)


def test_what_cannot_be_loaded_is_said(trained):
    paths = trained("--beta_y", "0.5", "2", "--multi_rate", "--force")
    (model,) = (path for path in paths if "_to_" in path.name)
    for path, why in (("runs", "no config.json there"), (model, "a multi-rate model")):
        with pytest.raises(UserError, match=f"{path}: {why}"):
            load(path)


def test_the_readme_is_right_from_any_folder(trained):
    (path,) = trained()
    section = (ROOT / "README.md").read_text().split("## Use from Python")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    for name, here in (("path/to/this/repository", ROOT), ("runs/grid/NAME", path.resolve())):
        assert code.count(name) == 1
        code = code.replace(name, str(here))
    Path("elsewhere").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd="elsewhere", check=True)
    assert Image.open("elsewhere/samples.png").size == (8 * 30 + 2, 2 * 30 + 2)


def test_the_tour_runs(trained):
    """As a notebook does: cell by cell, in one namespace; the last expression of each is shown, as it is stored."""
    (path,) = trained()
    cells = [c for c in json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    shown = [output["data"]["image/png"] for c in cells for output in c["outputs"] if "data" in output]
    names, pictures = {}, []
    for cell in cells:
        code = "".join(cell["source"]).replace('".."', repr(str(ROOT))).replace('"../runs', '"runs')
        *lines, last = code.splitlines()
        exec("\n".join(lines), names)
        if last.startswith("run.show("):
            pictures.append(eval(last, names))
        else:
            exec(last, names)
    assert names["run"].run.path == path and len(pictures) == 5
    assert [Image.open(io.BytesIO(base64.b64decode(png))).size for png in shown] == [p.size for p in pictures]
    assert all(p.width == 8 * 30 + 2 and p.getextrema()[0][1] > 0 for p in pictures)
