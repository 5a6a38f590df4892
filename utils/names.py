"""Short names of runs: what tells them apart, instead of folders' names with all that they share."""

from collections.abc import Sequence

from utils.config import Config, fields_of


def what_differs(configs: Sequence[Config]) -> list[str]:
    """A short name for each: the settings in which they differ and the betas, `beta_y 1, beta_z 0.1`."""
    names = [name for name in fields_of() if name not in ("run_batch_name", "data_digest", "source")]
    different = [n for n in names if n.startswith("beta_") or len({getattr(c, n) for c in configs}) > 1]

    def text(config: Config) -> str:
        values = {name: getattr(config, name) for name in different}
        if values.get("warmup_epochs") == config.default_warmup:
            del values["warmup_epochs"]  # it follows from the others
        shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items() if v not in (None, "")}
        return ", ".join(f"{k} {v}" for k, v in shown.items())

    return [text(config) for config in configs]
