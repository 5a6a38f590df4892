"""A chunk: grid cells that train together, with their betas, position in the data, checkpoints and results."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from datasets.loading import Data
from models.stack import TERMS
from models.tables import COLLAPSED
from utils.distributed import is_first, largest_of_all
from utils.errors import UserError
from utils.runs import Run
from utils.training.betas import Betas
from utils.training.engine import MOMENTS, Engine

SAVING_SHARE = 0.05  # the largest share of the training time that automatic checkpoints may take
ASK_EVERY = 16  # steps between the synchronisations in which data-parallel processes share a signal to stop
IN_USE = 2.0  # nats of R(z), or half of what it can hold: more than noise keeps for a while
SPREAD = 0.15  # of the training, in which a conditioned model's betas fill their range
SAVER = ThreadPoolExecutor(1)  # writes the checkpoints in the background


class Chunk:
    """Cells that train together: M stacked models, one Adam, one position (epoch, step) in the data.

    All cells share the seed's initial weights, batches and noise, so they differ only in their betas.
    Training resumes exactly, because batches and noise depend only on (seed, epoch, step). If the engine
    holds more models than there are cells, the surplus models train with betas of 1 and are discarded.
    """

    def __init__(self, runs: list[Run], states: list[dict | None], engine: Engine):
        self.runs, self.config, self.device = runs, runs[0].config, engine.device
        self.engine, self.stack = engine, engine.stack
        engine.restart(self.config.seed)
        self.betas = Betas([r.config for r in runs], self.stack.m, engine.device)
        self.live = dict(enumerate(runs))  # the cells that have not failed, by model index
        self.epoch = self.step = 0
        self.seconds = 0.0  # training time per cell
        self.history = self.noise = None  # of the current epoch: each step's sums (steps, M, 4), the noise generator
        self.at_points: dict[str, dict[str, float]] = {}  # of a conditioned model, after the last epoch
        self._spread_to(0.0)
        self.saving, self.cost_of_save = None, 0.0  # the pending write; the seconds that the last one took
        if states[0] is not None:
            self._load(states)
        self.good = self.stack.snapshot()  # the weights to keep if the loss becomes non-finite

    def _load(self, states: list[dict]) -> None:
        for m, state in enumerate(states):
            self.engine.load_cell(m, state)
            self.betas.load(m, state)
        first = states[0]
        self.epoch, self.step, self.seconds = first["epoch"], first["step"], first["seconds"]
        self._spread_to(first.get("spread", 0.0))
        if self.step:
            self.history = torch.zeros(len(first["history"]), self.stack.m, len(TERMS), device=self.device)
            self.history[:, : len(states)] = torch.stack([s["history"] for s in states], 1)
            self.noise = torch.Generator(self.device)
            try:
                self.noise.set_state(first["noise"])
            except RuntimeError as e:
                where = "a CPU" if self.device.type == "cuda" else "a GPU"
                raise UserError(f"{self.runs[0].path}: saved within an epoch on {where}; resume it on {where}") from e

    def widen(self, train: torch.Tensor) -> None:
        """Widens, after an epoch with means (M, 4), the range of a conditioned model's betas: once z is in use.

        z comes into use within a few epochs, at betas that stay where it is worth its rate; large ones would keep it
        from that. If it has not by half of the training, the range is widened all the same.
        """
        if not self.config.is_conditioned:
            return
        has_z = math.prod(self.stack.model.z_shape) > 0
        enough = min(IN_USE, self.config.most_rate_z / 2)
        in_use = not has_z or train[:, TERMS.index("kl_z")].min() >= enough
        if in_use or 2 * self.epoch >= self.config.num_epochs:
            self._spread_to(min(1.0, self.spread + 1 / (SPREAD * self.config.num_epochs)))

    def _spread_to(self, share: float) -> None:
        """Sets the share of its range over which a conditioned model's betas are drawn."""
        self.spread = share
        if self.config.is_conditioned:
            self.stack.model.spread.fill_(share)
            self.engine.orthogonalise(share > 0)

    @property
    def collapsed(self) -> bool:
        """Whether a conditioned model's z is unused even at the smallest beta_z."""
        there = bool(self.at_points) and math.prod(self.stack.model.z_shape) > 0  # a BVAE has no z
        return there and max(terms["kl_z"] for terms in self.at_points.values()) < COLLAPSED

    def save(self) -> None:
        """Copies the checkpoints of all live cells to the CPU, and writes them in the background."""
        self.settle()
        start = time.monotonic()
        stacked, written = self.engine.on_host(), dict(self.written)
        steered = {m: self.betas.state(m) if self.betas.steered else {} for m in written}
        numbers = {name: getattr(self, name) for name in ("epoch", "step", "seconds", "spread")}
        numbers |= {"adam_steps": self.engine.adam_steps, "threads": torch.get_num_threads()}
        history, noise = (self.history.cpu().clone(), self.noise.get_state()) if self.step else (None, None)

        def copied(t):  # by NumPy: a torch copy would start a second OpenMP pool here, which slows down the training
            return torch.from_numpy(t.numpy().copy())

        def write():
            for m, run in written.items():
                state = {key: {name: copied(t[m]) for name, t in stacked[key].items()} for key in stacked}
                within_epoch = {"history": copied(history[:, m]), "noise": noise} if history is not None else {}
                run.save_state({**state, **numbers, **within_epoch, **steered[m]})
            self.cost_of_save = time.monotonic() - start

        self.saving = SAVER.submit(write)

    def settle(self) -> None:
        """Waits for the pending write; raises its exception if it failed."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def cheap_to_save(self, saved_at: float) -> bool:
        """Whether a checkpoint now keeps within SAVING_SHARE, if the last one was started at `saved_at`."""
        done = self.saving is None or self.saving.done()
        return done and (time.monotonic() - saved_at) * SAVING_SHARE >= self.cost_of_save

    def stop(self, received: int | None) -> int | None:
        """The signal to stop for, or None; data-parallel processes agree on it, so that they stop at the same step."""
        if not self.engine.data_parallel:
            return received
        if self.step % ASK_EVERY:
            return None
        return largest_of_all(received or 0, self.device) or None

    @property
    def written(self) -> dict[int, Run]:
        """The live cells whose files this process writes; of data-parallel processes, only the first writes."""
        return self.live if is_first() or not self.engine.data_parallel else {}

    def drop_failed(self, means: torch.Tensor, step: int) -> None:
        """Marks cells with non-finite means (M, ...) as failed and saves their last finite weights.

        `step` is the number of steps done in this epoch.
        """
        for m in [m for m in self.live if not means[m].isfinite().all()]:
            self.settle()
            values = self.history[:step, m].tolist()
            bad = next((i for i, v in enumerate(values) if not all(map(math.isfinite, v))), None)
            if bad is None:  # finite on the training images, but not on the test images
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
        """Writes the trained weights and the final metrics of every live cell; train and test are means (M, 4)."""
        self.settle()
        stacked = self.engine.on_host()
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
            if run.config.has_target:
                run = run.with_betas(*(float(f"{b:.6g}") for b in self.betas.values[m].tolist()))
            if self.at_points:
                result |= {"points": self.at_points, "collapsed": self.collapsed}
            adam = {key: {name: t[m].clone() for name, t in stacked[key].items()} for key in MOMENTS}
            adam |= {"adam_steps": self.engine.adam_steps, "threads": torch.get_num_threads()}
            run.finish(self.stack.cell(m), result, adam if run.config.is_extendable else None)
