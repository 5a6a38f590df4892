"""Trains the classifier with which the evaluation labels samples and reconstructions.

    python train_classifier.py --dataset Digits --seed 2 3 4
    python train_classifier.py --dataset path/to/folder --image_size 32

It is saved in runs/classifiers/<data set>/, where the evaluation looks for it, those of further
seeds in folders seed_<seed> there. Repeating a command resumes an unfinished training and skips a
finished one.
"""

from functools import partial
from pathlib import Path

from utils.cli import Parser, add_config_flags, positive, whole
from utils.distributed import share
from utils.errors import UserError, run_script
from utils.files import check_writable, read_json, save_tensors, write_json
from utils.locks import Held, locked, note_held
from utils.machine import prepare


def parse_args(argv=None):
    """Parses the flags. Raises UserError for unknown or invalid ones."""
    parser = Parser(__doc__)
    add_config_flags(parser, only=("dataset", "image_size", "image_channels"))
    usual = "(default: set per data set)"
    parser.add_argument("--num_epochs", type=whole, help=f"epochs to train {usual}")
    parser.add_argument("--batch_size", type=whole, help=f"images per batch {usual}")
    parser.add_argument("--learning_rate", type=positive, help=f"initial learning rate {usual}")
    seeds = "weights, batch order, dropout, augmentation; several train a classifier each (default: 2)"
    seed = partial(whole, least=0, most=2**63 - 1)
    parser.add_argument("--seed", type=seed, nargs="+", default=[2], help=seeds)
    parser.add_argument("--overwrite", action="store_true", help="retrain from scratch, even a finished classifier")
    return parser.parse(argv)


def main(argv=None) -> int:
    """Trains and saves the classifiers of a data set; returns the exit status."""
    args = parse_args(argv)
    device = prepare(args.device, args.threads)
    from datasets.loading import load_data
    from models.classifiers import folder_of
    from utils.config import Config

    config = Config(dataset=args.dataset, image_size=args.image_size, image_channels=args.image_channels)
    names = ("num_epochs", "batch_size", "learning_rate")
    settings = {name: getattr(args, name) or getattr(config.recipe, name) for name in names}
    load = partial(load_data, config, args.data_dir, device, args.download)
    seeds = list(dict.fromkeys(args.seed))
    for seed in share(seeds, "classifiers"):
        folder = folder_of(seed, Path(args.runs_dir) / "classifiers" / config.data_name)
        try:
            make(config, settings | {"seed": seed}, folder, load, device, args.overwrite)
        except Held as e:
            if len(seeds) == 1:  # which leaves nothing to do, and its user should notice
                raise
            note_held(e)
    return 0


def make(config, settings: dict, folder: Path, load, device, overwrite: bool) -> None:
    """Trains a classifier and saves it in a folder, unless it is there; `load` loads its data set."""
    from models.classifiers import accuracy, load_classifier
    from utils.training.classifier import trained

    described = {"dataset": config.data_name, **settings}
    for name, value in described.items():
        print(f"  {name:20s} {value}")
    file, weights, checkpoint = (folder / n for n in ("config.json", "classifier.pth", "resume.pth"))
    stored = read_json(file) if file.exists() and not overwrite else described
    for name in (name for name, value in described.items() if stored.get(name) != value):
        raise UserError(f"{folder}: trained with another --{name} ({stored.get(name)}); --overwrite retrains it")
    if weights.exists() and not overwrite:
        load_classifier(folder, config, device, load())  # it may be damaged, or of other images
        print(f"already complete: {folder}, test accuracy {stored.get('test_accuracy')}")
        return
    check_writable(folder)
    data = load()
    if not data.labelled:
        raise UserError(f"--dataset: {config.dataset} has no classes that a classifier could learn")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if weights.exists() and not overwrite:  # by now, by another process
            print(f"already complete: {folder}")
            return
        for path in (weights, checkpoint) if overwrite else ():
            path.unlink(missing_ok=True)
        described |= {"n_classes": data.n_classes, "data": data.digest}
        write_json(file, described)
        model = trained(config, data, settings, folder, device)
        test_accuracy = accuracy(model, data.test)
        write_json(file, {**described, "test_accuracy": test_accuracy})
        save_tensors(weights, {k: v.contiguous().cpu() for k, v in model.state_dict().items()})
        checkpoint.unlink(missing_ok=True)
    print(f"test accuracy {test_accuracy:.4f}; the classifier is in {folder}")


if __name__ == "__main__":
    run_script(main)
