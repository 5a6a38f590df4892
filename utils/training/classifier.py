"""The training of a classifier, with a checkpoint after every epoch."""

from pathlib import Path
from typing import NamedTuple

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


class ClassifierTraining(NamedTuple):
    """How the classifier of a Config's data set is trained."""

    config: Config
    num_epochs: int
    batch_size: int
    learning_rate: float
    seed: int

    @property
    def settings(self) -> dict:
        """All but the Config, as config.json has them."""
        return {name: value for name, value in self._asdict().items() if name != "config"}

    def train(self, data: Data, folder: Path, device: torch.device) -> Classifier:
        """Trains from the folder's checkpoint, if any. Raises UserError if it is damaged, or the loss not finite."""
        recipe, cuda = self.config.recipe, device.type == "cuda"
        layout = torch.channels_last if cuda else torch.contiguous_format
        torch.manual_seed(self.seed)
        model = build_classifier(self.config, data.n_classes).to(device, memory_format=layout)
        optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=self.learning_rate)
        is_cosine = recipe.decay is None
        rates = CosineAnnealingLR(optimizer, self.num_epochs) if is_cosine else StepLR(optimizer, 1, recipe.decay)
        parts = {"model": model, "optimizer": optimizer, "scheduler": rates}
        start = _restore(folder / "resume.pth", parts)
        if start:
            print(f"resuming at epoch {start} of {self.num_epochs}", flush=True)
        bar = progress(range(start, self.num_epochs), initial=start, total=self.num_epochs, unit="epoch")
        for epoch in bar:
            torch.manual_seed(self.seed + 1000 * epoch)  # for dropout
            g = generator(device, self.seed, epoch, "augmentation")
            model.train()
            total = torch.zeros((), device=device)
            for x, label in data.train.batches(self.batch_size, (self.seed, epoch)):
                if recipe.crop or recipe.flip:
                    x = augmented(x, recipe.crop, recipe.flip, g)
                with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                    loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(x)
            rates.step()
            if not total.isfinite():
                what = f"the loss is not finite in epoch {epoch + 1}; try a value below {self.learning_rate}"
                raise UserError(f"--learning_rate: {what}")
            values = {"loss": total.item() / len(data.train), "test_accuracy": accuracy(model, data.test)}
            bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()}, refresh=False)
            state = {name: part.state_dict() for name, part in parts.items()}
            save_tensors(folder / "resume.pth", {"epoch": epoch + 1, **state})
        return model


def _restore(path: Path, parts: dict) -> int:
    """The epoch of a checkpoint, whose state the parts take; 0 without one."""
    if not path.exists():
        return 0
    try:
        state = load_tensors(path)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["epoch"])
    except (UserError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as e:
        raise UserError(f"{path}: damaged; --overwrite starts from scratch ({e})") from e
