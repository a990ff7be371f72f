"""Fine-tuning as a task: encoder and classifier trained together on all labels, on some, or on another set."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from moco_fast.evaluation.base import (
    FigureInfo,
    Inputs,
    Outcome,
    Split,
    Task,
    Want,
    refuse_crop_scale,
    refuse_unless_above,
)

if TYPE_CHECKING:
    from moco_fast.config import Config
    from moco_fast.evaluation.recipes import Recipe

__all__ = ["Finetune"]

Protocol = Literal["full", "semi-1", "semi-10", "transfer"]

# open-mmlab/mmselfsup, configs/benchmarks/classification/imagenet/imagenet_1percent and imagenet_10percent.
_SEMI: dict[str, Any] = {
    "optimizer": "sgd",
    "nesterov": False,
    "batch_size": 256,
    "epochs": 20,
    "lr": (0.1, 0.01, 0.001),
    "head_multiplier": (1.0, 10.0, 100.0),
    "schedule": "steps",
    "milestones": (0.6, 0.8),
    "drop": 0.2,
}
# finetune.py of linusericsson/ssl-transfer: a decay is given for a learning rate of 1.
_TRANSFER: dict[str, Any] = {
    "optimizer": "sgd",
    "nesterov": True,
    "batch_size": 64,
    "steps": 5000,
    "lr": (0.1, 0.01, 0.001, 0.0001),
    "weight_decay": (0.0, 1e-6, 1e-5, 1e-4, 1e-3),
    "decay_per_lr": True,
    "schedule": "cosine",
    "choice_share": 0.2,
}
# "All the default DeiT configs" (README of facebookresearch/moco-v3): main.py of facebookresearch/deit, whose learning
# rate is for 512 samples; RandAugment, random erasing and repeated augmentation, which loaders here lack, left out.
_DEIT: dict[str, Any] = {
    "optimizer": "adamw",
    "batch_size": 1024,
    "lr": (5e-4 * 1024 / 512,),
    "min_lr": 1e-5,
    "weight_decay": (0.05,),
    "schedule": "cosine",
    "epochs": 150,
    "warmup": 5 / 150,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.1,
}
_PROTOCOLS: dict[str, dict[str, Any]] = {
    "semi-1": {**_SEMI, "share": 0.01, "weight_decay": (5e-4,)},
    "semi-10": {**_SEMI, "share": 0.1, "weight_decay": (1e-4,)},
    "full": {**_SEMI, "weight_decay": (1e-4,), "lr": (0.01,), "head_multiplier": (10.0,)},
    "transfer": _TRANSFER,
}
_OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "full": _DEIT,
    # transfer/README.md of facebookresearch/moco-v3, as for CIFAR-10.
    "transfer": {**_DEIT, "lr": (3e-4 * 1024 / 512,), "weight_decay": (0.1,), "epochs": 100, "warmup": 0.03},
}
_OTHERWISE: dict[str, Any] = {
    "share": 1.0,
    "head_multiplier": (1.0,),
    "layer_decay": 1.0,
    "weight_decay": (0.0,),
    "decay_per_lr": False,
    "momentum": 0.9,
    "nesterov": False,
    "milestones": (0.6, 0.8),
    "drop": 0.1,
    "warmup": 0.0,
    "min_lr": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "choice_share": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Finetune(Task):
    """Train backbone and classifier together on augmented images; takes hours, and resumes where it was killed."""

    name: ClassVar[str] = "finetune"
    classifies: ClassVar[bool] = True
    slow: ClassVar[bool] = True

    protocol: Protocol = "full"
    """`semi-1`, `semi-10`: 1% and 10% of the labels (mmselfsup). `full`: all of them. `transfer`: 5000 steps on
    another set (ssl-transfer). Transformers have MoCo v3's for the last two. What is unset is the protocol's."""
    share: float | None = None
    """Share of the labels that are learned from, the same of every class, one sample at least, drawn by the seed.
    Unset: 0.01 (semi-1), 0.1 (semi-10), 1 (full, transfer)."""
    labels_file: str | None = None
    """File that lists the samples whose labels are learned from, in place of a draw, such as SimCLR's 1% and 10% of
    ImageNet: a line for each, with its key or the file that it was packed from."""
    from_scratch: bool = False
    """Begin with random weights: what the encoder's are compared with."""
    lr: tuple[float, ...] | None = None
    """Learning rates, as they are used; of several values, here and below, the best are chosen on a part of the
    training set. Unset: the protocol's, times batch size over the protocol's batch size."""
    head_multiplier: tuple[float, ...] | None = None
    """Learning rate of the classifier as a multiple of --lr. Unset: 1, 10, 100 (semi), 10 (full), 1 (transfer)."""
    weight_decay: tuple[float, ...] | None = None
    """Weight decay. Unset: 5e-4 (semi-1), 1e-4 (semi-10, full), five values (transfer), 0.05, 0.1 (transformers)."""
    decay_per_lr: bool | None = None
    """Divide --weight-decay by the learning rate. Unset: as ssl-transfer (transfer)."""
    epochs: int | None = None
    """Passes over the samples. Unset: 20 (semi, full), 150 or 100 (transformers)."""
    steps: int | None = None
    """Number of steps, in place of --epochs. Unset: 5000 (transfer)."""
    batch_size: int | None = None
    """Samples in a step, over all ranks. Unset: 256 (semi, full), 64 (transfer), 1024 (transformers)."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """Optimizer. Unset: sgd; for transformers adamw (full, transfer)."""
    momentum: float | None = None
    """Momentum of SGD; unset: 0.9."""
    nesterov: bool | None = None
    """Nesterov's momentum. Unset: yes (transfer)."""
    schedule: Literal["cosine", "steps"] | None = None
    """How the learning rate falls. Unset: steps (semi, full), cosine (transfer, transformers)."""
    milestones: tuple[float, ...] | None = None
    """`steps`: shares of the training after which the learning rate drops; unset: 0.6, 0.8."""
    drop: float | None = None
    """`steps`: what the learning rate is multiplied with; unset: 0.2."""
    warmup: float | None = None
    """Share of the training in which the learning rate rises from 0. Unset: 5 or 3 epochs (transformers), or 0."""
    min_lr: float | None = None
    """`cosine`: learning rate at the end. Unset: 1e-5 (transformers), otherwise 0."""
    layer_decay: float | None = None
    """Learning rate of a layer as a share of that of the layer above it; unset: 1."""
    label_smoothing: float | None = None
    """Share of the target that is spread over all classes. Unset: 0.1 (transformers), otherwise 0."""
    mixup: float | None = None
    """Parameter of mixup's Beta distribution, 0: none. Unset: 0.8 (transformers), otherwise 0."""
    cutmix: float | None = None
    """Parameter of CutMix's Beta distribution, 0: none. Unset: 1 (transformers), otherwise 0."""
    drop_path: float | None = None
    """Probability that a transformer's last block is left out. Unset: 0.1 (transformers), otherwise 0."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a share of the image's."""
    choice_share: float | None = None
    """Share of the samples that decide between options. Unset: 0.2 (transfer), 0.1 (semi); all are learned from in the
    end."""

    @property
    def splits(self) -> frozenset[Split]:
        """Both."""
        return frozenset({"train", "test"})

    @property
    def preset(self) -> str:
        """The protocol."""
        return self.protocol

    @property
    def shared(self) -> bool:
        """All ranks train together."""
        return True

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Take what is open from the protocol."""
        del run
        chosen = _PROTOCOLS[self.protocol]
        if is_transformer:
            chosen = _OF_TRANSFORMERS.get(self.protocol, chosen)
        values = _OTHERWISE | chosen
        if self.batch_size is not None:
            scale = self.batch_size / values["batch_size"]
            values["lr"] = tuple(rate * scale for rate in values["lr"])
        if self.labels_file is not None:
            values.pop("share")
        for name, other in (("epochs", self.steps), ("steps", self.epochs)):
            if other is not None:
                values.pop(name, None)
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def validate(self) -> None:
        """Refuse numbers that cannot be, and options that mean nothing beside others."""
        refuse_unless_above(
            0,
            share=self.share,
            lr=self.lr,
            head_multiplier=self.head_multiplier,
            epochs=self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            layer_decay=self.layer_decay,
            drop=self.drop,
            choice_share=self.choice_share,
        )
        refuse_unless_above(-1e-30, weight_decay=self.weight_decay, mixup=self.mixup, cutmix=self.cutmix)
        for name in ("share", "layer_decay", "label_smoothing", "drop_path", "warmup", "choice_share", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be between 0 and 1")
        refuse_crop_scale(self.crop_scale)
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"--epochs {self.epochs} and --steps {self.steps} both say how long to train: give one")
        if self.labels_file is not None and self.share is not None:
            raise ValueError(f"--share {self.share:g} means nothing beside --labels-file, which lists the samples")

    def wants(self) -> tuple[Want, ...]:
        """No features: images are looked at."""
        return ()

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracies."""
        title = "trained from scratch" if self.from_scratch else "fine-tuned"
        return {
            "top1": FigureInfo(title=f"{title}, top-1", caption="Share of test samples that are classified rightly."),
            "top5": FigureInfo(
                title=f"{title}, top-5", caption="Share of test samples whose class is among the five highest scores."
            ),
            "mean_per_class": FigureInfo(
                title=f"{title}, mean per class", caption="Mean over the classes of the share classified rightly."
            ),
        }

    def recipes(self) -> "list[Recipe]":
        """Return a recipe for every choice of learning rate, the classifier's multiple of it, and weight decay."""
        from moco_fast.evaluation.recipes import Recipe

        assert self.lr is not None
        assert self.head_multiplier is not None
        assert self.weight_decay is not None
        shared = {each.name for each in fields(Recipe)} & {each.name for each in fields(self)}
        common: dict[str, Any] = {name: getattr(self, name) for name in shared}
        recipes: list[Recipe] = []
        for rate, multiplier, decay in product(self.lr, self.head_multiplier, self.weight_decay):
            common |= {"lr": rate, "head_multiplier": multiplier}
            common["weight_decay"] = decay / rate if self.decay_per_lr else decay
            recipes.append(Recipe(**common))
        return recipes

    def measure(self, inputs: Inputs) -> Outcome:
        """Choose a recipe, train with it on all samples, test."""
        from moco_fast.evaluation.tuning import measure_finetuned

        return measure_finetuned(self, inputs)
