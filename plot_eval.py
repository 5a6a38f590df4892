"""Plots the rate plane of an evaluated batch, and finds the best cell for each task.

    python plot_eval.py --run_batch_name B                    report.html, figures and advice in runs/B/figures/
    python plot_eval.py --run_batch_name B --max_rate 20      also the best cells of at most 20 nats per image
    python plot_eval.py --run_batch_name B C                  what B and C reach at equal rates, in runs/B/figures/
    python plot_eval.py --traverse RUN [RUN ...]              what z and what y of these runs encode, side by side

Reads runs/B/eval_results.csv, which eval_beta_grid.py writes, and the models, for samples and reconstructions. The
report is one page, which works offline: the rate plane to explore, and below it all tables and figures.
"""

import math
from functools import partial
from pathlib import Path

from utils.cli import Parser, add_moved_flag, batch_folder, positive, whole
from utils.errors import run_script
from utils.files import check_writable, write_text
from utils.machine import prepare
from utils.plane.advice import EXPLAINED, advice, commands, headings_of, terms_for
from utils.plane.cells import UNITS, Plane, labels_of, read_plane
from utils.plane.excess import Pair, excess_rows, pairs, print_excess
from utils.plane.metrics import ACCURACIES, FOUR, INFORMATION, first_of, plain, wanted
from utils.plane.report import page, remove_stale, settings, write_comparison, write_figures, write_tables
from utils.plane.slopes import Slope, print_far_off, slope_rows, slopes
from utils.plane.tables import to_markdown


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run_batch_name", nargs="+",
        help="the batch: a folder of runs under --runs_dir; several are compared at equal rates",
    )  # fmt: skip
    what.add_argument("--traverse", nargs="+", metavar="RUN", help="draw what z and y of these run folders encode")
    parser.add_argument(
        "--metrics", nargs="+", help="columns of eval_results.csv to draw, or all (default: one for each task)"
    )
    add_moved_flag(parser)
    parser.add_argument("--out", help="output folder (default: figures/ in the batch's folder)")
    parser.add_argument(
        "--format", nargs="+", choices=("png", "pdf"), default=["png", "pdf"], help="file formats (default: png pdf)"
    )
    parser.add_argument(
        "--images",
        type=partial(whole, most=100),
        default=4,
        help="samples and reconstructions shown per cell (default: 4)",
    )
    parser.add_argument("--overview", action="store_true", help="also draw the rate plane at a glance, as for a README")
    parser.add_argument(
        "--rate_unit", choices=UNITS, default="nats", help="unit of rates and information, everywhere (default: nats)"
    )
    group = parser.add_argument_group("rate budget of the advice, per image, in that unit")
    group.add_argument("--max_rate", type=positive, metavar="RATE", help="upper limit on R(z) + R(y|z)")
    group.add_argument("--max_rate_z", type=positive, metavar="RATE", help="upper limit on R(z)")
    group.add_argument("--max_rate_y", type=positive, metavar="RATE", help="upper limit on R(y|z)")
    return parser.parse(argv)


def draw(plane: Plane, found: list[Slope], compared: list[Pair], names: list[str], folder: Path, args, made) -> dict:
    """Draws all figures for which the batch has data; returns them, with their data, by name."""
    from utils.evaluation.information import accuracy_bound, entropy
    from utils.plane import figures, maps
    from utils.plane.pictures import overview, sheets

    drawn = {}
    if names:
        drawn["rate_plane"] = figures.rate_planes(plane, names)
        drawn["total_rate"] = figures.total_rates(plane, names)
    of_label = ("recons_acc", "mi_q_mc", "mi_q", "mi_lr_lb", "mi_z_low", "mi_y_low", *ACCURACIES["qz_mu"])
    information = [n for n in names if plain(n) in of_label] if args.metrics else first_of(plane.names, INFORMATION)
    if information:
        labels = labels_of(plane)
        if labels is None:
            plane.notes.append("no latents.npz in any run: the bounds implied by R(z) are not drawn")
        bound = None if labels is None else partial(accuracy_bound, labels=labels)
        drawn["rate_z"] = figures.against_rate_z(
            plane, information, bound, math.nan if bound is None else entropy(labels)
        )
    drawn["tasks"] = figures.tasks(plane, first_of(plane.names, FOUR[:3]))
    for kind, cells in plane.grids.items():
        of_kind = f"_{kind}" * bool(kind)
        drawn[f"heat_maps{of_kind}"] = maps.heat_maps(cells, names)
        there = [s for s in found if any(s.cell is cell for cell in cells.cells)]
        if any(math.isfinite(r) for s in there for r in (s.ratio_y, s.ratio_z)):
            drawn[f"slopes{of_kind}"] = maps.slope_maps(cells, there)
    if compared:
        drawn["excess"] = maps.excess_maps(plane, compared)
    if not any(name.startswith("slopes") for name in drawn):
        plane.notes.append("no slopes of D: they need cells with neighbours along both axes of the grid")
    if args.overview:
        drawn |= overview(plane, first_of(plane.names, FOUR[:3]), folder, args)
    return drawn | sheets(plane, made)


def main(argv=None) -> int:
    """Writes figures, tables and the report of a batch; returns the exit status."""
    args = parse_args(argv)
    args.device = prepare(args.device, args.threads)
    if args.traverse:
        from utils.plane.traversals import traverse

        return traverse(args)
    args.run_batch_name = list(dict.fromkeys(args.run_batch_name))
    folders = {name: batch_folder(args.runs_dir, name) for name in args.run_batch_name}
    planes = {name: read_plane(folder / "eval_results.csv", args.rate_unit) for name, folder in folders.items()}
    (folder, *_), (plane, *_) = folders.values(), planes.values()
    out = Path(args.out) if args.out else folder / "figures"
    names = wanted(plane.names, args.metrics)
    check_writable(out, "--out")
    if len(planes) > 1:
        print(write_comparison(out, args.format, planes, names or ["rate"]), end="")
        return 0
    limits = (("rate", args.max_rate), ("kl_z", args.max_rate_z), ("kl_y", args.max_rate_y))
    budget = {name: most for name, most in limits if most is not None}
    terms = terms_for(plane)
    advised = advice(plane, terms=terms) + (within := advice(plane, budget, terms) if budget else [])
    if budget and not within:
        plane.notes.append("no evaluated cell is within the budget")
    from utils.plane.explorer import explorer
    from utils.plane.pictures import pictures

    found, compared = slopes(plane), pairs(plane)
    made = pictures(plane, folder, args)
    drawn = draw(plane, found, compared, names, folder, args, made)
    images = write_figures(out, args.format, plane, drawn)
    remove_stale(out, args.format, drawn)
    estimates = slope_rows(found)
    tables = write_tables(out, plane, advised, estimates, excess_rows(compared), names)
    title, parts = f"Batch {args.run_batch_name[0]}", explorer(plane, names, made)
    write_text(out / "report.html", page(title, settings(plane), plane.notes, tables, images, parts))
    for note in plane.notes:
        print(f"note: {note}")
    print(to_markdown(advised, headings_of(plane)), end="")
    print(EXPLAINED)
    for row in commands(advised):
        print(f"\nTo train the best for {row['metrics']} on its own:\n{row['command']}")
    print_far_off(estimates)
    print_excess(compared)
    print(f"\nOpen {out / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_script(main)
