"""A GPU that is none: CUDA tensors that compute on the CPU, under torch's rules for devices, host reads and captures.

What a GPU would refuse raises Refused: tensors or a generator of another device, and, within a capture, whatever waits
for the device. A captured graph is the list of its operators, replayed on the same memory. It shows neither what CUDA's
kernels compute nor how fast. torch must be built with CUDA.
"""

import collections
import contextlib
import graphlib
import linecache
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

ROOT = str(Path(__file__).parent.parent)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten, SET_DATA = torch.ops.aten, Tensor.data.__set__
WAITING = aten.nonzero, aten.masked_select, aten._unique2, aten.bincount  # the sizes of their results are on the device
KERNELS = {aten.convolution_backward: 3, aten._unsafe_view: 0, aten.new_empty: 0}  # of an operator, if not one


class Refused(RuntimeError):
    """What a GPU would not do."""


class OnGpu(Tensor):
    """A tensor that says that it is on the GPU; its numbers are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": GPU}
        self = Tensor._make_wrapper_subclass(cls, held.size(), **how)
        self.held = held
        return self

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise Refused("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __format__(self, how: str) -> str:
        return format(self.item(), how)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return pretended(func, args, kwargs or {})


class Generator(torch.Generator):
    """One of the CPU that says that it is on the device asked for."""

    device = None

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.device = torch.device(device)
        return self


class Graph:
    """A captured graph."""

    capturing = None  # the one that is being captured
    launches, reads = 0, collections.Counter()  # kernels since the start, and reads by the host, by their line

    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        with _disable_current_modes():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(tensors_in(results), tensors_in(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, **_):
    """As torch.cuda.graph."""
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


def each(change, value):
    """Nested lists, tuples and dictionaries with their tensors changed; torch's own takes most of the time."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([each(change, v) for v in value])
    return {name: each(change, v) for name, v in value.items()} if isinstance(value, dict) else value


def tensors_in(value) -> list[Tensor]:
    found = []
    each(found.append, value)
    return found


def line() -> str:
    """Of the project's code, which is running."""
    for frame, number in traceback.walk_stack(None):
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and code.co_filename != __file__:
            return f"{code.co_name}: {linecache.getline(code.co_filename, number).strip()}"
    return ""


def read(func) -> None:
    """Notes that the host waits for the device; refused within a capture."""
    Graph.reads[line()] += 1
    if Graph.capturing:
        raise Refused(f"operation not permitted when stream is capturing: {func} ({line()})")


def check(func, args: tuple, tensors: list[Tensor], on_gpu: bool) -> None:
    """Raises Refused for an operator with tensors of both devices, of which those on the CPU may be single numbers."""
    there, here = ([t for t in tensors if isinstance(t, OnGpu) == which] for which in (True, False))
    is_index = func is aten.index.Tensor and isinstance(args[0], OnGpu)
    waits = func is aten._local_scalar_dense.default or func.overloadpacket in WAITING
    waits |= is_index and any(t.dtype == torch.bool for t in tensors[1:])
    if func in (aten._to_copy.default, aten.copy_.default):
        to, source = (on_gpu, args[0]) if func is aten._to_copy.default else (isinstance(args[0], OnGpu), args[1])
        waits = isinstance(source, OnGpu) != to and bool(not to or Graph.capturing)
    elif there and any(t.dim() for t in here) and not is_index:
        raise Refused(f"tensors on cuda and on the cpu: {func} ({line()})")
    if waits:
        read(func)


def pretended(func, args: tuple, kwargs: dict):
    """What an operator gives, on the GPU if it would be there."""
    tensors, device = [], kwargs.get("device")

    def held(t: Tensor) -> Tensor:
        tensors.append(t)
        return t.held if isinstance(t, OnGpu) else t

    held_args, held_kwargs = each(held, (args, kwargs))
    there = any(isinstance(t, OnGpu) for t in tensors)
    on_gpu = there if device is None else torch.device(device).type == "cuda"
    if not (there or on_gpu):
        return func(*args, **kwargs)
    check(func, args, tensors, on_gpu)
    held_kwargs |= {name: of_cpu for name, of_cpu in (("device", CPU), ("pin_memory", False)) if name in kwargs}
    if Graph.capturing:  # as they are now: an operator may change what they are views of
        held_args, held_kwargs = each(alias, (held_args, held_kwargs))
    out = func(*held_args, **held_kwargs)
    if func is aten._to_copy.default and out is held_args[0]:
        out = out.clone()
    if Graph.capturing and on_gpu:
        Graph.capturing.calls.append((func, held_args, held_kwargs, each(alias, out)))
    if not on_gpu:
        return out
    if not func.is_view:
        Graph.launches += KERNELS.get(func.overloadpacket, 1)
    return return_and_correct_aliasing(func, args, kwargs, each(OnGpu, out))


