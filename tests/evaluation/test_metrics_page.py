"""docs/metrics.md has an entry for every column, with its unit, and none for others."""

import re

import pytest

from tests.conftest import ROOT
from utils.evaluation.batch import METRIC_COLUMNS
from utils.plane.metrics import metric

ROWS = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*?) ?\|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
ENTRIES = {name: unit for names, unit in ROWS for name in re.findall(r"\w+", names) if not name.startswith("_")}
ENDINGS = ("_se", "_paper", "_y", "_sample")


def entry_of(column: str) -> str | None:
    """The entry that a column belongs to: its own, or that of the name without an ending."""
    if column in ENTRIES:
        return column
    shorter = next((column.removesuffix(end) for end in ENDINGS if column.endswith(end)), None)
    return shorter and entry_of(shorter)


@pytest.mark.parametrize("column", METRIC_COLUMNS)
def test_every_column_is_explained_with_its_unit(column):
    assert entry_of(column) is not None
    assert ENTRIES[entry_of(column)] == metric(column).unit


def test_a_standard_error_is_a_column_where_the_page_says_so():
    rows = [line.split(" | ") for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    named = [(re.findall(r"`(\w+)`", names), bias) for names, _, _, bias, *_ in (r for r in rows if len(r) > 3)]
    with_se = [name for names, bias in named if "`_se`" in bias for name in names]
    assert len(with_se) >= 15 and all(f"{name}_se" in METRIC_COLUMNS for name in with_se)


def test_every_entry_is_a_column():
    assert set(ENTRIES) == {entry_of(column) for column in METRIC_COLUMNS}
    assert len(METRIC_COLUMNS) == len(set(METRIC_COLUMNS))
    assert metric("svm_rbf_acc_y_paper").label == "SVM (rbf) on y, paper's protocol"
    assert metric("lr_nll_sample_y_se")[:3] == ("standard error of log loss on samples of y", "nats", 0)
