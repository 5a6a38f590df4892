"""The training loop: trains a chunk of stacked cells from its position in the data to the last epoch."""

import contextlib
import itertools
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator

import torch

from datasets.loading import Data
from models.conditioned import Conditioned
from models.stack import TERMS
from models.tables import COLLAPSED
from utils import locks
from utils.config import FLAGS, Config
from utils.errors import UserError, heeded_signals
from utils.runs import Run
from utils.seeds import generator
from utils.training.bar import GridBar
from utils.training.chunk import Chunk
from utils.training.pictures import N, pictures, write_pictures

LONGEST_UNSAVED = 600.0  # seconds after the last checkpoint, at which one is written within an epoch
FASTER = 3.5  # times --learning_rate, once a conditioned model's z is in use; at twice of it, ordinary ones lost z
N_CURVES = 1000  # test images of the curves of PSNR, and of a conditioned model's at single betas


class Interrupted(Exception):
    """A signal to end was received, and a checkpoint has been saved."""

    def __init__(self, number: int, epoch: int):
        super().__init__(number, epoch)
        self.signal, self.epoch = number, epoch


class Signals:
    """Records a signal to end instead of raising, so that training can save a checkpoint before it stops."""

    def __enter__(self):
        self.received = None
        self.before = {s: signal.signal(s, self._remember) for s in heeded_signals()}
        return self

    def _remember(self, number, frame):
        self.received = self.received or number

    def __exit__(self, *_):
        for number, handler in self.before.items():  # after a first signal, further ones must not interrupt the exit
            signal.signal(number, signal.SIG_IGN if self.received else handler)


def lr_factor(config: Config, progress: float, spread: float = 0.0) -> float:
    """What the learning rate is multiplied by, after that share of the training.

    `spread` is that of a conditioned model's betas; until they spread, it is trained as an ordinary one.
    """
    start = {"constant": 1.0, "cosine": 0.0, "tail": 0.7}[config.lr_schedule]
    peak = FASTER if spread > 0 else 1.0
    if progress < start or start == 1:
        return peak
    return peak / 2 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))


@torch.no_grad()
def terms_at_points(model: Conditioned, x: torch.Tensor) -> dict[str, dict[str, float]]:
    """Loss, ll, kl_y, kl_z (means over images x, nats) of a conditioned model at its `points`, with fixed noise."""
    noise, result = model.noise(len(x), generator(x.device, 0, "points")), {}
    for name, log_betas in model.points().items():
        terms = model(x, noise._replace(log_betas=log_betas.to(x).expand(len(x), 2)))
        beta_y, beta_z = (10**log_betas).tolist()
        values = (terms.loss(beta_y, beta_z), *terms)
        result[name] = {term: v.mean().item() for term, v in zip(TERMS, values, strict=True)}
    return result


def rate_weights(config: Config, epoch: int) -> tuple[float, float]:
    """Warm-up factors of beta_y and beta_z: they rise linearly from 0 in epoch 0 to 1 in epoch `warmup_epochs`.

    That of a conditioned model's beta_y is 1 from the start: while y is costly and z is free, z comes into use.
    """
    weight = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return (1.0 if config.is_conditioned else weight), weight


def train(
    chunk: Chunk, data: Data, signals: Signals, save_every: int | None = None, bar: GridBar | None = None
) -> None:
    """Trains a chunk to the last epoch, with checkpoints every `save_every` epochs (None: as SAVING_SHARE allows).

    `bar` is that of all cells of which the chunk is a part. Raises Interrupted after a signal, once a checkpoint is
    saved.
    """
    try:
        _train(chunk, data, signals, save_every, bar or GridBar(chunk.runs))
    finally:
        chunk.settle()


