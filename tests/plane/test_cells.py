"""Reading a batch's table as cells; the hull."""

import csv

import numpy as np
import pytest
from scipy.spatial import ConvexHull

from tests.plane.planes import rows_of, write_csv
from utils.plane.cells import frontier, read_plane


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


def test_repeats_with_other_seeds_become_one_cell():
    rows = rows_of([1, 2]) + rows_of([1, 2], seed=3, psnr=30.0)
    plane = read_plane(write_csv(rows))
    assert len(plane.cells) == 4 and len(plane.cells[0].runs) == 2
    assert plane.values("psnr")[0] == pytest.approx((21 + 30) / 2)
    assert [row["psnr"] for row in plane.cells[0].repeats] == [21, 30] and plane.cells[0].seeds == ("2", "3")
    assert plane.values("rate")[0] == pytest.approx(rows[0]["kl_y"] + rows[0]["kl_z"])
    assert plane.values("nelbo")[0] == pytest.approx(rows[0]["kl_y"] + rows[0]["kl_z"] - rows[0]["ll"])
    assert any("trained more than once" in note for note in plane.notes)


def test_runs_of_other_settings_stay_apart_and_it_is_noted():
    plane = read_plane(write_csv(rows_of([1, 2]) + rows_of([1, 2], z_dims=16)))
    assert len(plane.cells) == 8 and any("z_dims 16, 8" in note for note in plane.notes)


@pytest.mark.parametrize(
    "separator, point, encoding",
    [(",", ".", "utf-8-sig"), (";", ",", "utf-8-sig"), (";", ".", "utf-8"), ("\t", ",", "utf-16"), (",", ".", "utf-8")],
)
def test_a_table_that_a_spreadsheet_saved_is_read(separator, point, encoding):
    path = write_csv(rows_of([0.1, 1]))
    expected = read_plane(path)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    text = "\r\n".join(separator.join(v if i == 0 else v.replace(".", point) for v in r) for i, r in enumerate(rows))
    path.write_bytes(text.encode(encoding))
    assert [c.median for c in read_plane(path).cells] == [c.median for c in expected.cells]
