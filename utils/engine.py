"""The training step at full speed: M stacked models and their Adam, compiled; on a GPU captured as one CUDA graph."""

import dataclasses
import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from models import build_model
from models.hvae import Noise
from models.stack import Stack
from utils.config import Config
from utils.distributed import place, sum_over_all

COMPILE = ("auto", "on", "off")
WARM_UP = 3  # steps before a capture: they allocate what must exist, and settle the compiler's and cuDNN's choices


class Engine:
    """M stacked models in training; kept from chunk to chunk, so that a grid is compiled once.

    With `data_parallel` each process of torchrun takes its part of every batch, and the gradients are added up.
    `compile` is one of COMPILE: "off" runs the step as it is written, "on" through torch.compile and, on a GPU,
    as one CUDA graph for all batches of full size; "auto" is on for a GPU, off elsewhere.
    """

    def __init__(
        self, config: Config, m: int, device: torch.device, compile: str = "auto", data_parallel: bool = False
    ):
        on_gpu = device.type == "cuda"
        self.config, self.device, self.graph, self.data_parallel = config, device, None, data_parallel
        self.stack = Stack(build_model(config).to(device), m, config.precision)
        self.to_capture = on_gpu and compile != "off" and not data_parallel
        if data_parallel:
            rank, world = place()
            self.stack.part, self.stack.sum_over_all = slice(rank, None, world), sum_over_all
        parameters = self.stack.parameters.values()
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True, capturable=on_gpu)
        for p in parameters:  # at once, so that every state is set in place and a captured graph goes on seeing it
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=device if on_gpu else "cpu"), **moments}
        if not self.to_capture and (compile == "on" or compile == "auto" and on_gpu):
            self.stack.compile()

    def fits(self, config: Config, m: int, device: torch.device) -> bool:
        """Whether it can train m cells of that Config: all but betas, seed and names must be its own."""
        free = {name: getattr(self.config, name) for name in ("beta_y", "beta_z", "seed", "run_name", "run_batch_name")}
        return dataclasses.replace(config, **free) == self.config and (m, device) == (self.stack.m, self.device)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Sets all models to the seed's initial weights, and Adam to its start."""
        torch.manual_seed(seed)
        initial = dict(build_model(self.config).named_parameters())
        for name, p in self.stack.parameters.items():
            p.copy_(initial[name].expand_as(p))
            for value in self.optimizer.state[p].values():
                value.zero_()

    @property
    def adam_steps(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])

    def moments(self, m: int) -> dict[str, dict[str, Tensor]]:
        """Adam's moments of model m, a copy on the CPU."""
        state = self.optimizer.state
        return {
            key: {name: state[p][key][m].cpu().clone() for name, p in self.stack.parameters.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }

    @torch.no_grad()
    def load_cell(self, m: int, state: dict) -> None:
        """Sets weights and Adam's moments of model m, and the number of steps of all."""
        self.stack.load_cell(m, state["weights"])
        for name, p in self.stack.parameters.items():
            adam = self.optimizer.state[p]
            adam["step"].fill_(state["adam_steps"])
            for key in ("exp_avg", "exp_avg_sq"):
                adam[key][m] = state[key][name]

    def step(self, x: Tensor, noise: Noise, beta_y: Tensor, beta_z: Tensor) -> Tensor:
        """One optimiser step of every model. Returns the batch's sums of loss, ll, kl_y, kl_z: (M, 4)."""
        inputs = (x, noise, beta_y, beta_z)
        if self.to_capture:
            self.to_capture = False
            self._capture(inputs)
        if self.graph is None or any(a.shape != b.shape for a, b in zip(flat(inputs), self.inputs, strict=True)):
            return self.stack.step(self.optimizer, *inputs)  # so does the last batch of an epoch, where it is smaller
        for there, new in zip(self.inputs, flat(inputs), strict=True):
            there.copy_(new)
        self.graph.replay()
        return self.sums

    def _tensors(self) -> list[Tensor]:
        """All that a step changes."""
        adam = (t for state in self.optimizer.state.values() for t in state.values())
        return [*self.stack.parameters.values(), *adam]

    def _capture(self, inputs: tuple) -> None:
        """Captures the step for batches of this size, after comparing it with the step as it is written.

        What cannot be captured, or gives another result, is not used; a line says so.
        """
        before = [t.detach().clone() for t in self._tensors()]
        expected = self.stack.step(self.optimizer, *inputs)
        self._set(before)
        for compile in (True, False):
            try:
                self.stack.compile(compile)
                self._record(inputs)
                self._set(before)
                self.graph.replay()
                torch.testing.assert_close(self.sums, expected, rtol=1e-2 if self.stack.low else 1e-3, atol=1e-2)
                return self._set(before)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:
                self.graph = None
                self._set(before)
                line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
                what = "compiled" if compile else "captured"
                print(f"note: the step cannot be {what} on this machine, going on without: {line}", flush=True)

    def _record(self, inputs: tuple) -> None:
        self.inputs = [t.clone() for t in flat(inputs)]
        x, z, y, *temperature, beta_y, beta_z = self.inputs
        fixed = (x, Noise(z, y, *temperature), beta_y, beta_z)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.stack.step(self.optimizer, *fixed)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.sums = self.stack.step(self.optimizer, *fixed)
        self.graph = graph

    @torch.no_grad()
    def _set(self, values: Iterable[Tensor]) -> None:
        for there, value in zip(self._tensors(), values, strict=True):
            there.copy_(value)


def fastest_size(config: Config, most: int, device: torch.device) -> int:
    """How many cells, at most so many, to stack: doubled while that pays and the memory holds them.

    Measured on a few steps of random images, as written rather than compiled.
    """
    x = torch.rand(config.batch_size, *config.image_shape, device=device)
    best, fastest, size = 1, math.inf, 1
    while size <= most:
        try:
            engine, ones = Engine(config, size, device, "off"), torch.ones(size, device=device)
            noise = engine.stack.model.noise(len(x), torch.Generator(device))
            for i in range(6):
                if i == 2:
                    start = clock(device)
                engine.step(x, noise, ones, ones)
            each = (clock(device) - start) / size
        except torch.OutOfMemoryError:
            break
        finally:
            engine = None  # before the next one takes memory
        if each > 0.95 * fastest:
            break
        best, fastest = size, each
        size = 2 * size if 2 * size <= most or size == most else most
    return best


def use_precision(precision: str) -> None:
    """Lets a GPU multiply in TF32, where that is asked for or less."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def clock(device: torch.device) -> float:
    """Seconds, once all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flat(inputs: tuple) -> list[Tensor]:
    """The tensors of a step's inputs: x, z's noise, y's noise, the temperature if there is one, beta_y, beta_z."""
    x, noise, *betas = inputs
    return [x, *(t for t in noise if t is not None), *betas]
