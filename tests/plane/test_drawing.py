"""How the figures look, and that they show what they are given."""

import csv
import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.text import Text

import plot_eval
from tests.plane.planes import AXIS, HEADER, exponential, plane_of, rows_of, write_csv
from utils.plane import figures, maps
from utils.plane.cells import Plane, hull, read_plane
from utils.plane.drawing import COLUMN, TEXT, beta_colours
from utils.plane.pictures import Pictures, sheets
from utils.plane.report import titled_csv

DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(rgb: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB colours (N, 3), seen through a matrix on linear RGB (Machado 2009)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.array(seen).T, 0, 1) @ np.array(XYZ).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("seen", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["all", "deuteranopia", "protanopia"])
def test_the_colours_of_25_cells_are_told_apart(seen):
    """Differences of CIELAB; 2.3 is the least that is seen."""
    colours = beta_colours(*(g.ravel() for g in np.meshgrid(AXIS, AXIS, indexing="ij")))
    assert colours.min() >= 0 and colours.max() <= 1
    points = lab(colours, seen)
    apart = np.linalg.norm(points[:, None] - points, axis=2)[np.triu_indices(25, 1)]
    assert apart.min() > 12
    assert np.isfinite(beta_colours(np.array([0.0, 1]), np.array([0.0, 0]))).all()


def test_half_and_half_of_two_models_is_mixed_in_squared_errors():
    """Half 22.3 dB and half 13.4 dB is 15.9 dB, not 17.9; D and accuracies mix as they are, inception scores do not."""
    ends = [{"kl_z": r, "kl_y": 0.0, "psnr": p, "D": d} for r, p, d in ((10.0, 22.3, 200.0), (2.0, 13.4, 300.0))]
    for row in ends:
        row |= {
            "train_psnr": row["psnr"],
            "is_mean": row["psnr"],
            "recons_acc": row["psnr"] / 30,
            "beta_y": 1 + row["kl_z"],
            "beta_z": 1,
        }
    plane = plane_of(ends)
    every = np.ones(2, bool)
    half = 10 * math.log10(2 / (10**-2.23 + 10**-1.34))
    for name, value in (("psnr", half), ("train_psnr", half), ("D", 250.0), ("recons_acc", (22.3 + 13.4) / 60)):
        xs, vs = hull(plane, name, every)
        assert np.interp(6.0, xs, vs) == pytest.approx(value, abs=0.02)
        assert (vs[-1], vs[0]) == pytest.approx([plane.values(name)[i] for i in (0, 1)])
    falling = plane_of([row | {"recons_acc": 1 - row["recons_acc"]} for row in ends])
    assert set(hull(falling, "recons_acc", every)[1]) == {1 - 13.4 / 30}  # further rate costs no accuracy
    assert not len(hull(plane, "is_mean", every)[0]) and not len(hull(plane, "D", ~every)[0])
    (psnr, score, *_) = figures.total_rates(plane, ["psnr", "is_mean"]).figure.axes
    assert [sum("hull" in line.get_label() for line in ax.lines) for ax in (psnr, score)] == [
        1,
        0,
    ]  # none has equal betas


def test_what_is_only_known_between_two_ends_is_a_bar():
    rows = [exponential(1, bz) | {"mi_z_low": 0.1 * i, "mi_z_high": 0.1 * i + 0.5} for i, bz in enumerate(AXIS)]
    plane = Plane(plane_of(rows).cells, unit="bits")
    for make in (figures.total_rates, lambda p, n: figures.against_rate_z(p, n, None, math.nan)):
        drawn = make(plane, ["mi_z_low"])
        (bars,) = [c for c in drawn.figure.axes[0].collections if hasattr(c, "get_segments")]
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, [[row["mi_z_low"], row["mi_z_high"]] / np.log(2) for row in rows])
        assert "mi_z_high" in drawn.rows[0]


