"""The report of a batch: figures, tables, and one HTML page with all of them."""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.distributed import progress
from utils.files import to_csv, write_atomic, write_text
from utils.plane.advice import ADVICE, EXPLAINED, TASKS, commands, headings_of
from utils.plane.cells import SETTINGS, Plane, number
from utils.plane.compare import COMPARED, comparisons, groups
from utils.plane.drivers import DRIVERS, drivers
from utils.plane.excess import EXCESS, Pair, excess_rows
from utils.plane.metrics import ACCURACIES, metric, wanted
from utils.plane.slopes import SLOPES, Slope, slope_rows
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
LARGE = '<dialog id="large"><form method="dialog"><button>close</button></form><img alt=""></dialog>'
TO_TRAIN = {"metrics": "best for", "command": "command"}
STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))


def page(
    title: str,
    settings: Mapping[str, str],
    notes: Sequence[str],
    tables: Mapping[str, str],
    images: Mapping[str, bytes],
    explorer: tuple[str, str] = ("", ""),
) -> str:
    """A self-contained HTML page; `tables` are HTML by heading, `images` are PNGs by figure name.

    `explorer` is HTML for the head and for the top of the body.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", explorer[1]]
    if notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"]
    first, *others = tables.items()
    parts += [f"<h2>{html.escape(first[0])}</h2>{first[1]}", "<h2>Figures</h2>"]
    for name, png in images.items():
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        base = next(known for known in CAPTIONS if name.startswith(known))
        caption = f"<figcaption>{CAPTIONS[base]}{html.escape(name[len(base) :].replace('_', ' '))}</figcaption>"
        picture = f'<button class="picture" type="button" title="enlarge"><img alt="{name}" src="{source}"></button>'
        parts.append(f'<figure id="{name}">{picture}{caption}</figure>')
    parts += [f"<h2>{html.escape(heading)}</h2>{table}" for heading, table in others]
    parts.append("<h2>Settings</h2><dl>")
    parts += [f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in settings.items()]
    parts.append(f"</dl>{LARGE}")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE.read_text()}</style>{explorer[0]}"
    )
    body = "\n".join(parts)
    html_of = (
        f'<html lang="en"><head>{head}</head>\n<body>\n{body}\n<script>{SCRIPT.read_text()}</script></body></html>'
    )
    return f"<!doctype html>\n{html_of}\n"


def settings(plane: Plane) -> dict[str, str]:
    """Each setting of the batch's cells, with all of its values."""
    values = {}
    for name in SETTINGS:
        distinct = {cell.settings.get(name) or "" for cell in plane.cells}
        if distinct != {""}:
            values[name] = ", ".join(sorted(distinct, key=lambda v: (math.isnan(number(v)), number(v), v)))
    return values


def write_report(
    out: Path,
    args,
    plane: Plane,
    advised: list[dict],
    found: list[Slope],
    compared: list[Pair],
    drawn: dict,
    explorer: tuple[str, str],
) -> None:
    """Writes the figures in the requested formats, their data, the tables and the page; removes stale figures."""
    from utils.plane.drawing import headings, table

    out.mkdir(parents=True, exist_ok=True)
    if (page_there := out / "report.html").is_file():  # from an earlier call, whose other figures are now stale
        earlier = re.findall(r'<figure id="([\w.-]+)"', page_there.read_text(errors="replace"))
        for stale in (out / f"{name}.{form}" for name in earlier for form in ("png", "pdf", "csv")):
            if stale.stem not in drawn or stale.suffix[1:] not in (*args.format, "csv"):
                stale.unlink(missing_ok=True)
    images = write_figures(out, args.format, plane, drawn)
    advice_headings, checked = headings_of(plane), slope_rows(found)
    write_text(out / "advice.csv", to_csv(advised, {**ADVICE, **dict.fromkeys(plane.differing), "command": None}))
    write_text(out / "advice.md", to_markdown(advised, advice_headings))
    write_text(out / "slopes.csv", to_csv(checked, SLOPES))
    of_tasks = [name for names in TASKS.values() for name in names]
    of_tasks += [*ACCURACIES["z"], *ACCURACIES["y"]]
    driven = drivers(plane, [name for name in of_tasks if name in plane.names])
    of_grids = DRIVERS | {name: name for name in plane.differing}
    write_text(out / "drivers.csv", to_csv(driven, of_grids))
    if compared := excess_rows(compared):
        write_text(out / "excess.csv", to_csv(compared, EXCESS))
    shown = [name for name in dict.fromkeys([*of_tasks, *wanted(plane.names, args.metrics)]) if name in plane.names]
    cells = [row for row in table(plane, shown) if row["what"] != "seed"]
    to_train = commands(advised)
    tables = {
        "Advice": f'{to_html(advised, advice_headings)}<p class="about">{EXPLAINED}</p>',
        **({"Commands that train these points on their own": to_html(to_train, TO_TRAIN)} if to_train else {}),
        **({"Rank correlations with the rates": to_html(driven, of_grids)} if driven else {}),
        "Cells": to_html(cells, headings(cells, plane)),
        "Slopes": to_html(checked, SLOPES),
        **({"Multi-rate cells and their own trainings": to_html(compared, EXCESS)} if compared else {}),
    }
    report = page(f"Batch {args.run_batch_name[0]}", settings(plane), plane.notes, tables, images, explorer)
    write_text(out / "report.html", report)


def write_figures(out: Path, formats: Sequence[str], plane: Plane, drawn: Mapping) -> dict[str, bytes]:
    """Writes figures with their data; returns the PNGs by name."""
    from utils.plane.drawing import headings, rendered

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

    out.mkdir(parents=True, exist_ok=True)
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
