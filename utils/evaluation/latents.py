"""What each unit of z and y holds, and the export of the latents."""

import numpy as np
import torch

from datasets.loading import memory
from models.latents import Gaussian
from utils.errors import UserError
from utils.evaluation.subject import BATCH, Subject
from utils.files import npz

ACTIVE = 0.01  # nats: the rate from which a unit counts as active


@torch.no_grad()
def active_by_rate(s: Subject) -> dict[str, int]:
    """Units whose own rate exceeds 0.01 nats on average over the test images: of y, what they add to what z tells.

    KL[q(z_i|x) || p(z_i)] and KL[q(y_i|z,x) || p(y_i|z)], z from q(z|x); they add up to R(z) and R(y|z). A categorical
    z is one unit.
    """
    g, of_z, of_y = s.generator("units"), 0.0, 0.0
    for x, _ in s.test.batches(BATCH):
        q_z, noise = s.model.q_z(x), s.model.noise(len(x), g)
        z = q_z.sample(noise.z)
        of_z += q_z.rate_of_units().double().sum(0)
        of_y += s.model.q_y(z, x).kl_of_units(s.model.p_y(z)).double().sum(0)
    n = len(s.test)
    return {"active_z_rate": int((of_z / n > ACTIVE).sum()), "active_y_rate": int((of_y / n > ACTIVE).sum())}


@torch.no_grad()
def export(s: Subject, split: str) -> dict[str, bytes]:
    """The latents of a split's N images, in the data set's order, as latents_<split>.npz.

    `index` and `label` (N,); `z_mean`, `z_std` of q(z|x) (N, *z_shape), `y_mean`, `y_std` of q(y|z,x) at the mode of
    q(z|x) (N, *y_shape); `z_sample`, `y_sample`: one joint sample of q(z|x) q(y|z,x). Of a categorical z, `z_mean` has
    the probabilities, and there is no `z_std`; of images without labels, no `label`. Raises UserError if they do not
    fit into the memory.
    """
    data, model, g = s.bench.data(s.config), s.model, s.generator("latents", split)
    images = getattr(data, split)
    needs, has = 24 * len(images) * (np.prod(model.z_shape) + np.prod(model.y_shape)), memory()
    if needs > has:
        raise UserError(f"--latents {split}: needs {int(needs):,} bytes of memory, this machine has {has:,}")
    parts = {}
    for x, label in images.batches(BATCH):
        q_z, noise = model.q_z(x), model.noise(len(x), g)
        z = q_z.sample(noise.z)
        q_y = model.q_y(q_z.mode, x)
        found = {"label": label, "z_mean": q_z.mean, "z_sample": z, "y_mean": q_y.mean, "y_std": q_y.std}
        found["y_sample"] = model.q_y(z, x).sample(noise.y)
        if isinstance(q_z, Gaussian):
            found["z_std"] = q_z.std
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    if not data.labelled:
        del parts["label"]
    arrays = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return {f"latents_{split}.npz": npz({"index": np.arange(len(images)), **arrays})}
