"""A training: cells of a grid that train together, from their position in the data to the last epoch.

train       epochs, with checkpoints between them
step        draws the noise of a batch; every weight, rate and learning rate that depends on the time
update      forward, loss, backward, and the optimiser's step; on a GPU captured (capture.py)
evaluate    the means over the test images after an epoch; of whole batches captured, too
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.loading import Data
from models.build import build_model
from models.hvae import Noise
from models.stack import TERMS, Stack, losses, sums_of
from utils.distributed import is_first, largest_of_all, place
from utils.errors import UserError
from utils.provenance import now, provenance
from utils.runs import FORMAT, Run
from utils.seeds import generator
from utils.training import multi_rate
from utils.training.betas import Betas, rate_weights
from utils.training.capture import prepared, prepared_sums
from utils.training.console import GridBar
from utils.training.log import Log, figures
from utils.training.optimizers import MOMENTS, build_optimizer, lr_factor, set_lr
from utils.training.saving import Interrupted, Saver, Signals

ASK_EVERY = 16  # steps between the synchronisations in which data-parallel processes share a signal to stop


class Setup(NamedTuple):
    """How trainings run, whatever they train."""

    device: torch.device
    cells_at_once: int | None = None  # None: as `fastest` says on a GPU, 1 on a CPU
    compile: str = "auto"  # "auto": captured on a GPU; "on": compiled as well; "off": neither
    save_every: int | None = None  # epochs; None: as often as is cheap
    data_parallel: bool = False
    threads: int | None = None  # None: those of the checkpoint, if there is one
    overwrite: bool = False

    @property
    def size(self) -> int | None:
        """How many cells train at once, as far as it is known without trying."""
        return self.cells_at_once or (1 if self.data_parallel or self.device.type == "cpu" else None)

    @property
    def capture(self) -> bool:
        """Whether updates are captured as CUDA graphs."""
        return self.device.type == "cuda" and self.compile != "off" and not self.data_parallel

    @property
    def writes(self) -> bool:
        """Whether this process writes files: of data-parallel ones the first."""
        return is_first() or not self.data_parallel


class Training:
    """Cells that train together, in lockstep: M stacked models, one optimiser, one position (epoch, step) in the data.

    All cells share the seed's initial weights, batches and noise, so they differ only in their betas. A training
    resumes exactly, because batches and noise depend only on (seed, epoch, step). `states` are the cells' checkpoints,
    None for new ones.
    """

    def __init__(self, runs: list[Run], states: list[dict | None], setup: Setup):
        self.runs, self.setup, self.device = runs, setup, setup.device
        self.config = config = runs[0].config
        torch.manual_seed(config.seed)
        model = build_model(config).to(self.device)
        self.stack = Stack(model, len(runs), config.precision, place() if setup.data_parallel else (0, 1))
        self.optimizer = build_optimizer(config, self.stack.parameters, setup.capture)
        self.betas = Betas([run.config for run in runs], self.device)
        self.live = dict(enumerate(runs))  # the cells that have not failed, by model index
        self.epoch, self.steps_done = config.first_epoch, 0  # epochs and, of the current one, steps
        self.steps = 0  # of an epoch
        self.spread = 0.0  # the share of its range over which a conditioned model's betas are drawn
        self.seconds, self.resumed = 0.0, time.monotonic()  # training time per cell, until it was last resumed
        self.history = self.noise = None  # of the current epoch: each step's sums (steps, M, 4), the noise generator
        self.fast = self.fast_sums = None  # `update`, and the stack's `sums`, prepared for whole batches
        self.session: dict = {}  # what makes it now (provenance.py), and, of each cell, what made it before
        self.earlier = [(state or {}).get("sessions", []) for state in states]
        self.points: dict[str, dict[str, float]] = {}  # terms of a conditioned model at single betas
        self.saver = Saver(setup.save_every)
        if states[0] is not None:
            self._load(states)
        self._set_spread(self.spread)
        self.good = self.stack.snapshot()  # the weights to keep if the loss becomes non-finite

    @torch.no_grad()
    def _load(self, states: list[dict]) -> None:
        first = states[0]
        for m, state in enumerate(states):
            self.betas.load(m, state)
            for name, p in self.stack.parameters.items():
                p[m] = state["weights"][name]
                self.optimizer.state[p]["step"].fill_(first["adam_steps"])  # shared by all models
                for key in MOMENTS:
                    self.optimizer.state[p][key][m] = state[key][name]
        self.epoch, self.steps_done, self.seconds = first["epoch"], first["step"], first["seconds"]
        self.spread = first.get("spread", 0.0)
        if self.steps_done:
            self.history = torch.stack([s["history"] for s in states], 1).to(self.device)
            self.noise = torch.Generator(self.device)
            try:
                self.noise.set_state(first["noise"])
            except RuntimeError as e:
                where = "a CPU" if self.device.type == "cuda" else "a GPU"
                raise UserError(f"{self.runs[0].path}: saved within an epoch on {where}; resume it on {where}") from e

    def train(self, data: Data, signals: Signals, bar: GridBar) -> None:
        """Trains to the last epoch. Raises Interrupted after a signal, once a checkpoint is saved."""
        config, n, size = self.config, len(data.train), self.config.batch_size
        self.steps = math.ceil(n / size)
        self.session = provenance(self.device, data)
        log = Log(self.written, data, self.epoch, new=(self.epoch, self.steps_done) == (config.first_epoch, 0))
        bar.begin(self)
        try:
            while self.live and self.epoch < config.last_epoch:
                if self.steps_done == 0:
                    self.begin_epoch(self.steps)
                order = (config.seed, self.epoch)
                for x, _ in data.train.batches(size, order, self.steps_done, self.stack.part):
                    self.step(x, min(size, n - self.steps_done * size))
                    bar.update(len(self.runs))
                    number = self.stop(signals.received)
                    if (number or self.saver.is_overdue) and self.steps_done < self.steps:
                        self._count_seconds()
                        self.drop_failed(self.history[: self.steps_done].sum(0).cpu(), self.steps_done)
                        self.save(number)
                train, test = (self.history.double().sum(0) / n).cpu(), self.evaluate(data).cpu()
                self.drop_failed(torch.cat([train, test], 1), self.steps)
                self.epoch, self.steps_done = self.epoch + 1, 0
                self._set_spread(multi_rate.next_spread(config, self.epoch, self.spread, train))
                self._count_seconds()
                bar.show(self, train[list(self.live), 0].mean().item())
                self._log(log, {"train": train, "test": test})
                number = self.stop(signals.received)
                if self.epoch == config.last_epoch:
                    self.finish(train, test, data)
                elif number or self.saver.is_due(self.epoch):
                    self.save(number)
            bar.end(self)
        finally:
            self.saver.settle()

    def evaluate(self, data: Data) -> Tensor:
        """Means over the test images of loss, ll, kl_y, kl_z, (M, 4), with the same noise after every epoch."""
        noise = generator(self.device, self.config.seed, "test")
        return self.stack.evaluate(
            data.test, self.config.batch_size, noise, self.betas.y, self.betas.z, self.sums_of_whole
        )

    def sums_of_whole(self, *inputs) -> Tensor:
        """The stack's `sums` of a whole batch."""
        self.fast_sums = self.fast_sums or prepared_sums(self, inputs)
        return self.fast_sums(*inputs)

    def begin_epoch(self, steps: int) -> None:
        """Starts the noise and the history of an epoch of so many steps; keeps the weights that are good so far."""
        self.steps = steps
        self.noise = generator(self.device, self.config.seed, self.epoch, "noise")
        self.history = torch.zeros(self.steps, self.stack.m, len(TERMS), device=self.device)
        self.good = self.stack.snapshot()

    def step(self, x: Tensor, n: int) -> Tensor:
        """One step of all models on images x (B, C, H, W), this process's part of a batch of n.

        Returns the sums over the batch of loss, ll, kl_y, kl_z: (M, 4).
        """
        config, model, all_steps = self.config, self.stack.model, self.steps * self.config.last_epoch
        epochs = self.epoch + self.steps_done / self.steps
        progress = (epochs - config.first_epoch) / config.own_epochs
        temperature = model.family.temperature(self.epoch)
        if temperature is not None:
            temperature = torch.full((), temperature, device=self.device)
        noise = model.noise(n, self.noise, temperature)
        weight_y, weight_z = rate_weights(config, self.epoch)
        inputs = x, noise, weight_y * self.betas.y, weight_z * self.betas.z
        set_lr(self.optimizer, config.learning_rate * lr_factor(config, progress, self.spread))
        if n < config.batch_size:  # an epoch's last batch
            sums = self.update(*inputs)
        else:
            self.fast = self.fast or prepared(self, inputs, self.setup.capture, self.setup.compile == "on")
            sums = self.fast(*inputs)
        self.history[self.steps_done] = sums
        self.betas.steer(sums, n, progress, all_steps)
        self.steps_done += 1
        return sums

    def update(
        self, x: Tensor, noise: Noise, beta_y: Tensor, beta_z: Tensor, terms_of: Callable | None = None
    ) -> Tensor:
        """Forward, loss, backward, optimiser: as `step`, with the noise of the whole batch and betas (M,).

        `terms_of` is another implementation of the stack's `terms`.
        """
        n, noise = len(noise.y), noise.of(self.stack.part)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stack.low):
            terms = (terms_of or self.stack.terms)(x, noise)
        loss = losses(terms, noise, beta_y, beta_z)  # (M, B)
        objective = loss if noise.log_betas is None else loss * self.stack.model.image_weights(noise.log_betas)
        self.optimizer.zero_grad()
        (objective.sum() * (1 / n)).backward()
        if self.stack.world > 1:
            for p in self.stack.parameters.values():
                self.stack.of_all(p.grad)
        self.optimizer.step()
        return self.stack.of_all(sums_of(loss, terms))

    def _set_spread(self, spread: float) -> None:
        """Sets the share of its range over which a conditioned model's betas are drawn.

        Until they spread, its weights take Adam's steps: with Muon from the start, y learnt too fast for a categorical
        z to come into use. A captured update is captured anew.
        """
        self.spread = spread
        if self.config.is_conditioned:
            self.stack.model.spread.fill_(spread)
            if self.config.optimizer == "muon" and self.optimizer.on != (spread > 0):
                self.optimizer.on, self.fast = spread > 0, None

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds, self.resumed = self.seconds + (now - self.resumed) / len(self.runs), now

    def stop(self, received: int | None) -> int | None:
        """The signal to stop for, or None; data-parallel processes agree on it, so that they stop at the same step."""
        if not self.setup.data_parallel:
            return received
        if self.steps_done % ASK_EVERY:
            return None
        return largest_of_all(received or 0, self.device) or None

    @property
    def written(self) -> dict[int, Run]:
        """The live cells whose files this process writes."""
        return self.live if self.setup.writes else {}

    def _log(self, log: Log, means: dict[str, Tensor]) -> None:
        """Logs an epoch's means (M, 4) by split; of a conditioned model also its terms at single betas."""
        for m in self.written:
            model, of_cell = self.stack.plain(m), {split: of[m].tolist() for split, of in means.items()}
            if self.config.is_conditioned:
                self.points = multi_rate.terms_at_points(model, log.curve_images)
                multi_rate.note_collapse(self.config, self.epoch, self.spread, self.points)
                of_cell |= {name: [*terms.values()] for name, terms in self.points.items()}
            log.write(m, model, self.epoch, of_cell)

    def state(self, m: int) -> dict:
        """The checkpoint of cell m between epochs, on the CPU."""

        def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.detach()[m].to("cpu", copy=True) for name, t in tensors.items()}

        parameters, of_optimizer = self.stack.parameters, self.optimizer.state
        state = {"weights": copies(parameters)}
        state |= {key: copies({name: of_optimizer[p][key] for name, p in parameters.items()}) for key in MOMENTS}
        state |= {"epoch": self.epoch, "step": self.steps_done, "seconds": self.seconds, "spread": self.spread}
        steps = int(next(iter(of_optimizer.values()))["step"])
        state |= {"format": FORMAT, "adam_steps": steps, "threads": torch.get_num_threads()}
        return {**state, "sessions": self.sessions(m)}

    def sessions(self, m: int) -> list[dict]:
        """What has made cell m until now."""
        return self.earlier[m] + ([{**self.session, "end": now()}] if self.session else [])

    def save(self, number: int | None = None) -> None:
        """Copies the checkpoints of all live cells to the CPU, and writes them in the background.

        With the number of a signal it waits for that, and raises Interrupted.
        """
        states = {m: self.state(m) for m in self.written}
        for m, state in states.items():
            if self.steps_done:
                state |= {"history": self.history[:, m].to("cpu", copy=True), "noise": self.noise.get_state()}
            if self.betas.steered:
                state |= self.betas.state(m)
        runs = dict(self.written)

        def write():
            for m, state in states.items():
                runs[m].save_state(state)

        self.saver.start(write)
        if number:
            self.saver.settle()
            raise Interrupted(number, self.epoch)

    def drop_failed(self, means: Tensor, steps: int) -> None:
        """Marks cells with non-finite means (M, ...), after so many steps of an epoch, as failed.

        Their weights are the last finite ones.
        """
        for m in [m for m in self.live if not means[m].isfinite().all()]:
            self.saver.settle()
            values = self.history[:steps, m].tolist()
            bad = next((i for i, v in enumerate(values) if not all(map(math.isfinite, v))), None)
            if bad is None:  # finite on the training images, but not on the test images
                bad, values = steps - 1, [means[m, -len(TERMS) :].tolist()] * steps
            if m in self.written:
                terms = {name: str(v) for name, v in zip(TERMS, values[bad], strict=True)}
                result = {"status": "failed", "epoch": self.epoch + 1, "step": bad + 1, "terms": terms}
                result["sessions"] = self.sessions(m)
                self.live[m].finish(self.stack.cell(m, self.good), result)
            self.live.pop(m)

    def finish(self, train: Tensor, test: Tensor, data: Data) -> None:
        """Writes the trained weights and the final metrics of every live cell; train and test are means (M, 4)."""
        self.saver.settle()
        for m, run in self.written.items():
            state, model, first = self.state(m), self.stack.plain(m), run.config
            if first.has_target:
                beta_y, beta_z = (float(f"{b:.6g}") for b in self.betas.values[m].tolist())
                run = run.with_settings(beta_y=beta_y, beta_z=beta_z)
            result = {
                "status": "finished",
                "epoch": self.epoch,
                "seconds": round(self.seconds, 2),
                "parameters": sum(p.numel() for p in model.parameters()),
                "sessions": state["sessions"],
                **figures(model, data, run.config, train=train[m], test=test[m]),
            }
            if first.has_target:
                result["first_betas"] = {name: getattr(first, name) for name in ("beta_y", "beta_z")}
                run.write_config()
            if self.points:
                what = multi_rate.collapsed(self.config, self.points)
                result |= {"points": self.points, "collapsed": what or False}
            optimizer = {key: state[key] for key in (*MOMENTS, "adam_steps", "threads", "format", "sessions")}
            run.finish(state["weights"], result, optimizer if run.config.is_extendable else None)
