"""Robustness as a task: errors of a linear head on corrupted images, and its accuracy under adversarial attacks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Known, Outcome, Task, Want, refuse_unless_above
from moco_fast.evaluation.strengths import COMMON, EXTRA, Strengths
from moco_fast.evaluation.tasks.linear import Linear

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["Robustness"]

_TITLES = {"fgsm": "FGSM", "pgd": "PGD", "linf": "Linf", "l2": "L2"}


@dataclass(frozen=True, kw_only=True)
class Robustness(Task):
    """Train a linear classifier on clean images and test it on corrupted and on adversarially changed ones.

    For example: moco-fast eval robustness --encoder RUN --beside untrained --max-images 2000
    """

    name: ClassVar[str] = "robustness"
    classifies: ClassVar[bool] = True
    slow: ClassVar[bool] = True

    corruptions: tuple[str, ...] = COMMON
    """Kinds of corruptions of the test images (docs/evaluation.md): the 15 of ImageNet-C unless given. Without any
    name after it: none."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Their severities."""
    strengths: Strengths | None = None
    """Strengths of ImageNet-C, Tiny ImageNet-C or CIFAR-10-C; unset: those for the images nearest in size."""
    corrupted: str | None = field(default=None, metadata={"metavar": "FOLDER"})
    """Folder with images that are corrupted already, as KIND/SEVERITY/CLASS/IMAGE, such as ImageNet-C; unset: the test
    images are corrupted on the way."""
    corruption_seed: int | None = None
    """Seed of the corruptions, the same for all encoders, so that they see the same images; unset: 0."""
    max_images: int | None = None
    """At most this many test images for each corruption, evenly spread; unset: all."""
    attacks: tuple[Literal["fgsm", "pgd"], ...] = ("fgsm", "pgd")
    """Adversarial attacks: one step along the gradient's sign (or direction), or several. Without any name after it:
    none."""
    norms: tuple[Literal["linf", "l2"], ...] = ("linf",)
    """Norms that bound what an attack may change."""
    eps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """For linf: largest changes of a pixel's color, in 255ths."""
    eps_l2: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    """For l2: largest lengths of the change, for colors in 0..1."""
    steps: int = 10
    """Steps of PGD."""
    step_size: float | None = None
    """Length of a step of PGD as a share of eps; unset: 2.5 / steps."""
    random_start: bool = True
    """PGD begins at a random point of the ball."""
    max_attacked: int = 1000
    """At most this many test images are attacked, evenly spread."""
    layer: str = "backbone"
    """Whose output is classified: backbone, head, or another layer (docs/evaluation.md)."""
    epochs: int | None = None
    """Passes over the training set; unset: those of `linear`."""
    batch_size: int = 256
    """Samples in a step of the classifier's training."""

    @property
    def shared(self) -> bool:
        """All ranks corrupt and attack images."""
        return True

    def validate(self) -> None:
        """Refuse what cannot be measured."""
        known = (*COMMON, *EXTRA)
        if odd := [kind for kind in self.corruptions if kind not in known]:
            raise ValueError(f"--corruptions has {odd[0]!r}, which is not a kind: choose {', '.join(known)}")
        if not (self.corruptions or self.attacks):
            raise ValueError("--corruptions and --attacks name nothing, so there is nothing to measure: give one")
        if not self.severities or not set(self.severities) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"--severities is {self.severities}, but they are 1 to 5")
        if not self.norms:
            raise ValueError("--norms names nothing: give linf, l2 or both")
        refuse_unless_above(0, eps=self.eps, eps_l2=self.eps_l2, steps=self.steps, step_size=self.step_size)
        refuse_unless_above(0, max_images=self.max_images, max_attacked=self.max_attacked)
        refuse_unless_above(0, epochs=self.epochs, batch_size=self.batch_size)
        if self.corruption_seed is not None and self.corruption_seed < 0:
            raise ValueError(f"--corruption-seed is {self.corruption_seed}, but must be at least 0")
        if self.corrupted is not None:
            self._validate_folder(self.corrupted)
        check_layer(self.layer)

    def _validate_folder(self, folder: str) -> None:
        given = {"strengths": self.strengths, "corruption-seed": self.corruption_seed}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--{name} {value} means nothing beside --corrupted, whose images are as they are")
        if not self.corruptions:
            raise ValueError(f"--corrupted {folder} means nothing without --corruptions: leave one of them out")
        if not Path(folder).is_dir():
            raise ValueError(f"--corrupted {folder} is not a folder: give one with KIND/SEVERITY/CLASS/IMAGE")

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Settle the seed of corruptions, which no seed of the measurement changes."""
        del run, is_transformer
        return self if self.corrupted is not None else replace(self, corruption_seed=self.corruption_seed or 0)

    def why_not(self, known: Known) -> str | None:
        """Say what a folder of corrupted images lacks."""
        if self.corrupted is None:
            return None
        from moco_fast.evaluation.corrupted import CorruptedFolder

        folder = CorruptedFolder(path=Path(self.corrupted), class_names=known.class_names("test"))
        try:
            for kind, severity in product(self.corruptions, self.severities):
                folder.classes(kind, severity)
        except ValueError as error:
            return str(error)
        return None

    def wants(self) -> tuple[Want, ...]:
        """Clean images of both sets."""
        return (Want(split="train", layer=self.layer), Want(split="test", layer=self.layer, at_most=self.max_images))

    def figures(self) -> Mapping[str, FigureInfo]:
        """Errors on corrupted images, then accuracies under attacks."""
        return (self._errors() if self.corruptions else {}) | (self._accuracies() if self.attacks else {})

    def _errors(self) -> dict[str, FigureInfo]:
        found = {
            "corruption_error": (
                "error on corrupted images",
                "Share of corrupted images that are classified wrongly, mean over kinds; the extra kinds do not count.",
            ),
            "mce": ("mCE", "The error of each kind divided by AlexNet's on ImageNet-C, mean over the 15 kinds."),
            "relative_mce": (
                "relative mCE",
                "What each kind adds to the clean error, divided by what it adds to AlexNet's, mean over the 15 kinds.",
            ),
            "clean_error": ("clean error", "Share of test images, as they are, that are classified wrongly."),
        }
        caption = "Mean over the severities of the share of images that are classified wrongly."
        found |= {f"error_{kind}": (f"error: {kind.replace('_', ' ')}", caption) for kind in self.corruptions}
        return {
            name: FigureInfo(title=title, caption=caption, best="lowest") for name, (title, caption) in found.items()
        }

    def _accuracies(self) -> dict[str, FigureInfo]:
        found = {"attacked_0": FigureInfo(title="accuracy without attack", caption="Of the images that are attacked.")}
        for attack, norm, eps in self.perturbations():
            bound = f"{eps:g}/255" if norm == "linf" else f"{eps:g}"
            found[f"{attack}_{norm}_{eps:g}"] = FigureInfo(
                title=f"accuracy, {_TITLES[attack]} {_TITLES[norm]} {bound}",
                caption="Share of images that are still classified rightly after an attack within this bound.",
            )
        return found

    def perturbations(self) -> list[tuple[Literal["fgsm", "pgd"], Literal["linf", "l2"], float]]:
        """Return each attack with its norm and radius, as options give them, radii in rising order."""
        radii = {"linf": self.eps, "l2": self.eps_l2}
        return [
            (attack, norm, eps)
            for attack, norm in product(dict.fromkeys(self.attacks), dict.fromkeys(self.norms))
            for eps in sorted(set(radii[norm]))
        ]

    def linear(self) -> Linear:
        """Return the task that trains the classifier."""
        return Linear(layer=(self.layer,), epochs=self.epochs, batch_size=self.batch_size).settled(None)

    def measure(self, inputs: Inputs) -> Outcome:
        """Train the classifier, then test it on everything."""
        from moco_fast.evaluation.robustness import measure

        return measure(self, inputs)
