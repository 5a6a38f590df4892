"""The training step: M stacked models and their optimiser, compiled and, on a GPU, captured as a CUDA graph."""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from models.build import build_model
from models.conditioned import OWN
from models.hvae import Noise
from models.stack import Stack
from utils.config import Config
from utils.distributed import place
from utils.errors import is_out_of_memory, one_line
from utils.training.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; Muon leaves the second of layers' weights at 0
WARM_UP = 3  # steps before a capture, in which buffers are allocated and cuDNN and the compiler are tuned
STACKED = 8  # the cells that `fastest` stacks; by a model of a GPU's speed, more gain nothing (untested)


class Differs(Exception):
    """The results of two implementations of a step differ."""


class Engine:
    """M stacked models and their optimiser; reused for all chunks of a grid, so that it compiles and captures once.

    `compile` runs the step through torch.compile, `capture` records it as a CUDA graph for all full-size batches; both
    are compared with the eager step before they are used. With `data_parallel`, each torchrun process takes its part of
    every batch.
    """

    def __init__(
        self,
        config: Config,
        m: int,
        device: torch.device,
        compile: bool = False,
        capture: bool = False,
        data_parallel: bool = False,
    ):
        on_gpu = device.type == "cuda"
        self.config, self.device, self.data_parallel = config, device, data_parallel
        self.compile, self.capture, self.replay = compile, capture and not data_parallel, None
        self.to_prepare = self.capture or compile and not data_parallel
        self.stack = Stack(build_model(config).to(device), m, config.precision)
        parameters = self.stack.parameters
        adam = {"fused": True, "capturable": on_gpu and self.capture}
        adam["lr"] = torch.tensor(config.learning_rate, device=device) if adam["capturable"] else config.learning_rate
        if config.optimizer == "muon":
            weights = [name for name, p in parameters.items() if p.dim() > 2 and not name.startswith(OWN)]
            others = [p for name, p in parameters.items() if name not in weights]
            self.optimizer = Muon([parameters[name] for name in weights], others, **adam)
        else:
            self.optimizer = torch.optim.Adam(parameters.values(), **adam)
        for p in parameters.values():  # now, so that all later changes are in place, where a captured graph sees them
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=device if on_gpu else "cpu"), **moments}
        rank, world = place() if data_parallel else (0, 1)
        if compile and data_parallel:
            self.stack.compile(len(range(config.batch_size)[rank::world]))
        if data_parallel:
            self.stack.distribute(rank, world)

    def fits(self, config: Config, m: int) -> bool:
        """Whether m cells of that Config can use this engine and fill most of it; betas, seed, names may differ."""
        names = ("beta_y", "beta_z", "target_rate_y", "target_rate_z", "seed", "init_from")
        names += ("run_name", "run_batch_name")
        free = {name: getattr(self.config, name) for name in names}
        return dataclasses.replace(config, **free) == self.config and m <= self.stack.m < 2 * m

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Resets all models to the seed's initial weights, and Adam to its initial state."""
        torch.manual_seed(seed)
        initial = dict(build_model(self.config).named_parameters())
        for name, p in self.stack.parameters.items():
            p.copy_(initial[name].expand_as(p))
            for value in self.optimizer.state[p].values():
                value.zero_()

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate; a captured graph sees it."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def orthogonalise(self, on: bool) -> None:
        """Whether weights take Muon's own steps; while a conditioned model's z is not in use, they take Adam's.

        With Muon from the start, y learnt too fast for a categorical z to come into use. A captured step is recorded
        anew.
        """
        if isinstance(self.optimizer, Muon) and self.optimizer.on != on:
            self.optimizer.on = on
            self.replay, self.to_prepare = None, self.capture

    @property
    def adam_steps(self) -> int:
        """Number of optimiser steps taken."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def on_host(self) -> dict[str, dict[str, Tensor]]:
        """Copies of all weights and Adam moments on the CPU, stacked (M, ...), by parameter name."""
        state, parameters = self.optimizer.state, self.stack.parameters.items()
        moments = {key: {name: state[p][key].to("cpu", copy=True) for name, p in parameters} for key in MOMENTS}
        return {"weights": {name: p.detach().to("cpu", copy=True) for name, p in parameters}, **moments}

    @torch.no_grad()
    def load_cell(self, m: int, state: dict) -> None:
        """Loads weights and Adam moments of model m from a checkpoint; the step count is shared by all models."""
        self.stack.load_cell(m, state["weights"])
        for name, p in self.stack.parameters.items():
            adam = self.optimizer.state[p]
            adam["step"].fill_(state["adam_steps"])
            for key in MOMENTS:
                adam[key][m] = state[key][name]

    def step(self, x: Tensor, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """One optimiser step of all models on images x (B, C, H, W), with betas (M,).

        Returns the sums over the batch of loss, ll, kl_y, kl_z: (M, 4).
        """
        inputs = (x, noise, beta_y, beta_z)
        if self.to_prepare and len(x) == self.config.batch_size:
            self.to_prepare = False
            self._prepare(inputs)
        if self.replay is None or any(a.shape != b.shape for a, b in zip(flat(inputs), self.inputs, strict=True)):
            return self.stack.step(self.optimizer, *inputs)  # also for an epoch's last batch, if it is smaller
        for there, new in zip(self.inputs, flat(inputs), strict=True):
            there.copy_(new)
        self.replay()
        return self.sums

    def _tensors(self) -> list[Tensor]:
        """All tensors that a step changes: the parameters and Adam's state."""
        adam = (t for state in self.optimizer.state.values() for t in state.values())
        return [*self.stack.parameters.values(), *adam]

    def results(self, sums: Tensor) -> list[Tensor]:
        """Copies of a step's sums and gradients, by which two implementations of a step are compared."""
        return [sums.clone(), *(p.grad.clone() for p in self.stack.parameters.values())]

    def _prepare(self, inputs: tuple) -> None:
        """Compiles the step for batches of this size, and captures it, after comparing it with the eager step.

        Falls back, with a note, if compiling or capturing fails or changes the result.
        """
        before = [t.detach().clone() for t in self._tensors()]
        expected = self.results(self.stack.step(self.optimizer, *inputs))
        self._set(before)
        self.inputs = [t.clone() for t in flat(inputs)]
        x, *rest, beta_y, beta_z = self.inputs
        there = iter(rest)
        noise = Noise(*(None if t is None else next(there) for t in inputs[1]))
        fixed = (x, noise, beta_y, beta_z)
        for compile in [True] * self.compile + [False] * self.capture:
            try:
                if compile and not self.stack.compiled:
                    self.stack.compile(len(x))
                    with torch.no_grad():
                        hard = noise._replace(temperature=None)
                        self.stack.fast_terms(x, hard)  # as in an evaluation, to compile that here as well
                if self.capture:
                    self.replay, self.sums = record(lambda: self.stack.step(self.optimizer, *fixed), self.device)
                    self._set(before)
                    self.replay()
                    results = self.results(self.sums)
                else:
                    results = self.results(self.stack.step(self.optimizer, *fixed))
                check_same(results, expected, self.stack.low)
                return self._set(before)
            except Exception as e:
                self.replay = self.stack.compiled = None
                if is_out_of_memory(e):
                    raise torch.OutOfMemoryError(str(e)) from e
                self._set(before)
                what = "compiled" if compile else "captured as a CUDA graph"
                print(f"note: the step cannot be {what}, continuing without: {one_line(e)}", flush=True)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        """Sets, in place, all tensors that a step changes."""
        for there, value in zip(self._tensors(), values, strict=True):
            there.copy_(value)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for warm-up and capture; only one, since cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Captures a step as a CUDA graph. Returns a function that replays it, and the tensor that holds its result."""
    here, side, graph = torch.cuda.current_stream(device), side_stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    here.wait_stream(side)
    try:
        # "thread_local", since the data loader's threads may use CUDA during the capture
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = step()
    finally:
        torch.cuda.set_stream(here)  # torch does not restore the stream if the capture fails
    return graph.replay, result


def free(device: torch.device) -> None:
    """Frees the memory of discarded engines; a compiled one is part of a reference cycle, hence gc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_same(results: list[Tensor], expected: list[Tensor], low: bool) -> None:
    """Raises Differs unless a step's `results`, each (M, ...), agree with the `expected` ones in relative norm.

    The tolerance is tight for the sums and for all gradients together, loose for each gradient alone: in bfloat16
    (`low`), rounding alone changes a layer's gradient by 5 to 10 %. Models with a non-finite loss are ignored.
    """
    each, together = (0.5, 0.05) if low else (0.1, 0.01) if torch.backends.cudnn.allow_tf32 else (0.01, 1e-3)
    finite = torch.stack([t.reshape(len(t), -1).isfinite().all(1) for t in expected]).all(0)  # (M,)
    results, expected = ([t[finite] for t in tensors] for tensors in (results, expected))
    errors, sizes = (
        torch.stack([t.norm() for t in tensors]).tolist()
        for tensors in ([a - b for a, b in zip(results, expected, strict=True)], expected)
    )
    limits = [together * sizes[0], *(each * size for size in sizes[1:])]
    errors, limits = [*errors, math.hypot(*errors[1:])], [*limits, together * math.hypot(*sizes[1:])]
    for error, limit in zip(errors, limits, strict=True):
        if not error <= limit + 1e-6:
            raise Differs(f"its result differs by {error:.3g} (tolerance {limit:.3g})")


