"""The training of a classifier, with a checkpoint after every epoch."""

from pathlib import Path

import torch
import torch.nn.functional as F

from models.classifiers import OPTIMIZERS, Classifier, accuracy, augmented, build_classifier, scheduler
from utils.distributed import progress
from utils.errors import UserError
from utils.files import load_tensors, save_tensors
from utils.seeds import generator


def train(args, seed: int, data, folder: Path) -> Classifier:
    """Trains from the checkpoint, if there is one. Raises UserError if it is damaged or the loss is not finite."""
    recipe, cuda = args.config.recipe, args.device.type == "cuda"
    layout = torch.channels_last if cuda else torch.contiguous_format
    torch.manual_seed(seed)
    model = build_classifier(args.config, data.n_classes).to(args.device, memory_format=layout)
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=args.learning_rate)
    rates = scheduler(optimizer, recipe, args.num_epochs)
    parts, start = {"model": model, "optimizer": optimizer, "scheduler": rates}, 0
    if (folder / "resume.pth").exists():
        try:
            state = load_tensors(folder / "resume.pth")
            start = int(state["epoch"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (UserError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as e:
            raise UserError(f"{folder / 'resume.pth'}: damaged; --overwrite starts from scratch ({e})") from e
        print(f"resuming at epoch {start} of {args.num_epochs}", flush=True)
    bar = progress(range(start, args.num_epochs), initial=start, total=args.num_epochs, unit="epoch")
    for epoch in bar:
        torch.manual_seed(seed + 1000 * epoch)  # for dropout
        g = generator(args.device, seed, epoch, "augmentation")
        model.train()
        total = torch.zeros((), device=args.device)
        for x, label in data.train.batches(args.batch_size, (seed, epoch)):
            x = augmented(x, recipe.crop, recipe.flip, g) if recipe.crop or recipe.flip else x
            with torch.autocast(args.device.type, torch.bfloat16, enabled=cuda):
                loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(x)
        rates.step()
        if not total.isfinite():
            raise UserError(
                f"--learning_rate: the loss is not finite in epoch {epoch + 1}; try a value below {args.learning_rate}"
            )
        values = {"loss": total.item() / len(data.train), "test_accuracy": accuracy(model, data.test)}
        bar.set_postfix({name: f"{v:.4f}" for name, v in values.items()}, refresh=False)
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(folder / "resume.pth", {"epoch": epoch + 1, **state})
    return model
