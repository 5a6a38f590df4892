"""The report's page in a real browser: wide and narrow, light and dark, by mouse, finger and keyboard."""

import contextlib
import io
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from pytest import approx

import eval_beta_grid
import plot_eval
import train
from tests.conftest import TINY
from tests.plane.planes import plane_of, rows_of, write_csv
from utils.cli import grid_configs
from utils.plane.drawing import Output
from utils.plane.explorer import EMPTY, rate_plane
from utils.plane.metrics import metric
from utils.plane.reading import read_plane
from utils.plane.report import page, write_tables
from utils.plane.sheets import Pictures
from utils.runs import Run

HOSTILE = "</script><img src=x onerror=alert(1)><!--"
STATE = """() => { const of = name => Bokeh.documents[0].get_model_by_name(name), {data} = of("cells");
  const [plot] = Bokeh.documents[0].roots(), {el, frame} = Bokeh.index.get_one(plot), box = el.getBoundingClientRect();
  const places = Array.from(data.x, (x, i) => [frame.x_scale.compute(x), frame.y_scale.compute(data.y[i])]);
  const {palette, low, high, nan_color} = of("mapper"), {samples, reconstructions, shown} = data;
  return {samples, reconstructions, shown, places: places.map(([x, y]) => [box.x + x, box.y + y]), ends: [low, high],
    colours: [palette[0], palette.at(-1), nan_color, plot.title.text], values: Array.from(data.value, String)}; }"""
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (requirements-dev.txt)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            yield playwright.chromium.launch(executable_path=path, args=["--disable-dev-shm-usage"])
        except api.Error as e:  # there is none, or the machine lets none start
            pytest.skip(f"needs Chromium (Debian's package chromium): {str(e).splitlines()[0]}")


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """The folder of reports of batches: really trained, and of known figures under hostile names."""
    folder = tmp_path_factory.mktemp("batches")
    with contextlib.chdir(folder):
        real = ["--run_batch_name", "real", "--device", "cpu"]
        assert train.main([*TINY, *real, "--beta_y", "0.5", "2", "--beta_z", "0.5", "2", "--seed", "3"]) == 0
        assert eval_beta_grid.main([*real, "--exclude_mi", "--exclude_fid"]) == 0
        assert plot_eval.main([*real, "--format", "png"]) == 0
        rows = enumerate(rows_of(vae_type=HOSTILE, psnr_se=0.123))
        rows = [row | {"run": HOSTILE + row["run"], "fid": i or "", HOSTILE: i} for i, row in rows]
        plane = read_plane(write_csv(rows, "known", header=["psnr_se", "fid", HOSTILE]))
        plane.notes, out = [HOSTILE], plane.folder / "figures"
        out.mkdir()
        tables = write_tables(Output(out), plane, ["psnr", "fid"], [], [], [])
        (out / "report.html").write_text(page(plane, ["psnr_se", "is_mean"], tables, {}, Pictures({}, {})))
    return folder / "runs"


@pytest.fixture
def opened(browser, batches):
    """Opens a batch's report; whatever the test does there, the page may not complain, load anything or overflow."""
    page, complaints, asked = browser.new_page(has_touch=True), [], []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))

    def report(batch, width=1280, scheme="light"):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto((batches / batch / "figures" / "report.html").as_uri())
        page.wait_for_function("document.querySelector('#colour').value")
        return page

    yield report
    assert page.evaluate(OVERFLOW) <= 0
    page.close()
    assert complaints == [] and [url for url in asked if not url.startswith(("data:", "blob:"))] == asked[:1]


def compared(page):
    """The texts of the two cells beside each other, by heading."""
    rows = page.locator("#compared tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.innerText))")
    return {heading: texts for heading, *texts in rows}


def contrast(page):
    """The ink of the plane's vertical axis less its ground, -1 for black on white."""
    image = Image.open(io.BytesIO(page.locator("#plane").screenshot())).convert("L")
    pixels = np.asarray(image, float)[20:-60, 4:50] / 255
    return max(pixels.min() - np.median(pixels), pixels.max() - np.median(pixels), key=abs)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_is_legible_in_the_dark(opened, width):
    page = opened("real", width, "dark")
    assert contrast(page) > 0.6
    page.emulate_media(color_scheme="light")  # it follows a change
    page.wait_for_timeout(300)
    assert contrast(page) < -0.6
    last = "e => (e.scrollLeft = 1e5, e.querySelector('th:last-child').getBoundingClientRect().right)"
    for table in page.locator(".table").all():
        assert table.evaluate(last) <= width  # the last column can be brought into view
        assert table.evaluate("e => getComputedStyle(e).overflowX") == "auto"
    assert page.locator("#compared").evaluate("e => e.parentNode.scrollWidth <= e.parentNode.clientWidth")


