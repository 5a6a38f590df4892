"""Own networks: the documented example from training to reload; what cannot be trained is told before it is."""

import csv
import shlex
from pathlib import Path

import pytest

import eval_beta_grid
import plot_eval
import train
from models import own
from tests.conftest import EVALUATION, ROOT, TINY, all_weights
from utils.errors import UserError
from utils.explore import load
from utils.files import digest, read_json

EXAMPLE = (ROOT / "docs" / "residual.py").read_text()
FLAGS = [*TINY, "--num_epochs", "1", "--networks", "residual.py:Residual"]
STACKED = ["--beta_y", "1", "2", "--cells_at_once", "2"]
MULTI_RATE = ["--multi_rate", "--force", "--beta_y", "0.1:10:2"]


@pytest.fixture(autouse=True)
def no_file_named_before(monkeypatch):
    monkeypatch.setattr(own, "FILES", {})
    Path("residual.py").write_text(EXAMPLE)


def test_the_documented_example_is_trained_evaluated_and_loaded(passes, refused):
    """More than five seconds, as five runs are made, and four evaluated."""
    for flags in (STACKED, MULTI_RATE):
        assert "--all --networks residual.py" in passes(train.main, *FLAGS, *flags)
    runs = sorted(path for path in Path("runs/singles").iterdir() if "_to_" not in path.name)
    assert len(runs) == 4 and all("-networks_Residual" in path.name for path in runs)
    identity = f"Residual@{digest(EXAMPLE.encode())}"
    for path in runs:
        assert (path / "networks.py").read_text() == EXAMPLE
        assert read_json(path / "config.json")["networks"] == identity
        _, *command = shlex.split(passes(train.main, "--like", path))
        assert "already complete" in passes(train.main, *command[1:])
    own.FILES.clear()
    with pytest.raises(UserError, match=f"{identity}; add --networks FILE"):
        load(runs[0])
    assert identity in refused(plot_eval.main, "--traverse", runs[0])
    passes(eval_beta_grid.main, *EVALUATION, "--exclude_mi", "--networks", "residual.py")
    rows = list(csv.DictReader(Path("runs/singles/eval_results.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(row["networks"] == identity and float(row["kl_y"]) > 0 for row in rows)
    own.FILES.clear()
    run = load(runs[0], networks=runs[0] / "networks.py")
    assert run.decode(run.encode(run.images(2)[0]).z).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("flags", [["--vae_type", "LVAE"], ["--vae_type", "BVAE", "--precision", "bf16"]])
def test_the_documented_example_goes_with_other_models(flags, passes):
    passes(train.main, *FLAGS, *flags, "--px_y_family_ll", "MoL")


def test_a_class_of_the_same_networks_gives_the_same_bytes(passes, tiny):
    Path("same.py").write_text("from models.networks import VectorZ\n\n\nclass Same(VectorZ):\n    pass\n")
    passes(train.main, *TINY, "--networks", "same.py:Same")
    assert [*all_weights().values()] == [*all_weights(tiny).values()]
    (path,) = Path("runs/singles").iterdir()
    ours, theirs = (read_json(p / "training.json") for p in (path, next(tiny.glob("singles/*"))))
    assert ours["test"] == theirs["test"]


MULTI, INIT, BLOCK = " ".join(MULTI_RATE), "super().__init__()", "return h + self.change(h)"
FAULTS = [  # what of the example is replaced, and by what; what is told, and with which flags
    ("nn\n\n", "nn\nimport foo\n", "line 4: ModuleNotFoundError: No module named 'foo'", ""),
    ("nn\n\n", "nn\n)\n", "line 4: SyntaxError", ""),
    ("class Residual", "class Residuals", "no class Residual; did you mean Residuals? (valid: Block, Residuals)", ""),
    ("c, z_dims, y_dims)", "c)", "TypeError: Residual.__init__() takes", ""),
    ("= c, z_dims\n", "= c, z_dim\n", "line 20: NameError: name 'z_dim'", ""),
    ("def y_joint", "def joint", "no attribute 'y_joint'", ""),
    ("x_branch = trunk", "def x_branch(self):\n        pass", "x_branch must return an nn.Module, got NoneType", ""),
    ("self.colours, self.c)]", "self.colours, 5)]", "trunk.2 (Conv2d): RuntimeError", ""),
    ("2 * self.c, 3,", "2 * self.c, 1,", "y_prior: must give ((3, 2, 7, 7), (3, 2, 7, 7)) for 3 images, gives", ""),
    ("outputs, 4,", "outputs, 2,", "decoder: must give (3, 1, 28, 28) for 3 images, gives (3, 1, 26, 26)", ""),
    ("(nn.SiLU()", "(nn.BatchNorm2d(c)", "trunk.1.change.0 (BatchNorm2d): gives other", ""),
    ("(nn.SiLU()", "(nn.Dropout(0.1)", "trunk.1.change.0 (Dropout): gives other", ""),
    (BLOCK, f"{BLOCK} + h.mean()", "trunk.1 (Block): gives other", ""),
    (BLOCK, f"{BLOCK} if self.training else h", "trunk.1 (Block): gives other", ""),
    (INIT, f"{INIT}; self.register_buffer('a', nn.Linear(2, 2).bias.data)", ".a (Tensor): is a buffer", ""),
    (INIT, f"{INIT}; self.a = nn.Linear(2, 2)", ".a.weight (Parameter): has no part in the loss", ""),
    (BLOCK, f"{BLOCK} if h.sum() else h", "--cells_at_once 1 would", " ".join(STACKED)),
    ("(nn.SiLU()", "(nn.GroupNorm(1, c)", "trunk.1.change.0 (GroupNorm): --multi_rate", MULTI),
    ("stride=2,", "stride=2, bias=False,", "trunk.0 (Conv2d): --multi_rate needs its bias", MULTI),
    (BLOCK, f"{BLOCK} + self.change[1].weight.sum()", "trunk.1 (Block): --multi_rate cannot fold", MULTI),
    ("in_full(Conv2d(self.c, 2", "(Conv2d(self.c, 2", "must give torch.float32, gives", "--precision bf16"),
    ("(z_dims,)", "(z_dims, 1)", "GumbelSoftmax needs z_shape (3,), got (3, 1)", "--qz_family GumbelSoftmax"),
]


@pytest.mark.parametrize("old, new, said, flags", FAULTS)
def test_what_cannot_be_trained_is_told_before(old, new, said, flags, refused):
    assert old in EXAMPLE
    Path("residual.py").write_text(EXAMPLE.replace(old, new))
    err = refused(train.main, *FLAGS, *flags.split())
    assert err.startswith("error: --networks: ") and said in err, err
    assert not Path("runs").exists()


FINE = [  # what goes, though only just
    ("(nn.SiLU()", "(nn.GroupNorm(1, c)", STACKED),
    ("(nn.SiLU()", "(nn.GroupNorm(1, c, affine=False)", MULTI_RATE),
    ("stride=2,", "stride=2, bias=False,", STACKED),
    (BLOCK, f"{BLOCK} if h.sum() else h", STACKED[:3]),
    (INIT, f"{INIT}; self.register_buffer('a', nn.Linear(2, 2).bias.data, persistent=False)", MULTI_RATE),
]


@pytest.mark.parametrize("old, new, flags", FINE)
def test_nothing_more_is_refused(old, new, flags, passes):
    Path("residual.py").write_text(EXAMPLE.replace(old, new))
    passes(train.main, *FLAGS, *flags, "--dry_run")


def test_flags_that_name_no_class_in_a_file_are_refused(refused):
    for text, said in {"x": "FILE:CLASS", "x.py:": "FILE:CLASS", "x.py:A": "x.py: No such", ".:A": "directory"}.items():
        assert said in refused(train.main, *TINY, "--networks", text)
    assert "x.py: No such" in refused(eval_beta_grid.main, *EVALUATION, "--networks", "x.py")
    assert refused(train.main, *FLAGS, "--use_conv_z").startswith("error: --use_conv_z: ")


def test_a_changed_file_is_told_from_the_one_that_trained_a_run(interrupted, passes, refused):
    """The same file goes on with what was interrupted; another one does not, unless it begins anew."""
    flags = [*TINY, "--save_every", "1", "--networks"]
    passes(train.main, *flags, "residual.py:Residual", "--runs_dir", "undisturbed")
    interrupted(5, *flags, "residual.py:Residual")
    changed = EXAMPLE.replace("SiLU", "ReLU")
    Path("changed.py").write_text(changed)
    err = refused(train.main, *flags, "changed.py:Residual")
    assert all(f"Residual@{digest(text.encode())}" in err for text in (EXAMPLE, changed))
    (path,) = Path("runs/singles").iterdir()
    assert (path / "resume.pth").exists()
    passes(train.main, *flags, f"{path}/networks.py:Residual")
    assert all_weights() == all_weights("undisturbed")
    assert "of another architecture: networks" in refused(train.main, *TINY, "--init_from", path)
    passes(train.main, *flags, "changed.py:Residual", "--overwrite")
    assert (path / "networks.py").read_text() == changed and all_weights() != all_weights("undisturbed")


def test_runs_without_own_networks_need_no_file_and_no_code_runs(trained, passes, script):
    """More than five seconds, as they are evaluated twice, and drawn."""
    (plain,) = trained()
    assert "networks" not in read_json(plain / "config.json") and not (plain / "networks.py").exists()
    Path("residual.py").write_text(EXAMPLE + "open('ran', 'a').close()\n")
    passes(train.main, *FLAGS)
    evaluation = [*EVALUATION, "--exclude_mi"]
    passes(eval_beta_grid.main, *evaluation, "--networks", "residual.py")
    Path("ran").unlink()
    own.FILES.clear()
    Path("other.py").write_text("")
    status, out, err = script(eval_beta_grid.main, *evaluation, "--force", "--networks", "other.py")
    assert status == 1 and "1 of 2 runs evaluated" in out and err.count("\n") == 1
    assert "; add --networks FILE, with their file, or with its copy there, networks.py" in err
    assert err.endswith(f"; other.py is of {digest(b'')}\n")
    passes(plot_eval.main, *EVALUATION[:2])
    assert not Path("ran").exists()
    report = Path("runs/singles/figures/report.html").read_text()
    assert "-networks_Residual/networks.py:Residual --num_epochs 1" in report
