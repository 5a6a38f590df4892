"""The rate plane as a place to explore: its part of the report's page, which Bokeh draws and page.js answers in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady
from bokeh.models import ColorBar, ColumnDataSource, CustomJS, HoverTool, LinearColorMapper
from bokeh.palettes import Cividis256, Viridis256
from bokeh.plotting import figure
from bokeh.resources import Resources

from utils.plane.advice import TASKS, training
from utils.plane.cells import BETAS, Plane
from utils.plane.drawing import RED, crowded
from utils.plane.metrics import FOUR, first_of, metric
from utils.plane.pictures import Pictures, to_uri

EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # one clear pixel
TIP = """<div style="max-width: 178px"><b>beta_y @beta_y, beta_z @beta_z</b><br>
R(z) @kl_z, R(y|z) @kl_y {unit}<br>@shown<br>{pictures}</div>"""
TIP_PICTURE = '<img src="@{0}" alt="{0}" style="width: 80px; margin: 4px 4px 0 0; image-rendering: pixelated">'
PICTURE = '<details class="small"><summary><img alt="{}" src="{}"></summary></details>'
BODY = """<section id="explorer"><div><label>colour <select id="colour"></select></label>
<div id="plane">{plot}</div>
<p class="about">Each mark is a model, at its rates. Click or tap two to compare them. Dots are cells trained on their
own, squares cells of a multi-rate model, crosses rates that were asked for; rings mark ordinary beta-VAEs (equal
betas), small points single seeds. Yellow is best, grey unknown.</p></div>
<div class="table" tabindex="0"><table id="compared"><thead><tr><td></td>
<th><label>A: beta_y, beta_z <select><option value="">none</select></label></th>
<th><label>B: beta_y, beta_z <select><option value="">none</select></label></th></tr></thead>
<tbody>{pictures}</tbody></table></div></section>"""


def explorer(plane: Plane, names: Sequence[str], pictures: Pictures) -> tuple[str, str]:
    """The page's part for its head, Bokeh itself, and for its body; coloured first by the first of the metrics."""
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
    rows = []
    for kind in (kind for kind, of in pictures.shown.items() if of):
        heading = kind if kind == "samples" else f"{kind} of{PICTURE.format('test images', to_uri(pictures.originals))}"
        rows.append(f"<tr><th>{heading}</th>{2 * f'<td>{PICTURE.format(kind, EMPTY)}</td>'}</tr>")
    body = BODY.format(plot=place, pictures="".join(rows))
    return Resources(mode="inline", components=["bokeh"]).render_js(), body + script


def lines_of(plane: Plane) -> dict[str, dict]:
    """What is told of the cells, by name: a title, a text for each, and for numbers what colours them.

    First betas, rates and the metrics of the tasks; last the commands.
    """
    of_tasks = [name for names in TASKS.values() for name in names]
    names = [n for n in dict.fromkeys(["kl_z", "kl_y", "rate", *of_tasks, *plane.names]) if n in plane.names]
    names = [n for n in names if not (n.endswith("_se") and n.removesuffix("_se") in names)]
    titles = [plane.title(name) for name in names]
    lines = {name: {"title": name, "texts": [f"{v:.4g}" for v in plane.values(name)]} for name in BETAS}
    for name, title in zip(names, titles, strict=True):
        title += f" [{name}]" * (titles.count(title) > 1)
        lines[name] = numbers(title, metric(name).better, plane.values(name), plane.values(f"{name}_se"))
    for name in BETAS:
        logs = np.log10(np.where(plane.values(name) > 0, plane.values(name), np.nan))
        lines[f"log10 {name}"] = numbers(f"log10 {name}", 0, logs, np.nan * logs)
    about = {name: [cell.settings.get(name) or "" for cell in plane.cells] for name in plane.differing}
    about["seeds"] = [", ".join(cell.seeds) for cell in plane.cells]
    about["runs"] = [" ".join(cell.runs) for cell in plane.cells]
    none = "none: it started from other weights, or its settings are incomplete"
    about["command"] = [training(cell) or none for cell in plane.cells]
    return lines | {name: {"title": name, "texts": texts} for name, texts in about.items()}