def test_hovering_tells_betas_rates_and_the_coloured_figure_and_shows_pictures(opened, batches):
    page, plane = opened("real", 400), read_plane(batches / "real/eval_results.csv")
    for at, cell in zip(page.evaluate(STATE)["places"], plane.cells, strict=True):
        page.mouse.move(*at)
        tip = page.locator(".bk-Tooltip div:has(> b)")
        tip.get_by_text("beta_y {beta_y:.4g}, beta_z {beta_z:.4g}".format(**cell.median)).wait_for()
        text = "R(z) {kl_z:.4g}, R(y|z) {kl_y:.4g} nats PSNR (dB): {psnr:.4g} ± {psnr_se:.2g}".format(**cell.median)
        assert text in " ".join(tip.inner_text().split()) and tip.locator("img").count() == 2
        assert page.evaluate(OVERFLOW) <= 0  # also with a tip at the edge


def test_every_column_colours_the_plane_and_the_better_figure_of_two_is_bold(opened, batches):
    page, plane = opened("known"), read_plane(batches / "known/eval_results.csv")
    options = page.locator("#colour option").all_inner_texts()
    titles = [plane.title(name) for name in plane.names if name != "psnr_se"]  # shown with PSNR
    assert sorted(options) == sorted([*titles, "log10 beta_y", "log10 beta_z"])
    assert options[:4] == [plane.title(name) for name in ("kl_z", "kl_y", "rate", "psnr")]
    more = page.locator("#colour optgroup[label=more] option").all_inner_texts()
    assert more == options[-len(more) :] and {HOSTILE, plane.title("ll")} == {*more}
    assert page.locator("#colour option:checked").inner_text() == "inception score"  # no error, though asked for
    for select, cell in zip(page.locator("#compared select").all(), ("1", "24"), strict=True):
        select.select_option(cell)
    viridis, cividis = ["#440154", "#FDE724"], ["#00204C", "#FFE945"]
    for name, palette in (("fid", viridis[::-1]), ("is_mean", viridis), ("psnr", viridis), ("kl_z", cividis)):
        title, values = plane.title(name), plane.values(name)
        page.select_option("#colour", label=title)
        state = page.evaluate(STATE)
        assert [float(v) for v in state["values"]] == approx(values, nan_ok=True)
        assert state["colours"] == [*palette, "gray", title]
        assert state["ends"] == approx([np.nanmin(values), np.nanmax(values)])
        texts = ["unknown" if np.isnan(v) else f"{v:.4g}" + " ± 0.12" * (name == "psnr") for v in values]
        assert state["shown"] == [f"{title}: {text}" for text in texts] and ("unknown" in texts) == (name == "fid")
        row = page.locator("#compared tr", has=page.get_by_role("rowheader", name=title, exact=True))
        weights = row.locator("td").evaluate_all("all => all.map(e => getComputedStyle(e).fontWeight)")
        best = metric(name).better * (values[1] - values[24])
        assert [weight == "700" for weight in weights] == [best > 0, best < 0]


@pytest.mark.parametrize("width", [1280, 400])
def test_the_last_two_cells_that_were_chosen_are_compared(opened, batches, width):
    page, plane = opened("real", width), read_plane(batches / "real/eval_results.csv")
    choose, (a, b) = page.mouse.click if width > 500 else page.touchscreen.tap, page.locator("#compared select").all()
    assert [a.input_value(), b.input_value()] == [str(plane.best("psnr")), ""]
    for i in (1, 0, 3):
        choose(*page.evaluate(STATE)["places"][i])
        page.wait_for_function(f"document.querySelectorAll('#compared select')[1].value === '{i}'")
        page.wait_for_timeout(350)  # or the next is a double click
    rows, two = compared(page), [plane.cells[0], plane.cells[3]]
    assert rows["beta_y"] == rows["beta_z"] == ["0.5", "2"] and rows["runs"] == [c.runs[0] for c in two]
    for name in ("psnr", "kl_z", "ll"):
        assert rows[plane.title(name)] == [f"{c.median[name]:.4g} ± {c.median[name + '_se']:.2g}" for c in two]
    for kind in ("samples", "reconstructions"):
        sources = page.locator(f"#compared img[alt={kind}]").evaluate_all("all => all.map(image => image.src)")
        assert sources == [page.evaluate(STATE)[kind][i] for i in (0, 3)] and EMPTY not in sources
    for field, cell in zip(page.locator("#compared tr:last-child td:has-text('train.py')").all(), two, strict=True):
        field.click()  # selects all of it
        (config,) = grid_configs(train.parse_args(shlex.split(page.evaluate("getSelection().toString()"))[2:]))
        assert config.differs_in(Run.open(batches / "real" / cell.runs[0]).config) == ["data_digest"]
    a.select_option("")
    assert compared(page)["beta_y"] == ["", "2"]


