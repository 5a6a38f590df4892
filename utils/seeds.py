"""Random numbers that depend on nothing but their key."""

import numpy as np
import torch


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on the device, seeded by the key, e.g. (seed, epoch, "noise")."""
    words = [int.from_bytes(k.encode(), "little") if isinstance(k, str) else k for k in key]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed & (2**63 - 1))
