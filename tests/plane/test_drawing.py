"""How the figures look, and that they show what they are given."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.text import Text

import plot_eval
from tests.plane.planes import AXIS, exponential, grid, plane_of, read_csv, rows_of, write_csv
from utils.plane import figures, maps
from utils.plane.cells import Plane, read_plane
from utils.plane.drawing import COLUMN, TEXT, beta_colours
from utils.plane.pictures import Pictures, sheets

DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(rgb: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB colours (N, 3), seen through a matrix on linear RGB (Machado 2009)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.array(seen).T, 0, 1) @ np.array(XYZ).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def test_the_colours_of_25_cells_are_told_apart():
    """Differences of CIELAB; 2.3 is the least that is seen."""
    colours = beta_colours(*(g.ravel() for g in np.meshgrid(AXIS, AXIS, indexing="ij")))
    assert colours.min() >= 0 and colours.max() <= 1
    for seen in (np.eye(3), DEUTERANOPIA, PROTANOPIA):
        points = lab(colours, seen)
        assert np.linalg.norm(points[:, None] - points, axis=2)[np.triu_indices(25, 1)].min() > 12
    assert np.isfinite(beta_colours(np.array([0.0, 1]), np.array([0.0, 0]))).all()


def test_what_is_only_known_between_two_ends_is_a_bar():
    rows = [exponential(1, bz) | {"mi_z_low": 0.1 * i, "mi_z_high": 0.1 * i + 0.5} for i, bz in enumerate(AXIS)]
    plane = Plane(plane_of(rows).cells, unit="bits")
    for drawn in (
        figures.total_rates(plane, ["mi_z_low"]),
        figures.against_rate_z(plane, ["mi_z_low"], None, math.nan),
    ):
        (bars,) = [c for c in drawn.figure.axes[0].collections if hasattr(c, "get_segments")]
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, [[row["mi_z_low"], row["mi_z_high"]] / np.log(2) for row in rows])
        assert "mi_z_high" in drawn.rows[0]


def test_seeds_are_points_around_their_median_and_collapsed_ones_are_counted():
    rates = {1: 6.6, 2: 6.5, 3: 0.33, 4: 6.7}
    plane = read_plane(
        write_csv([row for s, r in rates.items() for row in rows_of([1], seed=s, kl_z=r, psnr=20.0 + s)])
    )
    (cell,) = plane.cells
    assert cell.median["kl_z"] == pytest.approx(6.55) and plane.collapsed == {"R(z)": (1, 1), "R(y|z)": (0, 0)}
    assert plane.about.endswith("4 seeds; R(z) < 0.5 nats in 1 of 4 runs")
    assert any("R(z) < 0.5 nats in 1 run(s)" in note for note in plane.notes)
    (ax, *_) = figures.rate_planes(plane, ["psnr"]).figure.axes
    points = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "single seeds"]
    assert points == list(rates.values()) and [text.get_text() for text in ax.texts] == ["1/4"]


def test_sizes_and_type_are_a_papers_and_every_panel_has_its_labels():
    names = ["psnr", "fid", "bpd", "D"]
    plane = plane_of([row | dict.fromkeys(names, row["beta_y"]) for row in grid([0.1, 1, 10])])
    makes = (figures.rate_planes, figures.total_rates, maps.heat_maps)
    for drawn in (*(make(plane, names) for make in makes), maps.heat_maps(plane, []), figures.tasks(plane, names[:3])):
        figure = drawn.figure
        figure.draw_without_rendering()
        assert figure.get_figwidth() in (COLUMN, TEXT)
        shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        assert {round(t.get_fontsize()) for t in shown} <= {7, 8, 9}
        for ax in figure.axes:
            if ax.get_label() != "<colorbar>":
                assert ax.get_xlabel() and any(t.get_text() for t in ax.get_xticklabels() if t.get_visible())


def test_less_is_better_is_yellow_and_on_top():
    plane = plane_of(grid(fid=lambda row: row["beta_y"]))
    figure = figures.rate_planes(plane, ["fid"]).figure
    (points,) = [c for c in figure.axes[0].collections if len(c.get_offsets()) == 25]
    best = points.cmap(Normalize(0.1, 10)(0.1))
    assert best[0] > 0.9 and best[2] < 0.3 and figure.axes[1].yaxis.get_inverted()


def test_rates_that_crowd_at_0_get_a_logarithmic_axis_and_others_do_not():
    for rates, scale in (((0.01, 0.2, 1.0, 3.0, 90.0), "symlog"), ((5.0, 30.0, 60.0, 90.0), "linear")):
        plane = plane_of([exponential(1, 1) | {"kl_z": r, "beta_z": r, "psnr": r} for r in rates])
        assert figures.rate_planes(plane, ["psnr"]).figure.axes[0].get_xscale() == scale


def test_every_figure_comes_with_what_it_shows(script):
    write_csv(rows_of() + rows_of([1.0], seed=3, psnr=40))
    flags = ["--run_batch_name", "b", "--format", "png", "--device", "cpu", "--rate_unit", "bits", "--metrics", "psnr"]
    status, out, err = script(plot_eval.main, *flags, "--max_rate", "60")
    assert status == 0, err
    assert "R(z) + R(y\\|z) <= 60 bits" in out and "R(z) (bits)" in out and "nats" not in out.partition("\n\n")[0]
    rows = read_csv("runs/b/figures/total_rate.csv")
    one = [r for r in rows if r["beta_y"] == r["beta_z"] == "1.0"]
    assert [(r["what"], r["PSNR (dB)"]) for r in one] == [("median", "30.5"), ("seed", "21.0"), ("seed", "40.0")]
    assert float(one[0]["R(z) (bits)"]) == pytest.approx(exponential(1, 1)["kl_z"] / math.log(2))
    assert {"hull of all cells", "hull of beta_y = beta_z"} <= {r["what"] for r in rows}


def test_cells_of_mixed_settings_have_markers_and_sheets_of_their_own():
    """HVAE and LVAE at the same betas: two markers, two sheets of all cells each; one kind needs no name."""
    plane = plane_of(grid([0.1, 1]) * 2)
    plane.cells[4:] = [dataclasses.replace(cell, settings={"vae_type": "LVAE"}) for cell in plane.cells[4:]]
    marks = figures.rate_planes(plane, ["ll"]).figure.axes[0].collections
    assert {c.get_label(): len(c.get_offsets()) for c in marks} == {"vae_type_HVAE": 4, "vae_type_LVAE": 4}
    assert len({len(c.get_paths()[0].vertices) for c in marks}) == 2
    images = {i: np.full((2, 2, 3), i / 8) for i in range(8)}
    of_kind = sheets(plane, Pictures(images, {}, None, {}))
    assert {name: [row["run"] for row in sheet.rows] for name, sheet in of_kind.items()} == {
        "samples_vae_type_HVAE": [cell.runs[0] for cell in plane.cells[:4]],
        "samples_vae_type_LVAE": [cell.runs[0] for cell in plane.cells[4:]],
    }
    means = [sheet.figure.axes[0].images[0].get_array()[:2, :2].mean() for sheet in of_kind.values()]
    assert means == pytest.approx([2 / 8, 6 / 8])  # the largest beta_y and smallest beta_z are at the top left
    assert list(sheets(Plane(plane.cells[:4]), Pictures({0: images[0]}, {}, None, {}))) == ["samples"]


def test_of_many_settings_each_keeps_its_marker_in_every_panel():
    """Also where one of them, B, lacks a metric."""
    cells = plane_of([exponential(by, 1) for by in (*AXIS, 0.2, 0.3, 0.4)]).cells
    for i, kind in enumerate("ABCDEFGH"):
        row = cells[i].repeats[0] | ({} if kind == "B" else {"is_mean": 2.0 + i})
        cells[i] = dataclasses.replace(cells[i], settings={"vae_type": kind}, repeats=(row,))
    axes = figures.rate_planes(Plane(cells), ["ll", "is_mean"]).figure.axes[:2]
    looks = [{c.get_label(): c.get_paths()[0].vertices.tolist() for c in ax.collections} for ax in axes]
    assert len(looks[0]) == 8 and set(looks[0]) - set(looks[1]) == {"vae_type_B"}
    assert all(looks[0][label] == path for label, path in looks[1].items())