def _train(chunk: Chunk, data: Data, signals: Signals, save_every: int | None, bar: GridBar) -> None:
    config, stack = chunk.config, chunk.stack
    steps = math.ceil(len(data.train) / config.batch_size)
    log = Log(chunk, data)
    bar.begin(chunk, steps)
    saved_at = time.monotonic()

    def save(stop):
        nonlocal saved_at
        saved_at = time.monotonic()
        chunk.save()
        if stop:
            chunk.settle()
            raise Interrupted(stop, chunk.epoch)

    started, seconds_before = time.monotonic(), chunk.seconds
    while chunk.live and chunk.epoch < config.num_epochs:
        weight_y, weight_z = rate_weights(config, chunk.epoch)
        temperature = stack.model.family.temperature(chunk.epoch)
        if temperature is not None:
            temperature = torch.tensor(temperature, device=chunk.device)
        if chunk.step == 0:
            chunk.noise = generator(chunk.device, config.seed, chunk.epoch, "noise")
            chunk.history = torch.zeros(steps, stack.m, len(TERMS), device=chunk.device)
            chunk.good = stack.snapshot()
        batches = data.train.batches(config.batch_size, (config.seed, chunk.epoch), chunk.step, stack.part)
        for x, _ in batches:
            whole = min(config.batch_size, len(data.train) - chunk.step * config.batch_size)
            done = (chunk.epoch + chunk.step / steps) / config.num_epochs
            noise = stack.model.noise(whole, chunk.noise, temperature)
            chunk.engine.set_lr(config.learning_rate * lr_factor(config, done, chunk.spread))
            sums = chunk.engine.step(x, noise, weight_y * chunk.betas.y, weight_z * chunk.betas.z)
            chunk.history[chunk.step] = sums
            chunk.betas.steer(sums, whole, done, steps * config.num_epochs)
            chunk.step += 1
            bar.bar.update(len(chunk.runs))
            stop = chunk.stop(signals.received)
            overdue = save_every is None and time.monotonic() - saved_at > LONGEST_UNSAVED
            if (stop or overdue) and chunk.step < steps:
                chunk.seconds = seconds_before + (time.monotonic() - started) / len(chunk.runs)
                chunk.drop_failed(chunk.history[: chunk.step].sum(0).cpu(), chunk.step)
                save(stop)
        train_means = (chunk.history.double().sum(0) / len(data.train)).cpu()
        test_noise = generator(chunk.device, config.seed, "test")
        test_means = stack.evaluate(data.test, config.batch_size, test_noise, chunk.betas.y, chunk.betas.z).cpu()
        chunk.drop_failed(torch.cat([train_means, test_means], 1), steps)
        chunk.epoch, chunk.step = chunk.epoch + 1, 0
        chunk.widen(train_means)
        chunk.seconds = seconds_before + (time.monotonic() - started) / len(chunk.runs)
        bar.show(chunk, train_means[list(chunk.live), 0].mean().item())
        log.epoch(train_means, test_means)
        stop = chunk.stop(signals.received)
        if chunk.epoch == config.num_epochs:
            chunk.finish(train_means, test_means, data)
        elif stop or (chunk.cheap_to_save(saved_at) if save_every is None else chunk.epoch % save_every == 0):
            save(stop)
    bar.end(chunk)
    log.close()


class Log:
    """Each cell's TensorBoard events and pictures."""

    def __init__(self, chunk: Chunk, data: Data):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.chunk = chunk
        first_epoch = chunk.epoch + 1
        self.writers = {m: SummaryWriter(run.path, purge_step=first_epoch) for m, run in chunk.written.items()}
        self.pictures_every = max(1, chunk.config.num_epochs // 10)
        self.images = next(iter(data.test.batches(N)))[0]
        self.curve_images = torch.cat([x for x, _ in itertools.islice(data.test.batches(N_CURVES // 4), 4)])
        if chunk.epoch == 0 and chunk.step == 0:
            for m, writer in self.writers.items():
                config = {name: getattr(chunk.runs[m].config, name) for name in FLAGS}
                config = {name: value for name, value in config.items() if value is not None}
                with self.reported(chunk.runs[m]):
                    for summary in hparams(config, {f"test/{name}": 0 for name in (*TERMS, "psnr")}):
                        writer.file_writer.add_summary(summary)

    def epoch(self, train_means: torch.Tensor, test_means: torch.Tensor) -> None:
        """Logs the means (M, 4) of an epoch; about ten times per training, also reconstructions and samples."""
        for m, run in self.chunk.written.items():
            locks.check(run.path)
            with self.reported(run):
                self._write(m, train_means, test_means)

    @contextlib.contextmanager
    def reported(self, run: Run) -> Iterator[None]:
        """Raises UserError for an OSError of the event writers, which names no file."""
        try:
            yield
        except OSError as e:
            free = shutil.disk_usage(run.path).free
            raise UserError(f"{run.path}: events cannot be written ({e.strerror or e}; {free:,} bytes are free)") from e

    def _write(self, m: int, train_means: torch.Tensor, test_means: torch.Tensor) -> None:
        epoch, config = self.chunk.epoch, self.chunk.config
        for split, means in (("train", train_means), ("test", test_means)):
            for name, value in zip(TERMS, means[m].tolist(), strict=True):
                self.writers[m].add_scalar(f"{split}/{name}", value, epoch)
        model = self.chunk.stack.plain(m)
        self.writers[m].add_scalar("test/psnr", model.psnr([(self.curve_images, None)]), epoch)
        if epoch % self.pictures_every == 0 or epoch == config.num_epochs:
            drawn = pictures(model, self.images, config.seed)
            for name, picture in drawn.items():
                self.writers[m].add_image(name, picture, epoch)
            if epoch == config.num_epochs:
                write_pictures(self.chunk.runs[m].path, drawn)
        if config.is_conditioned:
            self.points(m)
        self.writers[m].flush()

    def points(self, m: int) -> None:
        """Curves of a conditioned model at single betas; a note once z has collapsed."""
        self.chunk.at_points = terms_at_points(self.chunk.stack.plain(m), self.curve_images)
        for name, terms in self.chunk.at_points.items():
            for term, value in terms.items():
                self.writers[m].add_scalar(f"{name}/{term}", value, self.chunk.epoch)
        if self.chunk.collapsed and self.chunk.epoch == math.ceil(0.6 * self.chunk.config.num_epochs):
            print(
                f"note: z has collapsed, R(z) is below {COLLAPSED} nats at the smallest beta_z too; "
                "another --seed or more --warmup_epochs may help",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Closes the TensorBoard files."""
        for writer in self.writers.values():
            writer.close()
