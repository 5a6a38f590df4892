"""The rate plane: hull, slopes and advice on surfaces with known answers; figures of whatever a batch holds."""

import csv
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import ConvexHull

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from utils import figures
from utils.plane import BITS, Cell, Plane, advice, frontier, read_plane, slopes
from utils.report import ADVICE, page, to_html, to_markdown

AXIS = [0.1, 10**-0.5, 1.0, 10**0.5, 10.0]


def plane_of(rows):
    """A Plane of rows of figures, one cell each."""
    cells = []
    for row in rows:
        row = {"rate": row["kl_y"] + row["kl_z"], **row}
        cells.append(Cell({"vae_type": "HVAE"}, (f"{row['beta_y']}-{row['beta_z']}",), row, {}))
    return Plane(cells)


def exponential(beta_y, beta_z, slope=1.0):
    """The optimum of D = a exp(-R(y|z) / c) + b exp(-R(z) / d) + e, where -dD/dR = slope * beta."""
    a, b, c, d = 400.0, 100.0, 20.0, 5.0
    kl_y, kl_z = -c * math.log(slope * beta_y * c / a), -d * math.log(slope * beta_z * d / b)
    distortion = a * math.exp(-kl_y / c) + b * math.exp(-kl_z / d) + 7
    return {"beta_y": beta_y, "beta_z": beta_z, "kl_y": kl_y, "kl_z": kl_z, "ll": -distortion}


# --- hull ---


@pytest.mark.parametrize("better", [1, -1])
def test_the_frontier_is_one_side_of_scipys_hull(better):
    points = np.random.default_rng(0).normal(size=(60, 2))
    corners = points[ConvexHull(points).vertices]
    left, right = corners[:, 0].argmin(), corners[:, 0].argmax()
    chord = np.interp(corners[:, 0], corners[[left, right], 0], corners[[left, right], 1])
    side = corners[better * (corners[:, 1] - chord) >= -1e-12]
    expected = side[side[:, 0].argsort()]
    np.testing.assert_array_equal(np.stack(frontier(*points.T, better), 1), expected)


def test_the_frontier_of_few_points():
    def corners(*points, better=1):
        return list(zip(*(a.tolist() for a in frontier(*np.array(points).T, better)), strict=True))

    assert corners((1.0, 2.0)) == [(1, 2)]
    assert corners((1.0, 2.0), (1.0, 3.0)) == [(1, 3)] and corners((1.0, 2.0), (1.0, 3.0), better=-1) == [(1, 2)]
    assert corners((2.0, 2.0), (1.0, 1.0), (3.0, 3.0)) == [(1, 1), (3, 3)]  # in line
    assert corners((0.0, 0.0), (1.0, 2.0), (2.0, 1.0), (1.0, 0.0)) == [(0, 0), (1, 2), (2, 1)]


# --- slopes ---


def test_slopes_at_an_optimum_equal_the_betas():
    found = slopes(plane_of([exponential(by, bz) for by in AXIS for bz in AXIS]))
    for s in found:
        assert (s.ratio_y, s.ratio_z) == pytest.approx((1, 1), abs=1e-9) and not s.far_off
        assert s.excess == pytest.approx(0, abs=1e-9)


def test_slopes_of_a_smooth_surface_on_a_fine_grid():
    """D = R.A.R / 2 - b.R, not separable: at an optimum R = A^-1 (b - beta)."""
    a, b = np.array([[1.0, 0.3], [0.3, 2.0]]), np.array([30.0, 50.0])
    rows = []
    for by in 10 ** np.linspace(0, 0.2, 4):
        for bz in 10 ** np.linspace(0, 0.2, 4):
            r = np.linalg.solve(a, b - np.array([by, bz]))
            rows.append({"beta_y": by, "beta_z": bz, "kl_y": r[0], "kl_z": r[1], "ll": -(r @ a @ r / 2 - b @ r)})
    found = slopes(plane_of(rows))
    told = [r for s in found for r in (s.ratio_y, s.ratio_z) if math.isfinite(r)]
    assert len(told) > 16 and told == pytest.approx([1] * len(told), rel=0.02)


