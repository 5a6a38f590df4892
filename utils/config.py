"""What a run is: the Config, its flags, its config.json, and the name of its folder."""

import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from datasets.arrays import nearest_size, usual_channels
from datasets.folders import SIZES, enumeration
from datasets.table import DATASETS, Recipe, lookup
from models.own import IDENTITY
from models.tables import LATENTS, LIKELIHOODS, MODELS
from utils.errors import UserError, nearest
from utils.files import read_json

USUAL = {"num_epochs": 200, "batch_size": 256, "learning_rate": 3e-4, "z_dims": 10, "sigma": 0.03}  # the paper's
MUONS_RATE = 7e-3  # the usual learning rate of Muon, whatever the data set
HUGE = 1e30  # beyond which float32 overflows
BOUNDS = (("least", operator.lt, ">="), ("above", operator.le, ">"), ("most", operator.gt, "at most"))


def _flag(default, help: str | None, part: str, **bounds):
    """A field; `part` says what it is for, `least`, `above` and `most` bound its value.

    With a help it has a flag. Without, or if it is `sparse`, it is kept in config.json where it has a value.
    """
    return dataclasses.field(default=default, metadata={"help": help, "part": part, **bounds})


def _usual(name: str, help: str, part: str, **bounds):
    """A flag whose default depends on the data set."""
    return _flag(None, f"{help} (default: {USUAL[name]:g}{_of_data_sets(name)})", part, **bounds)


def _of_data_sets(name: str) -> str:
    """What a flag's help says of the data sets that have a default of their own."""
    return "".join(f"; {of} {row.settings[name]}" for of, row in DATASETS.items() if name in row.settings)


