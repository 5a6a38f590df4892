"""Draws the rate plane of an evaluated batch, and tells where in it each task does best.

    python plot_eval.py --run_batch_name B                    figures, advice and report.html in runs/B/figures/
    python plot_eval.py --run_batch_name B --max_rate 20      the advice for at most 20 bits an image as well

Reads runs/B/eval_results.csv, which eval_beta_grid.py writes, and the runs themselves for pictures of them.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.loading import load_data
from utils import figures
from utils.cli import Parser, batch_folder, whole
from utils.errors import UserError, nearest, run_script
from utils.files import check_writable, read_arrays, to_csv, write_atomic, write_text
from utils.information import accuracy_bound, entropy
from utils.plane import FAR_OFF, PROBES, SETTINGS, Plane, Slope, advice, number, read_plane, slopes
from utils.report import ADVICE, CAPTIONS, page, to_html, to_markdown
from utils.runs import Run, load_model
from utils.seeds import generator

SHOWN = [  # unless --metrics says otherwise; those that the batch has
    *("psnr", "nelbo", "ll_iw", "bpd", "is_mean", "fid", "fid_classifier", "recons_acc", "mi_q_mc", "mi_q"),
    *("mi_q_mc_y", "lr_acc_mean", "svm_rbf_acc", "lr_acc_mean_y", "svm_rbf_acc_y", "active_z"),
]
THREE = [  # the first of each that there is: reconstruction, generation, representation
    ("psnr", "recons_acc", "nelbo"),
    ("is_mean", "fid", "fid_classifier"),
    ("lr_acc_mean", "svm_rbf_acc", "mi_q_mc", "lr_acc_mean_y"),
]
MOST_CELLS = 9  # along each axis of a sheet of pictures


def positive(text: str) -> float:
    """A rate in bits, as a flag's value."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of bits > 0, got {text!r}")
    return value


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--run_batch_name", required=True, help="the batch: a folder of runs under --runs_dir")
    parser.add_argument("--metrics", nargs="+", help="columns of eval_results.csv to draw (default: the main ones)")
    parser.add_argument("--out", help="where the figures go (default: figures/ in the batch's folder)")
    parser.add_argument(
        "--format", nargs="+", choices=("png", "pdf"), default=["png", "pdf"], help="of the figures (default: png pdf)"
    )
    parser.add_argument(
        "--images",
        type=partial(whole, most=100),
        default=4,
        help="images of each cell in the sheets of pictures (default: 4)",
    )
    group = parser.add_argument_group("budgets for the advice, in bits per image")
    group.add_argument("--max_rate", type=positive, metavar="BITS", help="largest R(z) + R(y|z)")
    group.add_argument("--max_rate_z", type=positive, metavar="BITS", help="largest R(z)")
    group.add_argument("--max_rate_y", type=positive, metavar="BITS", help="largest R(y|z)")
    return parser.parse(argv)


def wanted_metrics(plane: Plane, asked: list[str] | None) -> list[str]:
    """The metrics to draw. Raises UserError for one that the batch does not have."""
    for name in asked or []:
        if name not in plane.names:
            raise UserError(f"--metrics: no run has {name!r}{nearest(name, plane.names)}")
    return list(dict.fromkeys(asked)) if asked else [name for name in SHOWN if name in plane.names]


def labels_of(plane: Plane, folder: Path) -> np.ndarray | None:
    """The test images' labels, from the first run that has its latents; None, with a note, if there is none."""
    for name in (run for cell in plane.cells for run in cell.runs):
        try:
            return read_arrays(folder / name / "latents.npz")["labels"]
        except (UserError, KeyError):
            continue
    plane.notes.append("no latents.npz in any run: what R(z) allows is not drawn")
    return None


