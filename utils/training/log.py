"""What is told of cells: curves and pictures in TensorBoard, pictures as files, the figures of training.json."""

import io
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams, image, scalar

from datasets.batches import chosen
from datasets.loading import Data
from datasets.table import optimum
from models.stack import TERMS
from utils import locks
from utils.config import FLAGS, Config
from utils.errors import UserError
from utils.files import write_atomic
from utils.images import tiled, to_pil
from utils.runs import Run
from utils.seeds import generator

N = 16  # images in a row; reconstructions, and as many samples, or four times as many up to 32 pixels
N_CURVES = 1000  # test images of the curves of PSNR, and of a conditioned model's at single betas


class Log:
    """TensorBoard's file of each cell that this process writes, by model index, and its pictures.

    Files are opened for each write: of many cells at once, none keeps a file or a thread.
    """

    def __init__(self, runs: dict[int, Run], data: Data, epochs: int, new: bool):
        self.runs, stem = runs, f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.images, self.curve_images = (chosen(data.test, n)[0] for n in (N, N_CURVES))
        self.paths = {m: run.path / f"{stem}.{run.config.seed}" for m, run in runs.items()}
        start = {"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}
        for m, run in runs.items():
            self._append(m, start, epochs + 1)  # which hides later epochs of earlier files
            if new:
                values = {n: getattr(run.config, n) for n in FLAGS if getattr(run.config, n) is not None}
                summaries = hparams(values, {f"test/{name}": 0 for name in (*TERMS, "psnr")})
                self._append(m, [{"summary": summary} for summary in summaries], 0)

    def _append(self, m: int, events: Iterable[dict], epoch: int) -> None:
        """Raises UserError if they cannot be written, Lost if another process has taken over."""
        run = self.runs[m]
        locks.check(run.path)
        try:
            with open(self.paths[m], "ab") as file:
                for event in events:
                    data = Event(step=epoch, wall_time=time.time(), **event).SerializeToString()
                    RecordWriter(file).write(data)
        except OSError as e:
            why = f"{e.strerror or e}; {shutil.disk_usage(run.path).free:,} bytes are free"
            raise UserError(f"{run.path}: events cannot be written ({why})") from e

    def write(self, m: int, model: nn.Module, epoch: int, means: dict[str, list[float]]) -> None:
        """Adds the means of an epoch's terms, by split, of model m; some epochs also its PSNR and pictures."""
        run, epochs = self.runs[m], self.runs[m].config.last_epoch
        curves = {f"{where}/{name}": v for where, of in means.items() for name, v in zip(TERMS, of, strict=True)}
        if epoch == epochs or epoch % max(1, epochs // 100) == 0:
            curves["test/psnr"] = model.psnr([(self.curve_images, None)])
        summaries = [scalar(name, value) for name, value in curves.items()]
        if epoch == epochs or epoch % max(1, epochs // 10) == 0:
            drawn = pictures(model, self.images, run.config.seed)
            summaries += [image(name, picture, dataformats="CHW") for name, picture in drawn.items()]
            if epoch == epochs:
                write_pictures(run.path, drawn)
        self._append(m, [{"summary": summary} for summary in summaries], epoch)


def figures(model: nn.Module, data: Data, config: Config, **means: Tensor) -> dict[str, dict]:
    """What training.json says of a model, by split: means (4,) of its terms; for the test images also others."""
    result = {split: dict(zip(TERMS, of.tolist(), strict=True)) for split, of in means.items()}
    psnr = model.psnr(data.test.batches(config.batch_size))
    result["test"]["psnr"] = psnr if math.isfinite(psnr) else None
    result["test"] |= above_bound(model, data, config)
    return result


@torch.no_grad()
def above_bound(model: nn.Module, data: Data, config: Config) -> dict[str, float]:
    """The loss on the test images above that of the best of all models, nats, and its error; empty if not known."""
    best, values, images = optimum(config), [], data.test.batches(config.batch_size)
    if best is None:
        return {}
    noise = generator(next(model.parameters()).device, config.seed, "test")  # that of the loss
    for x, _ in images:
        loss = model(x, model.noise(len(x), noise)).loss(config.beta_y, config.beta_z)
        values.append(loss.cpu().double() - torch.from_numpy(best.loss_of(x.cpu().numpy())))
    excess = torch.cat(values)
    return {"above_bound": excess.mean().item(), "above_bound_se": excess.std().item() / math.sqrt(len(excess))}


@torch.no_grad()
def pictures(model: nn.Module, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Pictures (3, H', W') in [0, 1] by name: `reconstructions` of up to N images (B, C, H, W), `samples`."""
    images = images[:N]
    samples = model.sample(N if images.shape[-1] > 32 else 4 * N, generator=generator(images.device, seed, "samples"))
    pairs = torch.cat([images, model.reconstruct(images)])
    return {"reconstructions": tiled(pairs, len(images)), "samples": tiled(samples, N)}


def write_pictures(folder: Path, drawn: dict[str, Tensor]) -> None:
    """Writes pictures as PNG files into a run's folder."""
    for name, picture in drawn.items():
        buffer = io.BytesIO()
        to_pil(picture).save(buffer, "PNG")
        write_atomic(folder / f"{name}.png", buffer.getvalue())