def test_a_click_on_a_heading_sorts_its_table(opened):
    table = opened("known").locator("h2:text-is('Cells') + .table")
    for heading, kind in (("beta_z", float), ("runs", str), ("FID", float)):
        column = table.locator("th").all_inner_texts().index(heading)
        for down in (False, True):
            table.locator("th button").nth(column).click()
            texts = table.locator(f"td:nth-child({column + 1})").all_inner_texts()
            values = [kind(text) for text in texts if text]
            assert values == sorted(values, reverse=down) and len(set(values)) > 4
            assert (texts[-1] == "") == (heading == "FID") and table.locator("th[aria-sort]").count() == 1


def test_all_is_reached_by_tab_and_pictures_are_enlarged_and_closed_by_a_key(opened):
    page, reached = opened("real", 400), set()
    focus = "(e => [e.tagName + e.className, getComputedStyle(e).outlineStyle])(document.activeElement)"
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(tuple(page.evaluate(focus)))
    assert {"SELECT", "SUMMARY", "DIVtable", "BUTTON"} <= {name for name, outline in reached if outline != "none"}
    for kind, key, least in (("figure", "Escape", 600), ("#compared td", "Enter", 350)):
        picture = page.locator(f"{kind} summary").first
        small = picture.locator("img").bounding_box()["width"]
        picture.click()
        assert picture.locator("img").bounding_box()["width"] >= least > small
        assert picture.bounding_box() == {"x": 0, "y": 0, "width": 400, "height": 900}
        page.keyboard.press(key)
        assert picture.locator("img").bounding_box()["width"] == small


def test_texts_of_files_stay_texts(opened):
    page = opened("known")
    page.select_option("#colour", label=HOSTILE)
    page.mouse.move(*page.evaluate(STATE)["places"][1])
    page.locator(".bk-Tooltip").get_by_text(f"{HOSTILE}: 1").wait_for()
    rows = compared(page)
    assert HOSTILE in rows and rows["runs"][0].startswith(HOSTILE) and rows["command"][0].startswith("none: ")
    assert page.locator("td", has_text=HOSTILE).count() > 25 and page.locator("img").count() == 0


def test_cells_and_the_rates_they_were_asked_for_are_where_the_axes_say():
    """Over rates of which most are small: a scale linear up to 1 nat, and logarithmic from there."""
    bit, rates = np.log(2), [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 20.0, 200.0]
    rows = [{"beta_y": 1.0, "beta_z": 1 + r, "kl_z": bit * r, "kl_y": 5.0} for r in rates]
    searched = {"multi_rate": "True", "target_rate_z": f"{200 * bit}"}
    plane = plane_of(rows, *[{}] * 6, searched, {}, unit="bits")
    plot = rate_plane(plane, Pictures({}, {"samples": {2: "data:x"}, "reconstructions": {}}))
    ticks = {float(text): at for at, text in plot.xaxis.major_label_overrides.items()}
    cells = plot.select_one({"name": "cells"}).data
    x, on = cells["x"], [0, 4, 5, 6, 7]
    assert x[on] == approx([ticks[rates[i]] for i in on])
    assert x[3] == approx(x[4] / 2) and x[7] - x[6] == approx(x[6] - x[5])
    assert cells["y"] == approx(plane.values("kl_y"))
    assert cells["marker"] == ["circle"] * 6 + ["square", "circle"] and cells["kl_z"][6] == "20"
    assert cells["samples"][1:3] == [EMPTY, "data:x"] and "reconstructions" not in cells
    (cross,) = [r.data_source.data for r in plot.renderers if getattr(r.glyph, "marker", None) == "x"]
    assert [*cross["x"], *cross["y"]] == approx([ticks[200], cells["y"][6]])  # of y not asked for, so its own
    assert plot.select_one({"name": "rings"}).data_source.data["x"] == approx(x[:1])  # where betas are equal
