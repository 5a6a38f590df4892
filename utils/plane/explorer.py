"""The rate plane as a place to explore: its part of the report's page, which Bokeh draws and page.js answers in."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady
from bokeh.models import ColorBar, ColumnDataSource, CustomJS, HoverTool, LinearColorMapper
from bokeh.palettes import Cividis256, Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources
from matplotlib.scale import SymmetricalLogTransform  # which Bokeh's axes lack

from utils.plane.advice import OF_TASKS, training
from utils.plane.cells import BETAS, Plane
from utils.plane.drawing import RED, crowded
from utils.plane.metrics import FOUR, first_of, metric
from utils.plane.sheets import Pictures

EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # one clear pixel
TIP = """<div style="max-width: 178px"><b>beta_y @beta_y, beta_z @beta_z</b><br>
R(z) @kl_z, R(y|z) @kl_y {unit}<br>@shown<br>{pictures}</div>"""
TIP_PICTURE = '<img src="@{0}" alt="{0}" style="width: 80px; margin: 4px 4px 0 0; image-rendering: pixelated">'
NO_COMMAND = "none: it started from other weights, or its settings are incomplete"


def explorer(plane: Plane, names: Sequence[str], pictures: Pictures) -> dict[str, str]:
    """What page.html needs of Bokeh: itself, the plot and its script; coloured first by the first of the metrics."""
    lines, plot, document = lines_of(plane), rate_plane(plane, pictures), Document()
    first = next(n for n in [*names, *first_of(plane.names, FOUR), "rate"] if "values" in lines.get(n, ()))
    labels = zip(*(lines[name]["texts"] for name in (*BETAS, *plane.differing)), strict=True)
    args = {name: plot.select_one({"name": name}) for name in ("cells", "dots", "mapper", "pair")}
    args |= {"plot": plot, "lines": list(lines.values()), "first": list(lines).index(first), "empty": EMPTY}
    args |= {"labels": [", ".join(filter(None, texts)) for texts in labels], "start": plane.best(first)}
    args["palettes"] = [Cividis256, Viridis256, Viridis256[::-1]]  # at 0, 1 and -1: the better way
    document.add_root(plot)
    document.js_on_event(DocumentReady, CustomJS(args=args, code=Path(__file__).with_name("page.js").read_text()))
    script, place = components(plot)
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js()
    return {"bokeh": bokeh, "plot": place, "script": script, "empty": EMPTY}


def lines_of(plane: Plane) -> dict[str, dict]:
    """What the page says of the cells, by name: a title, a text for each, and for numbers what colours them."""
    names = [n for n in dict.fromkeys(["kl_z", "kl_y", "rate", *OF_TASKS, *plane.names]) if n in plane.names]
    titles = [plane.title(name) for name in names]
    lines = {name: {"title": name, "texts": [f"{v:.4g}" for v in plane.values(name)]} for name in BETAS}
    for name, title in zip(names, titles, strict=True):
        if not name.endswith("_se") or name.removesuffix("_se") not in names:  # shown with its metric
            title = f"{title} [{name}]" if titles.count(title) > 1 else title
            lines[name] = numbers(title, metric(name).better, plane.values(name), plane.values(f"{name}_se"))
    for name in BETAS:
        logs = np.log10(np.where(plane.values(name) > 0, plane.values(name), np.nan))
        lines[f"log10 {name}"] = numbers(f"log10 {name}", 0, logs, np.nan * logs)
    texts = {name: [cell.settings.get(name) or "" for cell in plane.cells] for name in plane.differing}
    texts["seeds"] = [", ".join(cell.seeds) for cell in plane.cells]
    texts["runs"] = [" ".join(cell.runs) for cell in plane.cells]
    texts["command"] = [training(cell) or NO_COMMAND for cell in plane.cells]
    return lines | {name: {"title": name, "texts": of_cells} for name, of_cells in texts.items()}


def numbers(title: str, better: int, values: np.ndarray, errors: np.ndarray) -> dict:
    """A line of numbers (N,) with their standard errors, NaN where unknown, and the range of their colours."""
    texts = [f"{v:.4g}" if np.isfinite(v) else "" for v in values]
    texts = [f"{text} ± {e:.2g}" if np.isfinite(e) else text for text, e in zip(texts, errors, strict=True)]
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = finite.min(), finite.max()
    ends = {"low": low, "high": high if high > low else high + 1}
    return {"title": title, "texts": texts, "better": better, "values": values, **ends}


def rate_plane(plane: Plane, pictures: Pictures):
    """The scatter plot of the plane, with places for its colours and for the pair of cells that is compared."""
    plot = figure(tools="hover,box_zoom,wheel_zoom,pan,reset,save", sizing_mode="stretch_both", title=" ")
    plot.toolbar_location, plot.toolbar.logo = "below", None
    plot.toolbar.active_drag = plot.toolbar.active_scroll = None
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    x_of, y_of, unit = axis(plot.xaxis, plane, "kl_z"), axis(plot.yaxis, plane, "kl_y"), plane.scale("kl_z")
    x, y, on = x_of(plane.values("kl_z")), y_of(plane.values("kl_y")), plane.diagonal
    seeds = [row for cell in plane.cells if len(cell.repeats) > 1 for row in cell.repeats]
    at = (scale(unit * np.array([row[name] for row in seeds])) for scale, name in ((x_of, "kl_z"), (y_of, "kl_y")))
    plot.scatter(*at, size=3, color="gray", level="underlay")
    target_y, target_z = plane.targets.T
    at = np.where(np.isnan(target_z), x, x_of(unit * target_z)), np.where(np.isnan(target_y), y, y_of(unit * target_y))
    is_target = np.isfinite(plane.targets).any(1)
    plot.scatter(*(v[is_target] for v in at), marker="x", size=9, color="gray", level="underlay")
    data = {"x": x, "y": y, "value": np.full(len(x), np.nan), "shown": [""] * len(x)}
    data["marker"] = np.where(plane.unfolded, "square", "circle").tolist()
    data |= {name: [f"{v:.4g}" for v in plane.values(name)] for name in (*BETAS, "kl_z", "kl_y")}
    data |= {kind: [pictures.of_page[kind].get(i, EMPTY) for i in range(len(x))] for kind in pictures.kinds}
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="gray", name="mapper")
    dots = plot.scatter(
        "x", "y", source=ColumnDataSource(data, name="cells"), name="dots", marker="marker", size=11,
        line_color="gray", line_width=0.5, fill_color={"field": "value", "transform": mapper},
    )  # fmt: skip
    plot.scatter(x[on], y[on], size=15, fill_color=None, line_color="gray", name="rings")
    pair = ColumnDataSource({"x": [], "y": [], "label": []}, name="pair")
    plot.scatter("x", "y", source=pair, size=22, fill_color=None, line_color=RED, line_width=2)
    plot.text("x", "y", "label", source=pair, x_offset=12, y_offset=-6, text_color=RED, text_font_style="bold")
    tip = TIP.format(unit=plane.unit, pictures="".join(map(TIP_PICTURE.format, pictures.kinds)))
    plot.select_one(HoverTool).update(renderers=[dots], limit=1, tooltips=tip)
    bar = ColorBar(color_mapper=mapper, width=14, background_fill_color=None, major_label_text_color="gray")
    plot.add_layout(bar, "right")
    return plot


def axis(axes, plane: Plane, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Labels an axis as a rate; returns its scale, that of the figures: where rates crowd at 0, symmetric-log."""
    axes.axis_label = plane.title(name)
    if not crowded(plane, name):
        return np.asarray
    scale = SymmetricalLogTransform(10, plane.scale(name), 1).transform
    ticks = [0.0, *(m * 10.0**k for k in range(12) for m in (1, 2, 5)), 0.5]
    ticks = np.array([tick for tick in ticks if tick <= 2 * plane.values(name).max()])
    axes.ticker = scale(ticks).tolist()
    axes.major_label_overrides = {float(at): f"{tick:g}" for at, tick in zip(scale(ticks), ticks, strict=True)}
    return scale
