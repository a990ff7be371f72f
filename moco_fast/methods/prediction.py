"""Prediction of one view from the other, without negatives: BYOL (arXiv:2006.07733) and SimSiam (2011.10566).

Both maximize the cosine of a prediction p and a projection z without gradient. In BYOL z comes from a moving average of
the network, in SimSiam from the network itself.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from moco_fast.methods.base import (
    BatchStatistics,
    Chart,
    Clock,
    Encode,
    Level,
    Method,
    Objective,
    Pass,
    Setting,
    momentum_at,
    refuse_unless_above_zero,
    refuse_unless_average,
    spread_chart,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moco_fast.methods.clocked import ClockedKeys
    from moco_fast.methods.keys import MomentumKeys

__all__ = ["Byol", "SimSiam"]


@dataclass(frozen=True, kw_only=True)
class _Prediction(Method):
    """Base of BYOL and SimSiam; `unrelated` is the loss of orthogonal predictions and projections."""

    # There are no negatives, so batch statistics cannot give away a query's key: there is nothing to shuffle.
    bn_policies: ClassVar[tuple[BatchStatistics, ...]] = ("sync", "none")
    unrelated: ClassVar[float]

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the watched values: the mean cosine of predictions and projections, and the projections' spread."""
        return ("cosine", "feature_std")

    def charts(self, _batch_size: int, _num_small: int = 0, /) -> tuple[Chart, ...]:
        """Return charts of the loss (with the level of orthogonal vectors), the cosine and the spread."""
        return (
            Chart(
                title="Loss",
                caption="Predicting the projection of a sample's other view. It is lowest where encoders collapse, "
                "too: see the spread of the projections.",
                curves={"loss": ""},
                level=Level(value=self.unrelated, label="unrelated"),
            ),
            Chart(
                title="Agreement",
                caption="Mean cosine of a prediction with the projection of the other view.",
                curves={"cosine": ""},
            ),
            spread_chart(self.dim, "projections"),
        )

    def note(self, line: Mapping[str, float], /) -> str:
        """Return the cosine."""
        return f"cosine of prediction and projection {line['cosine']:.2f}"