def fastest(config: Config, most: int, device: torch.device) -> int:
    """How many of `most` cells to train at once: 1 or STACKED, whichever takes less time a cell in twenty steps."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.rand(config.batch_size, *config.image_shape, generator=g, device=device)
    noise, seconds = build_model(config).noise(len(x), g), {}
    for m in sorted({1, min(STACKED, most)}):
        ones, engine = torch.ones(m, device=device), None
        try:
            engine = Engine(config, m, device, capture=device.type == "cuda")
            for i in range(-2, 20):
                if i == 0:
                    start = clock(device)
                engine.step(x, noise, ones, ones)
            seconds[m] = (clock(device) - start) / m
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        finally:
            engine = None
            free(device)  # before the next engine allocates its own memory
    best = min(seconds, key=seconds.get, default=1)
    told = ", ".join(f"{1e3 * each:.3g} ms a cell with {m} at once" for m, each in seconds.items())
    print(f"cells at once: {best} (a step takes {told})", flush=True)
    return best


def use_precision(precision: str) -> None:
    """Allows TF32 products on a GPU for every precision but fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def clock(device: torch.device) -> float:
    """A time in seconds, read once all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flat(inputs: tuple) -> list[Tensor]:
    """The tensors of a step's inputs: x, those of the noise that there are, beta_y, beta_z."""
    x, noise, *betas = inputs
    return [x, *(t for t in noise if t is not None), *betas]
