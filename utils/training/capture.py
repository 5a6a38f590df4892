"""A training's update, and its evaluation of a batch, captured as CUDA graphs; the update, if asked for, compiled."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.hvae import Noise
from utils.errors import is_out_of_memory, one_line

WARM_UP = 3  # updates before a capture, in which buffers are allocated and cuDNN and the compiler are tuned
failed = False  # whether one failed, after which none is tried: another would too, and the memory it took may be lost
Update = Callable[[Tensor, Noise, Tensor, Tensor], Tensor]  # of x, noise, beta_y, beta_z: sums (M, 4)


def prepared(training, inputs: tuple, capture: bool, compile: bool) -> Update:
    """The update of a training, compiled and captured for inputs of these shapes, without making it.

    With a note, the update as it is written where that fails or changes its sums, its gradients or the weights; then
    all are, from then on.
    """
    if failed or not (capture or compile):
        return training.update
    update, parameters, low = training.update, [*training.stack.parameters.values()], training.stack.low
    state = [*parameters, *(t for of_one in training.optimizer.state.values() for t in of_one.values())]
    before = [t.detach().clone() for t in state]

    def changes() -> tuple[list[Tensor], list[Tensor]]:
        """Of the parameters, and of the optimiser's state."""
        differences = [t.detach() - old for t, old in zip(state, before, strict=True)]
        differences = [d if d.dim() else d.expand(training.stack.m) for d in differences]
        return differences[: len(parameters)], differences[len(parameters) :]

    def results(update: Update) -> list[Tensor]:
        restore(state, before)
        return [update(*inputs).clone(), *(p.grad.clone() for p in parameters)]

    expected = results(update)
    try:
        if compile:
            update = functools.partial(update, terms_of=torch.compile(training.stack.terms, fullgraph=True))
        if capture:
            update = captured(update, inputs, training.device)
        check_same(results(update), expected, low)
        changed = changes()
        restore(state, before)
        training.optimizer.step()  # by these gradients; the update must have made of them what this does
        for ours, right in zip(changed, changes(), strict=True):
            check_same(ours, right, low)
        return update
    except Exception as e:
        do_without(e, "step", capture)
        return training.update
    finally:
        restore(state, before)


def prepared_sums(training, inputs: tuple) -> Update:
    """The `sums` of a training's stack, captured for inputs of these shapes; where that fails, as they are written."""
    sums = training.stack.sums
    if failed or not training.setup.capture:
        return sums
    try:
        expected, fast = sums(*inputs), captured(sums, inputs, training.device)
        check_same([fast(*inputs)], [expected], low=False)
        return fast
    except Exception as e:
        do_without(e, "evaluation", capture=True)
        return sums


def do_without(e: Exception, what: str, capture: bool) -> None:
    """Notes why something cannot be captured, or compiled. Raises OutOfMemoryError if it is for want of memory."""
    global failed
    if is_out_of_memory(e):
        raise torch.OutOfMemoryError(str(e)) from e
    failed |= capture
    how = "captured as a CUDA graph" if capture else "compiled"
    print(f"note: the {what} cannot be {how}, continuing without: {one_line(e)}", flush=True)


@torch.no_grad()
def restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Sets tensors in place."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def captured(update: Update, inputs: tuple, device: torch.device) -> Update:
    """The update as a CUDA graph, which reads its inputs from places of its own; it is made a few times."""
    places = [t.clone() for t in flat(inputs)]
    x, *of_noise, beta_y, beta_z = places
    tensors = iter(of_noise)
    noise = Noise(*(None if t is None else next(tensors) for t in inputs[1]))
    replay, sums = record(lambda: update(x, noise, beta_y, beta_z), device)

    def captured_update(*inputs) -> Tensor:
        restore(places, flat(inputs))
        replay()
        return sums

    return captured_update


def flat(inputs: tuple) -> list[Tensor]:
    """The tensors of an update's inputs: x, those of the noise that are not None, beta_y, beta_z."""
    x, noise, *betas = inputs
    return [x, *(t for t in noise if t is not None), *betas]


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Captures a step as a CUDA graph. Returns a function that replays it, and the tensor that holds its result."""
    here, side, graph = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
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


def check_same(results: list[Tensor], expected: list[Tensor], low: bool) -> None:
    """Raises ValueError unless `results`, each (M, ...), agree with the `expected` ones in relative norm.

    The tolerance is tight for the first and for all others together, loose for each alone: in bfloat16 (`low`),
    rounding alone changes a layer's gradient by 5 to 10 %. Models with a non-finite value are ignored.
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
            raise ValueError(f"its result differs by {error:.3g} (tolerance {limit:.3g})")
