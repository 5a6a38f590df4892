"""Where the time of a training step goes: its operators, with shapes and the share of the machine's peaks reached."""

import argparse
import collections
import math
import statistics

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from utils.benchmark.loops import config_of, random_split, stepper
from utils.benchmark.measuring import copy_bandwidth, measure
from utils.training.engine import Engine, clock

SHOWN = 20  # rows of the table


class Operators(TorchDispatchMode):
    """Records seconds, floating-point operations and bytes of every operator, by name and shapes of its inputs."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.calls = device, collections.defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = clock(self.device)
        out = func(*args, **(kwargs or {}))
        seconds = clock(self.device) - start
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        tensors = [*inputs, *(t for t in tree_leaves(out) if isinstance(t, Tensor))]
        count = flop_registry.get(func.overloadpacket)
        shapes = " ".join("x".join(map(str, t.shape)) or "1" for t in inputs[:2])
        key = (func.overloadpacket.__name__, shapes if len(inputs) < 10 else f"{len(inputs)} tensors")
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.calls[key].append((seconds, flops, sum(t.numel() * t.element_size() for t in tensors)))
        return out


def profile(args: argparse.Namespace) -> None:
    """Prints the operators of a step that take longest: share of the time, and of peak arithmetic and bandwidth."""
    config, device = config_of(args), args.device
    engine = Engine(config, max(args.cells or [1]), device, backend=args.convolutions[0])
    step, steps = stepper(engine, random_split(config, 2 * args.batch_size, device)), []
    whole = statistics.median(measure({"": step}, args.n, device)[""])
    for _ in range(args.n):
        with Operators(device) as operators:
            step()
        steps.append(operators.calls)
    arithmetic, bandwidth = peak(device), copy_bandwidth(device)
    rows = []
    for key, calls in steps[0].items():
        seconds = statistics.median(sum(s for s, _, _ in each[key]) for each in steps)
        rows.append((seconds, len(calls), sum(f for _, f, _ in calls) / 1e9, sum(b for _, _, b in calls) / 1e9, *key))
    rows.sort(reverse=True)
    total, rest = (math.fsum(row[0] for row in part) for part in (rows, rows[SHOWN:]))
    print(f"{config.vae_type}, {args.dataset}-shaped images, batch {args.batch_size}, {config.precision}, eager:")
    print(f"a step takes {1e3 * whole:.1f} ms (n = {args.n}), its operators one by one {1e3 * total:.1f} ms;")
    print(f"a large matrix product reaches {arithmetic:.0f} GFLOP/s, a copy {bandwidth:.1f} GB/s")
    print(f"{'operator, shapes of its inputs':58s} {'calls':>5} {'ms':>7} {'share':>6}", end="")
    print(f" {'GFLOP/s':>8} {'of peak':>7} {'GB/s':>6} {'of copy':>7}")
    for seconds, calls, gflop, moved, name, shapes in rows[:SHOWN]:
        speed = f"{gflop / seconds:8.1f} {gflop / seconds / arithmetic:7.0%}" if gflop else " " * 16
        speed += f" {moved / seconds:6.1f} {moved / seconds / bandwidth:7.0%}"
        print(f"{f'{name} {shapes}':58.58s} {calls:5d} {1e3 * seconds:7.2f} {seconds / total:6.1%} {speed}")
    print(f"{f'{len(rows[SHOWN:])} others':58s} {'':5} {1e3 * rest:7.2f} {rest / total:6.1%}")


def peak(device: torch.device) -> float:
    """GFLOP/s of a large matrix product in float32."""
    a = torch.rand(2048, 2048, device=device)
    return 2 * 2048**3 / statistics.median(measure({"": lambda: a @ a}, 10, device)[""]) / 1e9
