"""The report's page in a real browser: wide and narrow, light and dark, by mouse, finger and keyboard."""

import contextlib
import csv
import importlib.util
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from tests.plane.planes import AXIS, HEADER, plane_of, rows_of, write_csv, write_terms
from utils.cli import grid_configs
from utils.plane.advice import advice, terms_for
from utils.plane.cells import Plane, read_plane
from utils.plane.drawing import crowded
from utils.plane.explorer import EMPTY, alike, drawn, explorer
from utils.plane.metrics import metric
from utils.plane.pictures import Pictures
from utils.runs import Run

HOSTILE = "</script><img src=x onerror=alert(1)><!--"
SIZES = pytest.mark.parametrize("width", [1280, 400])
INK = """() => { const m = Bokeh.documents[0].get_model_by_name("plot").below[0];
  return [m.axis_label_text_color, matchMedia("(prefers-color-scheme: dark)").matches]; }"""
PLACES = """() => { const d = Bokeh.documents[0], f = Bokeh.index.get_one(d.get_model_by_name("plot")).frame;
  const {x, y} = d.get_model_by_name("cells").data;
  return Array.from(x, (v, i) => [f.x_scale.compute(v), f.y_scale.compute(y[i])]); }"""

LABELS = """() => { const d = Bokeh.documents[0], f = Bokeh.index.get_one(d.get_model_by_name("plot")).frame;
  const found = [], context = document.createElement("canvas").getContext("2d");
  context.font = "bold 12px helvetica";
  for (const name of ["chosen", "stars"]) {
    const {x, y, label, shift, side, align} = d.get_model_by_name(name).data;
    for (const i of Array.from(x).keys()) {
      const at = f.x_scale.compute(x[i]) + side[i], wide = context.measureText(label[i]).width;
      const left = align[i] === "left" ? at : at - wide, top = f.y_scale.compute(y[i]) + shift[i] - 6;
      found.push([left, top, left + wide, top + 12]); } }
  return [[f.bbox.left, f.bbox.top, f.bbox.right, f.bbox.bottom], found]; }"""


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, without a window."""
    there = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if there is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Chromium (Debian's package chromium) and Playwright (requirements-dev.txt)")
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=there, args=["--disable-dev-shm-usage"])
        except Error as e:  # of a machine that lets no browser start
            pytest.skip(f"{there} does not start: {str(e).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """The folder of batches with reports: really trained, of known figures, hostile, and of cells close together."""
    folder = tmp_path_factory.mktemp("batches")
    with contextlib.chdir(folder):
        grid = ["--beta_y", "0.5", "2", "--beta_z", "0.5", "2", "--run_batch_name", "real", "--seed", "3"]
        assert train.main([*TINY, *grid]) == 0
        real = ["--run_batch_name", "real", "--device", "cpu"]
        assert eval_beta_grid.main([*real, "--exclude_mi", "--exclude_fid"]) == 0
        rng, rows = np.random.default_rng(0), []
        for seed in (2, 3):
            for row in rows_of(seed=seed):
                row |= {"run": f"{row['run']}-{seed}", "num_epochs": 7}
                mse = 0.01 * np.exp(rng.normal(size=100)) / (1 + row["beta_z"])
                correct = (rng.random(100) < 0.85).astype(np.float32)
                row |= {"psnr": -10 * np.log10(mse.mean()), "psnr_se": 0.123, "lr_acc_mean": correct.mean()}
                write_terms(Path("runs/known", row["run"]), mse=mse, lr_acc_mean=correct)
                rows.append(row)
        write_csv(rows, "known", header=[*HEADER, "psnr_se", "num_epochs"])
        hostile = [row | {"run": HOSTILE, "vae_type": HOSTILE, HOSTILE: i} for i, row in enumerate(rows_of([1, 2]))]
        write_csv(hostile, "hostile", header=[*HEADER, HOSTILE])
        scored = ["mi_z_low", "psnr", "is_mean", "lr_acc_mean", "lr_acc_mean_y", "kNN_acc", "svm_rbf_acc"]
        scored += ["mi_y_low", "kNN_acc_y", "svm_linear_acc", "svm_linear_acc_y"]  # all best in one cell, at the edge
        close = [{"run": f"r{i}", "status": "finished", "beta_y": 2 - i / 9, "beta_z": 1.5} for i in range(8)]
        for i, row in enumerate(close):  # another cell is the best for each, all of nearly the same rates but one
            row |= {"kl_z": 9 + 0.02 * i if i < 7 else 0.1, "kl_y": 20 - 0.05 * i if i < 7 else 0.2, "ll": -100}
            row |= {name: 0.5 + 0.1 * (i == min(j, 7)) for j, name in enumerate(scored)}
        write_csv(close, "close", header=[*HEADER, *(name for name in scored if name not in HEADER)])
        for name in ("real", "known", "hostile", "close"):
            assert plot_eval.main(["--run_batch_name", name, "--device", "cpu", "--format", "png"]) == 0
    return folder / "runs"


@pytest.fixture
def opened(browser, batches):
    """Opens a batch's report; whatever the test does there, the page may not complain, load anything or overflow."""
    with contextlib.ExitStack() as stack:

        def report(batch, width=1280, scheme="light"):
            page = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500
            )
            complaints, asked = [], []
            page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: complaints.append(str(e)))
            page.on("dialog", lambda d: (complaints.append("dialog"), d.dismiss()))
            page.on("request", lambda r: asked.append(r.url))
            page.goto((batches / batch / "figures" / "report.html").as_uri())
            page.wait_for_selector("#advised tbody tr")

            def end():
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.close()
                assert complaints == []
                assert [url for url in asked if not url.startswith(("data:", "blob:"))] == asked[:1]

            stack.callback(end)
            return page

        yield report


