"""The training loop: a chunk of cells, stacked, from one position in the data to the end."""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

from datasets.loading import Data
from models.stack import TERMS
from utils import locks
from utils.distributed import is_first, largest_of_all, progress
from utils.engine import Engine
from utils.errors import UserError, heeded_signals
from utils.runs import Run
from utils.seeds import generator

SAVING_SHARE = 0.05  # of the time, at most, goes into saving when that is automatic
LONGEST_UNSAVED = 600.0  # seconds, within an epoch
ASK_EVERY = 16  # steps: data-parallel processes wait for each other when they ask
SAVER = ThreadPoolExecutor(1)  # writes the resume states while the training goes on
N_PICTURES = 16  # reconstructions shown; as many samples of large images, four times as many of small ones


class Interrupted(Exception):
    """A signal to end came, and the state has been saved."""

    def __init__(self, number: int, epoch: int):
        super().__init__(number, epoch)
        self.signal, self.epoch = number, epoch


class Signals:
    """Remembers a signal to end instead of dying of it, so that the training can save first."""

    def __enter__(self):
        self.received = None
        self.before = {s: signal.signal(s, self._remember) for s in heeded_signals()}
        return self

    def _remember(self, number, frame):
        self.received = self.received or number

    def __exit__(self, *_):
        for number, handler in self.before.items():  # once one has come, more of them shall not disturb the end
            signal.signal(number, signal.SIG_IGN if self.received else handler)


