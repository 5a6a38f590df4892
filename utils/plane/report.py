"""The report of a batch: figures, tables, and one HTML page with all of them."""

import base64
import math
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from itertools import chain
from pathlib import Path

from utils.distributed import progress
from utils.files import to_csv, write_atomic, write_text
from utils.plane.advice import ADVICE, EXPLAINED, TASKS, commands, headings_of
from utils.plane.cells import SETTINGS, Plane, number
from utils.plane.compare import COMPARED, comparisons, groups
from utils.plane.drivers import DRIVERS, drivers
from utils.plane.excess import EXCESS
from utils.plane.metrics import ACCURACIES, metric
from utils.plane.slopes import SLOPES
from utils.plane.tables import to_html, to_markdown

CAPTIONS = {
    "rate_plane": "Each metric over the rate plane, the rate of z (horizontal) and of y given z (vertical). Dots are "
    "cells trained on their own, squares cells of a multi-rate model (of mixed settings, each has a marker), crosses "
    "rates that were asked for. Circles mark ordinary beta-VAEs (equal betas), the square both betas 1, the star the "
    "best cell. Cells with several seeds are at their medians, the seeds are small points, and 1/4 says that one of "
    "four collapsed.",
    "total_rate": "Each metric against the total rate. Mixtures, each model for a share of the images, reach the "
    "hulls; where that of all cells is better than that of ordinary beta-VAEs, separate betas improve on equal ones "
    "at the same total rate. PSNR is mixed as squared errors; metrics that do not mix have no hull. Information that "
    "is only known between two ends is a bar.",
    "rate_z": "Information on the label against R(z). z carries at most R(z) nats on the label, and at most the "
    "label's entropy; the line shows this bound. It holds for samples of z, not for probes on its posterior mean.",
    "heat_maps": "Rates and metrics over the grid of betas; the best cell is framed, and yellow is best.",
    "tasks": "The metrics of the tasks against each other. Colours tell a cell's betas: beta_y from dark to light, "
    "beta_z from blue to yellow.",
    "slopes": "Slopes of the distortion relative to the betas, -dD/dR / beta, estimated from neighbouring cells: 1 at "
    "an optimum. Cells far from 1 are under-trained; grey cells have no estimate, or D does not fall with the rate.",
    "excess": "The loss of cells of a multi-rate model less that of cells trained on their own at the same betas: "
    "above 0, the price of one training for all.",
    "overview": "Where in the rate plane each task is done best, and what these models make.",
    "samples": "Samples of each cell, generated from the same noise.",
    "reconstructions": "Reconstructions of the same test images by each cell.",
}
TO_TRAIN = {"metrics": "best for", "command": "command"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style>{head}</head><body><h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, settings: dict, notes: list, tables: dict, images: dict, explorer=("", "")) -> str:
    """A self-contained HTML page; tables are HTML by heading, images PNGs by name, explorer HTML for head and body."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    first, *others = [f"<h2>{escape(heading)}</h2>{table}" for heading, table in tables.items()]
    values = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in settings.items())
    body = [explorer[1], f"<h2>Notes</h2><ul>{items}</ul>" if notes else "", first, "<h2>Figures</h2>"]
    body += [figure_of(name, png) for name, png in images.items()] + others
    body.append(f"<h2>Settings</h2><dl>{values}</dl>")
    style = Path(__file__).with_name("page.css").read_text()
    return PAGE.format(title=escape(title), style=style, head=explorer[0], body="\n".join(body))


def figure_of(name: str, png: bytes) -> str:
    """A figure with its caption, as HTML; a click enlarges it."""
    base = next(base for base in CAPTIONS if name.startswith(base))
    caption = CAPTIONS[base] + escape(name.removeprefix(base).replace("_", " "))
    picture = f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    enlarged = f'<details><summary title="enlarge">{picture}</summary></details>'
    return f'<figure id="{name}">{enlarged}<figcaption>{caption}</figcaption></figure>'


def settings(plane: Plane) -> dict[str, str]:
    """Each setting of the batch's cells, with all of its values."""
    values = {name: {cell.settings.get(name) or "" for cell in plane.cells} for name in SETTINGS}
    in_order = partial(sorted, key=lambda text: (math.isnan(number(text)), number(text), text))
    return {name: ", ".join(in_order(texts)) for name, texts in values.items() if texts != {""}}


