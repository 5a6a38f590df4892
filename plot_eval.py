"""Plots the rate plane of an evaluated batch, and finds the best cell for each task.

    python plot_eval.py --run_batch_name B                 report.html and more in runs/B/figures/
    python plot_eval.py --run_batch_name B --max_rate 20   also the best cells of at most 20 nats
    python plot_eval.py --run_batch_name B C               what B and C reach at equal rates
    python plot_eval.py --traverse RUN [RUN ...]           what z and what y of these runs encode
    python plot_eval.py --latents RUN [RUN ...]            where test images lie in z of these runs

Reads runs/B/eval_results.csv, which eval_beta_grid.py writes, and the models, for samples and
reconstructions. The report is one page, which works offline: the rate plane to explore, and below
it all tables and figures.
"""

from functools import partial
from pathlib import Path

from utils.cli import Parser, add_run_flags, batch_folder, positive, whole
from utils.errors import UserError, run_script
from utils.files import check_writable
from utils.machine import prepare

LIMITS = {"max_rate": "R(z) + R(y|z)", "max_rate_z": "R(z)", "max_rate_y": "R(y|z)"}


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    add = task.add_argument
    text = "the batch: a folder of runs under --runs_dir; several are compared at equal rates"
    add("--run_batch_name", nargs="+", help=text)
    text = "draw what z and y of these run folders encode"
    add("--traverse", nargs="+", metavar="RUN", help=text)
    text = "draw z of the test images by these run folders (eval_beta_grid.py --latents writes it as arrays)"
    add("--latents", nargs="+", metavar="RUN", help=text)
    add = parser.add_argument
    text = "columns of eval_results.csv to draw, or all (default: one for each task)"
    add("--metrics", nargs="+", help=text)
    add_run_flags(parser)
    add("--out", type=Path, help="output folder (default: figures/ in the batch's folder)")
    formats, text = ("png", "pdf", "tex"), "formats of figures, and tex of tables (default: png pdf)"
    add("--format", nargs="+", choices=formats, default=formats[:2], help=text)
    add("--no_header", action="store_true", help="leave out what figures say above of data, epochs and cells")
    text = "samples and reconstructions shown per cell (default: 4)"
    add("--images", type=partial(whole, most=100), default=4, help=text)
    text = "also draw the rate plane at a glance, as for a README"
    add("--overview", action="store_true", help=text)
    text = "unit of rates and information, everywhere (default: nats)"
    add("--rate_unit", choices=("nats", "bits"), default="nats", help=text)
    group = parser.add_argument_group("rate budget of the advice, per image, in that unit")
    for name, rate in LIMITS.items():
        text = f"upper limit on {rate}"
        group.add_argument(f"--{name}", type=positive, metavar="RATE", help=text)
    return parser.parse(argv)


def draw_runs(args, device) -> int:
    """Draws what the latents of runs encode; returns the exit status."""
    from utils.explore import load
    from utils.plane.drawing import Output
    from utils.plane.latents import draw_latents
    from utils.plane.traversals import traverse
    from utils.runs import is_cell

    paths = list(map(Path, args.traverse or args.latents))
    if len(paths) > 1:  # of a shell's *
        paths = list(filter(is_cell, paths))
    cells = [load(path, args.data_dir, device, args.dataset) for path in paths]
    name = "traversals" if args.traverse else "latents"
    folder = args.out or paths[0].resolve().parent / "figures" / name
    out = Output(folder, args.format, not args.no_header)
    check_writable(out.folder, "--out")
    if args.traverse:
        traverse(cells, out, args.images)
    else:
        draw_latents(cells, out)
    return 0


def main(argv=None) -> int:
    """Writes figures, tables and the report of a batch; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    if args.traverse or args.latents:
        return draw_runs(args, device)
    folders = [batch_folder(args.runs_dir, name) for name in args.run_batch_name]
    if len({*folders}) < len(folders):
        raise UserError(f"--run_batch_name: {' '.join(args.run_batch_name)}: a batch is named twice")
    from utils.plane.drawing import Output
    from utils.plane.metrics import wanted
    from utils.plane.reading import read_plane

    planes = [read_plane(folder / "eval_results.csv", args.rate_unit) for folder in folders]
    plane = planes[0]
    names = wanted(plane.names, args.metrics)
    out = Output(args.out or plane.folder / "figures", args.format, not args.no_header)
    check_writable(out.folder, "--out")
    if len(planes) > 1:
        from utils.plane.compare import write_comparison

        print(write_comparison(out, planes, names or ["rate"]), end="")
        return 0
    from datasets.loading import load_data
    from utils.plane.report import Options, write_report

    def data_of(config):
        return load_data(config, args.data_dir, device, args.download, args.dataset)

    limits = {"rate": args.max_rate, "kl_z": args.max_rate_z, "kl_y": args.max_rate_y}
    budget = {name: most for name, most in limits.items() if most is not None}
    options = Options(args.metrics, budget, args.images, args.overview)
    write_report(out, plane, options, device, data_of)
    return 0


if __name__ == "__main__":
    run_script(main)
