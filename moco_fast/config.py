"""Configuration of a run: frozen sections, validated once and written to the run's folder.

Does not import torch, so that `--help` is fast.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import tyro

from moco_fast.methods.base import BatchStatistics, Method
from moco_fast.methods.registry import method_class
from pipelines.config import FREELY, WITH_NOTE, DataConfig, ViewsConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BatchNormConfig",
    "CheckpointConfig",
    "Config",
    "EvalConfig",
    "Layer",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "Tracker",
    "changes",
    "differences",
    "flatten",
    "from_dict",
    "may_change",
    "method_to_dict",
    "option_name",
    "to_dict",
    "validate",
]


Layer = Literal["backbone", "head"]
"""Layer whose output the features are: the backbone, or the projection head (without v3's predictor)."""

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""Where the metrics of a run can go besides metrics.jsonl."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder below the method's head."""

    encoder: str = "resnet50"
    """Name of the encoder: one of moco_fast.encoders.encoder.ENCODERS, or any model name of timm."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """`cifar`: a 3x3 first convolution with stride 1 and no pooling, for images of about 32 pixels."""
    channels: int = 3
    """Channels of the first layer. 1: for gray images; images in color count as their gray value."""
    zero_init_residual: bool = False
    """ResNets: start each residual block as the identity, the scale of its last batch norm at zero (MoCo v3)."""
    mean: tuple[float, float, float] = field(default=IMAGENET_MEAN, metadata={"metavar": "R G B"})
    """Mean per channel, subtracted from pixels in 0..1."""
    std: tuple[float, float, float] = field(default=IMAGENET_STD, metadata={"metavar": "R G B"})
    """Standard deviation per channel, by which pixels are then divided."""
    freeze_patch_projection: bool = False
    """Vision transformers: keep the patch projection as it was initialized (MoCo v3)."""


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig:
    """How batch statistics are kept from revealing which key belongs to which query."""

    policy: BatchStatistics = "auto"
    """`exchange`: keys are computed on other ranks' images (the paper's shuffling BN). `virtual`: one rank's batch is
    split into groups with their own statistics. `auto`: exchange on several ranks, virtual on one. `gather`: the
    authors' shuffle, slower, for comparisons. `sync`: statistics of the whole global batch (MoCo v3). `none`: each
    rank's own."""
    num_groups: int = 8
    """Number of groups of the `virtual` policy."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """Name of the optimizer."""
    kernels: Literal["torch", "apex"] = "torch"
    """`apex`: the fused kernels of NVIDIA's apex, which its container image includes; it has no LARS."""
    lr: float = 0.03
    """Peak learning rate as used: it is not scaled by the batch size."""
    published: tyro.conf.Suppress[tuple[tuple[int, float], ...]] = field(
        default=((128, 0.015), (256, 0.03)), metadata=FREELY
    )
    """Pairs of global batch size and learning rate in the recipe's source. A run with another pair logs a note."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"metavar": "BETA1 BETA2"})
    """Decay rates of the first and second moments of AdamW and LAMB."""
    trust: float = 0.001
    """Trust coefficient of LARS."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters; LARS excludes biases and batch-norm scales, as in MoCo v3."""
    clip_norm: float | None = None
    """Maximum norm of the gradient, to which larger ones are scaled down. Unset: no clipping."""
    schedule: Literal["cosine", "step", "exponential", "constant"] = "cosine"
    """Schedule of the learning rate over the run."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """`step`: shares of the run at which the learning rate drops to a tenth."""
    decay: float = 0.9
    """`exponential`: factor by which the learning rate drops each time."""
    decay_every: float = 0.05
    """`exponential`: share of the run between drops."""
    warmup: float = 0.0
    """Share of the run over which the learning rate rises from 0."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step. Unlike one larger batch, each is enqueued separately."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Folder, length, device and precision of the run."""

    out: str = field(default="runs/default", metadata=FREELY)
    """Folder of the run. Running the same command again continues it."""
    epochs: float = 200.0
    """Number of passes over the samples, unless `steps` or `samples` is set."""
    steps: int | None = None
    """Number of optimizer steps."""
    samples: int | None = None
    """Number of samples, each counted as often as it is seen; rounded up to whole steps."""
    seed: int = 0
    """Seed of weights, sample order and augmentation."""
    init_from: str | None = field(default=None, metadata={"metavar": "ENCODER"})
    """Start from the weights of another encoder: a value of `moco-fast eval --encoder`, such as a run's folder, a file,
    timm:NAME or torchvision:NAME. Unset: random weights."""
    branch_from: str | None = field(default=None, metadata=FREELY | {"metavar": "RUN[@STEP]"})
    """Begin with everything in a checkpoint of another run: its newest one, RUN@1000 or RUN@best. The other run is only
    read. What shall differ from it, --run.allow-changes has to name."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=FREELY)
    """`auto`: a GPU if there is one, unless `accelerate launch --cpu` is used."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: the choice of `accelerate launch --mixed_precision`; else bf16 on a GPU that supports it, else fp32.
    `tf32`: float32 with products rounded to 10 bits, on a GPU's tensor cores; `fp32`: no rounding."""
    compile: bool = False
    """Compile the encoders with torch.compile; `accelerate launch --dynamo_backend inductor` does the same."""
    cuda_graphs: bool = False
    """Compile the encoders and replay their kernels as CUDA graphs: for batches so small (about 32 per GPU) that
    launching kernels takes longer than running them. Needs a GPU, and one backward pass per step."""
    deterministic: bool = False
    """Use only kernels with bit-reproducible results: slower, but a resumed run is bit-equal on a GPU, too."""
    timeout_s: float = field(default=600.0, metadata=FREELY)
    """Seconds that a rank waits for the others before the run fails."""
    allow_changes: tuple[str, ...] = field(default=(), metadata=FREELY | {"metavar": "OPTION..."})
    """Options, such as run.steps, that a run which continues may have other than before, although they decide what is
    trained; data.shards and eval.shards: sets may hold other samples."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of the run."""

    every: Literal["given", "auto"] = field(default="given", metadata=FREELY)
    """`given`: as every_steps and every_minutes say. `auto`: as often as costs least, by the measured cost of a save
    and failure_hours (Young 1974, Daly 2006)."""
    every_steps: int | None = field(default=1000, metadata=FREELY)
    """Optimizer steps between checkpoints; one is always written at the end. None: not by steps."""
    every_minutes: float | None = field(default=None, metadata=FREELY)
    """Minutes between checkpoints, by the first rank's clock. Unset: not by time."""
    failure_hours: float = field(default=24.0, metadata=FREELY)
    """`auto`: mean hours between two failures of the run, on all its machines together."""
    keep: int = field(default=2, metadata=FREELY)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = field(default=None, metadata=FREELY)
    """Steps of which a checkpoint is kept for good: the first from each multiple on. Unset: the newest ones only."""
    keep_best: str | None = field(default=None, metadata=FREELY | {"metavar": "FIGURE"})
    """Figure of an evaluation, such as knn/top1: the checkpoint with its best value is kept, too, as checkpoints/best.
    Unset: no such checkpoint."""
    mirror: str | None = field(default=None, metadata=FREELY)
    """Address (s3:// gs:// az://) to which each checkpoint is uploaded, with the run's configuration and metrics. A run
    whose folder is empty, as on another machine, goes on from there. Unset: the run's folder only."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during the run."""

    tasks: tuple[str, ...] = field(default=(), metadata=WITH_NOTE | {"metavar": "TASK..."})
    """Tasks of `moco-fast eval` to measure, of those on frozen features, such as knn, linear and health. Unset: knn, or
    health where shards have no labels."""
    k: int = field(default=200, metadata=WITH_NOTE)
    """Number of neighbors that vote."""
    temperature: float = field(default=0.07, metadata=WITH_NOTE)
    """Temperature of the vote's weights."""
    layer: Layer = field(default="backbone", metadata=WITH_NOTE)
    """Features in which neighbors are compared: the backbone's, or the projection head's output (Wu et al. 2018 and the
    authors' CIFAR-10 demo)."""
    crop: float = field(default=0.875, metadata=WITH_NOTE)
    """Side of the central square that is evaluated, as a share of the shorter side (0.875 is 224 of 256)."""
    max_bank: int = field(default=100_000, metadata=WITH_NOTE)
    """Maximum number of training samples that tasks learn from (knn: its neighbors), evenly spread over the set."""
    max_held_out: int = field(default=100_000, metadata=WITH_NOTE)
    """Maximum number of held-out samples that are measured, evenly spread over the set."""
    shards: str | None = field(default=None, metadata=WITH_NOTE)
    """Held-out shards, with labels for all tasks but health. Unset: no evaluation, unless --eval.tasks is health."""
    every_steps: int = field(default=5000, metadata=FREELY)
    """Optimizer steps between evaluations; one is always done before the first step and after the last."""
    online_probe: bool = False
    """Train a linear classifier beside the run, on detached features of the labeled training samples' first views: its
    accuracy is logged as probe/top1, and measured on held-out samples. Nothing else changes by it."""
    probe_lr: float = 1e-3
    """Learning rate of that classifier, of AdamW."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging during the run."""

    every_steps: int = field(default=10, metadata=FREELY)
    """Optimizer steps between lines of metrics."""
    trackers: tuple[Tracker, ...] = field(default=("tensorboard",), metadata=FREELY)
    """Where metrics go besides metrics.jsonl, with the configuration and a picture of views. No names: nowhere."""
    project: str = field(default="moco-fast", metadata=FREELY)
    """Name of the project (wandb, trackio) or experiment (mlflow) that the run is part of."""
    name: str | None = field(default=None, metadata=FREELY)
    """Name of the run in trackers. Unset: that of its folder."""
    tags: tuple[str, ...] = field(default=(), metadata=FREELY)
    """Tags of the run in trackers."""
    headspace: int | None = field(default=5000, metadata=FREELY)
    """Optimizer steps between measurements of what loading costs a step: 12 steps are taken on batches that were
    fetched before. Nothing of the run changes by it but its time, by less than 12 steps. None: no measurement."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of a whole run."""

    recipe: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = field(default="", metadata=FREELY)
    """Name of the preset that it was made from; empty: of none."""
    data: DataConfig
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Method
    """Training method; the presets choose one of `moco_fast.methods.registry.METHODS`."""
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


