"""The training step at full speed: M stacked models and their Adam, compiled; on a GPU captured as one CUDA graph."""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from models.build import build_model
from models.hvae import Noise
from models.stack import ROUTES, Stack
from utils.config import Config
from utils.distributed import place
from utils.errors import UserError, is_out_of_memory, one_line

WARM_UP = 3  # steps before a capture: they allocate what must exist, and settle the compiler's and cuDNN's choices
LARGEST = 256  # cells that `fastest` tries to stack


class Differs(Exception):
    """A fast step does not give what the plain one gives."""


class Engine:
    """M stacked models in training; kept from chunk to chunk, so that a grid is compiled and captured once.

    `compile` takes the step through torch.compile; `capture`, on a GPU, makes it one CUDA graph for all batches of
    full size, after comparing it with the step as it is written. `route` is one of models.stack.ROUTES.
    With `data_parallel` each process of torchrun takes its part of every batch.
    """

    def __init__(
        self,
        config: Config,
        m: int,
        device: torch.device,
        compile: bool = False,
        capture: bool = False,
        route: str = "plain",
        data_parallel: bool = False,
    ):
        on_gpu = device.type == "cuda"
        self.config, self.device, self.data_parallel = config, device, data_parallel
        self.compile, self.to_capture, self.replay = compile, capture and not data_parallel, None
        self.stack = Stack(build_model(config).to(device), m, config.precision, route)
        parameters = self.stack.parameters.values()
        adam = {"fused": True, "capturable": on_gpu and self.to_capture}
        lr = torch.tensor(config.learning_rate, device=device) if adam["capturable"] else config.learning_rate
        self.optimizer = torch.optim.Adam(parameters, lr=lr, **adam)
        for p in parameters:  # at once, so that every state is set in place and a captured graph goes on seeing it
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=device if on_gpu else "cpu"), **moments}
        rank, world = place() if data_parallel else (0, 1)
        if compile and not self.to_capture:
            self.stack.compile(len(range(config.batch_size)[rank::world]))
        if data_parallel:
            self.stack.distribute(rank, world)

    def fits(self, config: Config, m: int) -> bool:
        """Whether m cells of that Config can train in it, and fill most of it; betas, seed and names are free."""
        names = ("beta_y", "beta_z", "target_rate_y", "target_rate_z", "seed", "run_name", "run_batch_name")
        free = {name: getattr(self.config, name) for name in names}
        return dataclasses.replace(config, **free) == self.config and m <= self.stack.m < 2 * m

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Sets all models to the seed's initial weights, and Adam to its start."""
        torch.manual_seed(seed)
        initial = dict(build_model(self.config).named_parameters())
        for name, p in self.stack.parameters.items():
            p.copy_(initial[name].expand_as(p))
            for value in self.optimizer.state[p].values():
                value.zero_()

    def set_lr(self, lr: float) -> None:
        """Sets Adam's learning rate; a captured graph sees it."""
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    @property
    def adam_steps(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])

    def on_host(self) -> dict[str, dict[str, Tensor]]:
        """All weights and Adam's moments, stacked, copied to the CPU."""
        state, parameters = self.optimizer.state, self.stack.parameters.items()
        moments = {
            key: {name: state[p][key].to("cpu", copy=True) for name, p in parameters}
            for key in ("exp_avg", "exp_avg_sq")
        }
        return {"weights": {name: p.detach().to("cpu", copy=True) for name, p in parameters}, **moments}

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
        if self.to_capture and len(x) == self.config.batch_size:
            self.to_capture = False
            self._capture(inputs)
        if self.replay is None or any(a.shape != b.shape for a, b in zip(flat(inputs), self.inputs, strict=True)):
            return self.stack.step(self.optimizer, *inputs)  # so does the last batch of an epoch, where it is smaller
        for there, new in zip(self.inputs, flat(inputs), strict=True):
            there.copy_(new)
        self.replay()
        return self.sums

    def _tensors(self) -> list[Tensor]:
        """All that a step changes."""
        adam = (t for state in self.optimizer.state.values() for t in state.values())
        return [*self.stack.parameters.values(), *adam]

    def results(self, sums: Tensor) -> list[Tensor]:
        """What tells one way of making a step from another: its sums, and the gradients that it left; copies."""
        return [sums.clone(), *(p.grad.clone() for p in self.stack.parameters.values())]

    def _capture(self, inputs: tuple) -> None:
        """Captures the step for batches of this size, after comparing it with the step as it is written.

        What cannot be compiled or captured, or gives another result, is not used; a line says so.
        """
        before = [t.detach().clone() for t in self._tensors()]
        expected = self.results(self.stack.step(self.optimizer, *inputs))
        self._set(before)
        self.inputs = [t.clone() for t in flat(inputs)]
        x, *rest, beta_y, beta_z = self.inputs
        there = iter(rest)
        noise = Noise(*(None if t is None else next(there) for t in inputs[1]))
        fixed = (x, noise, beta_y, beta_z)
        for compile in (True, False) if self.compile else (False,):
            try:
                if compile:
                    self.stack.compile(len(x))
                    with torch.no_grad():
                        self.stack.fast_terms(
                            x, noise._replace(temperature=None)
                        )  # as an evaluation does: so it compiles now or never
                self.replay, self.sums = record(lambda: self.stack.step(self.optimizer, *fixed), self.device)
                self._set(before)
                self.replay()
                check_same(self.results(self.sums), expected, self.stack.low)
                return self._set(before)
            except Exception as e:
                self.replay = self.stack.compiled = None
                if is_out_of_memory(e):
                    raise torch.OutOfMemoryError(str(e)) from e
                self._set(before)
                what = "compiled" if compile else "captured as a CUDA graph"
                print(f"note: the step cannot be {what} on this machine, going on without: {one_line(e)}", flush=True)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for there, value in zip(self._tensors(), values, strict=True):
            there.copy_(value)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps warm up and are captured: one stream, since cuBLAS keeps memory for each that it has seen."""
    return torch.cuda.Stream(device)


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Captures a step as a CUDA graph. Returns what replays it, and the tensor in which it leaves its result."""
    here, side, graph = torch.cuda.current_stream(device), side_stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    here.wait_stream(side)
    try:
        # the loader's threads may use CUDA meanwhile, which a capture of all threads would not bear
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = step()
    finally:
        torch.cuda.set_stream(here)  # where a capture fails, torch leaves its stream in place
    return graph.replay, result


