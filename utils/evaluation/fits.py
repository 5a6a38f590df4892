"""Fits the probes of all runs: latents of training and test images, worker processes, what they find."""

import signal
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.distributed import progress
from utils.errors import signals_postponed
from utils.evaluation.probes import PROBES, TAILS, TAILS_PAPER, probe
from utils.evaluation.subject import BATCH, Step, Subject, can_do, is_done, listed, record
from utils.files import npz, write_atomic

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # set to 1 in the workers
UNHEEDED = (signal.SIGHUP, signal.SIGUSR1)  # by loky's processes, which this one ends


@torch.no_grad()
def probe_latents(s: Subject) -> dict[str, np.ndarray]:
    """What probes are trained and tested on: means and samples of z and y, of test images and (`_train`) of others.

    The training images are a fixed choice of `probe_images`, or all if there are fewer.
    """
    g, model, data = s.generator("probes"), s.model, s.bench.data(s.config)
    arrays = {name: s.latents[name] for name in ("qz_mu", "qy_mu", "labels")}
    splits = {"": data.test.batches(BATCH), "_train": data.train.batches(BATCH, (0, 0))}
    for tail, images in splits.items():
        most = s.bench.probe_images if tail else len(data.test)
        wanted = ("z", "y", "qz_mu", "qy_mu", "labels") if tail else ("z", "y")
        parts = {name: [] for name in wanted}
        for i, (x, label) in enumerate(images):
            q_z, noise = model.q_z(x), model.noise(len(x), g)
            z = q_z.sample(noise.z)
            values = [z, model.q_y(z, x).sample(noise.y)]
            values += [q_z.mean, model.q_y(q_z.mode, x).mean, label] if tail else []
            for name, value in zip(wanted, values, strict=True):
                parts[name].append(value.cpu())
            if (i + 1) * BATCH >= most:
                break
        arrays |= {name + tail: torch.cat(some).numpy()[:most] for name, some in parts.items()}
    return arrays


@dataclass
class Fits:
    """One run's fits: how many are left, what the others found, and the file of latents that they read."""

    subject: Subject
    file: Path
    left: int
    results: dict[str, float]
    of_image: dict[str, np.ndarray] = field(default_factory=dict)


def run_probes(subjects: list[Subject], step: Step, args, problems: dict[Path, str]) -> None:
    """Fits the simple classifiers of all runs in worker processes; records failures in `problems`.

    Latents lie in temporary files, of a few runs at a time.
    """
    from joblib.externals.loky import get_reusable_executor

    todo, pending = [], {}
    for subject in subjects:
        with listed(problems, subject.run.path):
            if can_do(subject, step) and (args.force or not is_done(subject, step)):
                todo.append(subject)
    with signals_postponed(*UNHEEDED):
        executor = get_reusable_executor(args.cpu_n, env=dict.fromkeys(ONE_THREAD, "1"))
    unfinished = {subject.run.path for subject in todo}
    try:
        with tempfile.TemporaryDirectory(prefix="probes-") as folder:
            for n, subject in enumerate(progress(todo, unit="run")):
                fits, jobs = None, []
                with listed(problems, subject.run.path):
                    fits, jobs = prepare(subject, step, Path(folder, f"{n}.npz"))
                subject.forget()
                with signals_postponed(*UNHEEDED):
                    pending |= {executor.submit(probe, *job): fits for job in jobs}
                while len(pending) > 2 * args.cpu_n or n == len(todo) - 1 and pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        collect(pending.pop(future), future.result(), step, problems, unfinished)
    except BrokenProcessPool:
        for path in unfinished - set(problems):
            problems[path] = f"{path}: a worker process was killed (out of memory?)"
    except KeyboardInterrupt:  # do not wait for fits that may take minutes
        threading.excepthook = lambda _: None  # the pool's thread would print a traceback about the killed workers
        executor.shutdown(wait=True, kill_workers=True)
        raise


def prepare(s: Subject, step: Step, file: Path) -> tuple[Fits, list[tuple]]:
    """Writes the latents of a run to a file; returns the fits to be done and the arguments of `probe` for each."""
    paper = step.name == "probes_paper"
    arrays = dict(s.latents) if paper else probe_latents(s)
    write_atomic(file, npz(arrays))
    tails = {key: tail for key, tail in (TAILS_PAPER if paper else TAILS).items() if arrays[key].size}
    jobs = [(name, (file, key), tail, paper) for key, tail in tails.items() for name in PROBES]
    return Fits(s, file, len(jobs), {} if paper else {"probe_images": len(arrays["labels_train"])}), jobs


def collect(fits: Fits, found: tuple, step: Step, problems: dict[Path, str], unfinished: set) -> None:
    """Adds what one fit found; records the run's metrics after the last."""
    (results, of_image), s = found, fits.subject
    fits.left -= 1
    if isinstance(results, str):
        problems[s.run.path] = results
    elif not results:
        s.bench.note(f"{s.run.path.name}: too few images, or one class only, to train a classifier on")
    else:
        fits.results |= results
        fits.of_image |= of_image
    if fits.left:
        return
    fits.file.unlink()
    unfinished.discard(s.run.path)
    if s.run.path not in problems:
        with listed(problems, s.run.path):
            record(s, step, {**fits.results, step.files[0]: npz(dict(sorted(fits.of_image.items())))})
