"""plot_eval.py: figures, tables and the page of whatever a batch holds."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval_beta_grid
import plot_eval
from tests.datasets.files import write_folder
from tests.plane.planes import HEADER, plane_of, read_csv, rows_of, write_csv
from utils.plane import figures

DEVICE = ["--device", "cpu"]
BATCH = ["--run_batch_name", "b", *DEVICE]
FIGURES = Path("runs/b/figures")
GRID = [0.1, 1.0, 10.0]
ROWS = rows_of(GRID)
PSNR = ["--metrics", "psnr"]


def cases():
    """What a batch holds, the flags, and what the notes name."""
    gaps = [row | {"psnr": v} for row, v in zip(ROWS[::2], (20, "nan", 21, "inf", 22), strict=True)]
    gaps += [{"run": run, "status": "failed", "beta_y": 1, "beta_z": 1} for run in "fg"]
    gaps += [ROWS[0] | {"beta_y": 0, "beta_z": 0, "mi_q_mc": 1.0}]
    notes = ["2 run(s) (f, g) left out, without rates: failed", "missing in 2 of 6 cells: psnr"]
    yield "gaps", gaps, ["--metrics", "psnr", "mi_q_mc", "lr_acc_mean"], notes
    without = [{k: v for k, v in row.items() if k not in ("ll", *HEADER[10:])} for row in ROWS]
    yield "no metrics", without, [], []
    notes = ["no slopes of D", "no evaluated cell is within the budget"]
    yield "one run", ROWS[:1], ["--max_rate", "1e-9"], notes
    kinds = [*ROWS, *rows_of([1.0], seed=3, psnr=40), *rows_of(GRID, vae_type="LVAE")]
    yield "two kinds", kinds, PSNR, ["1 cell(s) were trained more than once", "HVAE, LVAE"]
    yield "off the diagonal", [row for row in ROWS if row["beta_y"] != row["beta_z"]], PSNR, []
    yield "no rate of z", [row | {"kl_z": 0.0, "beta_z": 1.0} for row in ROWS[::3]], PSNR, []
    absurd = [ROWS[0] | {"kl_z": 1e308}, ROWS[1] | {"psnr": -1.7e308}]
    yield "equal", absurd + [row | {"psnr": 1, "is_mean": 1} for row in ROWS[2:]], PSNR, []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows, flags, notes", [pytest.param(*case[1:], id=case[0]) for case in cases()])
def test_figures_still_come(rows, flags, notes, passes):
    """Also of a table whose rows are too long."""
    path = write_csv(rows, header=["mi_q_mc"])
    path.write_text(path.read_text().replace("\n", ",1,2,3\n").replace(",1,2,3", "", 1))
    out = passes(plot_eval.main, *BATCH, "--format", "png", *flags)
    assert all(note in out for note in notes)
    names = {path.name for path in FIGURES.iterdir()}
    assert {"tasks.png", "advice.csv", "advice.md", "slopes.csv", "report.html"} <= names
    kinds = {row["vae_type"] for row in rows if "vae_type" in row}
    kinds = [f"heat_maps_vae_type_{kind}.png" for kind in kinds] if len(kinds) > 1 else ["heat_maps.png"]
    assert names.issuperset(kinds)
    assert {f"{name[:-4]}.csv" for name in names if name.endswith(".png")} <= names
    assert ("rate_plane.png" in names) == ("total_rate.png" in names) == ("ll" in rows[0])


def test_bad_input(refused):
    write_csv(rows_of([1, 2]))
    write_csv([], "empty")
    for flags, *words in (
        (["--metrics", "pnsr"], "--metrics", "'pnsr'", "psnr?"),
        (["--max_rate", "-1"], "--max_rate:", "'-1'"),
        (["--max_rate_z", "nan"], "--max_rate_z:", "'nan'"),
        (["--format", "svg"], "--format:"),
        (["--out", "runs/b/eval_results.csv"], "runs/b/eval_results.csv:", "--out"),
        (["--run_batch_name", "c"], "runs/c/eval_results.csv:"),
        (["--run_batch_name", "b", "c"], "runs/c/eval_results.csv:"),
        (["--run_batch_name", "b", "b", "c"], "--run_batch_name: b b c", "twice"),
        (["--rate_unit", "dB"], "--rate_unit:"),
        (["--run_batch_name", "empty"], "runs/empty/eval_results.csv:"),
    ):
        batch = DEVICE if "--run_batch_name" in flags else BATCH
        err = refused(plot_eval.main, *batch, *flags)
        assert all(word in err for word in words) and not FIGURES.exists()


def test_a_real_batch_has_all_figures_and_a_page_of_its_own(passes, trained):
    """All four steps, once through, hence slow; a later call removes what is of an earlier one."""
    write_folder(Path("pets"), n=60)
    own = ["--dataset", "pets", "--image_size", "28", "--image_channels", "1"]
    trained(*own, "--beta_y", "0.5", "2", "--beta_z", "0.5", "2", batch="b")
    passes(eval_beta_grid.main, *BATCH, "--exclude_fid")
    out = passes(plot_eval.main, *BATCH, "--max_rate", "1000", "--images", "2", "--overview")
    assert "Open runs/b/figures/report.html" in out and "no per_image.npz" not in out
    report = (FIGURES / "report.html").read_text()
    for name in (
        "rate_plane", "total_rate", "rate_z", "heat_maps", "tasks", "overview", "samples", "reconstructions"
    ):  # fmt: skip
        assert (FIGURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (FIGURES / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f'<img alt="{name}" src="data:image/png;base64,' in report
    outside = re.sub(r"(<script[^>]*>).*?</script>", r"\1", report, flags=re.S)  # test_report.py runs it
    assert not re.findall(r'(?:src|href)="(?!data:)', outside) and "@import" not in outside
    budgets = {row["budget"] for row in read_csv(FIGURES / "advice.csv")}
    assert budgets == {"", "R(z) + R(y|z) <= 1000 nats"}
    betas = [(row["beta_y"], row["beta_z"]) for row in read_csv(FIGURES / "overview.csv")]
    assert betas == [("0.5", "0.5"), ("0.5", "2.0"), ("2.0", "0.5"), ("2.0", "2.0")]
    shutil.rmtree(next(Path("runs/b").glob("*Beta_y_2.0-Beta_z_2.0*")))
    shutil.rmtree("pets")
    (FIGURES / "overview_mine.csv").touch()
    out = passes(plot_eval.main, *BATCH, "--format", "png", *PSNR)
    assert "no pictures of 1 cell(s)" in out and "no reconstructions" in out
    assert not [*FIGURES.glob("*.pdf"), *FIGURES.glob("overview.*")]
    assert (FIGURES / "overview_mine.csv").exists() and (FIGURES / "samples.png").exists()


def test_every_column_has_its_unit_and_only_its_own_bound():
    in_nats = ["mi_q_mc", "mi_q_mc_null", "mi_p", "train_ll", "recons_pred_entropy"]
    names = [*in_nats, "clsfr_acc", "lr_acc_mean", "lr_acc_mean_sample", "lr_acc_mean_sample_y"]
    plane = plane_of([row | dict.fromkeys(names, 0.5) for row in rows_of([1, 2])])
    plane.labels = np.arange(40) % 10
    figures.rate_planes(plane, names), figures.total_rates(plane, names)
    axes = figures.against_rate_z(plane, names).figure.axes
    bounded = [any("bound from R(z)" in line.get_label() for line in ax.lines) for ax in axes]
    assert [names[i] for i in np.flatnonzero(bounded)] == ["mi_q_mc", "lr_acc_mean_sample"]
    assert [name for name in names if plane.title(name).endswith("(nats)")] == in_nats
    assert plane.title("lr_acc_mean_sample_y") == "accuracy of logistic regression on samples of y"
    assert plane.title("mi_q_mc_y_se") == "standard error of I(y; label) (nats)"
