"""The rate plane to explore, on the report's page: Bokeh draws it, and page.js answers in it."""

import contextlib
import shlex
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

from utils.errors import UserError
from utils.plane.advice import TASK_OF, training
from utils.plane.cells import BETAS, Cell, Plane
from utils.plane.drawing import RED, crowded
from utils.plane.metrics import COLOURS, FOUR, first_of, metric
from utils.plane.neighbours import predictions
from utils.plane.sheets import Pictures
from utils.provenance import command_of
from utils.runs import Run

# one clear pixel
EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
TIP = """<div style="max-width: 178px"><b>beta_y @beta_y, beta_z @beta_z</b><br>
R(z) @kl_z, R(y|z) @kl_y {unit}<br>@shown<br>{pictures}</div>"""
TIP_PICTURE = '<img src="@{0}" alt="{0}" style="width: 80px; margin: 4px 4px 0 0; image-rendering: pixelated">'
NO_COMMAND = "none: it started from other weights, or its run is not there"
PALETTES = [Cividis256, Viridis256, Viridis256[::-1]]  # at 0, 1 and -1: the better way


def explorer(plane: Plane, names: Sequence[str], pictures: Pictures) -> dict[str, str]:
    """What page.html needs of Bokeh: itself, the plot and its script."""
    lines, plot, document = lines_of(plane), rate_plane(plane, pictures), Document()
    choices = [*names, *first_of(plane.names, FOUR), "rate"]
    first = next(n for n in choices if "values" in lines.get(n, ()))
    labels = zip(*(lines[name]["texts"] for name in (*BETAS, *plane.differing)), strict=True)
    args = {name: plot.select_one({"name": name}) for name in ("cells", "dots", "mapper", "pair")}
    args |= {"plot": plot, "lines": list(lines.values()), "first": list(lines).index(first)}
    args["labels"] = [", ".join(filter(None, texts)) for texts in labels]
    args |= {"start": plane.best(first), "palettes": PALETTES, "empty": EMPTY}
    code = Path(__file__).with_name("page.js").read_text()
    document.add_root(plot)
    document.js_on_event(DocumentReady, CustomJS(args=args, code=code))
    script, place = components(plot)
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js()
    return {"bokeh": bokeh, "plot": place, "script": script, "empty": EMPTY}


def lines_of(plane: Plane) -> dict[str, dict]:
    """What the page says of cells, by name: title, a text for each, what colours numbers."""
    names = ["kl_z", "kl_y", "rate", *TASK_OF, *plane.names]
    names = [n for n in dict.fromkeys(names) if n in plane.names]
    titles = [plane.title(name) for name in names]
    texts, lines = {name: [f"{v:.4g}" for v in plane.values(name)] for name in BETAS}, {}
    for name, title in zip(names, titles, strict=True):
        if not name.endswith("_se") or name.removesuffix("_se") not in names:  # shown with it
            title = f"{title} [{name}]" if titles.count(title) > 1 else title
            both = plane.values(name), plane.values(f"{name}_se")
            lines[name] = numbers(title, metric(name).better, *both)
            for i, (value, se) in enumerate(zip(*predictions(plane, name), strict=True)):
                if np.isfinite(value):
                    lines[name]["texts"][i] = f"predicted: {value:.4g} ± {se:.2g}"
    for name in (f"log10 {beta}" for beta in BETAS):
        betas = plane.values(name.removeprefix("log10 "))
        logs = np.log10(np.where(betas > 0, betas, np.nan))
        lines[name] = numbers(name, 0, logs, np.nan * logs)
    few = ["kl_z", "kl_y", "rate", *first_of(plane.names, COLOURS), *(f"log10 {beta}" for beta in BETAS)]
    for name, line in lines.items():
        line["more"] = name not in few
    more = {name: [c.settings.get(name) or "" for c in plane.cells] for name in plane.differing}
    more["seeds"] = [", ".join(cell.seeds) for cell in plane.cells]
    more["runs"] = [" ".join(cell.runs) for cell in plane.cells]
    if any(made_by := [_made_by(cell, plane.folder) for cell in plane.cells]):
        more["made by"] = made_by
    more["command"] = [training(cell, plane.folder) or NO_COMMAND for cell in plane.cells]
    first, last = ({n: {"title": n, "texts": t} for n, t in of.items()} for of in (texts, more))
    return first | lines | last


