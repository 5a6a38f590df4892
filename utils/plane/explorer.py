"""The rate plane as a place to explore: its part of the report's page, which Bokeh draws and page.js answers in.

All that is computed is computed here; the browser colours, compares, and picks the best of what is within a budget.
"""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from utils.plane.advice import LIMITS, TASKS, training
from utils.plane.cells import UNITS, Plane
from utils.plane.drawing import RED, crowded
from utils.plane.gains import scores
from utils.plane.metrics import FOUR, first_of, is_squared, metric
from utils.plane.pictures import Pictures, to_uri

EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # one clear pixel
PICTURE = '<img src="@{0}" alt="{0}" style="width: 80px; margin: 4px 4px 0 0; image-rendering: pixelated">'
TIP = (
    '<div style="max-width: 178px"><b>beta_y @beta_y, beta_z @beta_z</b><br>'
    "R(z) @r_z, R(y|z) @r_y {unit}<br>@shown<br>{pictures}</div>"
)
BODY = """<section id="explorer">
<p class="controls"><label>colour <select id="colour"></select></label>
<label>cell A <select id="cell-a" class="cell"></select></label>
<label>cell B <select id="cell-b" class="cell"></select></label></p>
<div class="wide"><div><div id="plane"></div>
<p class="about">Each dot is a model, at its rates. Click or tap two to compare them. Dots are cells trained on their
own, squares cells of a multi-rate model, crosses rates that were asked for; circles mark ordinary beta-VAEs (equal
betas), small points single seeds, and numbered stars the advice below. Yellow is best, grey unknown.</p></div>
<div><div class="table" id="compared" tabindex="0" role="region" aria-label="chosen cells"></div>
<div id="commands"></div></div></div>
<h2>The best within a budget</h2>
<p class="controls" id="budget"></p>
<div class="table" id="advised" tabindex="0" role="region" aria-label="the best within the budget"></div>
<p class="about">The best cell for each metric, by all test images, and what ordinary beta-VAEs (beta_y = beta_z) reach
at the same R: two of them mixed where none has it, or with less where they end. Both values are of the half of the
images on which nothing was chosen, both ways, averaged; marked * they are those by which the cell was chosen, for want
of terms of single images or of an ordinary beta-VAE, or as seeds differ. Whether a gain is more than chance, the table
under Advice says.</p>
</section>"""


def explorer(plane: Plane, names: Sequence[str], terms: Mapping, made: Pictures) -> tuple[str, str]:
    """The page's part for its head, Bokeh itself, and for its body; first coloured by the first of the metrics `names`.

    `terms` are those of single images, by metric, see `terms_of`.
    """
    from bokeh.embed import json_item
    from bokeh.resources import Resources

    islands = {"explored": explored(plane, names, terms, made), "drawn": json_item(drawn(plane, made))}
    parts = [f'<script type="application/json" id="{name}">{inert(data)}</script>' for name, data in islands.items()]
    return Resources(mode="inline", components=["bokeh"]).render_js(), "\n".join([BODY, *parts])


def inert(data: object) -> str:
    """JSON that ends no script element, whatever texts are in it; NaN and infinities are null."""
    return json.dumps(_plain(data), allow_nan=False).replace("<", "\\u003c")