def free(device: torch.device) -> None:
    """Gives back the memory of engines that are no longer in use; a compiled one holds on to itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_same(results: list[Tensor], expected: list[Tensor], low: bool) -> None:
    """Raises Differs unless a step's `results` agree in norm: all gradients together, the sums, and roughly each.

    Models whose loss is not finite do not count. In bfloat16 the gradients of single layers differ by 5 to 10 %
    between equally right ways of rounding.
    """
    each, together = (0.5, 0.05) if low else (0.1, 0.01) if torch.backends.cudnn.allow_tf32 else (0.01, 1e-3)
    finite = torch.stack([t.flatten(1).isfinite().all(1) for t in expected]).all(0)  # (M,)
    results, expected = ([t[finite] for t in tensors] for tensors in (results, expected))
    errors, sizes = (
        torch.stack([t.norm() for t in tensors]).tolist()
        for tensors in ([a - b for a, b in zip(results, expected, strict=True)], expected)
    )
    limits = [together * sizes[0], *(each * size for size in sizes[1:])]
    errors, limits = [*errors, math.hypot(*errors[1:])], [*limits, together * math.hypot(*sizes[1:])]
    for error, limit in zip(errors, limits, strict=True):
        if not error <= limit + 1e-6:
            raise Differs(f"it gives another result, off by {error:.3g} where {limit:.3g} is allowed")


def check_route(route: str, device: torch.device) -> None:
    """Raises UserError for a way of convolving that cannot be had on that device."""
    if route == "kernels" and (device.type != "cuda" or find_spec("triton") is None):
        raise UserError("--convolutions: kernels need an NVIDIA GPU and the package triton; try plain")


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... and the last at most so many, or LARGEST."""
    most = min(most, LARGEST)
    return sorted({min(2**i, most) for i in range(most.bit_length() + 1)})


def fastest(
    config: Config, sizes: Sequence[int], device: torch.device, routes: Sequence[str] = ROUTES
) -> tuple[int, str]:
    """How many cells to stack, and by which route to convolve: the fastest a cell on this device.

    Measured on a few captured steps of random images, size after size while that pays and the memory holds it.
    A route that cannot run here, or gives another result than the first, is out.
    """
    g = torch.Generator(device).manual_seed(0)
    x = torch.rand(config.batch_size, *config.image_shape, generator=g, device=device)
    noise = build_model(config).noise(len(x), g)
    seconds, expected, out = {}, None, set()
    for size in sizes:
        before = min(seconds.values(), default=math.inf)
        for route in [r for r in routes if r not in out]:
            ones, engine = torch.ones(size, device=device), None
            try:
                engine = Engine(config, size, device, capture=device.type == "cuda", route=route)
                engine.restart(0)
                results = engine.results(engine.step(x, noise, ones, ones))
                if size == sizes[0]:
                    expected = expected or results
                    check_same(results, expected, engine.stack.low)
                for i in range(6):
                    if i == 2:
                        start = clock(device)
                    engine.step(x, noise, ones, ones)
                took = clock(device) - start
                few = noise.of(slice(None, None, 2))  # what an epoch needs beside: its last batch
                engine.stack.step(engine.optimizer, x[::2], few, ones, ones)
                with torch.no_grad():  # and the test images
                    engine.stack.terms(x, noise)
                seconds[size, route] = took / size
            except Exception as e:
                if not is_out_of_memory(e):
                    out.add(route)
                    print(f"note: convolutions by {route} are left out: {one_line(e)}", flush=True)
            finally:
                engine = results = None
                free(device)  # before the next one takes memory
        if min(seconds.values(), default=math.inf) > 0.95 * before:
            break
    return min(seconds, key=seconds.get, default=(sizes[0], routes[0]))


def use_precision(precision: str) -> None:
    """Lets a GPU multiply in TF32, where that is asked for or less."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def clock(device: torch.device) -> float:
    """Seconds, once all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def flat(inputs: tuple) -> list[Tensor]:
    """The tensors of a step's inputs: x, those of the noise that there are, beta_y, beta_z."""
    x, noise, *betas = inputs
    return [x, *(t for t in noise if t is not None), *betas]
