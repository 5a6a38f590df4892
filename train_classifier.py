"""Trains the classifier with which the evaluation labels samples and reconstructions.

    python train_classifier.py --dataset Digits
    python train_classifier.py --dataset path/to/folder --image_size 32

It is saved in runs/classifiers/<data set>/, where the evaluation looks for it. Repeating a command resumes
an unfinished training and skips a finished one.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

from pathlib import Path

import torch
import torch.nn.functional as F

from datasets.loading import load_data
from models.classifiers import OPTIMIZERS, Classifier, augmented, build_classifier, load_classifier, scheduler
from utils.cli import Parser, add_config_flags, whole
from utils.config import Config
from utils.distributed import progress
from utils.errors import UserError, run_script
from utils.files import check_writable, load_tensors, read_json, save_tensors, write_json
from utils.runs import locked
from utils.seeds import generator


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    add_config_flags(parser, only=("dataset", "image_size", "image_channels"))
    parser.add_argument("--num_epochs", type=whole, help="epochs to train (default: set per data set)")
    parser.add_argument("--batch_size", type=whole, help="images per batch (default: set per data set)")
    parser.add_argument("--learning_rate", type=float, help="initial learning rate (default: set per data set)")
    parser.add_argument("--seed", type=int, default=2, help="weights, batch order, dropout, augmentation (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="retrain from scratch, even a finished classifier")
    args = parser.parse(argv)
    args.config = Config(dataset=args.dataset, image_size=args.image_size, image_channels=args.image_channels)
    for name in ("num_epochs", "batch_size", "learning_rate"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.config.recipe, name))
    if not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning_rate: must be > 0 and finite, got {args.learning_rate}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: must be from 0 to 2^63 - 1, got {args.seed}")
    return args


@torch.no_grad()
def accuracy(model: Classifier, split) -> float:
    """Accuracy on all images of a split."""
    model.eval()
    return sum((model(x).argmax(1) == label).sum().item() for x, label in split.batches(500)) / len(split)


def train(args, data, folder: Path) -> Classifier:
    """Trains from the checkpoint, if there is one. Raises UserError if it is damaged or the loss is not finite."""
    recipe, cuda = args.config.recipe, args.device.type == "cuda"
    layout = torch.channels_last if cuda else torch.contiguous_format
    torch.manual_seed(args.seed)
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
        torch.manual_seed(args.seed + 1000 * epoch)  # for dropout
        g = generator(args.device, args.seed, epoch, "augmentation")
        model.train()
        total = torch.zeros((), device=args.device)
        for x, label in data.train.batches(args.batch_size, (args.seed, epoch)):
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


def main(argv=None) -> int:
    """Trains and saves the classifier of a data set; returns the exit status."""
    args = parse_args(argv)
    config = args.config
    settings = {k: getattr(args, k) for k in ("num_epochs", "batch_size", "learning_rate", "seed")}
    settings = {"dataset": config.data_name, **settings}
    for name, value in settings.items():
        print(f"  {name:20s} {value}")
    folder = Path(args.runs_dir) / "classifiers" / config.data_name
    before = read_json(folder / "config.json") if (folder / "config.json").exists() and not args.overwrite else settings
    if different := [k for k, v in settings.items() if before.get(k) != v]:
        raise UserError(
            f"{folder}: trained with another --{different[0]} ({before.get(different[0])}); --overwrite retrains it"
        )
    if (folder / "classifier.pth").exists() and not args.overwrite:
        load_classifier(folder, config, args.device)  # raises UserError if it is damaged
        print(f"already complete: {folder}, test accuracy {before.get('test_accuracy')}")
        return 0
    check_writable(folder)
    data = load_data(config, args.data_dir, args.device, args.download)
    if not data.labelled:
        raise UserError(f"--dataset: {args.dataset} has no classes that a classifier could learn")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if args.overwrite:
            for name in ("classifier.pth", "resume.pth"):
                (folder / name).unlink(missing_ok=True)
        settings |= {"n_classes": data.n_classes, "data": data.digest}
        write_json(folder / "config.json", settings)
        model = train(args, data, folder)
        test_accuracy = accuracy(model, data.test)
        write_json(folder / "config.json", {**settings, "test_accuracy": test_accuracy})
        save_tensors(folder / "classifier.pth", {k: v.contiguous().cpu() for k, v in model.state_dict().items()})
        (folder / "resume.pth").unlink(missing_ok=True)
    print(f"test accuracy {test_accuracy:.4f}; the classifier is in {folder}")
    return 0


if __name__ == "__main__":
    run_script(main)