def write_tables(out: Path, plane: Plane, advice: list, slopes: list, excess: list, names: list) -> dict[str, str]:
    """Writes the tables: advice, slopes, excess loss, metrics `names`; returns those of the page, HTML by heading."""
    from utils.plane.drawing import headings, table

    of_tasks = chain(*TASKS.values(), ACCURACIES["z"], ACCURACIES["y"])
    of_tasks = [name for name in of_tasks if name in plane.names]
    differing = {name: name for name in plane.differing}
    correlations = drivers(plane, of_tasks)
    cells = [row for row in table(plane, [*of_tasks, *names]) if row["what"] != "seed"]
    write_text(out / "advice.csv", to_csv(advice, ADVICE | differing | {"command": None}))
    write_text(out / "advice.md", to_markdown(advice, headings_of(plane)))
    write_text(out / "slopes.csv", to_csv(slopes, SLOPES))
    write_text(out / "drivers.csv", to_csv(correlations, DRIVERS | differing))
    if excess:
        write_text(out / "excess.csv", to_csv(excess, EXCESS))
    tables = {
        "Advice": (advice, headings_of(plane)),
        "Commands that train these points on their own": (commands(advice), TO_TRAIN),
        "Rank correlations with the rates": (correlations, DRIVERS | differing),
        "Cells": (cells, headings(cells, plane)),
        "Slopes": (slopes, SLOPES),
        "Multi-rate cells and their own trainings": (excess, EXCESS),
    }
    of_page = {heading: to_html(rows, of) for heading, (rows, of) in tables.items() if rows}
    if advice:
        of_page["Advice"] += f'<p class="about">{EXPLAINED}</p>'
    return of_page


def remove_stale(out: Path, formats: Sequence[str], drawn: Mapping) -> None:
    """Removes the files of figures that an earlier call's page shows and this call does not write."""
    path, written = out / "report.html", {f"{name}.{form}" for name in drawn for form in (*formats, "csv")}
    earlier = path.read_text(errors="replace") if path.is_file() else ""
    for file in out.glob("*.*"):
        is_figure = file.suffix in (".png", ".pdf", ".csv") and f'<figure id="{file.stem}"' in earlier
        if is_figure and file.name not in written:
            file.unlink()


def write_figures(out: Path, formats: Sequence[str], plane: Plane, drawn: Mapping) -> dict[str, bytes]:
    """Writes figures with their data; returns the PNGs by name."""
    from utils.plane.drawing import headings, rendered

    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, (figure, rows) in progress(drawn.items(), unit="figure"):
        files = rendered(figure, ("png", *formats))
        images[name] = files["png"]
        for form in formats:
            write_atomic(out / f"{name}.{form}", files[form])
        write_text(out / f"{name}.csv", titled_csv(rows, headings(rows, plane)))
    return images


def write_comparison(out: Path, formats: Sequence[str], planes: dict[str, Plane], names: Sequence[str]) -> str:
    """Writes the figure and the tables that compare batches; returns what to print: the table and notes."""
    from utils.plane.figures import batches

    found = groups(planes, names)
    rows, (first, *others) = comparisons(found), planes
    name = f"compare_{'_'.join(others)}"
    about = "\n".join(f"{batch}: {plane.about}" for batch, plane in planes.items())
    write_figures(out, formats, planes[first], {name: batches(found, about)})
    write_text(out / f"{name}_table.csv", to_csv(rows, COMPARED))
    told = to_markdown(rows, COMPARED)
    write_text(out / f"{name}_table.md", told)
    apart = [f"{metric(g.name).label} of {g.of or 'other settings'}" for g in found if len(g.planes) < len(planes)]
    notes = [f"not in every batch, so not compared with all: {text}" for text in apart]
    notes += [f"{batch}: {note}" for batch, plane in planes.items() for note in plane.notes]
    return told + "".join(f"note: {note}\n" for note in dict.fromkeys(notes))


def titled_csv(rows: Sequence[Mapping], titles: Mapping[str, str]) -> str:
    """Rows as CSV under headings that carry the units."""
    return to_csv([{titles[k]: v for k, v in row.items()} for row in rows], titles.values())
