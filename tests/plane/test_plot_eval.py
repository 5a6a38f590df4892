"""plot_eval.py: figures, tables and the page of whatever a batch holds."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from tests.datasets.files import write_folder
from tests.plane.planes import HEADER, grid, plane_of, read_csv, rows_of, write_csv
from utils.plane import figures, maps, pictures
from utils.plane.advice import ADVICE
from utils.plane.cells import read_plane
from utils.plane.report import page, to_html, to_markdown

BATCH = ["--run_batch_name", "b", "--device", "cpu"]
FIGURES = Path("runs/b/figures")
GRID = [0.1, 1.0, 10.0]
ROWS = rows_of(GRID)
PSNR = ["--metrics", "psnr"]


def cases():
    """What a batch holds, the flags, and what the notes name."""
    gaps = [row | {"psnr": value} for row, value in zip(ROWS[::2], (20, "nan", 21, "inf", 22), strict=True)]
    gaps += [{"run": run, "status": "failed", "beta_y": 1, "beta_z": 1} for run in "fg"]
    gaps += [ROWS[0] | {"beta_y": 0, "beta_z": 0, "mi_q_mc": 1.0}]
    flags = ["--metrics", "psnr", "mi_q_mc", "lr_acc_mean"]
    yield "gaps", gaps, flags, ["2 run(s) left out, without rates (failed): f, g", "(psnr) is missing in 2 of 6 cells"]
    yield "no metrics", [{k: v for k, v in row.items() if k not in ("ll", *HEADER[10:])} for row in ROWS], [], []
    yield "one run", ROWS[:1], ["--max_rate", "1e-9"], ["no slopes of D", "no evaluated cell is within the budget"]
    kinds = [*ROWS, *rows_of([1.0], seed=3, psnr=40), *rows_of(GRID, vae_type="LVAE")]
    yield "two kinds", kinds, PSNR, ["1 cell(s) were trained more than once", "vae_type HVAE, LVAE"]
    yield "off the diagonal", [row for row in ROWS if row["beta_y"] != row["beta_z"]], PSNR, []
    yield "no rate of z", [row | {"kl_z": 0.0, "beta_z": 1.0} for row in ROWS[::3]], PSNR, []
    absurd = [ROWS[0] | {"kl_z": 1e308}, ROWS[1] | {"psnr": -1.7e308}]
    yield "absurd and equal values", absurd + [row | {"psnr": 1, "is_mean": 1} for row in ROWS[2:]], PSNR, []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows, flags, notes", [pytest.param(*case[1:], id=case[0]) for case in cases()])
def test_figures_still_come(rows, flags, notes, script):
    """Also of a table whose rows are too long."""
    path = write_csv(rows, header=[*HEADER, "mi_q_mc"])
    path.write_text(path.read_text().replace("\n", ",1,2,3\n").replace(",1,2,3", "", 1))
    status, out, err = script(plot_eval.main, *BATCH, "--format", "png", *flags)
    assert status == 0 and "Traceback" not in err and all(note in out for note in notes), err
    made = {path.name for path in FIGURES.iterdir()}
    assert {"tasks.png", "advice.csv", "advice.md", "slopes.csv", "report.html"} <= made
    kinds = {row["vae_type"] for row in rows if "vae_type" in row}
    assert {f"heat_maps{f'_vae_type_{kind}' * (len(kinds) > 1)}.png" for kind in kinds} <= made
    assert {f"{name[:-4]}.csv" for name in made if name.endswith(".png")} <= made
    assert ("rate_plane.png" in made) == ("total_rate.png" in made) == ("ll" in rows[0])


def test_bad_input(script):
    write_csv(rows_of([1, 2]))
    write_csv([], "empty")
    for flags, names in (
        (["--metrics", "pnsr"], ["--metrics", "'pnsr'", "psnr?"]),
        (["--max_rate", "-1"], ["--max_rate:", "'-1'"]),
        (["--max_rate_z", "nan"], ["--max_rate_z:", "'nan'"]),
        (["--format", "svg"], ["--format:"]),
        (["--out", "runs/b/eval_results.csv"], ["runs/b/eval_results.csv:", "--out"]),
        (["--run_batch_name", "c"], ["runs/c/eval_results.csv:"]),
        (["--run_batch_name", "b", "b", "c"], ["runs/c/eval_results.csv:"]),
        (["--rate_unit", "dB"], ["--rate_unit:"]),
        (["--run_batch_name", "empty"], ["runs/empty/eval_results.csv:"]),
    ):
        status, _, err = script(plot_eval.main, *BATCH[2:], *([] if "--run_batch_name" in flags else BATCH[:2]), *flags)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert all(name in err for name in names) and not FIGURES.exists()


def test_a_real_batch_has_all_figures_and_a_page_of_its_own(script, trained):
    """All four steps, once through; a later call removes what is of an earlier one."""
    trained("--beta_y", "0.5", "2", "--beta_z", "0.5", "2", batch="b")
    assert script(eval_beta_grid.main, *BATCH, "--exclude_fid")[0] == 0
    status, out, err = script(plot_eval.main, *BATCH, "--max_rate", "1000", "--images", "2", "--overview")
    assert status == 0 and "Open runs/b/figures/report.html" in out and "no per_image.npz" not in out, err
    names = ("rate_plane", "total_rate", "rate_z", "heat_maps", "tasks", "overview", "samples", "reconstructions")
    for name in names:
        assert (FIGURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (FIGURES / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    report = (FIGURES / "report.html").read_text()
    assert all(f'<img alt="{name}" src="data:image/png;base64,' in report for name in names)
    outside = re.sub(r"(<script[^>]*>).*?</script>", r"\1", report, flags=re.S)  # test_report.py runs what is inside
    assert not re.findall(r'(?:src|href)="(?!data:)', outside) and "@import" not in outside
    assert {row["budget"] for row in read_csv(FIGURES / "advice.csv")} == {"", "R(z) + R(y|z) <= 1000 nats"}
    betas = [(row["beta_y"], row["beta_z"]) for row in read_csv(FIGURES / "overview.csv")]
    assert betas == [("0.5", "0.5"), ("0.5", "2.0"), ("2.0", "0.5"), ("2.0", "2.0")]
    shutil.rmtree(next(p for p in Path("runs/b").iterdir() if "Beta_y_2.0-Beta_z_2.0" in p.name))
    status, out, _ = script(plot_eval.main, *BATCH, "--format", "png", *PSNR)
    assert status == 0 and "no pictures of 1 cell(s)" in out
    assert not [*FIGURES.glob("*.pdf"), *FIGURES.glob("overview.*")]


def test_every_column_has_its_unit_and_only_its_own_bound():
    names = ["mi_q_mc", "mi_q_mc_null", "mi_p", "clsfr_acc", "lr_acc_mean", "train_ll", "recons_pred_entropy"]
    plane = read_plane(write_csv([row | dict.fromkeys(names, 0.5) for row in rows_of([1, 2])], header=HEADER + names))
    names += ["lr_acc_mean_sample", "lr_acc_mean_sample_y"]
    figures.rate_planes(plane, names), figures.total_rates(plane, names)
    figure = figures.against_rate_z(plane, names, lambda mi: 0.9, 2.3).figure
    bounds = [any("bound from R(z)" in line.get_label() for line in ax.lines) for ax in figure.axes[: len(names)]]
    assert [name for name, bound in zip(names, bounds, strict=True) if bound] == ["mi_q_mc", "lr_acc_mean_sample"]
    in_nats = ["mi_q_mc", "mi_q_mc_null", "mi_p", "train_ll", "recons_pred_entropy"]
    assert [name for name in names if plane.title(name).endswith("(nats)")] == in_nats
    assert plane.title("lr_acc_mean_sample_y") == "logistic regression on samples of y"
    assert plane.title("mi_q_mc_y_se") == "standard error of I(y; label) (nats)"


def test_own_images_that_are_gone_leave_samples_only(script):
    write_folder(Path("pets"), n=15)
    pets = ["--dataset", "pets", "--image_size", "28", "--image_channels", "1", "--run_batch_name", "b"]
    assert script(train.main, *TINY, *pets)[0] == 0
    assert script(eval_beta_grid.main, *BATCH, "--exclude_fid")[0] == 0
    shutil.rmtree("pets")
    status, out, _ = script(plot_eval.main, *BATCH, "--format", "png", *PSNR)
    assert status == 0 and "no reconstructions" in out
    assert (FIGURES / "samples.png").exists() and not (FIGURES / "reconstructions.png").exists()


def test_the_grid_puts_each_cell_in_its_place():
    of_betas = maps.Grid(np.array([1, 10, 1]), np.array([0.1, 0.1, 5]))
    np.testing.assert_array_equal(of_betas.image(np.array([1.0, 2.0, 3.0])), [[1, 3], [2, np.nan]])
    figure = pictures.sheet({(1.0, 0.1): np.zeros((4, 6, 3)), (10.0, 5.0): np.full((4, 6, 3), 0.5)}, "t")
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (12, 16, 3)
    assert (canvas[8:, :6] == 0).all() and (canvas[:4, 10:] == 0.5).all() and (canvas[:4, :6] == 1).all()


def test_the_best_is_starred_where_it_is():
    rows = [row | dict.fromkeys(("psnr", "fid"), row["beta_y"] - row["beta_z"]) for row in grid()]
    for name, best in (("psnr", rows[20]), ("fid", rows[4])):
        figure = figures.rate_planes(plane_of(rows), [name]).figure
        (star,) = [line for line in figure.axes[0].lines if line.get_label() == "best"]
        assert (best["beta_y"], best["beta_z"]) == ((10, 0.1) if name == "psnr" else (0.1, 10))
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (best["kl_z"], best["kl_y"])


def test_tables_escape_what_they_are_given():
    rows = [{"task": "<b>", "metric": "a|b", "value": 1.23456789}]
    assert "&lt;b&gt;" in to_html(rows, ADVICE) and "<b>" not in to_html(rows, ADVICE)
    lines = to_markdown(rows, ADVICE).splitlines()
    assert len(lines) == 3 and "a\\|b" in lines[2] and "1.235" in lines[2]
    text = page("<x>", {"k": "<v>"}, ["<n>"], {"T": "t"}, {})
    assert "<x>" not in text and "<v>" not in text and "<n>" not in text