def thinned(values: np.ndarray) -> np.ndarray:
    """At most MOST_CELLS of the distinct values, evenly chosen from the middle outwards."""
    distinct = np.unique(values)
    step = math.ceil(len(distinct) / MOST_CELLS)
    return distinct[(len(distinct) // 2) % step :: step]


def tiled(images: torch.Tensor, nrow: int) -> np.ndarray:
    """The images (B, C, H, W) as one picture, (height, width, 3)."""
    return make_grid(images, nrow, padding=1, pad_value=0.5).permute(1, 2, 0).cpu().numpy()


def sheets(plane: Plane, folder: Path, args) -> dict[str, figures.Figure]:
    """Samples and reconstructions of the cells as small pictures; what cannot be had is noted."""
    beta_y, beta_z = plane.values("beta_y"), plane.values("beta_z")
    chosen = np.isin(beta_y, thinned(beta_y)) & np.isin(beta_z, thinned(beta_z))
    samples, reconstructions, failures, x, tile = {}, {}, [], None, None
    for i in tqdm(np.flatnonzero(chosen), unit="cell", desc="pictures"):
        cell = plane.cells[i]
        key = (cell.mean["beta_y"], cell.mean["beta_z"])
        try:
            run = Run.open(folder / cell.runs[0])
            if tile is None:
                tile = partial(tiled, nrow=math.ceil(args.images**0.5))
                shape, x = run.config.image_shape, test_images(run, args, plane)
            if run.config.image_shape != shape or key in samples:
                continue
            model = load_model(run, args.device)
            drawn = model.sample(args.images, generator=generator(args.device, run.config.seed, "sheet"))
            samples[key] = tile(drawn)
            if x is not None:
                reconstructions[key] = tile(model.reconstruct(x))
        except UserError as e:
            failures.append(str(e))
    if failures:
        plane.notes.append(f"no pictures of {len(failures)} cell(s): {failures[0]}" + ", ..." * (len(failures) > 1))
    drawn = {"samples": figures.sheet(samples, "samples")} if samples else {}
    if reconstructions:
        drawn["reconstructions"] = figures.sheet(reconstructions, "reconstructions", originals=tile(x))
    return drawn


def test_images(run: Run, args, plane: Plane) -> torch.Tensor | None:
    """The first test images, or None, with a note, when the data set is not there."""
    try:
        test = load_data(run.config, args.data_dir, args.device, args.download).test
        return next(iter(test.batches(args.images)))[0]
    except UserError as e:
        plane.notes.append(f"no reconstructions: {e}")
        return None


def draw(plane: Plane, found: list[Slope], names: list[str], folder: Path, args) -> dict[str, figures.Figure]:
    """All figures that the batch has the figures for."""
    drawn = {}
    three = [next((n for n in choice if n in plane.names), None) for choice in THREE]
    three = [name for name in three if name is not None]
    if names:
        drawn["rate_plane"] = figures.rate_planes(plane, names)
        drawn["total_rate"] = figures.total_rates(plane, names)
    of_label = ("recons_acc", "mi_q_mc", "mi_q", "mi_lr_lb", *PROBES)
    information = [n for n in names if n.removesuffix("_standardized").removesuffix("_y") in of_label]
    if information:
        labels = labels_of(plane, folder)
        bound = None if labels is None else partial(accuracy_bound, labels=labels)
        drawn["rate_z"] = figures.against_rate_z(
            plane, information, bound, math.nan if bound is None else entropy(labels)
        )
    drawn["heat_maps"] = figures.heat_maps(plane, names)
    drawn["tasks"] = figures.tasks(plane, three)
    if any(math.isfinite(r) for s in found for r in (s.ratio_y, s.ratio_z)):
        drawn["slopes"] = figures.slope_maps(plane, found)
    else:
        plane.notes.append("the slopes of D need neighbouring cells in both directions of the grid; there are none")
    return drawn | sheets(plane, folder, args)


SLOPES = {
    "run": "run",
    "beta_y": "beta_y",
    "beta_z": "beta_z",
    "slope_y": "-dD/dR(y|z)",
    "slope_z": "-dD/dR(z)",
    "excess": "excess loss",
    "far_off": "far off",
}


def slope_rows(found: list[Slope]) -> list[dict]:
    """The slope check as a table: estimates of the slopes, which should equal the betas."""
    rows = []
    for s in found:
        b_y, b_z = s.cell.mean["beta_y"], s.cell.mean["beta_z"]
        told = {"slope_y": s.ratio_y * b_y, "slope_z": s.ratio_z * b_z, "excess": s.excess}
        row = {"run": s.cell.runs[0], "beta_y": b_y, "beta_z": b_z}
        rows.append(row | {k: v for k, v in told.items() if math.isfinite(v)} | {"far_off": "yes" * s.far_off})
    return rows


def tell_far_off(rows: list[dict]) -> None:
    """Prints the worst of the cells that are far off their optimum, if there are any."""
    far_off = sorted((row for row in rows if row["far_off"]), key=lambda row: -row.get("excess", 0))
    if far_off:
        print(f"\n{len(far_off)} of {len(rows)} cells are off their optimum, probably under-trained: a slope is more")
        print(
            f"than {FAR_OFF:g} times its beta or less than that part of it, or another cell does better at their betas:"
        )
        print(to_markdown(far_off[:10], {k: v for k, v in SLOPES.items() if k not in ("run", "far_off")}), end="")


def main(argv=None) -> int:
    args = parse_args(argv)
    folder = batch_folder(args.runs_dir, args.run_batch_name)
    out = Path(args.out) if args.out else folder / "figures"
    plane = read_plane(folder / "eval_results.csv")
    names = wanted_metrics(plane, args.metrics)
    check_writable(out, "--out")
    budget = {"rate": args.max_rate, "kl_z": args.max_rate_z, "kl_y": args.max_rate_y}
    budget = {name: bits for name, bits in budget.items() if bits is not None}
    advised = advice(plane) + (within := advice(plane, budget) if budget else [])
    if budget and not within:
        plane.notes.append("no cell that has been evaluated is within the budget")
    found = slopes(plane)
    drawn = draw(plane, found, names, folder, args)

    out.mkdir(parents=True, exist_ok=True)
    if (out / "report.html").is_file():  # of an earlier call, whose other figures would be stale
        for stale in (out / f"{name}.{form}" for name in CAPTIONS for form in ("png", "pdf")):
            if stale.stem not in drawn or stale.suffix[1:] not in args.format:
                stale.unlink(missing_ok=True)
    headings = ADVICE | {name: name for name in plane.differing}
    images = {}
    for name, figure in tqdm(drawn.items(), unit="figure"):
        files = figures.rendered(figure, ("png", *args.format))
        images[name] = files["png"]
        for form in args.format:
            write_atomic(out / f"{name}.{form}", files[form])
    checked = slope_rows(found)
    write_text(out / "advice.csv", to_csv(advised, headings))
    write_text(out / "advice.md", to_markdown(advised, headings))
    write_text(out / "slopes.csv", to_csv(checked, SLOPES))
    cells = [{"runs": ", ".join(cell.runs), **cell.mean} for cell in plane.cells]
    columns = {name: name for name in ("beta_y", "beta_z", *plane.names, "runs")}
    tables = {
        "Advice": to_html(advised, headings),
        "Cells": to_html(cells, columns),
        "Slopes": to_html(checked, SLOPES),
    }
    report = page(f"Batch {args.run_batch_name}", settings(plane), plane.notes, tables, images)
    write_text(out / "report.html", report)

    for note in plane.notes:
        print(f"note: {note}")
    print(to_markdown(advised, headings), end="")
    tell_far_off(checked)
    print(f"\nOpen {out / 'report.html'}")
    return 0


def settings(plane: Plane) -> dict[str, str]:
    """All settings of the batch's cells, each with all its values."""
    values = {}
    for name in SETTINGS:
        distinct = {cell.settings.get(name) or "" for cell in plane.cells}
        if distinct != {""}:
            values[name] = ", ".join(sorted(distinct, key=lambda v: (math.isnan(number(v)), number(v), v)))
    return values


if __name__ == "__main__":
    run_script(main)
