"""The report of a batch: figures, tables, and one HTML page with all of them."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch

from utils.distributed import progress
from utils.evaluation.metrics import plain
from utils.files import to_csv, write_text
from utils.plane import figures
from utils.plane.advice import EXPLAINED, OF_TASKS, advice, commands, headings_of
from utils.plane.cells import SETTINGS, Plane, number
from utils.plane.drawing import Drawing, headings, styled, table, write_drawing
from utils.plane.drivers import DRIVERS, drivers
from utils.plane.excess import EXCESS, excess_rows, print_excess
from utils.plane.explorer import explorer
from utils.plane.metrics import ACCURACIES, FOUR, INFORMATION, first_of, wanted
from utils.plane.sheets import OVERVIEW, Pictures, first_images, overview, pictures_of, sheets, to_uri
from utils.plane.slopes import SLOPES, Slope, print_far_off, slope_rows, slopes
from utils.plane.tables import texts_of, to_markdown

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
    "tasks": "The metrics of the tasks against each other. Colours tell a cell's betas: beta_y from dark to light, "
    "beta_z from blue to yellow.",
    "heat_maps": "Rates and metrics over the grid of betas; the best cell is framed, and yellow is best.",
    "slopes": "Slopes of the distortion relative to the betas, -dD/dR / beta, estimated from neighbouring cells: 1 at "
    "an optimum. Cells far from 1 are under-trained; grey cells have no estimate, or D does not fall with the rate.",
    "excess": "The loss of cells of a multi-rate model less that of cells trained on their own at the same betas: "
    "above 0, the price of one training for all.",
    "overview": "Where in the rate plane each task is done best, and what these models make.",
    "samples": "Samples of each cell, generated from the same noise.",
    "reconstructions": "Reconstructions of the same test images by each cell.",
}
OF_LABEL = ("recons_acc", "mi_q_mc", "mi_q", "mi_lr_lb", "mi_z_low", "mi_y_low", *ACCURACIES["qz_mu"])
TO_TRAIN = {"metrics": "best for", "command": "command"}


class Options(NamedTuple):
    """What a report shows."""

    formats: Sequence[str]  # of the figures
    metrics: Sequence[str] | None  # to draw: columns, or all; None for one of each task
    budget: Mapping[str, float]  # limits of the rates for the advice, in the plane's unit
    images: int  # of each kind and cell
    overview: bool  # whether to draw the rate plane at a glance


@styled
def write_report(out: Path, plane: Plane, options: Options, device: torch.device, load_data: Callable) -> None:
    """Writes figures, tables and the page of a batch into a folder, and prints the advice and what else to know.

    Models compute on `device`; `load_data` gives the data set of a Config, whose images they reconstruct.
    """
    names, advised = wanted(plane.names, options.metrics), advice(plane, options.budget)
    if options.budget and not any(row["budget"] for row in advised):
        plane.notes.append("no evaluated cell is within the budget")
    x = first_images(plane, load_data, max(options.images, 2 * OVERVIEW))
    pictures = pictures_of(plane, device, options.images, x)
    estimates, excess = slopes(plane), excess_rows(plane)
    drawings = draw(plane, names, options, estimates, excess)
    if options.overview and (glance := overview(plane, first_of(plane.names, FOUR[:3]), device, x)):
        drawings["overview"] = glance
    images = write_figures(out, options.formats, plane, drawings | sheets(plane, pictures))
    rows = slope_rows(estimates)
    tables = write_tables(out, plane, names, advised, rows, excess)
    write_text(out / "report.html", page(plane, names, tables, images, pictures))
    for note in plane.notes:
        print(f"note: {note}")
    print(to_markdown(advised, headings_of(plane)) + EXPLAINED)
    for row in commands(advised):
        print(f"\nTo train the best for {row['metrics']} on its own:\n{row['command']}")
    print_far_off(rows)
    print_excess(excess)
    print(f"\nOpen {out / 'report.html'}")


def draw(plane: Plane, names: list[str], options: Options, estimates: list[Slope], excess: list) -> dict[str, Drawing]:
    """All figures of metrics for which the batch has data, by name."""
    drawings = {}
    if names:
        drawings["rate_plane"] = figures.rate_planes(plane, names)
        drawings["total_rate"] = figures.total_rates(plane, names)
    requested = [name for name in names if plain(name) in OF_LABEL]
    if information := requested if options.metrics else first_of(plane.names, INFORMATION):
        if plane.labels is None:
            plane.notes.append("no latents.npz in any run: the bounds implied by R(z) are not drawn")
        drawings["rate_z"] = figures.against_rate_z(plane, information)
    drawings["tasks"] = figures.tasks(plane, first_of(plane.names, FOUR[:3]))
    for kind, grid in plane.grids.items():
        drawings[f"heat_maps_{kind}" if kind else "heat_maps"] = figures.heat_maps(grid, names)
        of_grid = [s for s in estimates if s.cell in grid.cells]
        if any(math.isfinite(ratio) for s in of_grid for ratio in (s.ratio_y, s.ratio_z)):
            drawings[f"slopes_{kind}" if kind else "slopes"] = figures.slope_maps(grid, of_grid)
    if excess:
        drawings["excess"] = figures.excess_maps(plane, excess)
    if not any(name.startswith("slopes") for name in drawings):
        plane.notes.append("no slopes of D: they need cells with neighbours along both axes of the grid")
    return drawings


def write_figures(out: Path, formats: Sequence[str], plane: Plane, drawings: Mapping[str, Drawing]) -> dict[str, bytes]:
    """Writes figures with their data, and removes those that an earlier call wrote; returns the PNGs by name."""
    images = {}
    for name, drawing in progress(drawings.items(), unit="figure"):
        images[name] = write_drawing(out, name, formats, drawing, headings(drawing.rows, plane))
    files, record = [f"{name}.{form}" for name in images for form in (*formats, "csv")], out / "figures.txt"
    for name in record.read_text().splitlines() if record.is_file() else ():
        if name not in files:
            (out / Path(name).name).unlink(missing_ok=True)
    write_text(record, "".join(f"{name}\n" for name in files))
    return images


def write_tables(out: Path, plane: Plane, names: list[str], advised: list, estimates: list, excess: list) -> dict:
    """Writes the tables: advice, slopes, excess loss, correlations; returns those of the page, by heading."""
    differing = {name: name for name in plane.differing}
    of_tasks = [name for name in (*OF_TASKS, *ACCURACIES["z"], *ACCURACIES["y"]) if name in plane.names]
    cells = [row for row in table(plane, [*of_tasks, *names]) if row["what"] != "seed"]
    write_text(out / "advice.csv", to_csv(advised, [*headings_of(plane), "command"]))
    write_text(out / "advice.md", to_markdown(advised, headings_of(plane)))
    of_page = {}
    for heading, rows, titles, file in (
        ("Advice", advised, headings_of(plane), ""),
        ("Commands that train these points on their own", commands(advised), TO_TRAIN, ""),
        ("Rank correlations with the rates", drivers(plane, of_tasks), DRIVERS | differing, "drivers.csv"),
        ("Cells", cells, headings(cells, plane), ""),
        ("Slopes", estimates, SLOPES, "slopes.csv"),
        ("Multi-rate cells and their own trainings", excess, EXCESS, "excess.csv" if excess else ""),
    ):
        if file:
            write_text(out / file, to_csv(rows, titles))
        of_page[heading] = texts_of(rows, titles)
    return of_page


def page(plane: Plane, names: list[str], tables: dict, images: Mapping[str, bytes], pictures: Pictures) -> str:
    """The page as HTML; `tables` are texts by heading, `images` PNGs by name."""
    with_captions = {}
    for name, png in images.items():
        base = next(base for base in CAPTIONS if name.startswith(base))
        caption = CAPTIONS[base] + name.removeprefix(base).replace("_", " ")
        with_captions[name] = caption, f"data:image/png;base64,{base64.b64encode(png).decode()}"
    settings = {}
    for name in SETTINGS:
        texts = sorted(plane.settings(name, ""), key=lambda text: (math.isnan(number(text)), number(text), text))
        if texts != [""]:
            settings[name] = ", ".join(texts)
    template = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent))
    return template.get_template("page.html").render(
        explorer(plane, names, pictures), title=f"Batch {plane.folder.name}", notes=plane.notes, tables=tables,
        explained=EXPLAINED, figures=with_captions, settings=settings, kinds=pictures.kinds,
        originals="" if pictures.originals is None else to_uri(pictures.originals),
    )  # fmt: skip