def test_saturated_estimates_are_left_out():
    names = ["mi_q_mc", "mi_q_mc_saturated", "mi_q_mc_y", "mi_q_mc_y_saturated"]
    rows = [row | {"mi_q_mc": 1.5, "mi_q_mc_saturated": int(i == 0)} for i, row in enumerate(rows_of([1, 2]))]
    for row, saturated in zip(rows, (0, 0, 1, 1), strict=True):
        row |= {"mi_q_mc_y": 2.0, "mi_q_mc_y_saturated": saturated}
    plane = read_plane(write_csv(rows, header=HEADER + names))
    np.testing.assert_array_equal(plane.values("mi_q_mc"), [math.nan, 1.5, 1.5, 1.5])
    np.testing.assert_array_equal(plane.values("mi_q_mc_y"), [2.0, 2.0, math.nan, math.nan])
    (note,) = [note for note in plane.notes if "mi_q_mc_y)" in note]
    assert note.endswith("(mi_q_mc_y) is saturated in 2 of 4 cells: left out")


def test_seeds_are_points_around_their_median_and_collapsed_ones_are_counted():
    rows = [
        row | {"seed": s}
        for s, r in ((1, 6.6), (2, 6.5), (3, 0.33), (4, 6.7))
        for row in rows_of([1])
        for row in [row | {"kl_z": r, "psnr": 20.0 + s}]
    ]
    plane = read_plane(write_csv(rows))
    (cell,) = plane.cells
    assert cell.median["kl_z"] == pytest.approx(6.55) and plane.collapsed == {"z": (1, 1), "y": (0, 0)}
    assert "4 seeds; R(z) < 0.5 nats in 1 of 4 runs" in plane.about
    (ax, *_) = figures.rate_planes(plane, ["psnr"]).figure.axes
    points = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "single seeds"]
    assert points == [6.6, 6.5, 0.33, 6.7] and [t.get_text() for t in ax.texts] == ["1/4"]


def test_sizes_and_type_are_a_papers_and_every_panel_has_its_labels():
    plane = plane_of(
        [exponential(by, bz) | dict.fromkeys(("psnr", "fid", "bpd", "D"), by) for by in AXIS for bz in AXIS]
    )
    names = ["psnr", "fid", "bpd", "D"]
    for drawn in (
        *(
            make(plane, n)
            for make in (figures.rate_planes, figures.total_rates, maps.heat_maps)
            for n in (names, ["fid"])
        ),
        figures.tasks(plane, names[:3]),
    ):
        figure = drawn.figure
        figure.draw_without_rendering()
        assert figure.get_figwidth() in (COLUMN, TEXT)
        shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        assert {round(t.get_fontsize()) for t in shown} <= {7, 8, 9}
        for ax in figure.axes:
            if ax.get_label() != "<colorbar>":
                assert ax.get_xlabel() and any(t.get_text() for t in ax.get_xticklabels() if t.get_visible())


def test_less_is_better_is_yellow_and_on_top():
    plane = plane_of([exponential(by, bz) | {"fid": by} for by in AXIS for bz in AXIS])
    figure = figures.rate_planes(plane, ["fid"]).figure
    (points,) = [c for c in figure.axes[0].collections if len(c.get_offsets()) == 25]
    best = points.cmap(Normalize(0.1, 10)(0.1))
    assert best[0] > 0.9 and best[2] < 0.3 and figure.axes[1].yaxis.get_inverted()


def test_rates_that_crowd_at_0_get_a_logarithmic_axis_and_others_do_not():
    wide = plane_of([exponential(1, 1) | {"kl_z": r, "beta_z": r, "psnr": r} for r in (0.01, 0.2, 1.0, 3.0, 90.0)])
    assert figures.rate_planes(wide, ["psnr"]).figure.axes[0].get_xscale() == "symlog"
    even = plane_of([exponential(1, 1) | {"kl_z": r, "beta_z": r, "psnr": r} for r in (5.0, 30.0, 60.0, 90.0)])
    assert figures.rate_planes(even, ["psnr"]).figure.axes[0].get_xscale() == "linear"