@dataclass(frozen=True, kw_only=True)
class Byol(_Prediction):
    """BYOL: predict the other view's projection by a moving average of the network."""

    name: ClassVar[str] = "byol"
    unrelated: ClassVar[float] = 4.0
    dim: int = 256
    """Size of a projection."""
    mlp_dim: int = 4096
    """Width of the projector's and the predictor's hidden layer."""
    momentum: float = 0.99
    """Momentum of the target network at the start (the paper's tau_base)."""
    momentum_schedule: Literal["constant", "cosine"] = "cosine"
    """`cosine`: the momentum rises to 1 over the run."""

    @property
    def backward_passes(self) -> int:
        """Return 2, one per direction."""
        return 2

    @property
    def num_encoded(self) -> tuple[int, int]:
        """Return a prediction and a target for each direction."""
        return self.backward_passes, self.backward_passes

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        super().validate()
        refuse_unless_above_zero({"mlp_dim": self.mlp_dim})
        refuse_unless_average("momentum", self.momentum)

    def scheduled(self, step: int, num_steps: int, /) -> dict[str, float]:
        """Return tau of the step before: the paper updates the target after a step, this code before the next one."""
        return {"momentum": momentum_at(max(0, step - 1), num_steps, self.momentum, self.momentum_schedule)}

    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projector and the predictor (byol/utils/networks.py of google-deepmind/deepmind-research)."""
        del is_transformer
        from moco_fast.methods.heads import mlp_with_batch_norm

        projector, predictor = (
            mlp_with_batch_norm([width, self.mlp_dim, self.dim], last_norm=False, hidden_bias=True)
            for width in (feature_dim, self.dim)
        )
        return projector, predictor

    def build(self, setting: Setting, /) -> Objective:
        """Build the target network."""
        from moco_fast.methods.keys import MomentumKeys

        keys = MomentumKeys.of(setting)
        return _PredictTarget(targets=keys, modules={"key": keys.key})


@dataclass(frozen=True, kw_only=True)
class SimSiam(_Prediction):
    """SimSiam: predict the other view's projection by the network itself, without gradient."""

    name: ClassVar[str] = "simsiam"
    unrelated: ClassVar[float] = 0.0
    # --fix-pred-lr in main_simsiam.py, with which the authors' results were computed.
    constant_lr: ClassVar[tuple[str, ...]] = ("predictor",)
    dim: int = 2048
    """Size of a projection."""
    predictor_dim: int = 512
    """Width of the predictor's hidden layer."""

    @property
    def num_encoded(self) -> tuple[int, int]:
        """Return both views, in one backward pass."""
        return 2, 0

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        super().validate()
        refuse_unless_above_zero({"predictor_dim": self.predictor_dim})

    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projector and the predictor (simsiam/builder.py of facebookresearch/simsiam)."""
        del is_transformer
        from moco_fast.methods.heads import mlp_with_batch_norm

        projector = mlp_with_batch_norm([feature_dim, feature_dim, feature_dim, self.dim], last_norm=True)
        predictor = mlp_with_batch_norm([self.dim, self.predictor_dim, self.dim], last_norm=False, last_bias=True)
        return projector, predictor

    def build(self, setting: Setting, /) -> Objective:
        """Build the objective, which has no state of its own."""
        del setting
        return _PredictItself()


def _cosine(predictions: "Tensor", targets: "Tensor") -> "Tensor":
    """Return the mean cosine of unit vectors (B, D) -> ()."""
    return (predictions * targets).sum(dim=1).mean()


@dataclass(frozen=True, kw_only=True, eq=False)
class _PredictTarget:
    """BYOL's objective: |p - z|^2 = 2 - 2 cos(p, z) of unit vectors, with one backward pass per direction."""

    targets: "MomentumKeys | ClockedKeys"
    modules: "Mapping[str, nn.Module]"
    compare: "Callable[[Tensor, Tensor], Tensor]" = _cosine
    num_passes: int = 2

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Update the target network."""
        self.targets.advance(scheduled)

    def passes(self, encode: Encode, views: "tuple[Tensor, ...]", index: "Tensor", /) -> Iterator[Pass]:
        """Yield the loss of predicting one view's target from the other, for both directions."""
        from moco_fast.encoders.encoder import unit_vectors
        from moco_fast.methods.loss import feature_std

        for number in range(self.num_passes):
            targets = self.targets(encode, views[1 - number], index)
            cosine = self.compare(unit_vectors(encode(views[number])), targets)
            yield Pass(loss=2 - 2 * cosine, watched={"cosine": cosine.detach(), "feature_std": feature_std(targets)})

    def on_a_clock(self, clock: Clock, /) -> "_PredictTarget":
        """Time the parts momentum update, key forward and loss."""
        from moco_fast.methods.clocked import ClockedKeys

        return replace(self, targets=ClockedKeys(self.targets, clock), compare=clock.timed("loss", self.compare))


@dataclass(frozen=True, kw_only=True, eq=False)
class _PredictItself:
    """SimSiam's objective: -cos(p, z), averaged over both directions, in one backward pass."""

    modules: "Mapping[str, nn.Module]" = field(default_factory=dict[str, "nn.Module"])
    compare: "Callable[[Tensor, Tensor], Tensor]" = _cosine
    num_passes: int = 1

    def advance(self, _scheduled: Mapping[str, float], /) -> None:
        """Do nothing: there is no target network to update."""

    def passes(self, encode: Encode, views: "tuple[Tensor, ...]", _index: "Tensor", /) -> Iterator[Pass]:
        """Yield the loss of predicting each view's projection from the other."""
        from moco_fast.encoders.encoder import unit_vectors
        from moco_fast.methods.loss import feature_std

        (p1, z1), (p2, z2) = ([unit_vectors(made) for made in encode.with_projection(view)] for view in views[:2])
        cosine = (self.compare(p1, z2.detach()) + self.compare(p2, z1.detach())) / 2
        yield Pass(loss=-cosine, watched={"cosine": cosine.detach(), "feature_std": feature_std(z1)})

    def on_a_clock(self, clock: Clock, /) -> "_PredictItself":
        """Time the loss as a part."""
        return replace(self, compare=clock.timed("loss", self.compare))