def alias(t: Tensor) -> Tensor:
    return t.as_strided(t.size(), t.stride(), t.storage_offset())


class OnDevice(TorchDispatchMode):
    """Lets also what makes tensors make them on the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return pretended(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Refuses random numbers from another device's generator; lets `t.data = other` change what t holds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, g = func(*args, **(kwargs or {})), kwargs and kwargs.get("generator")
        if g and isinstance(out, Tensor) and g.device.type != out.device.type:
            raise Refused(f"a generator on {g.device} for numbers on {out.device} ({line()})")
        if func == SET_DATA and isinstance(args[1], OnGpu):
            args[0].held = args[1].held
        return out


def backward(loss: Tensor, *_, **__) -> None:
    """`loss.backward()` node by node: torch's engine asks a driver for its streams."""
    inputs, found = {}, [loss.grad_fn]
    while found:
        node = found.pop()
        if node not in inputs:
            inputs[node] = [before for before, _ in node.next_functions if before is not None]
            found += inputs[node]
    grads = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed([*graphlib.TopologicalSorter(inputs).static_order()]):
            given = grads.pop(node, {})
            if hasattr(node, "variable"):
                p = node.variable
                p.grad = given[0].contiguous() if p.grad is None else p.grad + given[0]
            elif given:
                call = node if callable(node) else node.apply
                results = call(*[given.get(i) for i in range(len(node._input_metadata))])
                hand_on(node, results if isinstance(results, tuple) else (results,), grads)


def hand_on(node, results: tuple, grads: dict) -> None:
    """Adds a node's results to the gradients of what comes before it, summed over what was broadcast."""
    for (to, i), grad in zip(node.next_functions, results, strict=False):
        if to is not None and grad is not None:
            kind, known = to._input_metadata[i], grads.setdefault(to, {})
            if grad.shape != kind.shape:
                grad = grad.sum_to_size(tuple(kind.shape))
            grad = grad.to(kind.dtype)
            known[i] = known[i] + grad if i in known else grad


def moved(module: nn.Module, *args, memory_format=None, **kwargs) -> nn.Module:
    """`module.to(...)`, which cannot swap such parameters."""
    device = kwargs.get("device", next((a for a in args if isinstance(a, torch.device | str)), None))
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                how = {"memory_format": memory_format} if memory_format is not None and p.dim() == 4 else {}
                part._parameters[name] = nn.Parameter(p.detach().to(device or p.device, **how), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None and device is not None:
                part._buffers[name] = b.to(device)
    return module


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _) -> None:
        pass


@contextlib.contextmanager
def one(patch):
    """Lets torch take this machine for one with a GPU, by pytest's monkeypatch."""
    torch._C._ensureCUDADeviceGuardSet()
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") starts on the CPU
    nothing, numbers = (
        (
            "_lazy_init",
            "set_device",
            "synchronize",
            "empty_cache",
            "set_stream",
            "manual_seed_all",
            "reset_peak_memory_stats",
        ),
        {},
    )
    numbers |= {"is_available": True, "device_count": 1, "current_device": 0, "mem_get_info": (2**34, 2**34)}
    numbers |= {"get_device_name": "pretended GPU", "max_memory_allocated": 0, "is_bf16_supported": True}
    numbers |= {"get_device_capability": (9, 0), **dict.fromkeys(nothing), "stream": contextlib.nullcontext()}
    for name, value in numbers.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for where, name, value in (
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "current_stream", Stream),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", capture),
        (torch, "Generator", Generator),
        (Tensor, "backward", backward),
        (nn.Module, "to", moved),
        (torch.backends.cudnn, "enabled", False),
    ):
        patch.setattr(where, name, value)
    Graph.reads.clear()
    try:
        with OnDevice(), Functions():
            yield GPU
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
