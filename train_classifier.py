"""Trains the classifier with which the evaluation labels samples and reconstructions.

    python train_classifier.py --dataset Digits --seed 2 3 4
    python train_classifier.py --dataset path/to/folder --image_size 32

It is saved in runs/classifiers/<data set>/, where the evaluation looks for it, those of further seeds in folders
seed_<seed> there. Repeating a command resumes an unfinished training and skips a finished one.
"""

from pathlib import Path

from utils.cli import Parser, add_config_flags, whole
from utils.distributed import share
from utils.errors import UserError, run_script
from utils.files import check_writable, read_json, save_tensors, write_json
from utils.locks import Held, locked, note_held
from utils.machine import prepare


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    add_config_flags(parser, only=("dataset", "image_size", "image_channels"))
    parser.add_argument("--num_epochs", type=whole, help="epochs to train (default: set per data set)")
    parser.add_argument("--batch_size", type=whole, help="images per batch (default: set per data set)")
    parser.add_argument("--learning_rate", type=float, help="initial learning rate (default: set per data set)")
    seeds = "weights, batch order, dropout, augmentation; several train a classifier each (default: 2)"
    parser.add_argument("--seed", type=int, nargs="+", default=[2], help=seeds)
    parser.add_argument("--overwrite", action="store_true", help="retrain from scratch, even a finished classifier")
    args = parser.parse(argv)
    from utils.config import Config

    args.config = Config(dataset=args.dataset, image_size=args.image_size, image_channels=args.image_channels)
    for name in ("num_epochs", "batch_size", "learning_rate"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.config.recipe, name))
    if not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning_rate: must be > 0 and finite, got {args.learning_rate}")
    for seed in args.seed:
        if not 0 <= seed < 2**63:
            raise UserError(f"--seed: must be from 0 to 2^63 - 1, got {seed}")
    return args


def main(argv=None) -> int:
    """Trains and saves the classifiers of a data set; returns the exit status."""
    args = parse_args(argv)
    args.device = prepare(args.device, args.threads)
    from models.classifiers import folder_of

    seeds = list(dict.fromkeys(args.seed))
    for seed in share(seeds, "classifiers"):
        try:
            make(args, seed, folder_of(seed, Path(args.runs_dir) / "classifiers" / args.config.data_name))
        except Held as e:
            if len(seeds) == 1:  # which leaves nothing to do, and its user should notice
                raise
            note_held(e)
    return 0


def is_complete(folder: Path, args) -> bool:
    """Whether the classifier is there, and not to be trained again; says so. Raises UserError if it is damaged."""
    from models.classifiers import load_classifier

    if not (folder / "classifier.pth").exists() or args.overwrite:
        return False
    load_classifier(folder, args.config, args.device)
    print(f"already complete: {folder}, test accuracy {read_json(folder / 'config.json').get('test_accuracy')}")
    return True


def make(args, seed: int, folder: Path) -> None:
    """Trains the classifier of one seed and saves it in its folder, unless it is there."""
    from datasets.loading import load_data
    from models.classifiers import accuracy
    from utils.training.classifier import train

    config = args.config
    settings = {k: getattr(args, k) for k in ("num_epochs", "batch_size", "learning_rate")}
    settings = {"dataset": config.data_name, **settings, "seed": seed}
    for name, value in settings.items():
        print(f"  {name:20s} {value}")
    before = read_json(folder / "config.json") if (folder / "config.json").exists() and not args.overwrite else settings
    if different := [k for k, v in settings.items() if before.get(k) != v]:
        raise UserError(
            f"{folder}: trained with another --{different[0]} ({before.get(different[0])}); --overwrite retrains it"
        )
    if is_complete(folder, args):
        return
    check_writable(folder)
    data = load_data(config, args.data_dir, args.device, args.download)
    if not data.labelled:
        raise UserError(f"--dataset: {args.dataset} has no classes that a classifier could learn")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if is_complete(folder, args):  # by now, by another process
            return
        if args.overwrite:
            for name in ("classifier.pth", "resume.pth"):
                (folder / name).unlink(missing_ok=True)
        settings |= {"n_classes": data.n_classes, "data": data.digest}
        write_json(folder / "config.json", settings)
        model = train(args, seed, data, folder)
        test_accuracy = accuracy(model, data.test)
        write_json(folder / "config.json", {**settings, "test_accuracy": test_accuracy})
        save_tensors(folder / "classifier.pth", {k: v.contiguous().cpu() for k, v in model.state_dict().items()})
        (folder / "resume.pth").unlink(missing_ok=True)
    print(f"test accuracy {test_accuracy:.4f}; the classifier is in {folder}")


if __name__ == "__main__":
    run_script(main)
