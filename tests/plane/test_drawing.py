"""How the figures look, and that they show what they are given."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.text import Text
from numpy.testing import assert_allclose
from pytest import approx

import plot_eval
from datasets.gaussian import Gaussian
from tests.plane.planes import AXIS, exponential, grid, plane_of, read_csv, rows_of, write_csv
from utils.plane import figures
from utils.plane.cells import Plane
from utils.plane.drawing import BETA_Y, BETA_Z, COLUMN, TEXT, Output, styled, write_drawing
from utils.plane.reading import read_plane
from utils.plane.sheets import Pictures, sheets
from utils.plane.slopes import slopes
from utils.plane.tables import Table

HVAE, LVAE = {"vae_type": "HVAE"}, {"vae_type": "LVAE"}


def test_what_is_only_known_between_two_ends_is_a_bar():
    ends = [{"mi_z_low": 0.1 * i, "mi_z_high": 0.1 * i + 0.5} for i in range(5)]
    rows = [exponential(1, bz) | both for bz, both in zip(AXIS, ends, strict=True)]
    for draw in (figures.total_rates, figures.against_rate_z):
        figure, data = draw(plane_of(rows, unit="bits"), ["mi_z_low"])
        (bars,) = [c for c in figure.axes[0].collections if c.get_label() == "at least to at most"]
        drawn = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert_allclose(drawn, [[*both.values()] / np.log(2) for both in ends])
        assert "mi_z_high" in data[0]


def test_seeds_are_points_around_their_median_and_collapsed_ones_are_counted():
    rates = {1: 6.6, 2: 6.5, 3: 0.33, 4: 6.7}
    rows = [row for s, r in rates.items() for row in rows_of([1], seed=s, kl_z=r, psnr=20.0 + s)]
    plane = read_plane(write_csv(rows))
    assert plane.values("kl_z") == approx(6.55)
    assert plane.about.endswith("4 seeds; R(z) < 0.5 nats in 1 of 4 runs")
    assert any("R(z) < 0.5 nats in 1 run(s)" in note for note in plane.notes)
    (ax, *_) = figures.rate_planes(plane, ["psnr"]).figure.axes
    points = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "single seeds"]
    assert points == list(rates.values()) and [text.get_text() for text in ax.texts] == ["1/4"]


@styled
def test_sizes_and_type_are_a_papers_and_every_panel_has_its_labels():
    names = ["psnr", "fid", "bpd", "D"]
    plane = plane_of([row | dict.fromkeys(names, row["beta_y"]) for row in grid([0.1, 1, 10])])
    draws = [(draw, names) for draw in (figures.rate_planes, figures.total_rates, figures.heat_maps)]
    for draw, of in (*draws, (figures.heat_maps, []), (figures.tasks, names[:3])):
        figure, _ = drawing = draw(plane, of)
        figure.draw_without_rendering()
        assert "9 cells" in figure.get_suptitle()
        assert figure.get_figwidth() in (COLUMN, TEXT)
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        assert {round(t.get_fontsize()) for t in texts} <= {7, 8, 9}
        for ax in (ax for ax in figure.axes if ax.get_label() != "<colorbar>"):
            ticks = [t.get_text() for t in ax.get_xticklabels() if t.get_visible()]
            assert ax.get_xlabel() and any(ticks)
    write_drawing(Output(Path(), ["png"], header=False), "figure", drawing)
    assert figure.get_suptitle() == ""


def test_the_best_is_yellow_on_top_of_the_bar_and_starred_and_framed_with_those_that_are_as_good():
    best = {"psnr": (10, 0.1), "fid": (0.1, 10)}  # of which less is better
    plane = plane_of(grid(**dict.fromkeys(best, lambda row: row["beta_y"] - row["beta_z"])))
    for name, betas in best.items():
        ax, bar = figures.rate_planes(plane, [name]).figure.axes
        (star,) = [line for line in ax.lines if line.get_label() == "best"]
        at = exponential(*betas)
        assert star.get_xydata().tolist() == [[at["kl_z"], at["kl_y"]]]
        (points,) = [c for c in ax.collections if len(c.get_offsets()) == 25]
        red, _, blue, _ = points.to_rgba(plane.values(name))[plane.best(name)]
        assert red > 0.9 and blue < 0.3 and bar.yaxis.get_inverted() == (name == "fid")
    plane = plane_of(grid([0.1, 1], recons_acc=lambda row: 0.5 + 0.4 * (row["beta_z"] == 1)))
    assert plane.ties("recons_acc").tolist() == [1, 3] and not len(plane.ties("kl_z"))
    ax = figures.heat_maps(plane, ["recons_acc"]).figure.axes[2]
    assert sorted(frame.get_xy() for frame in ax.patches) == [(0.5, -0.5), (0.5, 0.5)]
    assert [text.get_text() for text in ax.texts] == ["0.500", "0.900"] * 2


def test_rates_that_crowd_at_0_get_a_logarithmic_axis_and_others_do_not():
    for rates, scale in (((0.01, 0.2, 1.0, 3.0, 90.0), "symlog"), ((5.0, 30.0, 60.0, 90.0), "linear")):
        plane = plane_of([exponential(1, 1) | {"kl_z": r, "beta_z": r, "psnr": r} for r in rates])
        assert figures.rate_planes(plane, ["psnr"]).figure.axes[0].get_xscale() == scale


def test_every_figure_comes_with_what_it_shows(passes):
    write_csv(rows_of() + rows_of([1.0], seed=3, psnr=40))
    flags = ["--format", "png", "--device", "cpu", "--rate_unit", "bits", "--metrics", "psnr"]
    out = passes(plot_eval.main, "--run_batch_name", "b", *flags, "--max_rate", "60")
    assert "reconstruction, dB, R(z) + R(y|z) <= 60 bits\n" in out and "\nrates in bits " in out
    assert "nats" not in out.partition("\n\n")[0]
    rows = read_csv("runs/b/figures/total_rate.csv")
    one = [r for r in rows if r["beta_y"] == r["beta_z"] == "1.0"]
    values = [(r["what"], r["PSNR (dB)"]) for r in one]
    assert values == [("median", "30.5"), ("seed", "21.0"), ("seed", "40.0")]
    assert [r["standard error of PSNR (dB)"] for r in one] == ["9.5", "", ""]
    assert float(one[0]["R(z) (bits)"]) == approx(exponential(1, 1)["kl_z"] / math.log(2))
    assert {"hull of all cells", "hull of beta_y = beta_z"} <= {r["what"] for r in rows}
    passes(plot_eval.main, "--run_batch_name", "b", *flags[2:], "--no_header", "--format", "tex")
    advice = Path("runs/b/figures/advice.tex").read_text()
    assert advice.startswith(r"\begin{tabular}") and not Path("runs/b/figures/total_rate.png").exists()


def test_cells_of_mixed_settings_have_markers_and_sheets_of_their_own():
    """HVAE and LVAE at the same betas: the same two markers in every panel, two sheets; one kind needs no name."""
    rows = [row | {"is_mean": 2.0} for row in grid([0.1, 1]) * 2]
    del rows[0]["is_mean"]
    plane = plane_of(rows, *[HVAE] * 4, *[LVAE] * 4)
    looks = []
    for ax, of_first in zip(figures.rate_planes(plane, ["ll", "is_mean"]).figure.axes, (4, 3), strict=False):
        numbers = {c.get_label(): len(c.get_offsets()) for c in ax.collections}
        assert numbers == {"vae_type_HVAE": of_first, "vae_type_LVAE": 4}
        looks.append([c.get_paths()[0].vertices.tolist() for c in ax.collections])
    assert looks[0] == looks[1] and looks[0][0] != looks[0][1]
    images = {i: np.full((2, 2, 3), i / 8) for i in range(8)}
    drawings = sheets(plane, Pictures({"samples": images}, {}))
    assert list(drawings) == ["samples_vae_type_HVAE", "samples_vae_type_LVAE"]
    runs = [[row["run"] for row in drawing.rows] for drawing in drawings.values()]
    assert runs == [[c.runs[0] for c in plane.cells[:4]], [c.runs[0] for c in plane.cells[4:]]]
    corners = [d.figure.axes[0].images[0].get_array()[:2, :2].mean() for d in drawings.values()]
    assert corners == approx([2 / 8, 6 / 8])  # the largest beta_y, the smallest beta_z
    one = sheets(
        plane_of(grid(np.geomspace(1, 2, 11))), Pictures({"samples": dict.fromkeys(range(121), images[0])}, {})
    )
    assert list(one) == ["samples"] and len(one["samples"].rows) == 25  # of 11 betas each second


def test_cells_of_rates_that_were_asked_for_have_a_sheet_over_these_rates():
    given, rows = grid([0.1, 1]), [exponential(by, 0.3) for by in (0.2, 0.7, 0.8)]
    asked = [{"target_rate_y": "9", "target_rate_z": "2"}, {"target_rate_y": "5", "target_rate_z": "2"}]
    plane = plane_of(given + rows, *[{}] * 4, *asked, {"target_rate_y": "5"}, unit="bits")
    images = {i: np.full((2, 2, 3), i / 8) for i in range(7)}
    drawings = sheets(plane, Pictures({"samples": images}, {}))
    axes = {name: drawing.figure.axes[0] for name, drawing in drawings.items()}
    of_y = {name: [ax.get_ylabel(), *(text.get_text() for text in ax.get_yticklabels())] for name, ax in axes.items()}
    label = "R(y|z) (bits) asked for"
    assert of_y["samples"] == [BETA_Y, "0.1", "1"] and of_y["samples_asked_y"] == [label, "7.21"]
    assert of_y["samples_asked_y_z"] == [label, "7.21", "13"]
    assert axes["samples_asked_y"].get_xlabel() == BETA_Z and len(slopes(plane)) == 4  # of no grid


def test_bars_are_standard_errors_over_seeds_or_of_one_over_its_images():
    cell, other = plane_of([exponential(1, bz) | {"psnr": 20.0, "psnr_se": 0.25} for bz in (0.1, 1)]).cells
    two = (*cell.repeats, cell.repeats[0] | {"psnr": 21.0})
    several = replace(cell, runs=("a", "b"), seeds=("1", "2"), repeats=two)
    for cells, ends, of in (
        ([cell, other], [0.25, 0.25], "one seed's images"),
        ([several, other], [0.5, 0.25], "seeds, or one seed's images"),
        ([several], [0.5], "seeds"),
    ):
        ax = figures.total_rates(Plane(cells), ["psnr"]).figure.axes[0]
        (bars,) = [c for c in ax.collections if c.get_label() == f"standard error over {of}"]
        assert_allclose([np.ptp(segment[:, 1]) / 2 for segment in bars.get_segments()], ends)


def test_the_colours_of_rates_are_logarithmic():
    plane = plane_of([exponential(1, 1) | {"kl_z": r} for r in (0.0, 1.0, 10.0)])
    norm = figures.rate_norm(plane, "kl_z")
    assert (norm(0.0), norm(0.1), norm(1.0), norm(10.0)) == approx((0, 0, 0.5, 1))


def test_tables_for_latex_have_errors_behind_their_values_and_those_in_markdown_beside():
    headings = {"metric": "metric_a", "value": "best", "se": "+-", "n": "R(y|z)", "rate": "<R>", "empty": "e"}
    rows = [{"metric": "psnr", "value": 719.34, "se": 0.5, "n": 3, "rate": 0.012345, "empty": None}]
    rows.append({"metric": "b", "value": 0.81449, "se": 0.0042, "n": 2, "rate": 12345.6})
    begin, _, head, _, *lines, _, _ = Table(rows, headings).latex().splitlines()
    assert (begin, head) == (r"\begin{tabular}{lrrr}", r"metric\_a & best & R(y$|$z) & $<$R$>$ \\")
    assert lines[0] == r"PSNR & $719.3 \pm 0.5$ & 3 & $0.0123$ \\"
    assert lines[1] == r"b & $0.814 \pm 0.004$ & 2 & $12300$ \\"
    head, _, line, _ = Table(rows, headings).markdown().splitlines()
    assert head == "| metric_a | best   | +-     | R(y\\|z) | <R>       |"
    assert line == "| psnr     | 719.3  | 0.5    | 3       | 0.01235   |"


def test_the_least_loss_is_a_curve_where_it_is_known():
    """D of rates between those of betas of 0.1 and 10, by the Gaussian's theory; in bits."""
    settings = {"dataset": "Gaussian", "px_y_family_ll": "GaussianFixedSigma", "sigma": "0.2", "vae_type": "HVAE"}
    rows = [row | {"D": -500.0, "is_mean": 3.0} for row in grid([0.1, 1, 10])]

    def curves(*of_cells):
        figure, data = figures.total_rates(plane_of(rows, *of_cells, unit="bits"), ["D", "is_mean"])
        drawn = [line for line in figure.axes[0].lines if line.get_label() == "least loss possible"]
        assert not [line for line in figure.axes[1].lines if line.get_label() == "least loss possible"]
        assert sum(row.get("what") == "least loss possible" for row in data) == sum(len(c.get_xdata()) for c in drawn)
        return drawn

    (curve,) = curves(*[settings] * 9)
    rate, distortion = curve.get_xdata(), curve.get_ydata()
    for beta in (0.1, 1, 10):
        best = Gaussian().optimum(beta, 0.2)
        assert np.interp(best.rate, rate[::-1] * np.log(2), distortion[::-1] * np.log(2)) == approx(best.D, abs=0.05)
    for other in ({"sigma": "0.3"}, {"px_y_family_ll": "Bernoulli"}, {"dataset": "Digits"}):
        assert not curves(*[settings] * 8, settings | other)
    assert not curves(*[settings | {"dataset": "Digits"}] * 9)