def numbers(title: str, better: int, values: np.ndarray, errors: np.ndarray) -> dict:
    """A line of numbers (N,) with their standard errors, NaN where unknown, and the range of their colours."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    texts = [f"{v:.4g}" if np.isfinite(v) else "" for v in values]
    texts = [f"{text} ± {e:.2g}" if np.isfinite(e) else text for text, e in zip(texts, errors, strict=True)]
    colours = {"better": better, "values": values, "low": low, "high": high + (high == low)}
    return {"title": title, "texts": texts, **colours}


def rate_plane(plane: Plane, pictures: Pictures):
    """The scatter plot of the plane, with places for its colours and for the pair of cells that is compared."""
    tools = "hover,box_zoom,wheel_zoom,pan,reset,save"
    plot = figure(tools=tools, sizing_mode="stretch_both", toolbar_location="below", title=" ")
    plot.toolbar.logo, plot.toolbar.active_drag, plot.toolbar.active_scroll = None, None, None
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    x_of, y_of = axis(plot.xaxis, plane, "kl_z"), axis(plot.yaxis, plane, "kl_y")
    x, y, on = x_of(plane.values("kl_z")), y_of(plane.values("kl_y")), plane.diagonal
    unit = plane.scale("kl_z")
    repeats = [row for cell in plane.cells if len(cell.repeats) > 1 for row in cell.repeats]
    seeds = unit * np.array([[row["kl_z"], row["kl_y"]] for row in repeats]).reshape(-1, 2)
    plot.scatter(x_of(seeds[:, 0]), y_of(seeds[:, 1]), size=3, color="gray", level="underlay")
    asked_y, asked_z = unit * plane.asked.T
    is_asked = np.isfinite(plane.asked).any(1)
    crosses = np.where(np.isnan(asked_z), x, x_of(asked_z)), np.where(np.isnan(asked_y), y, y_of(asked_y))
    plot.scatter(*(at[is_asked] for at in crosses), marker="x", size=9, color="gray", level="underlay")
    data = {"x": x, "y": y, "value": np.full(len(x), np.nan), "shown": [""] * len(x)}
    data["marker"] = np.where(plane.unfolded, "square", "circle").tolist()
    data |= {name: [f"{v:.4g}" for v in plane.values(name)] for name in (*BETAS, "kl_z", "kl_y")}
    data |= {kind: [of.get(i, EMPTY) for i in range(len(x))] for kind, of in pictures.shown.items() if of}
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="gray", name="mapper")
    dots = plot.scatter(
        "x", "y", source=ColumnDataSource(data, name="cells"), name="dots", marker="marker", size=11,
        line_color="gray", line_width=0.5, fill_color={"field": "value", "transform": mapper},
    )  # fmt: skip
    plot.scatter(x[on], y[on], size=15, fill_color=None, line_color="gray", name="rings")
    pair = ColumnDataSource({"x": [], "y": [], "label": []}, name="pair")
    plot.scatter("x", "y", source=pair, size=22, fill_color=None, line_color=RED, line_width=2)
    plot.text("x", "y", "label", source=pair, x_offset=12, y_offset=-6, text_color=RED, text_font_style="bold")
    tip = TIP.format(unit=plane.unit, pictures="".join(TIP_PICTURE.format(k) for k, of in pictures.shown.items() if of))
    plot.select_one(HoverTool).update(renderers=[dots], limit=1, tooltips=tip)
    bar = ColorBar(color_mapper=mapper, width=14, background_fill_color=None, major_label_text_color="gray")
    plot.add_layout(bar, "right")
    return plot


def axis(axes, plane: Plane, name: str):
    """Labels an axis as a rate; returns its scale, that of the figures: where rates crowd at 0, symmetric-log."""
    axes.axis_label = plane.title(name)
    if not crowded(plane, name):
        return np.asarray
    from matplotlib.scale import SymmetricalLogTransform  # which Bokeh's axes lack

    scale = SymmetricalLogTransform(10, plane.scale(name), 1).transform
    ticks = [0.0, *(m * 10.0**k for k in range(12) for m in (1, 2, 5)), 0.5]
    ticks = np.array([tick for tick in ticks if tick <= 2 * plane.values(name).max()])
    axes.ticker = scale(ticks).tolist()
    axes.major_label_overrides = {float(at): f"{tick:g}" for at, tick in zip(scale(ticks), ticks, strict=True)}
    return scale