class Chunk:
    """Cells in training: M stacked models, one Adam, one position (epoch, step) in the data.

    All cells share the seed's initial weights, batches and noise, so what differs between them is due to
    their betas alone. A position is resumed exactly: batches and noise depend on (seed, epoch, step) only.
    Where the engine has room for more models than there are cells, the rest train along and are forgotten.
    """

    def __init__(self, runs: list[Run], states: list[dict | None], engine: Engine):
        self.runs, self.config, self.device = runs, runs[0].config, engine.device
        self.engine, self.stack, device = engine, engine.stack, engine.device
        engine.restart(self.config.seed)
        spare = [1.0] * (self.stack.m - len(runs))
        self.beta_y = torch.tensor([r.config.beta_y for r in runs] + spare, device=device)
        self.beta_z = torch.tensor([r.config.beta_z for r in runs] + spare, device=device)
        self.live = dict(enumerate(runs))  # those not failed
        self.epoch = self.step = 0
        self.seconds = 0.0  # spent on each cell
        self.history = self.noise = None  # of this epoch: the batches' sums (steps, M, 4), the generator
        self.saving, self.cost_of_save = None, 0.0  # what is being written, and the seconds that it took last
        if states[0] is not None:
            self._load(states)
        self.good = self.stack.snapshot()  # the weights to keep where a loss is not finite

    def _load(self, states: list[dict]) -> None:
        for m, state in enumerate(states):
            self.engine.load_cell(m, state)
        first = states[0]
        self.epoch, self.step, self.seconds = first["epoch"], first["step"], first["seconds"]
        if self.step:
            self.history = torch.zeros(len(first["history"]), self.stack.m, len(TERMS), device=self.device)
            self.history[:, : len(states)] = torch.stack([s["history"] for s in states], 1)
            self.noise = torch.Generator(self.device)
            try:
                self.noise.set_state(first["noise"])
            except RuntimeError as e:
                where = "a CPU" if self.device.type == "cuda" else "a GPU"
                raise UserError(f"{self.runs[0].path}: saved within an epoch on {where}; continue there") from e

    def save(self) -> None:
        """Copies every live cell's resume state to the CPU; it is written while the training goes on."""
        self.settle()
        start = time.monotonic()
        stacked, written = self.engine.on_host(), dict(self.written)
        numbers = {name: getattr(self, name) for name in ("epoch", "step", "seconds")}
        numbers |= {"adam_steps": self.engine.adam_steps, "threads": torch.get_num_threads()}
        history, noise = (self.history.cpu().clone(), self.noise.get_state()) if self.step else (None, None)

        def copied(t):  # by NumPy: torch would start threads of its own here, which slow the training's down
            return torch.from_numpy(t.numpy().copy())

        def write():
            for m, run in written.items():
                state = {key: {name: copied(t[m]) for name, t in stacked[key].items()} for key in stacked}
                within_epoch = {"history": copied(history[:, m]), "noise": noise} if history is not None else {}
                run.save_state({**state, **numbers, **within_epoch})
            self.cost_of_save = time.monotonic() - start

        self.saving = SAVER.submit(write)

    def settle(self) -> None:
        """Waits until what is being written is on the disk; raises what went wrong with it."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def cheap_to_save(self, saved_at: float) -> bool:
        """Whether a save now, the last one having begun then, keeps within its share of the time."""
        done = self.saving is None or self.saving.done()
        return done and (time.monotonic() - saved_at) * SAVING_SHARE >= self.cost_of_save

    def stop(self, signals: "Signals") -> int | None:
        """The signal to stop for; data-parallel processes ask each other, now and then, so as to stop together."""
        if not self.engine.data_parallel:
            return signals.received
        if self.step % ASK_EVERY:
            return None
        return largest_of_all(signals.received or 0, self.device) or None

    @property
    def written(self) -> dict[int, Run]:
        """The live cells that this process writes: of data-parallel processes the first writes all."""
        return self.live if is_first() or not self.engine.data_parallel else {}

    def drop_failed(self, means: torch.Tensor, step: int) -> None:
        """Ends the cells whose figures (M, ...) are not finite: marks them failed, keeps their last good weights."""
        for m in [m for m in self.live if not means[m].isfinite().all()]:
            self.settle()
            values = self.history[:step, m].tolist()
            bad = next((i for i, v in enumerate(values) if not all(map(math.isfinite, v))), None)
            if bad is None:  # the training images' figures are finite, the test images' are not
                bad, values = step - 1, [means[m, -len(TERMS) :].tolist()] * step
            if m in self.written:
                self.live[m].finish(
                    self.stack.cell(m, self.good),
                    {
                        "status": "failed",
                        "epoch": self.epoch + 1,
                        "step": bad + 1,
                        "terms": {name: str(v) for name, v in zip(TERMS, values[bad], strict=True)},
                    },
                )
            self.live.pop(m)

    def finish(self, train: torch.Tensor, test: torch.Tensor, data: Data) -> None:
        """Writes the trained weights of every live cell, and how the training ended."""
        self.settle()
        for m, run in self.written.items():
            model = self.stack.plain(m)
            quality = model.psnr(data.test.batches(self.config.batch_size))
            result = {
                "status": "finished",
                "epoch": self.epoch,
                "seconds": round(self.seconds, 2),
                "device": str(self.device),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "parameters": sum(p.numel() for p in model.parameters()),
                "train": dict(zip(TERMS, train[m].tolist(), strict=True)),
                "test": {
                    **dict(zip(TERMS, test[m].tolist(), strict=True)),
                    "psnr": quality if math.isfinite(quality) else None,
                },
            }
            run.finish(self.stack.cell(m), result)


def rate_weight(epoch: int, warmup_epochs: int) -> float:
    """The weight of both rates in an epoch: from 0 in the first linearly to 1 after `warmup_epochs`."""
    return min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0


def train(chunk: Chunk, data: Data, signals: Signals, save_every: int | None = None) -> None:
    """Trains a chunk to the end, saving every so many epochs (None: as often as costs 5 % of the time).

    Raises Interrupted, after saving, when a signal has come.
    """
    try:
        _train(chunk, data, signals, save_every)
    finally:
        chunk.settle()


def _train(chunk: Chunk, data: Data, signals: Signals, save_every: int | None) -> None:
    config, stack = chunk.config, chunk.stack
    steps = math.ceil(len(data.train) / config.batch_size)
    log = Log(chunk, data)
    bar = progress(
        total=config.num_epochs * steps, initial=chunk.epoch * steps + chunk.step, unit="step", dynamic_ncols=True
    )
    saved_at = time.monotonic()

    def save(stop):
        nonlocal saved_at
        saved_at = time.monotonic()
        chunk.save()
        if stop:
            chunk.settle()
            bar.close()
            raise Interrupted(stop, chunk.epoch)

    started, seconds_before = time.monotonic(), chunk.seconds
    while chunk.live and chunk.epoch < config.num_epochs:
        weight = rate_weight(chunk.epoch, config.warmup_epochs)
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
            noise = stack.model.noise(whole, chunk.noise, temperature)
            chunk.history[chunk.step] = chunk.engine.step(x, noise, weight * chunk.beta_y, weight * chunk.beta_z)
            chunk.step += 1
            bar.update()
            stop = chunk.stop(signals)
            overdue = save_every is None and time.monotonic() - saved_at > LONGEST_UNSAVED
            if (stop or overdue) and chunk.step < steps:
                chunk.seconds = seconds_before + (time.monotonic() - started) / len(chunk.runs)
                chunk.drop_failed(chunk.history[: chunk.step].sum(0).cpu(), chunk.step)
                log.show(bar, chunk.history[: chunk.step].double().sum(0) / (chunk.step * config.batch_size))
                save(stop)
        train_means = (chunk.history.double().sum(0) / len(data.train)).cpu()
        test_noise = generator(chunk.device, config.seed, "test")
        test_means = stack.evaluate(data.test, config.batch_size, test_noise, chunk.beta_y, chunk.beta_z).cpu()
        chunk.drop_failed(torch.cat([train_means, test_means], 1), steps)
        chunk.epoch, chunk.step = chunk.epoch + 1, 0
        chunk.seconds = seconds_before + (time.monotonic() - started) / len(chunk.runs)
        log.show(bar, train_means)
        log.epoch(train_means, test_means)
        stop = chunk.stop(signals)
        if chunk.epoch == config.num_epochs:
            chunk.finish(train_means, test_means, data)
        elif stop or (chunk.cheap_to_save(saved_at) if save_every is None else chunk.epoch % save_every == 0):
            save(stop)
    bar.close()
    log.close()


class Log:
    """The progress bar's figures, and each cell's TensorBoard events."""

    def __init__(self, chunk: Chunk, data: Data):
        self.chunk = chunk
        first_epoch = chunk.epoch + 1
        self.writers = {m: SummaryWriter(run.path, purge_step=first_epoch) for m, run in chunk.written.items()}
        self.pictures_every = max(1, chunk.config.num_epochs // 10)
        self.images = next(iter(data.test.batches(N_PICTURES)))[0]
        self.n_samples = N_PICTURES if self.images.shape[-1] > 32 else 4 * N_PICTURES
        if chunk.epoch == 0 and chunk.step == 0:
            for m, writer in self.writers.items():
                betas = {"beta_y": chunk.runs[m].config.beta_y, "beta_z": chunk.runs[m].config.beta_z}
                with self.told(chunk.runs[m]):
                    for summary in hparams(betas, {f"test/{name}": 0 for name in TERMS}):
                        writer.file_writer.add_summary(summary)

    def show(self, bar: tqdm, means: torch.Tensor) -> None:
        """Loss and rates on the bar, averaged over the live cells."""
        live = means[list(self.chunk.live)].mean(0).tolist()
        values = {name: f"{v:.4g}" for name, v in zip(TERMS, live, strict=True) if name != "ll"}
        bar.set_postfix(epoch=self.chunk.epoch, **values)

    def epoch(self, train_means: torch.Tensor, test_means: torch.Tensor) -> None:
        """Curves after every epoch; reconstructions and samples ten times in a training."""
        for m, run in self.chunk.written.items():
            locks.check(run.path)
            with self.told(run):
                self._write(m, train_means, test_means)

    @contextlib.contextmanager
    def told(self, run: Run) -> Iterator[None]:
        """Raises UserError for what kept the events from being written, which names no file."""
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
        if epoch % self.pictures_every == 0 or epoch == config.num_epochs:
            model = self.chunk.stack.plain(m)
            pairs = torch.cat([self.images, model.reconstruct(self.images)])
            samples = model.sample(self.n_samples, generator=generator(self.chunk.device, config.seed, "samples"))
            self.writers[m].add_image("reconstructions", make_grid(pairs, nrow=N_PICTURES), epoch)
            self.writers[m].add_image("samples", make_grid(samples, nrow=N_PICTURES), epoch)
        self.writers[m].flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