def test_slopes_that_are_not_the_betas_are_seen():
    found = slopes(plane_of([exponential(by, bz, slope=3.0) for by in AXIS for bz in AXIS]))
    for s in found:
        told = [r for r in (s.ratio_y, s.ratio_z) if math.isfinite(r)]
        assert s.far_off and told == pytest.approx([3] * len(told), abs=1e-9)
    assert sum(s.excess > 0 for s in found) > 10  # neighbours do better at a cell's own betas


@pytest.mark.parametrize("bad", [[12], [0], [6, 8, 18], [10, 11, 12]])
@pytest.mark.parametrize("worse", [60, 200])
def test_under_trained_cells_are_found_and_no_others(bad, worse):
    rows = [exponential(by, bz) for by in AXIS for bz in AXIS]
    for i in bad:
        rows[i]["ll"] -= worse
    found = slopes(plane_of(rows))
    assert [i for i, s in enumerate(found) if s.far_off] == bad
    for i, s in enumerate(found):
        assert s.excess > 20 if i in bad else s.excess == pytest.approx(0, abs=1e-9)


def test_slopes_are_not_told_where_rates_do_not_change():
    rows = [exponential(by, 1.0) | {"beta_z": bz, "kl_z": 0.0} for by in AXIS for bz in AXIS]
    found = slopes(plane_of(rows))
    assert all(math.isnan(s.ratio_z) and math.isfinite(s.ratio_y) for s in found)
    assert all(math.isnan(s.ratio_y) for s in slopes(plane_of([exponential(1, 1)])))
    diagonal = slopes(plane_of([exponential(b, b) for b in AXIS]))  # only both slopes together could be told
    assert all(math.isnan(s.ratio_y) and math.isnan(s.ratio_z) for s in diagonal)


def test_slopes_use_the_training_images_where_there_are_any():
    rows = [exponential(by, bz) for by in AXIS for bz in AXIS]
    rows = [{f"train_{k}" if k in ("ll", "kl_y", "kl_z") else k: v for k, v in row.items()} for row in rows]
    rows = [row | {"kl_y": 1.0, "kl_z": 1.0, "ll": math.nan} for row in rows]
    assert all(s.ratio_y == pytest.approx(1, abs=1e-9) for s in slopes(plane_of(rows)))


# --- advice ---


def test_advice_on_a_known_surface():
    """PSNR grows with R(y|z), the accuracy from z peaks at R(z) = 6, the distance falls with the total rate."""
    rows = []
    for by in AXIS:
        for bz in AXIS:
            kl_y, kl_z = 10 - 4 * math.log10(by), 6 - 5 * math.log10(bz)
            rows.append({"beta_y": by, "beta_z": bz, "kl_y": kl_y, "kl_z": kl_z, "psnr": 20 + kl_y})
            rows[-1] |= {"lr_acc_mean": 0.9 - 0.1 * abs(kl_z - 6) + 0.01 * kl_y, "fid": 100 - kl_y - kl_z}
    found = {row["metric"]: row for row in advice(plane_of(rows))}
    assert set(found) == {"psnr", "lr_acc_mean", "fid"}
    psnr, acc, fid = found["psnr"], found["lr_acc_mean"], found["fid"]
    assert (psnr["beta_y"], psnr["beta_z"], psnr["value"]) == (0.1, 10, 34)  # the lowest total rate of the five
    assert psnr["diagonal_beta"] == 0.1 and psnr["gain"] == 0
    assert (acc["beta_y"], acc["beta_z"], acc["kl_z"]) == (0.1, 1, 6)
    assert acc["diagonal_beta"] == 1 and acc["gain"] == pytest.approx(0.04)
    assert (fid["beta_y"], fid["beta_z"], fid["value"], fid["gain"]) == (0.1, 0.1, 75, 0)
    budget = {"rate": 17 * BITS}
    within = {row["metric"]: row for row in advice(plane_of(rows), budget)}
    assert (within["psnr"]["beta_y"], within["psnr"]["beta_z"]) == (0.1, 10)
    assert all(row["rate"] <= 17 + 1e-9 and row["budget"] == "R(z) + R(y|z) <= 24.5258 bits" for row in within.values())
    assert within["fid"]["value"] > 75 and within["fid"]["diagonal_beta"] == 1
    assert advice(plane_of(rows), {"kl_z": 0.5}) == []
    assert all(row["kl_z"] <= 3.5 for row in advice(plane_of(rows), {"kl_z": 3.5 * BITS}))