def test_every_figure_comes_with_what_it_shows(script):
    write_csv(rows_of() + rows_of([1.0], seed=3, psnr=40))
    flags = ["--run_batch_name", "b", "--format", "png", "--device", "cpu", "--rate_unit", "bits"]
    status, out, err = script(plot_eval.main, *flags, "--max_rate", "60")
    assert status == 0, err
    assert "R(z) + R(y\\|z) <= 60 bits" in out and "R(z) (bits)" in out and "nats" not in out.partition("\n\n")[0]
    with open("runs/b/figures/total_rate.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    one = [r for r in rows if r["beta_y"] == r["beta_z"] == "1.0"]
    assert [(r["what"], r["PSNR (dB)"]) for r in one] == [("median", "30.5"), ("seed", "21.0"), ("seed", "40.0")]
    known = exponential(1, 1)
    assert float(one[0]["R(z) (bits)"]) == pytest.approx(known["kl_z"] / math.log(2))
    assert {"hull of all cells", "hull of beta_y = beta_z"} <= {r["what"] for r in rows}
    assert {p.stem for p in Path("runs/b/figures").glob("*.png")} <= {
        p.stem for p in Path("runs/b/figures").glob("*.csv")
    }
    text = titled_csv([{"what": "x", "kl_z": 1}], {"what": "what", "kl_z": "R(z) (nats)"})
    assert list(csv.reader(io.StringIO(text))) == [["what", "R(z) (nats)"], ["x", "1"]]


def test_cells_of_mixed_settings_have_markers_and_sheets_of_their_own():
    """HVAE and LVAE at the same betas: two markers, two sheets of all cells each; one kind needs no name."""
    plane = plane_of([exponential(by, bz) for by in (0.1, 1) for bz in (0.1, 1)] * 2)
    plane.cells[4:] = [dataclasses.replace(cell, settings={"vae_type": "LVAE"}) for cell in plane.cells[4:]]
    ax = figures.rate_planes(plane, ["ll"]).figure.axes[0]
    drawn = {c.get_label(): (len(c.get_offsets()), len(c.get_paths()[0].vertices)) for c in ax.collections}
    assert {label: n for label, (n, _) in drawn.items()} == {"vae_type_HVAE": 4, "vae_type_LVAE": 4}
    assert len({corners for _, corners in drawn.values()}) == 2
    pictures = {i: np.full((2, 2, 3), i / 8) for i in range(8)}
    found = sheets(plane, Pictures(pictures, {}, None, {}))
    assert {name: [row["run"] for row in figure.rows] for name, figure in found.items()} == {
        f"samples_vae_type_{kind}": [cell.runs[0] for cell in cells]
        for kind, cells in (("HVAE", plane.cells[:4]), ("LVAE", plane.cells[4:]))
    }
    means = [figure.figure.axes[0].images[0].get_array()[:2, :2].mean() for figure in found.values()]
    assert means == pytest.approx([2 / 8, 6 / 8])  # the largest beta_y and smallest beta_z are at the top left
    many = plane_of([exponential(by, 1) for by in AXIS * 2] + [exponential(1, bz) for bz in (0.1, 10)])
    for i, kind in enumerate("ABCDEFGH"):  # B lacks the score
        row = many.cells[i].repeats[0] | ({} if kind == "B" else {"is_mean": 2.0 + i})
        many.cells[i] = dataclasses.replace(many.cells[i], settings={"vae_type": kind}, repeats=(row,))
    axes = figures.rate_planes(Plane(many.cells[:8]), ["ll", "is_mean"]).figure.axes[:2]
    looks = [{c.get_label(): c.get_paths()[0].vertices.tolist() for c in ax.collections} for ax in axes]
    assert len(looks[0]) == 8 and set(looks[0]) - set(looks[1]) == {"vae_type_B"}
    assert all(looks[0][label] == path for label, path in looks[1].items())
    assert list(sheets(Plane(plane.cells[:4]), Pictures({0: pictures[0]}, {}, None, {}))) == ["samples"]