def _plain(data):
    """Of numpy's types and numbers that are not finite, what JSON has."""
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, np.ndarray | np.generic):
        return _plain(data.tolist())
    if isinstance(data, list | tuple):
        return [_plain(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def explored(plane: Plane, names: Sequence[str], terms: Mapping, made: Pictures) -> dict:
    """What page.js shows of the plane: cells, columns, and what the advice is made of; in the plane's unit."""
    from bokeh.palettes import Cividis256, Viridis256

    shown = columns(plane)
    known = {column["name"] for column in shown}
    first = next(name for name in [*names, *first_of(plane.names, FOUR), "rate"] if name in known)
    rates = {name: plane.values(name) for name in LIMITS}
    about = {name: [cell.settings.get(name) or "" for cell in plane.cells] for name in plane.differing}
    about |= {"seeds": [", ".join(cell.seeds) for cell in plane.cells]} if len(plane.seeds) > 1 else {}
    advice = []
    for task, name in ((task, name) for task, names in TASKS.items() for name in names if name in plane.names):
        chosen, told = scores(name, terms[name], [cell.seeds for cell in plane.cells]) if name in terms else ((), ())
        entry = {"task": task, "title": plane.title(name), "better": metric(name).better, "values": plane.values(name)}
        entry |= {"mixes": metric(name).mixes, "squared": is_squared(name), "alike": alike(plane, terms.get(name, ()))}
        advice.append(entry | {"chosen": chosen, "told": [plane.scale(name) * values for values in told]})
    return {
        "unit": plane.unit,
        "betas": {name: plane.values(name) for name in ("beta_y", "beta_z")},
        "rates": [{"name": name, "title": title, "values": rates[name]} for name, title in LIMITS.items()],
        "diagonal": plane.diagonal,
        "about": about | {"runs": [" ".join(cell.runs) for cell in plane.cells]},
        "commands": [training(cell) for cell in plane.cells],
        "columns": shown,
        "first": first,
        "start": plane.best(first),
        "advice": advice,
        "originals": None if made.originals is None else to_uri(made.originals),
        "palettes": {"1": Viridis256, "-1": Viridis256[::-1], "0": Cividis256},
    }


def alike(plane: Plane, terms: Sequence[np.ndarray | None]) -> bool:
    """Whether all cells that have terms have the same seeds and tested images, so that any of them choose as all do."""
    kinds = {
        (cell.seeds, np.isfinite(of_cell).all(0).tobytes())
        for cell, of_cell in zip(plane.cells, terms, strict=False)
        if of_cell is not None
    }
    return len(kinds) <= 1


def columns(plane: Plane) -> list[dict]:
    """The columns by which cells can be coloured, to six digits, with their standard errors: first rates and tasks."""
    of_tasks = [name for names in TASKS.values() for name in names]
    names = [n for n in dict.fromkeys(["kl_z", "kl_y", "rate", *of_tasks, *plane.names]) if n in plane.names]
    names = [n for n in names if not (n.endswith("_se") and n.removesuffix("_se") in names)]
    found, titles = [], [plane.title(name) for name in names]
    for name, title in zip(names, titles, strict=True):
        title += f" [{name}]" if titles.count(title) > 1 else ""
        errors = rounded(plane.values(f"{name}_se")) if f"{name}_se" in plane.names else None
        found.append({"name": name, "title": title, "better": metric(name).better})
        found[-1] |= {"values": rounded(plane.values(name)), "errors": errors}
    for name in ("beta_y", "beta_z"):
        betas = plane.values(name)
        with np.errstate(divide="ignore"):
            logs = rounded(np.log10(betas))
        found.append({"name": f"log10 {name}", "title": f"log10 {name}", "better": 0, "values": logs, "errors": None})
    return found


def rounded(values: np.ndarray) -> list[float]:
    """To six digits, to be shown."""
    return [float(f"{v:.6g}") for v in values]


def drawn(plane: Plane, made: Pictures):
    """The scatter plot of the plane, with empty places for the colours, the chosen cells and the advice."""
    from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper
    from bokeh.palettes import Viridis256
    from bokeh.plotting import figure

    tools = "hover,box_zoom,wheel_zoom,pan,reset,save"
    plot = figure(tools=tools, sizing_mode="stretch_both", toolbar_location="above", toolbar_sticky=False, name="plot")
    plot.x_range.range_padding = 0.2  # for the labels at its sides
    plot.toolbar.logo, plot.toolbar.active_drag, plot.toolbar.active_scroll = None, None, None
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    place = {"x": axis(plot.xaxis, plane, "kl_z"), "y": axis(plot.yaxis, plane, "kl_y")}
    (x, y), on = (place[of](plane.values(name)) for of, name in (("x", "kl_z"), ("y", "kl_y"))), plane.diagonal
    asked = UNITS[plane.unit] * plane.asked[:, ::-1].T
    ax, ay = (np.where(np.isnan(a), b, place[of](a)) for of, a, b in zip("xy", asked, (x, y), strict=True))
    there = np.isfinite(plane.asked).any(1)
    several = [(row, i) for i, cell in enumerate(plane.cells) if len(cell.repeats) > 1 for row in cell.repeats]
    sx, sy = (
        place[of](plane.scale(n) * np.array([row[n] for row, _ in several])) for of, n in (("x", "kl_z"), ("y", "kl_y"))
    )
    plot.scatter(sx, sy, size=3, color="gray", level="underlay")
    plot.scatter(ax[there], ay[there], marker="x", size=9, color="gray", level="underlay")
    data = {"x": x, "y": y, "value": np.full(len(x), np.nan), "shown": [""] * len(x)}
    data |= {"marker": np.where(plane.unfolded, "square", "circle").tolist()}
    texts = (("beta_y", "beta_y"), ("beta_z", "beta_z"), ("r_z", "kl_z"), ("r_y", "kl_y"))
    data |= {column: [f"{v:.4g}" for v in plane.values(name)] for column, name in texts}
    data |= {kind: [of.get(i, EMPTY) for i in range(len(x))] for kind, of in made.shown.items() if of}
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="gray", name="mapper")
    dots = plot.scatter(
        "x", "y", source=ColumnDataSource(data, name="cells"), marker="marker", size=11, line_color="gray",
        line_width=0.5, fill_color={"field": "value", "transform": mapper},
    )  # fmt: skip
    plot.scatter(x[on], y[on], size=15, fill_color=None, line_color="gray", name="ring")
    for name, marker in (("stars", "star"), ("chosen", "circle")):
        source = ColumnDataSource({k: [] for k in ("x", "y", "label", "shift", "side", "align")}, name=name)
        plot.scatter("x", "y", source=source, marker=marker, size=24, fill_color=None, line_color=RED, line_width=1.8)
        plot.text(
            "x", "y", "label", source=source, x_offset="side", y_offset="shift", text_align="align", text_color=RED,
            text_baseline="middle", text_font_size="12px", text_font_style="bold",
        )  # fmt: skip
    hover = plot.select_one(HoverTool)
    kinds = "".join(PICTURE.format(kind) for kind in made.shown if made.shown[kind])
    hover.update(renderers=[dots], limit=1, tooltips=TIP.format(unit=plane.unit, pictures=kinds))
    plot.add_layout(ColorBar(color_mapper=mapper, width=14, background_fill_color=None, name="bar"), "right")
    return plot


def axis(axes, plane: Plane, name: str):
    """Labels an axis as a rate; returns its scale, that of the figures: where rates crowd at 0, symmetric-log."""
    axes.axis_label = plane.title(name)
    if not crowded(plane, name):
        return np.asarray
    from matplotlib.scale import SymmetricalLogTransform  # which Bokeh's axes lack

    scale = SymmetricalLogTransform(10, UNITS[plane.unit], 1).transform
    ticks = [0.0, *(m * 10.0**k for k in range(12) for m in (1, 2, 5)), 0.5]
    ticks = np.array([tick for tick in ticks if tick <= 2 * plane.values(name).max()])
    axes.ticker = scale(ticks).tolist()
    axes.major_label_overrides = {float(at): f"{tick:g}" for at, tick in zip(scale(ticks), ticks, strict=True)}
    return scale
