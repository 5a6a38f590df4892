"""The training of a classifier, with a checkpoint after every epoch."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from datasets.loading import Data
from models.classifiers import OPTIMIZERS, Classifier, accuracy, augmented, build_classifier
from utils.config import Config
from utils.distributed import progress
from utils.errors import UserError
from utils.files import load_tensors, save_tensors
from utils.seeds import generator


def trained(config: Config, data: Data, settings: dict, folder: Path, device: torch.device) -> Classifier:
    """The classifier of a Config's data set, trained from the folder's checkpoint, if any.

    `settings` are num_epochs, batch_size, learning_rate and seed. Raises UserError if the checkpoint is damaged, or the
    loss not finite.
    """
    epochs, seed, rate = (settings[name] for name in ("num_epochs", "seed", "learning_rate"))
    recipe, cuda, path = config.recipe, device.type == "cuda", folder / "resume.pth"
    low = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    layout = torch.channels_last if cuda else torch.contiguous_format
    torch.manual_seed(seed)
    model = build_classifier(config, data.n_classes).to(device, memory_format=layout)
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=rate)
    is_cosine = recipe.decay is None
    rates = CosineAnnealingLR(optimizer, epochs) if is_cosine else StepLR(optimizer, 1, recipe.decay)
    parts = {"model": model, "optimizer": optimizer, "scheduler": rates}
    start = _restore(path, parts) if path.exists() else 0
    if start:
        print(f"resuming at epoch {start} of {epochs}", flush=True)
    bar = progress(range(start, epochs), initial=start, total=epochs, unit="epoch")
    for epoch in bar:
        torch.manual_seed(seed + 1000 * epoch)  # for dropout
        g, total = generator(device, seed, epoch, "augmentation"), torch.zeros((), device=device)
        model.train()
        for x, label in data.train.batches(settings["batch_size"], (seed, epoch)):
            if recipe.crop or recipe.flip:
                x = augmented(x, recipe.crop, recipe.flip, g)
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(x)
        rates.step()
        if not total.isfinite():
            what = f"the loss is not finite in epoch {epoch + 1}; try a value below {rate}"
            raise UserError(f"--learning_rate: {what}")
        values = {"loss": total.item() / len(data.train), "test_accuracy": accuracy(model, data.test)}
        bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()}, refresh=False)
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(path, {"epoch": epoch + 1, **state})
    return model


def _restore(path: Path, parts: dict) -> int:
    """The epoch of a checkpoint, whose state the parts take."""
    try:
        state = load_tensors(path)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["epoch"])
    except Exception as e:  # damaged values raise anything
        raise UserError(f"{path}: damaged; --overwrite starts from scratch ({e})") from e