def validate(config: Config) -> None:
    """Check the configuration before any work starts.

    Raises:
        ValueError: an option cannot work; the message gives its value and what would work.
    """

    def given(value: float | None) -> float:
        return 1 if value is None else value

    positive = {
        "bn.num_groups": config.bn.num_groups,
        "optim.lr": config.optim.lr,
        "optim.accumulate": config.optim.accumulate,
        "optim.trust": config.optim.trust,
        "optim.decay": config.optim.decay,
        "optim.decay_every": config.optim.decay_every,
        "run.epochs": config.run.epochs,
        "run.timeout_s": config.run.timeout_s,
        "checkpoint.every_steps": given(config.checkpoint.every_steps),
        "checkpoint.every_minutes": given(config.checkpoint.every_minutes),
        "checkpoint.failure_hours": config.checkpoint.failure_hours,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.keep_every": given(config.checkpoint.keep_every),
        "eval.every_steps": config.eval.every_steps,
        "eval.k": config.eval.k,
        "eval.temperature": config.eval.temperature,
        "eval.max_bank": config.eval.max_bank,
        "eval.max_held_out": config.eval.max_held_out,
        "eval.probe_lr": config.eval.probe_lr,
        "log.every_steps": config.log.every_steps,
        "log.headspace": 1 if config.log.headspace is None else config.log.headspace,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"--{option_name(name)} is {value}, but must be above 0")
    _validate_pixels(config.model)
    _validate_length(config.run)
    if config.optim.clip_norm is not None and not config.optim.clip_norm > 0:
        raise ValueError(
            f"--optim.clip-norm is {config.optim.clip_norm}, but must be above 0, or unset for no clipping"
        )
    _validate_method(config)
    if config.run.cuda_graphs:
        _validate_graphs(config)
    if config.data.stream_samples is not None:
        _validate_streaming(config)
    if not 0 < config.eval.crop <= 1:
        raise ValueError(
            f"--eval.crop is {config.eval.crop}, but must be a fraction of the image, above 0 and at most 1"
        )
    if not 0 <= config.optim.warmup < 1:
        raise ValueError(
            f"--optim.warmup is {config.optim.warmup}, but must be a fraction of the run, at least 0 and below 1"
        )