def _made_by(cell: Cell, folder: Path | None) -> str:
    """The commands that make a cell's runs again that no training alone makes, if their folders tell."""
    commands = {}
    for run in cell.runs if folder else ():
        with contextlib.suppress(UserError):
            run = Run.open(folder / run)
            if run.config.source or run.config.init_from:
                commands[shlex.join(["python", *command_of(run)])] = None
    return " && ".join(commands)


def numbers(title: str, better: int, values: np.ndarray, errors: np.ndarray) -> dict:
    """A line of numbers (N,) and standard errors, NaN where unknown, and their colours' range."""
    texts = [f"{v:.4g}" if np.isfinite(v) else "" for v in values]
    pairs = zip(texts, errors, strict=True)
    texts = [f"{text} ± {e:.2g}" if np.isfinite(e) else text for text, e in pairs]
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = finite.min(), finite.max()
    ends = {"low": low, "high": high if high > low else high + 1}
    return {"title": title, "texts": texts, "better": better, "values": values, **ends}


def rate_plane(plane: Plane, pictures: Pictures):
    """The plane's scatter plot, with places for its colours and the pair that is compared."""
    tools = "hover,box_zoom,wheel_zoom,pan,reset,save"
    plot = figure(tools=tools, sizing_mode="stretch_both", title=" ")
    plot.toolbar_location, plot.toolbar.logo = "below", None
    plot.toolbar.active_drag = plot.toolbar.active_scroll = None
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    rates, unit = ("kl_z", "kl_y"), plane.scale("kl_z")
    scales = [axis(*both) for both in zip((plot.xaxis, plot.yaxis), [plane] * 2, rates, strict=True)]

    def places(values: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [scale(of_rate) for scale, of_rate in zip(scales, values, strict=True)]

    medians, on = list(map(plane.values, rates)), plane.diagonal
    small = {"color": "gray", "level": "underlay"}
    seeds = [row for cell in plane.cells if len(cell.repeats) > 1 for row in cell.repeats]
    of_seeds = [unit * np.array([row[name] for row in seeds]) for name in rates]
    plot.scatter(*places(of_seeds), size=3, **small)
    crosses = places(plane.asked[:, ::-1].T)
    plot.scatter(*(v[~plane.is_given] for v in crosses), marker="x", size=9, **small)
    x, y = places(medians)
    data = {"x": x, "y": y, "value": np.full(len(x), np.nan), "shown": [""] * len(x)}
    data["marker"] = np.where(plane.unfolded, "square", "circle").tolist()
    data |= {name: [f"{v:.4g}" for v in plane.values(name)] for name in (*BETAS, *rates)}
    for kind in pictures.kinds:
        data[kind] = [pictures.of_page[kind].get(i, EMPTY) for i in range(len(x))]
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1, nan_color="gray", name="mapper")
    dots = plot.scatter(
        "x", "y", source=ColumnDataSource(data, name="cells"), name="dots", marker="marker", size=11,
        line_color="gray", line_width=0.5, fill_color={"field": "value", "transform": mapper},
    )  # fmt: skip
    ring = {"fill_color": None, "line_color": "gray"}
    plot.scatter(x[on], y[on], size=15, name="rings", **ring)
    pair = ColumnDataSource({"x": [], "y": [], "label": []}, name="pair")
    plot.scatter("x", "y", source=pair, size=22, line_width=2, **ring | {"line_color": RED})
    look = {"text_color": RED, "text_font_style": "bold", "x_offset": 12, "y_offset": -6}
    plot.text("x", "y", "label", source=pair, **look)
    tip = TIP.format(unit=plane.unit, pictures="".join(map(TIP_PICTURE.format, pictures.kinds)))
    plot.select_one(HoverTool).update(renderers=[dots], limit=1, tooltips=tip)
    look = {"background_fill_color": None, "major_label_text_color": "gray"}
    plot.add_layout(ColorBar(color_mapper=mapper, width=14, **look), "right")
    return plot


def axis(axes, plane: Plane, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Labels an axis as a rate; returns its scale: where rates crowd at 0, symmetric-log."""
    axes.axis_label = plane.title(name)
    if not crowded(plane, name):
        return np.asarray
    scale = SymmetricalLogTransform(10, plane.scale(name), 1).transform
    ticks = np.array([0.0, *(m * 10.0**k for k in range(12) for m in (1, 2, 5)), 0.5])
    ticks = ticks[ticks <= 2 * plane.values(name).max()]
    places = scale(ticks).tolist()
    axes.ticker = places
    axes.major_label_overrides = {at: f"{tick:g}" for at, tick in zip(places, ticks, strict=True)}
    return scale
