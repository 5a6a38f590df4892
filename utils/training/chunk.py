"""Cells in training together: their weights, betas and position in the data, how they are saved and how they end."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from datasets.loading import Data
from models.stack import TERMS
from utils.distributed import is_first, largest_of_all
from utils.errors import UserError
from utils.runs import Run
from utils.training.betas import Betas
from utils.training.engine import Engine

SAVING_SHARE = 0.05  # of the time, at most, goes into saving when that is automatic
ASK_EVERY = 16  # steps: data-parallel processes wait for each other when they ask
COLLAPSED = 0.1  # nats of R(z) at the best: less is a z that is not used
SAVER = ThreadPoolExecutor(1)  # writes the resume states while the training goes on


class Chunk:
    """Cells in training: M stacked models, one Adam, one position (epoch, step) in the data.

    All cells share the seed's initial weights, batches and noise, so what differs between them is due to
    their betas alone. A position is resumed exactly: batches and noise depend on (seed, epoch, step) only.
    Where the engine has room for more models than there are cells, the rest train along and are forgotten.
    """

    def __init__(self, runs: list[Run], states: list[dict | None], engine: Engine):
        self.runs, self.config, self.device = runs, runs[0].config, engine.device
        self.engine, self.stack = engine, engine.stack
        engine.restart(self.config.seed)
        self.betas = Betas([r.config for r in runs], self.stack.m, engine.device)
        self.live = dict(enumerate(runs))  # those not failed
        self.epoch = self.step = 0
        self.seconds = 0.0  # spent on each cell
        self.history = self.noise = None  # of this epoch: the batches' sums (steps, M, 4), the generator
        self.at_points: dict[str, dict[str, float]] = {}  # of a conditioned model, after the last epoch
        self.saving, self.cost_of_save = None, 0.0  # what is being written, and the seconds that it took last
        if states[0] is not None:
            self._load(states)
        self.good = self.stack.snapshot()  # the weights to keep where a loss is not finite

    def _load(self, states: list[dict]) -> None:
        for m, state in enumerate(states):
            self.engine.load_cell(m, state)
            self.betas.load(m, state)
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

    @property
    def collapsed(self) -> bool:
        """Whether a conditioned model's z is unused even at the smallest beta_z."""
        return bool(self.at_points) and max(terms["kl_z"] for terms in self.at_points.values()) < COLLAPSED

    def save(self) -> None:
        """Copies every live cell's resume state to the CPU; it is written while the training goes on."""
        self.settle()
        start = time.monotonic()
        stacked, written = self.engine.on_host(), dict(self.written)
        steered = {m: self.betas.state(m) if self.betas.steered else {} for m in written}
        numbers = {name: getattr(self, name) for name in ("epoch", "step", "seconds")}
        numbers["adam_steps"] = self.engine.adam_steps
        history, noise = (self.history.cpu().clone(), self.noise.get_state()) if self.step else (None, None)

        def copied(t):  # by NumPy: torch would start threads of its own here, which slow the training's down
            return torch.from_numpy(t.numpy().copy())

        def write():
            for m, run in written.items():
                state = {key: {name: copied(t[m]) for name, t in stacked[key].items()} for key in stacked}
                within_epoch = {"history": copied(history[:, m]), "noise": noise} if history is not None else {}
                run.save_state({**state, **numbers, **within_epoch, **steered[m]})
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

    def stop(self, received: int | None) -> int | None:
        """The signal to stop for; data-parallel processes ask each other, now and then, so as to stop together."""
        if not self.engine.data_parallel:
            return received
        if self.step % ASK_EVERY:
            return None
        return largest_of_all(received or 0, self.device) or None

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
                "parameters": sum(p.numel() for p in model.parameters()),
                "train": dict(zip(TERMS, train[m].tolist(), strict=True)),
                "test": {
                    **dict(zip(TERMS, test[m].tolist(), strict=True)),
                    "psnr": quality if math.isfinite(quality) else None,
                },
            }
            if run.config.has_target:
                run = run.with_betas(*(float(f"{b:.6g}") for b in self.betas.values[m].tolist()))
            if self.at_points:
                result |= {"points": self.at_points, "collapsed": self.collapsed}
            run.finish(self.stack.cell(m), result)