def _validate_graphs(config: Config) -> None:
    """Refuse CUDA graphs with several backward passes: a replay overwrites the memory of earlier gradients."""
    several = {
        f"{config.method.name}, as it is set, adds those of several": config.method.backward_passes,
        f"--optim.accumulate {config.optim.accumulate} adds those of several": config.optim.accumulate,
        f"--views.num-small {config.views.num_small} adds that of the small views": 1 + bool(config.views.num_small),
    }
    for reason, num_passes in several.items():
        if num_passes > 1:
            raise ValueError(
                f"--run.cuda-graphs keeps the gradient of one backward pass, but {reason}: leave one of them out "
                "(--run.compile alone works with both)"
            )


def _validate_pixels(model: ModelConfig) -> None:
    if model.channels not in (1, 3):
        raise ValueError(
            f"--model.channels is {model.channels}, but shards hold JPEGs, whose pixels are gray or RGB: use 1 or 3"
        )
    if not all(value > 0 for value in model.std) or not all(0 <= value <= 1 for value in model.mean):
        raise ValueError(
            f"--model.mean {model.mean} and --model.std {model.std} are for pixels in 0..1: a mean "
            "must be between 0 and 1, a standard deviation above 0"
        )


def _validate_length(run: RunConfig) -> None:
    if run.steps is not None and run.steps < 1:
        raise ValueError(f"--run.steps is {run.steps}, but must be at least 1")
    if run.samples is not None and run.samples < 1:
        raise ValueError(f"--run.samples is {run.samples}, but must be at least 1")
    if run.steps is not None and run.samples is not None:
        raise ValueError(
            f"--run.steps {run.steps} and --run.samples {run.samples} both set the length of the run: add "
            "--run.steps None or --run.samples None"
        )


