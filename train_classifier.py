"""Trains the classifier that the evaluation labels samples and reconstructions with.

    python train_classifier.py --dataset Digits

It goes to runs/classifiers/<data set>/, where the evaluation finds it. The same command again continues
an unfinished training and skips a finished one.
"""

import utils.threads  # noqa: F401  isort: skip  (before torch)

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets.loading import load_data
from models.classifiers import CLASSIFIERS, Classifier, load_classifier
from utils.cli import Parser, whole
from utils.config import Config
from utils.errors import UserError, nearest, run_script
from utils.files import check_writable, load_tensors, read_json, save_tensors, write_json
from utils.runs import locked
from utils.seeds import generator


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dataset", default="Digits", help=f"{', '.join(CLASSIFIERS)} (default: Digits)")
    parser.add_argument("--num_epochs", type=whole, help="epochs to train (default: the data set's recipe)")
    parser.add_argument("--batch_size", type=whole, help="images a batch (default: the data set's recipe)")
    parser.add_argument("--learning_rate", type=float, help="(default: the data set's recipe)")
    parser.add_argument("--seed", type=int, default=2, help="weights, order, dropout, augmentation (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="train anew, even when there is one")
    args = parser.parse(argv)
    if args.dataset not in CLASSIFIERS:
        raise UserError(f"--dataset: unknown {args.dataset!r}{nearest(args.dataset, CLASSIFIERS)}")
    recipe = CLASSIFIERS[args.dataset]
    for name in ("num_epochs", "batch_size", "learning_rate"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    if not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning_rate: must be > 0 and finite, got {args.learning_rate}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: must be from 0 to 2^63 - 1, got {args.seed}")
    return args


def augmented(x: torch.Tensor, crop: int, flip: bool, g: torch.Generator) -> torch.Tensor:
    """Each image (B, C, H, W) padded by `crop`, cropped at a place of its own, and flipped or not."""
    b, _, h, w = x.shape
    padded = F.pad(x, (crop,) * 4)
    top, left = torch.randint(0, 2 * crop + 1, (2, b, 1), generator=g, device=x.device)
    rows, columns = top + torch.arange(h, device=x.device), left + torch.arange(w, device=x.device)
    mirrored = torch.rand(b, 1, generator=g, device=x.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns) if flip else columns
    index = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: Classifier, split) -> float:
    """Share of the images that are labelled right."""
    model.eval()
    return sum((model(x).argmax(1) == label).sum().item() for x, label in split.batches(500)) / len(split)


def train(args, data, folder: Path) -> Classifier:
    """Trains to the end, from the last epoch's state when there is one."""
    recipe, cuda = CLASSIFIERS[args.dataset], args.device.type == "cuda"
    layout = torch.channels_last if cuda else torch.contiguous_format
    torch.manual_seed(args.seed)
    model = recipe.build(data.n_classes).to(args.device, memory_format=layout)
    optimizer = recipe.optimizer(model.parameters(), args.learning_rate)
    scheduler = recipe.scheduler(optimizer, args.num_epochs)
    parts, start = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, 0
    if (folder / "resume.pth").exists():
        try:
            state = load_tensors(folder / "resume.pth")
            start = int(state["epoch"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (UserError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as e:
            raise UserError(f"{folder / 'resume.pth'}: damaged, --overwrite starts anew ({e})") from e
        print(f"resuming at epoch {start} of {args.num_epochs}", flush=True)
    bar = tqdm(range(start, args.num_epochs), initial=start, total=args.num_epochs, unit="epoch")
    for epoch in bar:
        torch.manual_seed(args.seed + 1000 * epoch)  # of the dropout
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
        scheduler.step()
        if not total.isfinite():
            raise UserError(
                f"--learning_rate: the loss is not finite in epoch {epoch + 1}; try less than {args.learning_rate}"
            )
        bar.set_postfix(loss=f"{total.item() / len(data.train):.4f}", test_accuracy=f"{accuracy(model, data.test):.4f}")
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(folder / "resume.pth", {"epoch": epoch + 1, **state})
    return model


def main(argv=None) -> int:
    args = parse_args(argv)
    settings = {k: getattr(args, k) for k in ("dataset", "num_epochs", "batch_size", "learning_rate", "seed")}
    for name, value in settings.items():
        print(f"  {name:20s} {value}")
    folder = Path(args.runs_dir) / "classifiers" / args.dataset
    before = read_json(folder / "config.json") if (folder / "config.json").exists() and not args.overwrite else settings
    if different := [k for k, v in settings.items() if before.get(k) != v]:
        raise UserError(
            f"{folder}: exists, trained with another --{different[0]} ({before.get(different[0])}); --overwrite"
        )
    if (folder / "classifier.pth").exists() and not args.overwrite:
        load_classifier(folder, args.dataset, args.device)  # whole, or an error
        print(f"already complete: {folder}, test accuracy {before.get('test_accuracy')}")
        return 0
    check_writable(folder)
    data = load_data(Config(dataset=args.dataset), args.data_dir, args.device, args.download)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if args.overwrite:
            for name in ("classifier.pth", "resume.pth"):
                (folder / name).unlink(missing_ok=True)
        settings["n_classes"] = data.n_classes
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
