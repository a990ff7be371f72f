"""Recipe of a training of backbone and classifier: its optimizer's groups, its schedule, its augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import AdamW, Optimizer

from moco_fast.evaluation.heads import cosine, steps_down
from moco_fast.optimizers.optim import build_sgd
from pipelines.config import ViewConfig

__all__ = ["Mixed", "OptimizerName", "Recipe", "Schedule", "build_recipe_optimizer", "layer_scales", "loss_of", "mix"]

OptimizerName = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "steps"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How backbone and classifier are trained."""

    lr: float
    """Peak learning rate of the backbone, as it is used."""
    batch_size: int
    """Samples in a step, over all ranks."""
    epochs: int | None = None
    steps: int | None = None
    """Length, as one or the other."""
    optimizer: OptimizerName = "sgd"
    head_multiplier: float = 1.0
    """Of the classifier's learning rate."""
    layer_decay: float = 1.0
    """Learning rate of a layer as a share of that of the layer above it."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = ()
    """`steps`: shares of the training after which the learning rate drops."""
    drop: float = 0.1
    """`steps`: what it is multiplied with."""
    warmup: float = 0.0
    """Share of the training in which the learning rate rises from 0."""
    min_lr: float = 0.0
    """`cosine`: learning rate at the end."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """Parameter of mixup's Beta distribution; 0: none."""
    cutmix: float = 0.0
    """That of CutMix; where there are both, each step draws one of them."""
    drop_path: float = 0.0
    """Transformers: probability that the last block is left out; those before it less often."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a share of the image's."""
    from_scratch: bool = False
    """Begin with random weights instead of the encoder's."""

    @property
    def view(self) -> ViewConfig:
        """Augmentation: random crop and flip."""
        return ViewConfig(crop_scale=self.crop_scale, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)

    def num_steps(self, num_samples: int) -> int:
        """Return the length of a training on so many samples, in steps."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * (num_samples // self.batch_size)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of step `step`, from 0, of the backbone's last layer."""
        done = step / num_steps
        if done < self.warmup:
            return self.lr * done / self.warmup
        if self.schedule == "steps":
            return self.lr * steps_down(self.milestones, to=self.drop)(done)
        rest = (done - self.warmup) / (1 - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * cosine(rest)


def layer_scales(backbone: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied with, by its name.

    The last layer below the classifier has `layer_decay`, the one below that its square, and so on (BEiT; timm's
    param_groups_layer_decay, whose grouping of a network's parameters into layers this is).

    Raises:
        ValueError: the backbone does not say what its layers are.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if layer_decay == 1:
        return dict.fromkeys(names, 1.0)
    if not hasattr(backbone, "group_matcher"):
        raise ValueError(
            f"--layer-decay {layer_decay:g} needs a network of timm's, which says what its layers are; this one is a "
            f"{type(backbone).__name__}: leave the option out"
        )
    module: Any = backbone
    layers: Any = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    # A classifier, which ours has elsewhere, is a layer above all of these.
    above = max(layers[name] for name in names) + 1
    return {name: layer_decay ** (above - layers[name]) for name in names}


def build_recipe_optimizer(backbone: nn.Module, head: nn.Module, recipe: Recipe) -> Optimizer:
    """Build the optimizer; each of its groups has a `scale` that the schedule's learning rate is multiplied with.

    SGD decays all parameters, as in the published protocols with it; AdamW none of one dimension, nor those that timm's
    network names (positions, class token), as in DeiT's.
    """
    scales = layer_scales(backbone, recipe.layer_decay)
    ask = getattr(backbone, "no_weight_decay", None)
    spared: set[str] = set() if ask is None or recipe.optimizer == "sgd" else set(ask())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}

    def add(scale: float, name: str, parameter: nn.Parameter) -> None:
        is_spared = recipe.optimizer == "adamw" and (parameter.ndim <= 1 or name in spared)
        groups.setdefault((scale, 0.0 if is_spared else recipe.weight_decay), []).append(parameter)

    for name, parameter in backbone.named_parameters():
        add(scales[name], name, parameter)
    for name, parameter in head.named_parameters():
        add(recipe.head_multiplier, name, parameter)
    as_groups: list[dict[str, Any]] = [
        {"params": parameters, "scale": scale, "weight_decay": decay} for (scale, decay), parameters in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return AdamW(as_groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return build_sgd(
        as_groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov and recipe.momentum > 0,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """A batch as the network sees it."""

    images: Tensor
    """(B, 3, H, W), in 0..255."""
    targets: Tensor
    """(B,) int64, or (B, C) shares of each class."""


def mix(images: Tensor, labels: Tensor, recipe: Recipe, *, num_classes: int, seed: Sequence[int]) -> Mixed:
    """Mix every image, and its label, with another one of the batch: the first with the last, and so on.

    Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), with one draw for the batch, as timm's Mixup does in its mode
    `batch`; without both, the batch is left as it is.

    Args:
        images: (B, 3, H, W) uint8.
        labels: (B,) int64; -1 for a sample that took the place of a damaged one, and has no part in the loss.
        recipe: its mixup, cutmix and label smoothing.
        num_classes: C.
        seed: of the draw, the same on every rank.
    """
    if not recipe.mixup and not recipe.cutmix:
        return Mixed(images=images, targets=labels)
    rng = np.random.default_rng(seed)
    cuts = bool(recipe.cutmix) and (not recipe.mixup or bool(rng.random() < 0.5))
    alpha = recipe.cutmix if cuts else recipe.mixup
    share = float(rng.beta(alpha, alpha))
    other = images.flip(0)
    if cuts:
        height, width = images.shape[2:]
        rows, columns = (_side(rng, size, (1 - share) ** 0.5) for size in (height, width))
        images = images.clone()
        images[:, :, rows, columns] = other[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        images = images.float() * share + other.float() * (1 - share)
    smoothing = recipe.label_smoothing
    targets = one_hot(labels.clamp(min=0), num_classes) * (1 - smoothing) + smoothing / num_classes
    targets = targets * (labels >= 0)[:, None]
    return Mixed(images=images, targets=share * targets + (1 - share) * targets.flip(0))


def _side(rng: np.random.Generator, size: int, share: float) -> slice:
    """Draw where a box lies whose side is a share of the image's; what would lie outside is cut off."""
    length, center = int(size * share), int(rng.integers(size))
    return slice(max(0, center - length // 2), min(size, center + (length + 1) // 2))


def loss_of(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Return the mean cross-entropy: (B, C) and targets of `mix` to ()."""
    # Mixed targets are smooth already.
    smoothing = recipe.label_smoothing if targets.ndim == 1 else 0.0
    return nn.functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing, ignore_index=-1)
