"""Plots the rate plane of an evaluated batch, and finds the best cell for each task.

    python plot_eval.py --run_batch_name B                    report.html, figures and advice in runs/B/figures/
    python plot_eval.py --run_batch_name B --max_rate 20      also the best cells of at most 20 nats per image
    python plot_eval.py --run_batch_name B C                  what B and C reach at equal rates, in runs/B/figures/
    python plot_eval.py --traverse RUN [RUN ...]              what z and what y of these runs encode, side by side

Reads runs/B/eval_results.csv, which eval_beta_grid.py writes, and the models, for samples and reconstructions. The
report is one page, which works offline: the rate plane to explore, and below it all tables and figures.
"""

from functools import partial
from pathlib import Path

from utils.cli import Parser, add_moved_flag, batch_folder, positive, whole
from utils.errors import run_script
from utils.files import check_writable
from utils.machine import prepare


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--run_batch_name", nargs="+",
        help="the batch: a folder of runs under --runs_dir; several are compared at equal rates",
    )  # fmt: skip
    task.add_argument("--traverse", nargs="+", metavar="RUN", help="draw what z and y of these run folders encode")
    parser.add_argument(
        "--metrics", nargs="+", help="columns of eval_results.csv to draw, or all (default: one for each task)"
    )
    add_moved_flag(parser)
    parser.add_argument("--out", type=Path, help="output folder (default: figures/ in the batch's folder)")
    formats = ("png", "pdf")
    parser.add_argument("--format", nargs="+", choices=formats, default=formats, help="file formats (default: png pdf)")
    parser.add_argument(
        "--images", type=partial(whole, most=100), default=4,
        help="samples and reconstructions shown per cell (default: 4)",
    )  # fmt: skip
    parser.add_argument("--overview", action="store_true", help="also draw the rate plane at a glance, as for a README")
    parser.add_argument(
        "--rate_unit",
        choices=("nats", "bits"),
        default="nats",
        help="unit of rates and information, everywhere (default: nats)",
    )
    group = parser.add_argument_group("rate budget of the advice, per image, in that unit")
    group.add_argument("--max_rate", type=positive, metavar="RATE", help="upper limit on R(z) + R(y|z)")
    group.add_argument("--max_rate_z", type=positive, metavar="RATE", help="upper limit on R(z)")
    group.add_argument("--max_rate_y", type=positive, metavar="RATE", help="upper limit on R(y|z)")
    return parser.parse(argv)


def main(argv=None) -> int:
    """Writes figures, tables and the report of a batch; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    if args.traverse:
        from utils.explore import load
        from utils.plane.traversals import traverse
        from utils.runs import is_cell

        paths = [
            path for path in map(Path, args.traverse) if len(args.traverse) == 1 or is_cell(path)
        ]  # of a shell's *
        cells = [load(path, args.data_dir, device, args.dataset) for path in paths]
        folder = args.out or paths[0].resolve().parent / "figures" / "traversals"
        traverse(cells, folder, args.format, args.images)
        return 0
    folders = {name: batch_folder(args.runs_dir, name) for name in args.run_batch_name}
    from utils.plane.cells import read_plane
    from utils.plane.metrics import wanted

    planes = {name: read_plane(folder / "eval_results.csv", args.rate_unit) for name, folder in folders.items()}
    plane = planes[args.run_batch_name[0]]
    out, names = args.out or plane.folder / "figures", wanted(plane.names, args.metrics)
    check_writable(out, "--out")
    if len(planes) > 1:
        from utils.plane.compare import write_comparison

        print(write_comparison(out, args.format, planes, names or ["rate"]), end="")
        return 0
    from datasets.loading import load_data
    from utils.plane.report import Options, write_report

    def data_of(config):
        return load_data(config, args.data_dir, device, args.download, args.dataset)

    limits = {"rate": args.max_rate, "kl_z": args.max_rate_z, "kl_y": args.max_rate_y}
    budget = {name: most for name, most in limits.items() if most is not None}
    write_report(out, plane, Options(args.format, args.metrics, budget, args.images, args.overview), device, data_of)
    return 0


if __name__ == "__main__":
    run_script(main)