@dataclass(frozen=True)
class Config:
    """One run's settings, a field per flag; complete and valid once made (UserError otherwise).

    A field is part of the "model", "objective", "training", "data", "repeat" or "name" of a run, by which runs are
    compared (`fields_of`, `differs_in`). Adding a flag is adding a field; with `in_name`, the name of the run folder
    has its value where it is not the default.
    """

    vae_type: str = _flag("HVAE", "the model", "model", choices=MODELS)
    dataset: str = _flag("Digits", f"{', '.join(DATASETS)}, or a folder or .npz of images", "data")
    image_size: int | None = _flag(
        None,
        f"for own images: resize to {enumeration(SIZES)} pixels (default: the size nearest to theirs)",
        "data",
    )
    image_channels: int | None = _flag(
        None, "for own images: 1 (grey) or 3 (colour) (default: 3, arrays have their own)", "data"
    )
    px_y_family_ll: str | None = _flag(
        None, "the likelihood p(x|y) (default: the data set's usual one)", "model", choices=LIKELIHOODS
    )
    sigma: float = _usual(
        "sigma", "std of GaussianFixedSigma, in units of the pixel range", "model", above=0, most=HUGE
    )
    qz_family: str = _flag("DiagonalGaussian", "the family of z", "model", choices=LATENTS)
    use_conv_z: bool = _flag(False, "a convolutional z (always for 256 pixels)", "model")
    linear_y_with_dims: int = _flag(
        -1, "make y a vector with this many dimensions (-1: convolutional y)", "model", most=2**20
    )
    conv_channels: int = _flag(16, "channels of the conv layers", "model", least=1, most=4096)
    z_dims: int = _usual("z_dims", "dimensions (or categories) of a vector z", "model", least=1, most=2**20)
    networks: str | None = _flag(
        None, "own networks: a Python file and a class in it (docs/own_networks.md)", "model", sparse=True
    )
    num_epochs: int = _usual("num_epochs", "epochs to train", "training", least=1, most=10**9)
    batch_size: int = _usual("batch_size", "images per batch", "training", least=1, most=2**31 - 1)
    learning_rate: float = _flag(
        None, f"the learning rate (default: {USUAL['learning_rate']:g}{_of_data_sets('learning_rate')}; with Muon "
        f"{MUONS_RATE:g})", "training", above=0, most=HUGE,
    )  # fmt: skip
    optimizer: str | None = _flag(
        None, "adam; muon: far ahead in short trainings of Gaussian z (default: adam, muon "
        f"with --multi_rate{_of_data_sets('optimizer')})", "training", choices=("adam", "muon"),
    )  # fmt: skip
    warmup_epochs: int | None = _flag(
        None, "epochs over which the weight of both rates (--multi_rate: of R(z)) rises from 0 to 1 (default: LVAE "
        "num_epochs // 5, --multi_rate num_epochs // 10, others 0)", "training", least=0, most=10**9,
    )  # fmt: skip
    no_warmup: bool = _flag(False, "same as --warmup_epochs 0", "training")
    beta_y: float = _flag(1.0, "weight of R(y|z), the rate of y given z", "objective", least=0, most=HUGE)
    beta_z: float = _flag(1.0, "weight of R(z), the rate of z", "objective", least=0, most=HUGE)
    lr_schedule: str | None = _flag(
        None, "constant; cosine: down to 0 over the whole training; tail: over its last 30 % (default: constant, tail "
        f"with --multi_rate{_of_data_sets('lr_schedule')})", "training", choices=("constant", "cosine", "tail"),
    )  # fmt: skip
    multi_rate: bool = _flag(
        False, "train one model for the whole range of betas, and unfold it into the grid's cells", "training"
    )
    refine_epochs: int | None = _flag(
        None, "epochs for which every unfolded cell of --multi_rate is trained further, on its own (default: none)",
        "training", least=1, most=10**9, sparse=True, in_name=True,
    )  # fmt: skip
    precision: str = _flag(
        "fp32", "fp32; tf32: TF32 products on a GPU; bf16: bfloat16 hidden layers, the rest in fp32",
        "training", choices=("fp32", "tf32", "bf16"),
    )  # fmt: skip
    seed: int = _flag(
        2, "initial weights, batch order and noise, the same for all cells of a grid", "repeat", least=0, most=2**63 - 1
    )
    run_name: str = _flag("", "prefix of the run folder's name", "name")
    run_batch_name: str = _flag("singles", "folder under --runs_dir in which the runs of a batch lie", "name")
    data_digest: str | None = _flag(None, None, "data")  # of its images and labels
    # A conditioned model is trained for all beta_y from beta_y to beta_max_y, and so for beta_z.
    beta_max_y: float | None = _flag(None, None, "objective", least=0)
    beta_max_z: float | None = _flag(None, None, "objective", least=0)
    target_rate_y: float | None = _flag(None, None, "objective", above=0)  # nats; the betas are those of such rates
    target_rate_z: float | None = _flag(None, None, "objective", above=0)
    init_from: str | None = _flag(None, None, "training")  # the digest of the weights that the training started from
    sharing: int | None = _flag(None, None, "training")  # what betas share in a multi-rate model (conditioned.py)
    source: str | None = _flag(None, None, "repeat")  # an unfolded cell's: that of the conditioned model's weights

    def __post_init__(self):
        of_data_set = DATASETS[str(self.dataset)].settings if str(self.dataset) in DATASETS else {}
        if self.multi_rate:
            self._default(optimizer="muon", lr_schedule="tail", sharing=2)
        usual = USUAL | {"optimizer": "adam", "lr_schedule": "constant"} | of_data_set
        self._default(optimizer=usual["optimizer"])
        self._default(learning_rate=MUONS_RATE if self.optimizer == "muon" else None)
        self._default(**usual)
        for field in dataclasses.fields(self):
            self._check(field)
        self._check_names()
        self._check_data()
        self._check_betas()
        self._default(px_y_family_ll=lookup(self).likelihood)
        self._set(use_conv_z=self.use_conv_z or self.image_shape[1] == 256 and self.networks is None)
        self._check_warmup()
        self._check_model()
        if len(self.folder_name.encode(errors="surrogateescape")) > 255:
            raise UserError("--run_name: too long for a folder name")

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _default(self, **values) -> None:
        self._set(**{name: value for name, value in values.items() if getattr(self, name) is None})

    def _check(self, field: dataclasses.Field) -> None:
        """Raises UserError for a value of another type than the field's, or outside its choices and bounds."""
        name, kind, allowed = field.name, kind_of(field), field.metadata
        value = getattr(self, name)

        def need(right: str):
            raise UserError(f"--{name}: must be {right}, got {value!r}")

        if value is None and type(None) in get_args(field.type):
            return
        if kind is float and type(value) is int and abs(value) < HUGE:
            self._set(**{name: float(value)})
        elif type(value) is not kind:
            need({int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind])
        if "choices" in allowed and value not in allowed["choices"]:
            raise UserError(f"--{name}: unknown {value!r}{nearest(value, allowed['choices'])}")
        if kind is float and not math.isfinite(value):
            need("a finite number")
        for bound, is_outside, right in BOUNDS:
            if bound in allowed and is_outside(value, allowed[bound]):
                need(f"{right} {allowed[bound]:.10g}")

    def _check_names(self) -> None:
        for name in fields_of("name"):
            text = getattr(self, name)
            if set(text) & set("/\\") or text[:1] == "." or not text.isprintable() or text == "classifiers":
                right = "a plain folder name, without slashes, control characters or a leading dot, not 'classifiers'"
                raise UserError(f"--{name}: must be {right}, got {text!r}")
        if not 0 < len(self.run_batch_name.encode(errors="surrogateescape")) <= 255:
            raise UserError("--run_batch_name: too long or too short for a folder name")

    def _check_data(self) -> None:
        own = {"image_size": self.image_size, "image_channels": self.image_channels}
        if self.dataset in DATASETS:
            for name in (name for name, value in own.items() if value is not None):
                raise UserError(f"--{name}: is for own images, {self.dataset} has its own")
            return
        path = os.path.abspath(self.dataset)
        if self.image_size is None and not os.path.exists(path):
            if os.sep in self.dataset:
                raise UserError(f"--dataset: {path} not found")
            known = nearest(self.dataset, DATASETS)
            raise UserError(f"--dataset: unknown {self.dataset!r}{known}, or a folder or .npz")
        if not os.path.basename(path).isprintable():
            raise UserError(f"--dataset: runs are named after it, so rename {path!r}")
        size = nearest_size(path) if self.image_size is None else self.image_size
        self._set(dataset=path, image_size=size)
        self._default(image_channels=usual_channels(path))
        if size not in SIZES:
            raise UserError(f"--image_size: must be {enumeration(SIZES)} for own images, got {size}")
        if self.image_channels not in (1, 3):
            raise UserError(f"--image_channels: must be 1 or 3, got {self.image_channels}")

    def _check_betas(self) -> None:
        if self.refine_epochs and not self.multi_rate:
            raise UserError("--refine_epochs: trains cells that --multi_rate unfolds; add it")
        if not self.is_conditioned:
            return
        ranges = {"beta_y": (self.beta_y, self.beta_max_y), "beta_z": (self.beta_z, self.beta_max_z)}
        for name, (low, high) in ranges.items():
            if not 0 < low <= high <= 1e6 * low:
                wish = f"{low:g} to {high:g}"
                raise UserError(f"--{name}: --multi_rate needs a range of at most 6 decades, > 0, got {wish}")
        if all(low == high for low, high in ranges.values()):
            raise UserError("--multi_rate: needs a range of betas, several of --beta_y or of --beta_z")

    def _check_warmup(self) -> None:
        if self.no_warmup and self.warmup_epochs:
            raise UserError("--no_warmup: contradicts --warmup_epochs")
        default = self.default_warmup
        self._default(warmup_epochs=0 if self.no_warmup else default)
        self._set(no_warmup=default > 0 and self.warmup_epochs == 0)  # the two ways to say it
        if self.warmup_epochs > self.num_epochs:
            most = f"at most --num_epochs ({self.num_epochs})"
            raise UserError(f"--warmup_epochs: must be {most}, got {self.warmup_epochs}")

    def _check_model(self) -> None:
        y_dims, likelihood = self.linear_y_with_dims, self.px_y_family_ll
        if self.networks is not None and not IDENTITY.fullmatch(self.networks):
            raise UserError(f"--networks: must be CLASS@ and the digest of its file, got {self.networks!r}")
        if self.networks is not None and self.use_conv_z:
            raise UserError("--use_conv_z: goes without --networks, which give z its shape")
        if y_dims != -1 and y_dims < 2:
            raise UserError(f"--linear_y_with_dims: must be -1 (off) or >= 2, got {y_dims}")
        if y_dims > 0 and self.use_conv_z:
            raise UserError("--linear_y_with_dims: goes with a vector z, not with --use_conv_z or 256 pixels")
        if self.image_shape[0] == 3 and not LIKELIHOODS[likelihood].colour:
            raise UserError(f"--px_y_family_ll: {likelihood} is for grey images, {self.dataset} is in colour")
        MODELS[self.vae_type].check(self)
        if self.qz_family == "GumbelSoftmax" and self.z_dims < 2:
            raise UserError(f"--z_dims: GumbelSoftmax needs at least 2 categories, got {self.z_dims}")
        if self.target_rate_z is not None and self.vae_type == "BVAE":
            raise UserError("--target_rate_z: BVAE has no z")
        if (self.target_rate_z or 0) >= self.most_rate_z:
            most = f"{self.z_dims} categories hold less than {self.most_rate_z:.4g} nats"
            raise UserError(f"--target_rate_z: {most}, got {self.target_rate_z:g}")

    def differs_in(self, other: "Config", *parts: str) -> list[str]:
        """The fields of some parts, or of all, in which two Configs differ, as far as they matter.

        Data sets are told by `data_name`, since folders move; sigma only matters where it is fixed; no_warmup follows
        from warmup_epochs.
        """
        names = [n for n in fields_of(*parts) if getattr(self, n) != getattr(other, n)]
        unused = {"no_warmup"}
        if self.data_name == other.data_name:
            unused.add("dataset")
        if self.px_y_family_ll != "GaussianFixedSigma":
            unused.add("sigma")
        return [n for n in names if n not in unused]

    def begins_as(self, other: "Config") -> bool:
        """Whether the two trainings are the same for as long as both last."""
        different = self.differs_in(other, "model", "objective", "training", "data", "repeat")
        return other.is_extendable and set(different) <= {"num_epochs", "data_digest"}

    def continues(self, other: "Config") -> bool:
        """Whether this training begins as `other`, and has more epochs."""
        return self.begins_as(other) and other.num_epochs < self.num_epochs

    @property
    def is_conditioned(self) -> bool:
        """Whether it is the model of a whole range of betas."""
        return self.beta_max_y is not None

    @property
    def first_epoch(self) -> int:
        """The epochs before its own training: of a cell that is refined, those of the multi-rate model."""
        return self.num_epochs if self.refine_epochs else 0

    @property
    def own_epochs(self) -> int:
        """The epochs of its own training."""
        return self.refine_epochs or self.num_epochs

    @property
    def last_epoch(self) -> int:
        """The epochs after which it is trained, those before its own training among them."""
        return self.first_epoch + self.own_epochs

    @property
    def has_target(self) -> bool:
        """Whether its betas are those of rates that were asked for."""
        return self.target_rate_y is not None or self.target_rate_z is not None

    @property
    def most_rate_z(self) -> float:
        """What z can hold, in nats."""
        return math.log(self.z_dims) if self.qz_family == "GumbelSoftmax" else math.inf

    @property
    def is_extendable(self) -> bool:
        """Whether a training of more epochs begins exactly as this one."""
        return not (self.lr_schedule != "constant" or self.is_conditioned or self.has_target or self.source)

    @property
    def default_warmup(self) -> int:
        """Epochs of warm-up when --warmup_epochs is not given; without any, a conditioned model's z collapses."""
        of_model = MODELS[self.vae_type].default_warmup(self.num_epochs)
        return max(of_model, math.ceil(self.num_epochs / 10)) if self.multi_rate else of_model

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return lookup(self).shape

    @property
    def recipe(self) -> Recipe:
        """How the classifier of the data set is trained."""
        return lookup(self).recipe

    @property
    def data_flags(self) -> list[str]:
        """The flags that mean this data set."""
        own = ["--image_size", str(self.image_size), "--image_channels", str(self.image_channels)]
        return ["--dataset", self.dataset, *(own if self.dataset not in DATASETS else [])]

    @property
    def data_name(self) -> str:
        """The data set's name; of own images that of the folder or file and the size that they are resized to."""
        if self.dataset in DATASETS:
            return self.dataset
        return f"{Path(self.dataset).resolve().name}_{self.image_channels}x{self.image_size}x{self.image_size}"

    @property
    def folder_name(self) -> str:
        """The run folder's name, which spells the configuration the way the paper's code does."""
        parts = {  # and whether it says so
            f"{self.run_name or 'NoName'}-Epochs_{self.num_epochs}-BatchSize_{self.batch_size}": True,
            f"c_{self.conv_channels}-{self.data_name}": True,
            f"{self.vae_type}-px_y_family_ll_{self.px_y_family_ll}-qz_family_{self.qz_family}": True,
            f"{self._name_of_layer('y')}-{self._name_of_layer('z')}": True,
            f"ll_sigma_{self.sigma}": self.px_y_family_ll == "GaussianFixedSigma",
            "use_conv_z": self.use_conv_z,
            f"z_dim_{self.z_dims}": not self.use_conv_z,
            f"networks_{(self.networks or '').partition('@')[0]}": self.networks is not None,
            f"linear_y_dims_{self.linear_y_with_dims}": self.linear_y_with_dims > 0,
            "no_warmup": self.no_warmup,
            f"warmup_epochs_{self.warmup_epochs}": self.warmup_epochs not in (0, self.default_warmup),
            self.lr_schedule: self.lr_schedule != ("tail" if self.multi_rate else "constant"),
            "muon": self.optimizer == "muon",
            "multi_rate": self.multi_rate,
            f"init_{(self.init_from or '')[:8]}": self.init_from is not None,
            self.precision: self.precision != Config.precision,
        }
        for field in (f for f in dataclasses.fields(self) if "in_name" in f.metadata):
            parts[f"{field.name}_{getattr(self, field.name)}"] = getattr(self, field.name) != field.default
        parts[f"seed_{self.seed}"] = self.seed != Config.seed
        return "-".join(text for text, is_said in parts.items() if is_said)

    def flags(self, without: Sequence[str] = ()) -> list[str]:
        """The fewest flags of train.py that give its fields, but for some."""
        names = set(FLAGS) - {"no_warmup", *without}  # which follows from warmup_epochs
        settings = {n: getattr(self, n) for n in FLAGS if n in names and getattr(self, n) is not None}
        config = Config(**settings)
        for name in [*settings]:
            fewer = {n: v for n, v in settings.items() if n != name}
            with contextlib.suppress(UserError):  # of what cannot be without it
                settings = fewer if Config(**fewer) == config else settings
        words = {n: [f"--{n}"] if v is True else [f"--{n}", f"{v}"] for n, v in settings.items()}
        odd = [n for n, v in settings.items() if f"{v}"[:1] == "-" or f"{v}".isspace()]  # which no flag can be beside
        words |= {n: [f"--{n}={settings[n]}"] for n in odd}
        return [word for of_one in words.values() for word in of_one]

    def _name_of_layer(self, layer: str) -> str:
        """What the folder's name says of a layer's rate: its beta, the range of betas, or the rate asked for."""
        beta, largest, target = (getattr(self, n + layer) for n in ("beta_", "beta_max_", "target_rate_"))
        if target is not None:
            return f"Rate_{layer}_{target}"
        return f"Beta_{layer}_{beta}" if largest is None else f"Beta_{layer}_{beta}_to_{largest}"

    def to_json(self) -> str:
        """The text of config.json; `sha256` guards the settings against damage."""
        settings = {name: getattr(self, name) for name in fields_of()}
        settings = {k: v for k, v in settings.items() if v is not None or k in FLAGS and k not in SPARSE}
        return json.dumps({**settings, "sha256": _sha256(settings)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> "Config":
        """Reads config.json, ours or the paper's code's. Raises UserError naming the file."""
        settings = read_json(path)
        if "dataset" not in settings:
            raise UserError(f"{path}: damaged, or not a run's config.json")
        digest = settings.pop("sha256", None)
        if digest is not None and digest != _sha256(settings):
            raise UserError(f"{path}: damaged or edited by hand (its sha256 does not match its settings)")
        for name in set(settings) - set(fields_of()) if digest is not None else ():
            raise UserError(f"{path}: has --{name}, which this version of the code does not know; use a newer one")
        earlier = {"optimizer": "adam", "sharing": 1 if settings.get("multi_rate") else None}
        settings = earlier | settings  # runs that do not say were trained so
        try:
            return cls(**{name: settings[name] for name in fields_of() if name in settings})
        except UserError as e:
            raise UserError(f"{path}: {e}") from e


FLAGS = [f.name for f in dataclasses.fields(Config) if f.metadata["help"]]  # the fields that have one
SPARSE = [f.name for f in dataclasses.fields(Config) if "sparse" in f.metadata]


def fields_of(*parts: str) -> list[str]:
    """The names of the fields of some parts of a Config, or of all, in their order."""
    return [f.name for f in dataclasses.fields(Config) if not parts or f.metadata["part"] in parts]


def kind_of(field: dataclasses.Field) -> type:
    """The plain type of a Config's field: `int | None` is an int."""
    return next(iter(get_args(field.type)), field.type)


def what_differs(configs: Sequence[Config]) -> list[str]:
    """A short name for each Config: the settings in which they differ and the betas, `beta_y 1, beta_z 0.1`."""
    names = [n for n in fields_of() if n not in ("run_batch_name", "data_digest", "source")]
    names = [n for n in names if n.startswith("beta_") or len({getattr(c, n) for c in configs}) > 1]

    def text(name: str, config: Config) -> str:
        value = getattr(config, name)
        if value in (None, "") or name == "warmup_epochs" and value == config.default_warmup:
            return ""  # a default follows from the others
        return f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"

    return [", ".join(filter(None, (text(name, c) for name in names))) for c in configs]


def _sha256(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