def _validate_method(config: Config) -> None:
    """Check the method's options and other options against the method."""
    method = config.method
    method.validate()
    method.views_of(config.views)
    if config.bn.policy not in method.bn_policies:
        raise ValueError(
            f"--bn.policy {config.bn.policy} cannot be used by {method.name}: use {' or '.join(method.bn_policies)}"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dictionaries that JSON can hold; the method's also has its `name`."""
    return dataclasses.asdict(config) | {"method": method_to_dict(config.method)}


def method_to_dict(method: Method) -> dict[str, Any]:
    """Return a method as a dictionary that JSON can hold, with its `name`; `from_dict` rebuilds it."""
    return {"name": method.name, **dataclasses.asdict(method)}


T = TypeVar("T")


def from_dict(data: dict[str, Any], cls: type[T] = Config) -> T:
    """Rebuild a configuration from `to_dict`'s dictionaries (tuples may have become lists).

    Raises:
        ValueError: a field or a method is unknown to this version, or a field without a default is missing.
    """
    if issubclass(cls, Method):
        data = dict(data)
        cls = cast("type[T]", method_class(data.pop("name")))
    types: dict[str, type[object]] = get_type_hints(cls)
    data = _of_today(data, cls)
    if unknown := sorted(set(data) - set(types)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}: the file comes from another version")
    values: dict[str, object] = {}
    for name, value in data.items():
        is_section = dataclasses.is_dataclass(types[name])
        values[name] = from_dict(value, types[name]) if is_section else _with_tuples(value)
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _of_today(data: dict[str, Any], cls: type[object]) -> dict[str, Any]:
    """Return a section as this version writes it: runs that an earlier one began still open."""
    if cls is LogConfig and "tensorboard" in data:
        data = {"trackers": ("tensorboard",) if data["tensorboard"] else (), **data}
        del data["tensorboard"]
    return data


def _with_tuples(value: object) -> object:
    """Convert lists to tuples, which JSON does not have."""
    if not isinstance(value, list | tuple):
        return value
    items = cast("list[object] | tuple[object, ...]", value)
    return tuple(_with_tuples(item) for item in items)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of `to_dict`'s dictionaries, by their dotted names."""
    items: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            items |= flatten(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            items[f"{prefix}{name}"] = value
    return items


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the old and new values of fields in which two configurations differ, by their dotted names."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    names = [*after, *(name for name in before if name not in after)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def differences(old: Config, new: Config) -> list[str]:
    """List the options in which two configurations differ, as `--option: old -> new`."""
    return [f"--{option_name(name)}: {before} -> {after}" for name, (before, after) in changes(old, new).items()]


def may_change(config: Config) -> dict[str, str]:
    """Return by dotted name how a field may change between two starts.

    `freely`, `with a note`, `if allowed`, or `if given`: unset it stays, and another value has to be allowed.
    """
    found: dict[str, str] = {}

    def look(section: object, prefix: str) -> None:
        for each in dataclasses.fields(cast("Any", section)):
            value = getattr(section, each.name)
            if dataclasses.is_dataclass(value):
                look(value, f"{prefix}{each.name}.")
            else:
                found[f"{prefix}{each.name}"] = each.metadata.get("may_change", "if allowed")

    look(config, "")
    return found


def option_name(field_name: str) -> str:
    """Return the command-line name of the field `section.name`, without leading dashes."""
    return field_name.replace("_", "-")


def _validate_streaming(config: Config) -> None:
    """Refuse options that need sample numbers where tars are streamed without an index."""
    index = f"`make-shards index {config.data.shards}` numbers the samples"
    if config.method.needs_sample_numbers:
        raise ValueError(
            f"{config.method.name} needs the number of each sample, but streamed samples have none: {index}"
        )