def table(page, name):
    """The texts of a table of the page, by row."""
    rows = page.locator(f"#{name} tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def places(page):
    """Where in the window the cells are drawn, (N, 2)."""
    box = page.locator("#plane canvas").first.bounding_box()
    return [(box["x"] + x, box["y"] + y) for x, y in page.evaluate(PLACES)]


def luminance(colour):
    """Of a CSS colour, by WCAG 2.1."""
    parts = np.array([float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@SIZES
def test_the_page_fits_and_its_plane_is_legible(opened, width, scheme):
    page = opened("real", width, scheme)
    ink, dark = page.evaluate(INK)
    assert dark == (scheme == "dark")
    assert luminance(ink) > 0.7 if dark else luminance(ink) < 0.05
    other = page.locator("#plane").bounding_box()
    assert other["x"] >= 0 and other["x"] + other["width"] <= width and other["height"] >= 350
    for x, y in places(page):  # tips at the edge must not widen the page either
        page.mouse.move(x, y)
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(color_scheme="light" if dark else "dark")
    page.wait_for_function(f"ink => ({INK})()[0] !== ink", arg=ink)  # it follows a change
    for frame in page.locator(".table").all():  # the last column can always be brought into view
        if not frame.locator("thead").first.is_visible():  # or the columns are lines
            values = frame.locator("tbody tr").first.locator("td").all()
            labels = [value.evaluate("e => getComputedStyle(e, '::before').content") for value in values]
            assert width < 500 and len(set(labels)) == len(labels) == 13 and '"best"' in labels
            assert all(0 <= v.bounding_box()["x"] <= width - v.bounding_box()["width"] for v in values)
            continue
        last = frame.locator("tr").first.locator("th").last
        last.scroll_into_view_if_needed()
        inner, outer = last.bounding_box(), frame.bounding_box()
        assert inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 1 <= width + 1
        assert frame.get_attribute("tabindex") == "0"
        assert frame.evaluate("e => getComputedStyle(e).overflowX") == "auto"
    assert page.locator("#compared").evaluate("e => e.scrollWidth <= e.clientWidth")  # two cells fit beside each other


def test_hovering_tells_betas_rates_and_the_coloured_figure_and_shows_pictures(opened, batches):
    page, plane = opened("real"), read_plane(batches / "real/eval_results.csv")
    for (x, y), cell in zip(places(page), plane.cells, strict=True):
        page.mouse.move(x, y)
        tip = page.locator(".bk-Tooltip div:has(> b)")
        tip.get_by_text("beta_y {beta_y:.4g}, beta_z {beta_z:.4g}".format(**cell.median)).wait_for()
        text = tip.inner_text()
        assert "R(z) {kl_z:.4g}, R(y|z) {kl_y:.4g} nats".format(**cell.median) in text
        assert f"PSNR (dB): {cell.median['psnr']:.4g} ± {cell.median['psnr_se']:.2g}" in text
        sizes = [
            image.evaluate("image => image.decode().then(() => image.naturalWidth)")
            for image in tip.locator("img").all()
        ]
        assert len(sizes) == 2 and min(sizes) > 16


def test_every_column_colours_the_plane_by_its_better_way(opened, batches):
    page, plane = opened("known"), read_plane(batches / "known/eval_results.csv")
    options = dict(page.locator("#colour option").evaluate_all("all => all.map(o => [o.value, o.text])"))
    figures = [name for name in plane.names if name != "psnr_se"]  # shown with PSNR
    assert {name: options[name] for name in figures} == {name: plane.title(name) for name in figures}
    assert list(options)[:4] == ["kl_z", "kl_y", "rate", "psnr"] and {"log10 beta_y", "log10 beta_z"} <= set(options)
    assert not any(name.endswith("_se") for name in options)
    for name, first, last in (("nelbo", "#FDE724", "#440154"), ("is_mean", "#440154", "#FDE724")):
        page.select_option("#colour", name)
        found = page.evaluate("""() => { const of = name => Bokeh.documents[0].get_model_by_name(name);
            const {palette, low, high} = of("mapper"), {value, shown} = of("cells").data;
            return [Array.from(value), low, high, palette[0], palette.at(-1), of("plot").title.text, shown[0]]; }""")
        values = plane.values(name)
        assert found[0] == pytest.approx(values, rel=1e-5)
        assert found[1:3] == pytest.approx([values.min(), values.max()], rel=1e-5)
        assert found[3:] == [first, last, plane.title(name), f"{plane.title(name)}: {values[0]:.4g}"]
        assert table(page, "compared")[3][0] == plane.title(name)  # after the betas


@SIZES
def test_the_last_two_cells_that_were_chosen_are_compared(opened, batches, width):
    page, plane = opened("real", width), read_plane(batches / "real/eval_results.csv")
    choose = page.mouse.click if width > 500 else page.touchscreen.tap
    chosen = lambda: [page.input_value(f"#cell-{ab}") for ab in "ab"]  # noqa: E731
    assert chosen() == [str(plane.best("psnr")), ""]
    page.select_option("#cell-a", "")
    assert "Click or tap a cell" in page.inner_text("#compared") and not page.locator("textarea").count()
    for i in (0, 3):
        choose(*places(page)[i])
    page.wait_for_function("document.getElementById('cell-b').value === '3'")
    assert chosen() == ["0", "3"]
    rows = {row[0]: row[1:] for row in table(page, "compared")}
    two = [plane.cells[0], plane.cells[3]]
    assert rows[""] == ["cell A", "cell B"]
    for name in ("psnr", "kl_z", "ll"):
        told = [f"{c.median[name]:.4g} ± {c.median[name + '_se']:.2g}" for c in two]
        assert [float(v) for text in rows[plane.title(name)] for v in text.split(" ± ")] == pytest.approx(
            [float(v) for text in told for v in text.split(" ± ")]
        )
    assert rows["runs"] == [c.runs[0] for c in two]
    assert page.locator("#compared .picture").count() == 5  # samples, reconstructions, and what is reconstructed
    for text, cell in zip(page.locator("textarea").all(), two, strict=True):
        command = shlex.split(text.input_value())
        assert command[:2] == ["python", "train.py"]
        (config,) = grid_configs(train.parse_args(command[2:]))
        assert config == Run.open(batches / "real" / cell.runs[0]).config
    for i, then in ((1, ["3", "1"]), (1, ["3", ""])):
        page.wait_for_timeout(350)  # or it is a double click, which chooses once
        choose(*places(page)[i])
        page.wait_for_function("b => document.getElementById('cell-b').value === b", arg=then[1])
        assert chosen() == then


def test_cells_and_the_rates_they_were_asked_for_are_where_the_axes_say():
    """Over rates of which most are small: a scale linear up to 1 nat, and logarithmic from there."""
    rates = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 20.0, 200.0]
    plane = plane_of([{"beta_y": 1.0, "beta_z": 2.0, "kl_z": math.log(2) * r, "kl_y": 5.0} for r in rates])
    plane.unit = "bits"
    plane.cells[6] = replace(plane.cells[6], settings={"multi_rate": "True", "target_rate_z": f"{math.log(2) * 200}"})
    plot = drawn(plane, Pictures({}, {}, None, {"samples": {2: "data:x"}, "reconstructions": {}}))
    ticks = {float(text): at for at, text in plot.xaxis.major_label_overrides.items()}
    cells = plot.select_one({"name": "cells"}).data
    at = dict(zip(rates, cells["x"], strict=True))
    assert [at[r] for r in (0, 1, 2, 20, 200)] == pytest.approx([ticks[r] for r in (0, 1, 2, 20, 200)])
    assert at[0.5] == pytest.approx(at[1] / 2) and at[200] - at[20] == pytest.approx(at[20] - at[2])
    assert crowded(plane, "kl_z") and not crowded(plane, "kl_y")
    assert cells["y"] == pytest.approx(plane.values("kl_y"))
    assert cells["marker"] == ["circle"] * 6 + ["square", "circle"] and cells["r_z"][6] == "20"
    assert cells["samples"][1:3] == [EMPTY, "data:x"] and "reconstructions" not in cells
    (cross,) = [r for r in plot.renderers if getattr(r.glyph, "marker", None) == "x"]
    assert cross.data_source.data["x"] == pytest.approx([ticks[200]])
    assert cross.data_source.data["y"] == pytest.approx([cells["y"][6]])  # not asked for, so its own


def test_a_standard_error_that_is_asked_for_colours_nothing_first():
    rows = [{"beta_y": 1.0, "beta_z": z, "kl_z": z, "kl_y": 5.0, "psnr": 9.0, "psnr_se": 0.1} for z in (1.0, 2.0)]
    made = Pictures({}, {}, None, {"samples": {}, "reconstructions": {}})
    (data,) = re.findall(r'id="explored">(.*?)</script>', explorer(plane_of(rows), ["psnr_se", "psnr"], {}, made)[1])
    assert json.loads(data)["first"] == "psnr"


def test_the_page_stars_what_seeds_that_differ_would_choose_otherwise():
    """Of cells that do not all have the same seeds or images, some choose otherwise than all do."""
    plane, terms = plane_of(rows_of(AXIS[:2])), [np.ones((1, 30))] * 4
    assert alike(plane, terms) and alike(plane, [*terms[:3], None]) and alike(plane, ())
    plane.cells[0] = replace(plane.cells[0], seeds=("7",))
    assert not alike(plane, terms) and alike(plane, [None, *terms[1:]])
    part = np.ones((1, 30))
    part[0, 3] = np.nan
    assert not alike(Plane(plane.cells[1:]), [part, *terms[2:]])


def test_the_better_of_two_is_bold_where_a_better_way_is_known(opened, batches):
    page, plane = opened("known"), read_plane(batches / "known/eval_results.csv")
    page.select_option("#cell-a", "0")
    page.select_option("#cell-b", "24")
    for name in ("psnr", "nelbo", "is_mean", "kl_z"):
        row = page.locator("#compared tr", has=page.get_by_role("rowheader", name=plane.title(name), exact=True))
        best = metric(name).better * (plane.values(name)[0] - plane.values(name)[24])
        assert [cell.get_attribute("class") == "best" for cell in row.locator("td").all()] == [best > 0, best < 0]


def test_a_command_can_be_copied_or_else_is_selected(opened):
    page = opened("real")
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', {value: {writeText: async t => told = t}}) && 0")
    copy, text = page.locator("#commands button"), page.locator("#commands textarea")
    copy.click()
    assert page.evaluate("told") == text.input_value() and copy.inner_text() == "copied"
    page.evaluate("() => { navigator.clipboard.writeText = async () => { throw Error(); }; }")
    copy.click()
    assert "Ctrl+C" in copy.inner_text()
    assert text.evaluate("t => t.value.slice(t.selectionStart, t.selectionEnd)") == text.input_value()


def same_advice(page, rows):
    """Asserts that the page's advice is that of these rows."""
    found = table(page, "advised")[1:]
    assert len(found) == len(rows) > 0
    for (_, task, _, *texts, chosen), row in zip(found, rows, strict=True):
        names = ("value", "beta_y", "beta_z", "rate", "kl_z", "kl_y", "diagonal_value", "diagonal_rate", "gain")
        assert task == row["task"]
        told = [float(text.rstrip("*") or "nan") for text in texts]
        assert told == pytest.approx(
            [float("nan" if row.get(n) in (None, "") else row[n]) for n in names], rel=1e-3, nan_ok=True
        )
        assert texts[0].endswith("*") == (row["told"] == "untested") and chosen == (row.get("chosen_kl_z") or "")


@pytest.mark.parametrize("batch", ["real", "known"])
def test_without_a_limit_the_advice_is_the_written_one(opened, batches, batch):
    with open(batches / batch / "figures/advice.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["told"] == "untested" for row in rows} == ({True, False} if batch == "known" else {False})
    same_advice(opened(batch), rows)


@SIZES
def test_sliders_move_the_advice_as_a_budget_of_plot_eval_does(opened, batches, width):
    page, plane = opened("known", width), read_plane(batches / "known/eval_results.csv")
    terms, budget, seen = terms_for(plane), {}, []
    for name, presses in (("rate", 4), ("rate", 5), ("kl_z", 9), ("kl_y", 6)):
        page.focus(f"#{name}")
        for _ in range(presses):
            page.keyboard.press("ArrowLeft")
        steps = sorted(set(plane.values(name)))
        budget[name] = steps[int(page.input_value(f"#{name}"))]
        assert f"{budget[name]:.4g} nats" in page.inner_text("#budget").replace("\u00a0", " ")
        same_advice(page, rows := advice(plane, budget, terms))
        seen.append([(row["beta_y"], row["beta_z"]) for row in rows])
        stars = page.evaluate("Array.from(Bokeh.documents[0].get_model_by_name('stars').data.x)")
        assert len(stars) == len(set(seen[-1]))
        inside(page)
    assert seen[0] != seen[1] != seen[2]
    page.locator("#advised button").first.click()  # chooses the first row's cell
    assert float(table(page, "compared")[1][-1]) == seen[-1][0][0]


def inside(page):
    """The boxes (N, 4) of the plane's labels, none of which is cut off."""
    frame, labels = (np.array(v) for v in page.evaluate(LABELS))
    assert (labels[:, :2] >= frame[:2]).all() and (labels[:, 2:] <= frame[2:]).all()
    return labels


@SIZES
def test_labels_in_the_plane_lie_apart_and_are_not_cut_off(opened, width):
    page = opened("close", width)
    for zoomed in (False, True):  # out
        if zoomed:
            page.evaluate("Bokeh.documents[0].get_model_by_name('plot').x_range.setv({start: -4, end: 12})")
            page.wait_for_timeout(100)
        page.select_option("#cell-a", "2")
        page.select_option("#cell-b", "3")
        labels = inside(page)
        apart = [[min(a[2:] - b[:2]) <= 0 or min(b[2:] - a[:2]) <= 0 for b in labels] for a in labels]
        assert len(labels) == 10 and np.array_equal(apart, ~np.eye(10, dtype=bool))
        assert max(labels[:, 2] - labels[:, 0]) > 70  # the label of five tasks


def test_all_controls_are_reached_by_tab_and_show_it(opened):
    page = opened("real")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("(e => [e.id, getComputedStyle(e).outlineStyle])(document.activeElement)")
        reached.add(name)
        assert not name or outline != "none"
    assert {"colour", "cell-a", "cell-b", "rate", "kl_z", "kl_y", "compared", "advised"} <= reached
    page.focus("#cell-b")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#cell-b") == "0" and "cell B" in page.inner_text("#compared")


@SIZES
def test_pictures_are_enlarged_and_closed_by_a_key(opened, width):
    page = opened("real", width)
    for kind, least in (("figure .picture", 600), ("#compared .picture", 0.75 * min(width, 900))):
        page.locator(kind).first.click()
        large = page.locator("#large img")
        assert large.bounding_box()["width"] >= least
        frame = page.locator("#large").bounding_box()
        assert frame["x"] >= 0 and frame["x"] + frame["width"] <= width
        page.keyboard.press("Escape")
        assert not large.is_visible()


def test_texts_of_files_stay_texts(opened):
    page = opened("hostile")
    assert page.locator("img[src=x]").count() == 0
    page.select_option("#colour", HOSTILE)
    page.mouse.move(*places(page)[1])
    page.locator(".bk-Tooltip").get_by_text(f"{HOSTILE}: 1").wait_for()
    assert page.locator("img[src=x]").count() == 0
    rows = {row[0]: row[1:] for row in table(page, "compared")}
    assert rows["runs"] == [HOSTILE] and HOSTILE in rows
    assert "no command trains it" in page.inner_text("#commands")
    assert not page.locator("#compared .picture").count()