def test_advice_without_ordinary_cells_leaves_them_empty():
    (row,) = advice(plane_of([exponential(1, 10) | {"psnr": 3.0}]))
    assert "gain" not in row and "diagonal_beta" not in row
    assert "gain" not in to_markdown([row], ADVICE)


# --- reading ---

HEADER = [
    "run",
    "status",
    "vae_type",
    "z_dims",
    "seed",
    "beta_y",
    "beta_z",
    "ll",
    "kl_y",
    "kl_z",
    "psnr",
    "is_mean",
    "lr_acc_mean",
]


def write_csv(rows, batch="b", header=HEADER):
    path = Path("runs", batch, "eval_results.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(grid=AXIS, **more):
    rows = []
    for by in grid:
        for bz in grid:
            row = {"run": f"r-{by}-{bz}", "status": "finished", "vae_type": "HVAE", "z_dims": 8, "seed": 2}
            row |= exponential(by, bz) | {"psnr": 20 + bz, "is_mean": 2 + by, "lr_acc_mean": 0.5} | more
            rows.append(row)
    return rows


def test_repeats_with_other_seeds_become_one_cell():
    rows = rows_of([1, 2]) + rows_of([1, 2], seed=3, psnr=30.0)
    plane = read_plane(write_csv(rows))
    assert len(plane.cells) == 4 and len(plane.cells[0].runs) == 2
    assert plane.values("psnr")[0] == pytest.approx((21 + 30) / 2)
    assert plane.stds("psnr")[0] == pytest.approx(9 / 2**0.5)
    assert plane.values("rate")[0] == pytest.approx(rows[0]["kl_y"] + rows[0]["kl_z"])
    assert plane.values("nelbo")[0] == pytest.approx(rows[0]["kl_y"] + rows[0]["kl_z"] - rows[0]["ll"])
    assert any("trained more than once" in note for note in plane.notes)


def test_runs_of_other_settings_stay_apart_and_it_is_noted():
    plane = read_plane(write_csv(rows_of([1, 2]) + rows_of([1, 2], z_dims=16)))
    assert len(plane.cells) == 8 and any("z_dims 16, 8" in note for note in plane.notes)


# --- figures ---


def cases():
    rows = rows_of()
    failed = {"run": "f", "status": "failed", "beta_y": 1, "beta_z": 1}
    yield "missing metrics", [{k: v for k, v in row.items() if k != "psnr"} for row in rows], []
    yield "no metrics", [{k: v for k, v in row.items() if k not in ("ll", *HEADER[10:])} for row in rows], []
    yield "missing cells", rows[::3], []
    yield "one run", rows[:1], ["the slopes of D need neighbouring cells"]
    yield "duplicate betas", rows + rows[:5], ["5 cell(s) were trained more than once"]
    yield (
        "NaNs",
        [row | {"psnr": "nan", "is_mean": "inf"} if i % 2 else row for i, row in enumerate(rows)],
        ["psnr is missing in 12 of 25 cells"],
    )
    yield "failed runs", [*rows, failed, failed | {"run": "g"}], ["2 run(s) left out, without rates (failed): f, g"]
    yield "beta 0", rows + [rows[0] | {"beta_y": 0, "beta_z": 0}], []
    yield "seeds", rows + rows_of(seed=3, psnr=40), ["25 cell(s) were trained more than once"]
    yield "off the diagonal", [row for row in rows if row["beta_y"] != row["beta_z"]], []
    yield "no rate of z", [row | {"kl_z": 0.0, "beta_z": 1.0} for row in rows[::5]], []
    yield (
        "two kinds",
        rows + rows_of(vae_type="LVAE"),
        ["the batch mixes settings, all drawn together", "vae_type HVAE, LVAE"],
    )
    yield "absurd values", [rows[0] | {"kl_z": 1e308, "psnr": -1.7e308}, rows[1] | {"psnr": 1.7e308}, *rows[2:]], []
    yield "equal values", [row | {"psnr": 1, "is_mean": 1} for row in rows], []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows, notes", [pytest.param(*case[1:], id=case[0]) for case in cases()])
def test_figures_still_come(rows, notes, script):
    write_csv(rows)
    status, out, err = script(plot_eval.main, "--run_batch_name", "b", "--format", "png", "--device", "cpu")
    assert status == 0 and "Traceback" not in err, err
    for note in notes:
        assert note in out
    made = {p.name for p in Path("runs/b/figures").iterdir()}
    assert {"heat_maps.png", "tasks.png", "advice.csv", "advice.md", "slopes.csv", "report.html"} <= made
    for name in ("rate_plane.png", "total_rate.png"):
        assert (name in made) == ("ll" in rows[0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metrics", "pnsr"], "--metrics: no run has 'pnsr'; did you mean psnr?"),
        (["--max_rate", "-1"], "--max_rate: must be a number of bits > 0, got '-1'"),
        (["--max_rate_z", "nan"], "--max_rate_z: must be a number of bits > 0, got 'nan'"),
        (["--format", "svg"], "--format: "),
        (["--out", "runs/b/eval_results.csv"], "runs/b/eval_results.csv: cannot write there; choose another --out"),
        (["--run_batch_name", "c"], "runs/c/eval_results.csv: cannot be read"),
        (["--run_batch_name", "empty"], "runs/empty/eval_results.csv: no run has rates yet"),
    ],
)
def test_bad_input(flags, message, script):
    write_csv(rows_of([1, 2]))
    write_csv([], "empty")
    status, _, err = script(plot_eval.main, "--run_batch_name", "b", "--device", "cpu", *flags)
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not Path("runs/b/figures").exists()


def test_a_real_batch_has_all_figures_and_a_page_of_its_own(script, trained):
    trained("--beta_y", "0.5", "2", "--beta_z", "0.5", "2", batch="b")
    flags = ["--run_batch_name", "b", "--device", "cpu"]
    assert script(eval_beta_grid.main, *flags, "--exclude_fid")[0] == 0
    status, out, err = script(plot_eval.main, *flags, "--max_rate", "1000", "--images", "2")
    assert status == 0 and "Open runs/b/figures/report.html" in out, err
    names = ("rate_plane", "total_rate", "rate_z", "heat_maps", "tasks", "samples", "reconstructions")
    for name in names:
        assert Path(f"runs/b/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert Path(f"runs/b/figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    report = Path("runs/b/figures/report.html").read_text()
    assert all(f'<img alt="{name}" src="data:image/png;base64,' in report for name in names)
    assert not re.findall(r'(?:src|href)="(?!data:)', report) and "@import" not in report
    with open("runs/b/figures/advice.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["budget"] for row in rows} == {"", "R(z) + R(y|z) <= 1000 bits"}
    shutil.rmtree(next(p for p in Path("runs/b").iterdir() if "Beta_y_2.0-Beta_z_2.0" in p.name))
    status, out, _ = script(plot_eval.main, *flags, "--format", "png")
    assert status == 0 and "no pictures of 1 cell(s)" in out and not list(Path("runs/b/figures").glob("*.pdf"))


def test_rows_that_are_too_long_and_budgets_that_nothing_meets(script):
    path = write_csv(rows_of([1, 2]))
    path.write_text(path.read_text().replace("\n", ",1,2,3\n").replace(",1,2,3", "", 1))
    flags = ["--run_batch_name", "b", "--format", "png", "--device", "cpu"]
    status, out, err = script(plot_eval.main, *flags, "--max_rate", "1e-9")
    assert status == 0 and "note: no cell that has been evaluated is within the budget" in out, err


def test_every_column_can_be_drawn_with_its_unit_and_only_its_own_bound(script):
    names = ["mi_q_mc", "mi_q_mc_null", "mi_p", "clsfr_acc", "lr_acc_mean", "train_ll", "recons_pred_entropy"]
    write_csv([row | dict.fromkeys(names, 0.5) for row in rows_of([1, 2])], header=list(dict.fromkeys(HEADER + names)))
    flags = ["--run_batch_name", "b", "--format", "png", "--device", "cpu", "--metrics", *names]
    assert script(plot_eval.main, *flags)[0] == 0
    plane = read_plane(Path("runs/b/eval_results.csv"))
    figure = figures.against_rate_z(plane, names, lambda mi: 0.9, 2.3)
    bounds = [any("bound by R(z)" in line.get_label() for line in ax.lines) for ax in figure.axes[: len(names)]]
    assert bounds == [True, False, False, False, True, False, False]
    units = [figures.title_of(name).endswith("(nats)") for name in names]
    assert units == [True, True, True, False, False, True, True]


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


def test_colours_of_the_betas():
    b = np.array([0.1, 1.0, 10.0])
    colours = figures.beta_colours(*(g.ravel() for g in np.meshgrid(b, b, indexing="ij"))).reshape(3, 3, 3)
    assert np.ptp(colours[1, 1]) < 1e-9  # grey at (1, 1)
    chroma = np.ptp(colours, axis=2)
    assert chroma[0, 0] > chroma[0, 1] > 0.1 and chroma[2, 2] == pytest.approx(chroma[0, 0])
    flat = np.delete(colours.reshape(9, 3), 4, 0)
    assert min(np.abs(flat[i] - flat[j]).max() for i in range(8) for j in range(i)) > 0.1


def test_the_grid_puts_each_cell_in_its_place():
    grid = figures.Grid(np.array([1, 10, 1, 1]), np.array([0.1, 0.1, 5, 5]))
    values = grid.mean(np.array([1.0, 2.0, 3.0, 5.0]))
    np.testing.assert_array_equal(values, [[1, 4], [2, np.nan]])
    figure = figures.sheet({(1.0, 0.1): np.zeros((4, 6, 3)), (10.0, 5.0): np.full((4, 6, 3), 0.5)}, "t")
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (12, 16, 3)
    assert (canvas[8:, :6] == 0).all() and (canvas[:4, 10:] == 0.5).all() and (canvas[:4, :6] == 1).all()


def test_the_best_is_starred_where_it_is_and_bits_are_nats_over_ln_2():
    rows = [exponential(by, bz) | {"psnr": by - bz, "fid": by - bz} for by in AXIS for bz in AXIS]
    plane = plane_of(rows)
    for name, (by, bz) in {"psnr": (10, 0.1), "fid": (0.1, 10)}.items():
        figure = figures.rate_planes(plane, [name])
        (star,) = [line for line in figure.axes[0].lines if line.get_label() == "best"]
        at = exponential(by, bz)
        assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((at["kl_z"], at["kl_y"]))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    bits = next(child for child in ax.child_axes if child.get_xlabel() == "bits")
    assert bits.get_xlim() == pytest.approx(np.array(ax.get_xlim()) / math.log(2))


# --- tables ---


def test_tables_escape_what_they_are_given():
    rows = [{"task": "<b>", "metric": "a|b", "value": 1.23456789}]
    assert "&lt;b&gt;" in to_html(rows, ADVICE) and "<b>" not in to_html(rows, ADVICE)
    lines = to_markdown(rows, ADVICE).splitlines()
    assert len(lines) == 3 and "a\\|b" in lines[2] and "1.235" in lines[2]
    text = page("<x>", {"k": "<v>"}, ["<n>"], {"T": "t"}, {})
    assert "<x>" not in text and "<v>" not in text and "<n>" not in text
