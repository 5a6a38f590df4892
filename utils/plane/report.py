"""The report of a batch: figures, tables, and one HTML page with all of them."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch

from utils.cli import wrapped
from utils.distributed import progress
from utils.evaluation.metrics import plain
from utils.files import to_csv, write_text
from utils.plane import figures
from utils.plane.advice import EXPLAINED, TASK_OF, advice, commands, headings_of, print_advice
from utils.plane.cells import SETTINGS, Plane, number
from utils.plane.drawing import Drawing, Output, styled, write_drawing
from utils.plane.excess import EXCESS, areas, excess_rows, left, print_excess
from utils.plane.explorer import explorer
from utils.plane.metrics import ACCURACIES, FOUR, INFORMATION, first_of, wanted
from utils.plane.sheets import OVERVIEW, Pictures, images_to_reconstruct, overview, pictures_of, sheets, to_uri
from utils.plane.slopes import SLOPES, print_far_off, slopes
from utils.plane.tables import DRIVERS, Table, cells_of, drivers

OF_LABEL = ("recons_acc", "mi_q_mc", "mi_q", "mi_lr_lb", "mi_z_low", "mi_y_low", *ACCURACIES["qz_mu"])
TO_TRAIN = {"metrics": "best for", "command": "command"}


class Options(NamedTuple):
    """What a report shows."""

    metrics: Sequence[str] | None  # to draw: columns, or all; None for one of each task
    budget: Mapping[str, float]  # limits of the rates for the advice, in the plane's unit
    images: int  # of each kind and cell
    overview: bool  # whether to draw the rate plane at a glance


@styled
def write_report(out: Output, plane: Plane, options: Options, device: torch.device, load_data: Callable) -> None:
    """Writes figures, tables and the page of a batch, and prints the advice.

    Models compute on `device`; `load_data` gives the data set of a Config.
    """
    names, advised = wanted(plane.names, options.metrics), advice(plane, options.budget)
    if options.budget and not any(row["budget"] for row in advised):
        plane.notes.append("no evaluated cell is within the budget")
    x = images_to_reconstruct(plane, load_data, max(options.images, 2 * OVERVIEW))
    pictures = pictures_of(plane, device, options.images, x)
    of_slopes, excess = slopes(plane), excess_rows(plane)
    drawings = draw(plane, names, options.metrics, of_slopes, excess)
    if options.overview and (glance := overview(plane, first_of(plane.names, FOUR[:3]), device, x)):
        drawings["overview"] = glance
    images = write_figures(out, plane, drawings | sheets(plane, pictures))
    to_gain = left(plane, excess)
    of_slopes = [row | to_gain.get(row["run"], {}) for row in of_slopes]
    tables = write_tables(out, plane, names, advised, of_slopes, excess)
    write_text(out.folder / "report.html", page(plane, names, tables, images, pictures))
    for note in plane.notes:
        print(wrapped(f"note: {note}"))
    print_advice(advised, plane)
    print_far_off(of_slopes)
    print_excess(excess, areas(plane))
    print(f"\nOpen {out.folder / 'report.html'}")


def draw(plane: Plane, names: list[str], requested, slopes: list[dict], excess: list[dict]) -> dict:
    """The Drawings of metrics by name; of information on the label those `requested`, if any."""
    drawings = {}
    if names:
        drawings["rate_plane"] = figures.rate_planes(plane, names)
        drawings["total_rate"] = figures.total_rates(plane, names)
    of_label = [name for name in names if plain(name) in OF_LABEL]
    if information := of_label if requested else first_of(plane.names, INFORMATION):
        if plane.labels is None:
            plane.notes.append("no latents.npz in any run: the bounds implied by R(z) are not drawn")
        drawings["rate_z"] = figures.against_rate_z(plane, information)
    drawings["tasks"] = figures.tasks(plane, first_of(plane.names, FOUR[:3]))
    for kind, grid in plane.grids.items():
        ending, runs = f"_{kind}" if kind else "", {cell.runs[0] for cell in grid.cells}
        drawings[f"heat_maps{ending}"] = figures.heat_maps(grid, names)
        of_grid = [row for row in slopes if row["run"] in runs]
        if any({"slope_y", "slope_z"} & row.keys() for row in of_grid):
            drawings[f"slopes{ending}"] = figures.slope_maps(grid, of_grid)
    if excess:
        drawings["excess"] = figures.excess_maps(plane, excess)
    if not any(name.startswith("slopes") for name in drawings):
        plane.notes.append("no slopes of D: they need cells with neighbours along both axes of the grid")
    return drawings


def write_figures(out: Output, plane: Plane, drawings: Mapping[str, Drawing]) -> dict[str, bytes]:
    """Writes figures with their data, and removes those of an earlier call; returns the PNGs."""
    images = {}
    for name, drawing in progress(drawings.items(), unit="figure"):
        images[name] = write_drawing(out, name, drawing, plane.title)
    record = out.folder / "figures.txt"
    files = [f"{name}.{form}" for name in images for form in (*out.of_figures, "csv")]
    for name in record.read_text().splitlines() if record.is_file() else ():
        if name not in files:
            (out.folder / Path(name).name).unlink(missing_ok=True)
    write_text(record, "".join(f"{name}\n" for name in files))
    return images


def write_tables(out: Output, plane: Plane, names: list[str], advised: list, slopes: list, excess: list) -> dict:
    """Writes the tables; returns those of the page by heading."""
    of_tasks = [*TASK_OF, *ACCURACIES["z"], *ACCURACIES["y"]]
    of_tasks = [name for name in of_tasks if name in plane.names]
    cells = [row for row in cells_of(plane, [*of_tasks, *names]) if row["what"] != "seed"]
    of_drivers = DRIVERS | {name: name for name in plane.differing}
    to_train = Table(commands(advised), TO_TRAIN)
    tables = {
        "Advice": Table(advised, headings_of(plane), "advice"),
        "Commands that train these cells separately": to_train,
        "Rank correlations with the rates": Table(drivers(plane, of_tasks), of_drivers, "drivers"),
        "Cells": Table(cells, {n: plane.title(n) for row in cells for n in row if not n.endswith("_se")}),
        "Slopes": Table(slopes, SLOPES, "slopes"),
        "Multi-rate cells and separately trained ones": Table(excess, EXCESS, "excess" if excess else ""),
    }
    for table in tables.values():
        if table.file:
            table.write(out)
    write_text(out.folder / "advice.csv", to_csv(advised, [*headings_of(plane), "command"]))
    return tables


def page(plane: Plane, names: list[str], tables: dict, images: Mapping[str, bytes], pictures: Pictures) -> str:
    """The page as HTML, with Tables by heading and PNGs by name."""
    uris = {n: f"data:image/png;base64,{base64.b64encode(png).decode()}" for n, png in images.items()}
    settings = {}
    for name in SETTINGS:
        texts = plane.settings(name, "")
        texts.sort(key=lambda text: (math.isnan(number(text)), number(text), text))
        if texts != [""]:
            settings[name] = ", ".join(texts)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(autoescape=True, loader=loader).get_template("page.html")
    originals = "" if pictures.originals is None else to_uri(pictures.originals)
    return template.render(
        explorer(plane, names, pictures), title=f"Batch {plane.folder.name}", notes=plane.notes,
        tables={heading: table.texts() for heading, table in tables.items()}, explained=EXPLAINED,
        figures=uris, settings=settings, kinds=pictures.kinds, originals=originals,
    )  # fmt: skip
