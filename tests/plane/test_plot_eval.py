"""plot_eval.py: figures, tables and the page of whatever a batch holds."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from tests.plane.planes import AXIS, HEADER, exponential, plane_of, rows_of, write_csv
from utils.plane import figures, maps, pictures
from utils.plane.advice import ADVICE
from utils.plane.cells import read_plane
from utils.plane.report import page, to_html, to_markdown


def cases():
    rows = rows_of()
    failed = {"run": "f", "status": "failed", "beta_y": 1, "beta_z": 1}
    yield "missing metrics", [{k: v for k, v in row.items() if k != "psnr"} for row in rows], []
    yield "no metrics", [{k: v for k, v in row.items() if k not in ("ll", *HEADER[10:])} for row in rows], []
    yield "missing cells", rows[::3], []
    yield "one run", rows[:1], ["no slopes of D: they need cells with neighbours"]
    yield "duplicate betas", rows + rows[:5], ["5 cell(s) were trained more than once"]
    yield (
        "NaNs",
        [row | {"psnr": "nan", "is_mean": "inf"} if i % 2 else row for i, row in enumerate(rows)],
        ["PSNR (psnr) is missing in 12 of 25 cells"],
    )
    yield "failed runs", [*rows, failed, failed | {"run": "g"}], ["2 run(s) left out, without rates (failed): f, g"]
    yield "beta 0", rows + [rows[0] | {"beta_y": 0, "beta_z": 0}], []
    yield "seeds", rows + rows_of(seed=3, psnr=40), ["25 cell(s) were trained more than once"]
    yield "off the diagonal", [row for row in rows if row["beta_y"] != row["beta_z"]], []
    yield "no rate of z", [row | {"kl_z": 0.0, "beta_z": 1.0} for row in rows[::5]], []
    yield (
        "two kinds",
        rows + rows_of(vae_type="LVAE"),
        ["the batch mixes settings, each with a marker", "vae_type HVAE, LVAE"],
    )
    yield "absurd values", [rows[0] | {"kl_z": 1e308, "psnr": -1.7e308}, rows[1] | {"psnr": 1.7e308}, *rows[2:]], []
    yield "equal values", [row | {"psnr": 1, "is_mean": 1} for row in rows], []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows, notes", [pytest.param(*case[1:], id=case[0]) for case in cases()])
def test_figures_still_come(rows, notes, script, request):
    write_csv(rows)
    status, out, err = script(plot_eval.main, "--run_batch_name", "b", "--format", "png", "--device", "cpu")
    assert status == 0 and "Traceback" not in err, err
    for note in notes:
        assert note in out
    made = {p.name for p in Path("runs/b/figures").iterdir()}
    assert {"tasks.png", "advice.csv", "advice.md", "slopes.csv", "report.html"} <= made
    kinds = ["_vae_type_HVAE", "_vae_type_LVAE"] if "two kinds" in request.node.name else [""]
    assert {f"heat_maps{kind}.png" for kind in kinds} <= made
    assert {f"{p[:-4]}.csv" for p in made if p.endswith(".png")} <= made
    for name in ("rate_plane.png", "total_rate.png"):
        assert (name in made) == ("ll" in rows[0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metrics", "pnsr"], "--metrics: no run has 'pnsr'; did you mean psnr?"),
        (["--max_rate", "-1"], "--max_rate: must be a number > 0, got '-1'"),
        (["--max_rate_z", "nan"], "--max_rate_z: must be a number > 0, got 'nan'"),
        (["--format", "svg"], "--format: "),
        (
            ["--out", "runs/b/eval_results.csv"],
            "runs/b/eval_results.csv: cannot write there (Not a directory); choose another --out",
        ),
        (["--run_batch_name", "c"], "runs/c/eval_results.csv: cannot be read"),
        (["--run_batch_name", "b", "b", "c"], "runs/c/eval_results.csv: cannot be read"),
        (["--rate_unit", "dB"], "--rate_unit: "),
        (["--run_batch_name", "empty"], "runs/empty/eval_results.csv: no run has rates yet"),
    ],
)
def test_bad_input(flags, message, script):
    write_csv(rows_of([1, 2]))
    write_csv([], "empty")
    batch = [] if "--run_batch_name" in flags else ["--run_batch_name", "b"]
    status, _, err = script(plot_eval.main, *batch, "--device", "cpu", *flags)
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not Path("runs/b/figures").exists()


def test_a_real_batch_has_all_figures_and_a_page_of_its_own(script, trained):
    trained("--beta_y", "0.5", "2", "--beta_z", "0.5", "2", batch="b")
    flags = ["--run_batch_name", "b", "--device", "cpu"]
    assert script(eval_beta_grid.main, *flags, "--exclude_fid")[0] == 0
    status, out, err = script(plot_eval.main, *flags, "--max_rate", "1000", "--images", "2", "--overview")
    assert status == 0 and "Open runs/b/figures/report.html" in out, err
    names = ("rate_plane", "total_rate", "rate_z", "heat_maps", "tasks", "overview", "samples", "reconstructions")
    for name in names:
        assert Path(f"runs/b/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert Path(f"runs/b/figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    report = Path("runs/b/figures/report.html").read_text()
    assert all(f'<img alt="{name}" src="data:image/png;base64,' in report for name in names)
    outside = re.sub(r"(<script[^>]*>).*?</script>", r"\1", report, flags=re.S)  # test_report.py runs what is inside
    assert not re.findall(r'(?:src|href)="(?!data:)', outside) and "@import" not in outside
    with open("runs/b/figures/advice.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["budget"] for row in rows} == {"", "R(z) + R(y|z) <= 1000 nats"}
    with open("runs/b/figures/overview.csv", newline="") as file:
        assert [(row["beta_y"], row["beta_z"]) for row in csv.DictReader(file)] == [
            ("0.5", "0.5"), ("0.5", "2.0"), ("2.0", "0.5"), ("2.0", "2.0")
        ]  # fmt: skip
    shutil.rmtree(next(p for p in Path("runs/b").iterdir() if "Beta_y_2.0-Beta_z_2.0" in p.name))
    status, out, _ = script(plot_eval.main, *flags, "--format", "png")
    assert status == 0 and "no pictures of 1 cell(s)" in out and not list(Path("runs/b/figures").glob("*.pdf"))
    assert not Path("runs/b/figures/overview.csv").exists()  # it is of the earlier call


def test_rows_that_are_too_long_and_budgets_that_nothing_meets(script):
    path = write_csv(rows_of([1, 2]))
    path.write_text(path.read_text().replace("\n", ",1,2,3\n").replace(",1,2,3", "", 1))
    flags = ["--run_batch_name", "b", "--format", "png", "--device", "cpu"]
    status, out, err = script(plot_eval.main, *flags, "--max_rate", "1e-9")
    assert status == 0 and "note: no evaluated cell is within the budget" in out, err


def test_every_column_can_be_drawn_with_its_unit_and_only_its_own_bound(script):
    names = ["mi_q_mc", "mi_q_mc_null", "mi_p", "clsfr_acc", "lr_acc_mean", "train_ll", "recons_pred_entropy"]
    write_csv([row | dict.fromkeys(names, 0.5) for row in rows_of([1, 2])], header=list(dict.fromkeys(HEADER + names)))
    flags = ["--run_batch_name", "b", "--format", "png", "--device", "cpu", "--metrics", *names]
    assert script(plot_eval.main, *flags)[0] == 0
    plane = read_plane(Path("runs/b/eval_results.csv"))
    names += ["lr_acc_mean_sample", "lr_acc_mean_sample_y"]
    figure = figures.against_rate_z(plane, names, lambda mi: 0.9, 2.3).figure
    bounds = [any("bound from R(z)" in line.get_label() for line in ax.lines) for ax in figure.axes[: len(names)]]
    assert bounds == [True, False, False, False, False, False, False, True, False]
    units = [plane.title(name).endswith("(nats)") for name in names]
    assert units == [True, True, True, False, False, True, True, False, False]
    assert plane.title("lr_acc_mean_sample_y") == "logistic regression on samples of y"
    assert plane.title("mi_q_mc_y_se") == "standard error of I(y; label) (nats)"


def test_own_images_that_are_gone_leave_samples_only(script):
    from tests.datasets.files import write_folder

    write_folder(Path("pets"), n=15)
    pets = ["--dataset", "pets", "--image_size", "28", "--image_channels", "1", "--run_batch_name", "b"]
    assert script(train.main, *TINY, *pets)[0] == 0
    assert script(eval_beta_grid.main, "--run_batch_name", "b", "--device", "cpu", "--exclude_fid")[0] == 0
    shutil.rmtree("pets")
    status, out, _ = script(plot_eval.main, "--run_batch_name", "b", "--device", "cpu", "--format", "png")
    made = {p.name for p in Path("runs/b/figures").iterdir()}
    assert status == 0 and "no reconstructions" in out
    assert "samples.png" in made and "reconstructions.png" not in made


def test_the_grid_puts_each_cell_in_its_place():
    grid = maps.Grid(np.array([1, 10, 1]), np.array([0.1, 0.1, 5]))
    np.testing.assert_array_equal(grid.image(np.array([1.0, 2.0, 3.0])), [[1, 3], [2, np.nan]])
    figure = pictures.sheet({(1.0, 0.1): np.zeros((4, 6, 3)), (10.0, 5.0): np.full((4, 6, 3), 0.5)}, "t")
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (12, 16, 3)
    assert (canvas[8:, :6] == 0).all() and (canvas[:4, 10:] == 0.5).all() and (canvas[:4, :6] == 1).all()


def test_the_best_is_starred_where_it_is():
    rows = [exponential(by, bz) | {"psnr": by - bz, "fid": by - bz} for by in AXIS for bz in AXIS]
    for name, (by, bz) in {"psnr": (10, 0.1), "fid": (0.1, 10)}.items():
        figure = figures.rate_planes(plane_of(rows), [name]).figure
        (star,) = [line for line in figure.axes[0].lines if line.get_label() == "best"]
        at = exponential(by, bz)
        assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((at["kl_z"], at["kl_y"]))


def test_tables_escape_what_they_are_given():
    rows = [{"task": "<b>", "metric": "a|b", "value": 1.23456789}]
    assert "&lt;b&gt;" in to_html(rows, ADVICE) and "<b>" not in to_html(rows, ADVICE)
    lines = to_markdown(rows, ADVICE).splitlines()
    assert len(lines) == 3 and "a\\|b" in lines[2] and "1.235" in lines[2]
    text = page("<x>", {"k": "<v>"}, ["<n>"], {"T": "t"}, {})
    assert "<x>" not in text and "<v>" not in text and "<n>" not in text
