"""Renames the weights of the paper's published code, and unwraps those that other programs saved."""

import re

from torch import Tensor, nn

# The paper's layer names (their stems, for numbered ones) in the order in which our models define theirs.
ORDER = [
    *("qz_conv1", "qz_conv2", "qz_conv2_dy", "qz_conv3", "qz_convs", "qz_convs_dy", "qz_convs_dz"),
    *("qz_mu", "qz_pre_sp", "qz_logit"),
    *("qy_conv1_x", "qy_conv2_x", "qy_conv_x", "qy_l1_z", "qy_conv1_z", "qy_deconv_z", "qy_conv1_zx", "qy_convs_zx"),
    *("qy_conv1_dy", "qy_convs_dy", "qy_mu", "qy_pre_sp"),
    *("py_l1", "py_mu", "py_pre_sp", "py_deconvs"),
    *("px_l1", "px_conv1", "px_convs", "px_conv2", "px_conv3", "px_deconvs"),
]
LAYER = re.compile(r"(q[zy]|p[xy])_\w+(\.\d+)?")


def unwrapped(state: dict) -> dict[str, Tensor]:
    """The weights of a file that holds more, or the weights of a wrapped model (DataParallel, torch.compile)."""
    for name in ("state_dict", "model_state_dict"):
        if isinstance(state.get(name), dict):
            return unwrapped(state[name])
    for prefix in ("module.", "_orig_mod."):
        if state and all(isinstance(name, str) and name.startswith(prefix) for name in state):
            return unwrapped({name.removeprefix(prefix): t for name, t in state.items()})
    return state


def translate(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state_dict of the paper's code with the parameter names of `model`; any other is returned unchanged.

    Raises ValueError if its layers do not correspond to those of the model.
    """
    layers = {name.rpartition(".")[0] for name in state if name != "log_sigma"}
    if not layers or not all(LAYER.fullmatch(layer) for layer in layers):
        return state

    def position(layer: str) -> tuple[int, int]:
        stem, _, number = layer.partition(".")
        return ORDER.index(stem), int(number or 0)

    ours = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters() if "log_sigma" not in name)
    if len(ours) != len(layers):
        raise ValueError(f"{len(layers)} layers instead of {len(ours)}")
    pairs = list(zip(ours, sorted(layers, key=position), strict=True))
    renamed = {f"{our}.{part}": state[f"{their}.{part}"] for our, their in pairs for part in ("weight", "bias")}
    if "log_sigma" in state:
        renamed["likelihood.log_sigma"] = state["log_sigma"]
    return renamed
