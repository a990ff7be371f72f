"""Linear classification as a task: the authors' protocols on live, augmented features, a fast one on cached ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from moco_fast.encoders.layers import check_layer
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

__all__ = ["Linear"]

# DINOv3's grid (dinov3/eval/linear.py), for each 256 samples, times 100: features that are scaled to deviation 1 and
# classifiers that begin at nearly nothing bear, and need, larger steps than its unscaled tokens.
_FAST_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_MIN_STEPS = 1000
_CROP_SCALE = (0.08, 1.0)  # The authors': that of torchvision's RandomResizedCrop.

Protocol = Literal["fast", "v1", "v2", "v3"]


@dataclass(frozen=True, kw_only=True)
class Linear(Task):
    """Train a linear classifier on frozen features; nothing of the backbone may change."""

    name: ClassVar[str] = "linear"
    classifies: ClassVar[bool] = True
    live: ClassVar[bool] = True

    protocol: Protocol = "fast"
    """`fast`: many learning rates at once on cached features without augmentation, the best chosen on a tenth of the
    training set (by cross-entropy, of those that accuracy does not tell apart). `v1`, `v2`: the authors' for MoCo v1
    and v2 on augmented images. `v3`: that of MoCo v3."""
    layer: tuple[str, ...] = ("backbone",)
    """Whose output is classified: backbone, head, or another layer (docs/evaluation.md); of several, the best is
    chosen."""
    lr: tuple[float, ...] | None = None
    """Learning rates, as they are used; of several, the best is chosen. Unset: the protocol's: 30 (v1, v2), 0.1 or for
    transformers 3, each times batch size / 256 (v3), 13 from 0.001 to 10 times batch size / 256 (fast)."""
    epochs: int | None = None
    """Passes over the training set; unset: 100 (v1, v2), 90 (v3), 10 (fast)."""
    batch_size: int | None = None
    """Samples in a step, over all ranks; unset: 256 (v1, v2, fast), 1024 (v3)."""
    min_steps: int | None = None
    """`fast`: least number of steps; a small set is passed over more often. Unset: 1000, or none beside --epochs."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    crop_scale: tuple[float, float] | None = None
    """`v1`, `v2`, `v3`: area of the random crop as a share of the image's. Unset: 0.08 1, the authors'; images of few
    pixels bear less (docs/evaluation.md)."""

    @property
    def splits(self) -> frozenset[Split]:
        """Both, whether features are cached or live."""
        return frozenset({"train", "test"})

    @property
    def preset(self) -> str:
        """The protocol."""
        return self.protocol

    @property
    def shared(self) -> bool:
        """Whether images are looked at while heads are trained, by all ranks."""
        return self.protocol != "fast"

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Take what is open from the protocol."""
        del run
        batch_size = (1024 if self.protocol == "v3" else 256) if self.batch_size is None else self.batch_size
        scale = batch_size / 256
        rates = {
            "fast": tuple(rate * scale for rate in _FAST_RATES),
            "v3": ((3.0 if is_transformer else 0.1) * scale,),
        }.get(self.protocol, (30.0,))
        epochs = {"fast": 10, "v3": 90}.get(self.protocol, 100)
        return replace(
            self,
            batch_size=batch_size,
            lr=rates if self.lr is None else self.lr,
            epochs=epochs if self.epochs is None else self.epochs,
            crop_scale=_CROP_SCALE if self.shared and self.crop_scale is None else self.crop_scale,
            min_steps=self.min_steps
            if self.min_steps is not None or self.protocol != "fast" or self.epochs
            else _MIN_STEPS,
        )

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(0, lr=self.lr, epochs=self.epochs, batch_size=self.batch_size)
        if self.protocol != "fast" and self.min_steps:
            raise ValueError(
                f"--min-steps {self.min_steps} means nothing beside --protocol {self.protocol}, which counts epochs: "
                "leave it out, or give --epochs"
            )
        if not self.shared and self.crop_scale is not None:
            raise ValueError(
                "--crop-scale means nothing beside --protocol fast, which has no random crops: leave it out, or name a "
                "protocol"
            )
        refuse_crop_scale(self.crop_scale)
        if not self.layer:
            raise ValueError("--layer names nothing: give one layer at least")
        for layer in self.layer:
            check_layer(layer)

    def wants(self) -> tuple[Want, ...]:
        """The test set; the training set too, where features are not live or a choice is to be made."""
        splits = ("train", "test") if self.needs_choice or not self.shared else ("test",)
        return tuple(Want(split=split, layer=layer) for split in splits for layer in self.layer)

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracies."""
        return {
            "top1": FigureInfo(title="linear top-1", caption="Share of test samples that a linear classifier names."),
            "top5": FigureInfo(
                title="linear top-5", caption="Share of test samples whose class is among the five highest scores."
            ),
            "mean_per_class": FigureInfo(
                title="linear mean per class", caption="Mean over the classes of the share classified rightly."
            ),
        }

    def measure(self, inputs: Inputs) -> Outcome:
        """Train heads, choose one, test it."""
        from moco_fast.evaluation.linear import measure_cached, measure_live

        return (measure_live if self.shared else measure_cached)(self, inputs)

    @property
    def needs_choice(self) -> bool:
        """Whether several heads are trained, of which the best is chosen."""
        assert self.lr is not None
        return len(self.lr) * len(self.layer) > 1
