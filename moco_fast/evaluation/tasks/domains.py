"""Other domains as a task: a head trained on one set, tested on others that share its class names.

As for ImageNet-A, -R and -Sketch (Hendrycks et al. 2021, Wang et al. 2019): a set may have a part of the classes, found
by their names (WordNet ids, say), and then only these compete.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from moco_fast.encoders.layers import check_layer
from moco_fast.evaluation.base import FigureInfo, Inputs, Known, Outcome, Task, Want, refuse_unless_above

__all__ = ["Domains"]


@dataclass(frozen=True, kw_only=True)
class Domains(Task):
    """Train a linear head on one set, and test it on others that share its class names, such as ImageNet-R."""

    name: ClassVar[str] = "domains"
    classifies: ClassVar[bool] = True

    domains: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME=SHARDS..."})
    """Sets that the head is tested on besides --test, as NAME=SHARDS. Their class names are among those of --train."""
    head: Literal["linear", "logistic"] = "linear"
    """The head of `linear`, by its fast protocol, or that of `logistic`, each with its defaults."""
    layer: str = "backbone"
    """Whose output is classified: backbone, head, or another layer (docs/evaluation.md)."""
    epochs: int | None = None
    """Passes over the training set of `linear`; unset: those of its protocol."""
    num_c: int = 45
    """Values of C that `logistic` tries."""

    @classmethod
    def for_suite(cls, domains: Mapping[str, str]) -> Self:
        """Test on the sets of the folder."""
        return cls(domains=tuple(f"{name}={path}" for name, path in domains.items()))

    @property
    def preset(self) -> str:
        """The head."""
        return self.head

    def more_sets(self) -> dict[str, str]:
        """Return the domains."""
        return dict(self._named(domain) for domain in self.domains)

    def validate(self) -> None:
        """Refuse domains without a name of their own."""
        names = [self._named(domain)[0] for domain in self.domains]
        if twice := [name for name in names if names.count(name) > 1 or name in ("train", "test")]:
            raise ValueError(f"--domains names {twice[0]} twice, but results are told apart by the name: give another")
        refuse_unless_above(0, epochs=self.epochs, num_c=self.num_c)
        check_layer(self.layer)

    def why_not(self, known: Known) -> str | None:
        """Ask for domains that share classes with the training set."""
        if not self.domains:
            return "no set to test on is named: give some with --domains NAME=SHARDS (suite: a folder `domains`)"
        names = set(known.class_names("train"))
        for domain, path in self.more_sets().items():
            if not names & set(known.class_names(domain)):
                return f"{path} shares no class name with the training set: pack both from folders with the same names"
        return None

    def wants(self) -> tuple[Want, ...]:
        """All of every set."""
        return tuple(Want(split=split, layer=self.layer) for split in ("train", "test", *self.more_sets()))

    def figures(self) -> Mapping[str, FigureInfo]:
        """Mean over the domains, and each."""
        infos = {
            "mean": FigureInfo(title="mean over domains", caption="Mean of the top-1 accuracies on the other domains."),
            "in_domain": FigureInfo(
                title="in-domain top-1", caption="Share of test samples that the same head classifies rightly."
            ),
        }
        for name in self.more_sets():
            infos[f"top1_{name}"] = FigureInfo(
                title=f"{name} top-1",
                caption=f"Share of the samples of {name} that the head classifies rightly among its classes.",
            )
            infos[f"in_domain_{name}"] = FigureInfo(
                title=f"in-domain top-1, classes of {name}",
                caption=f"Share of the test samples of the classes of {name} that are classified rightly among these.",
            )
        return infos

    def measure(self, inputs: Inputs) -> Outcome:
        """Train once, test on each."""
        from moco_fast.evaluation.domains import measure

        return measure(self, inputs)

    @staticmethod
    def _named(domain: str) -> tuple[str, str]:
        name, _, path = domain.partition("=")
        if not name or not path:
            raise ValueError(f"--domains {domain} is not NAME=SHARDS: give each set a name, which its figure has")
        return name, path
