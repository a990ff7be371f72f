"""Training and test of networks: by all ranks together, one after the other, resumable at any step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from moco_fast import distributed
from moco_fast.checkpoint import Checkpoint, part
from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import FigureInfo, Saving
from moco_fast.evaluation.saving import SavedTraining
from moco_fast.evaluation.training import SteppedWork, on_all_ranks, refusing_alone
from moco_fast.interrupt import StoppedError
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.optimizers.optim import load_optimizer_tensors, optimizer_tensors
from moco_fast.transfer.described import described
from moco_fast.transfer.optimizing import build_network_optimizer, lr_at, set_lr
from moco_fast.transfer.pictures import Gallery
from moco_fast.transfer.precise import set_precise_statistics
from moco_fast.transfer.presets import TransferPreset
from pipelines.world import World
from shards.ground.files import appearing
from shards.ground.units import counted

__all__ = [
    "AnySet",
    "BatchStream",
    "Course",
    "Machine",
    "NetworkTrainings",
    "Start",
    "TestOutcome",
    "Trained",
    "in_turn",
    "sum_of_ranks",
]

T = TypeVar("T")

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CURVE_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where networks are trained."""

    device: torch.device
    world: World = field(default_factory=World)
    precision: str = "fp32"
    threads: int = 4
    """That decode, for this rank."""
    decode: Literal["auto", "cpu"] = "auto"
    """Where training images of detectors are decoded; `auto`: plain JPEGs on the device, if it is a GPU."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the network computes in the precision."""
        dtype = _HALF.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What a network begins with."""

    name: str
    """A few words, for the progress bar and files."""
    encoder: Encoder
    digest: str
    """Of the encoder."""
    model: ModelConfig | None = None
    """What its backbone is built of; None: only another library builds it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a training found, as JSON can hold it."""

    figures: dict[str, float]
    """In 0..1, the most important one first."""
    by_class: list[dict[str, Any]]
    """A row of a table for each class, by the names of its columns."""
    curve: list[tuple[int, float]]
    """(step, mean of the loss since the point before)."""
    num_damaged: int
    """Images of the training set that could not be decoded."""
    num_untested: int
    """Those of the test set."""
    name: str = ""
    """Of its files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TestOutcome:
    """What a test found."""

    figures: dict[str, float]
    """In 0..1, by the names of `infos`."""
    by_class: list[dict[str, Any]]
    """A row of a table for each class."""
    num_untested: int
    """Images that this rank could not decode."""
    gallery: Gallery | None
    """Images to look at, on the first rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """A training that begins, or goes on from a state."""

    name: str
    """Of its files."""
    title: str
    """Init and seed, for people."""
    settings: Mapping[str, Any]
    step: int
    """That it goes on from."""


Log = Callable[[Mapping[str, float]], None]
Watch = Callable[[Course], AbstractContextManager[Log]]


class BatchStream(Protocol):
    """Batches of this rank without end, as the images of a training set give them."""

    damaged: dict[str, str]
    """Images that could not be decoded, with the reason."""

    def batches(self, step: int) -> Generator[Any]:
        """Give batches from that of a step on; each has `to`, and is what `forward` of a network takes."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class AnySet(Protocol):
    """What all sets of images say of themselves."""

    @property
    def where(self) -> str:
        """For people."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        ...

    @property
    def identity(self) -> str:
        """Digest of images and annotations."""
        ...

    def __len__(self) -> int: ...


@dataclass(kw_only=True, eq=False)
class _NetworkState:
    """What a training has become."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    loss: Tensor
    """Sum since the last point of the curve."""
    step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    def save(self, saved: SavedTraining) -> None:
        saved.save(
            self.step,
            model={f"network.{name}": value for name, value in self.model.state_dict().items()},
            optimizer=optimizer_tensors(self.optimizer, self.model),
            numbers={"curve": self.curve, "loss": self.loss.item(), "scaler": self.scaler.state_dict()},
        )

    def restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(part(saved.model, "network"))
        load_optimizer_tensors(self.optimizer, self.model, saved.optimizer)
        if saved.numbers["scaler"]:
            self.scaler.load_state_dict(saved.numbers["scaler"])
        self.loss.fill_(saved.numbers["loss"])
        self.step, self.curve = saved.step, [(int(step), loss) for step, loss in saved.numbers["curve"]]


class NetworkTrainings(SteppedWork, ABC):
    """Trainings and tests of networks on the same sets; collective.

    The images of a step, their augmentation and all first weights are functions of the seed; what a network draws
    itself, each rank decides for its own images.

    Args:
        train: set that is learned from.
        test: set that is tested on.
        preset: how.
        machine: where.
        folder: for states, as `SavedTraining` keeps them, and for the trained networks.
        every_steps: steps between two states.
        num_trainings: for the time left.
        at_most_damaged: share of the training images that may be undecodable.
        watch: opens what is sent loss, learning rate and figures of a training, each with its `step`; None: nothing is.

    Raises:
        ValueError: the batch cannot be divided among the ranks.
    """

    def __init__(
        self,
        train: AnySet,
        test: AnySet,
        preset: TransferPreset,
        machine: Machine,
        *,
        folder: Path,
        every_steps: int,
        num_trainings: int,
        at_most_damaged: float,
        watch: Watch | None = None,
    ) -> None:
        if preset.batch_size % machine.world.world_size:
            raise ValueError(
                f"--batch-size {preset.batch_size} is not a multiple of the {machine.world.world_size} ranks: choose "
                "one that is"
            )
        self.train_set, self.test_set = train, test
        self._how, self._machine = preset, machine
        self._folder, self._every_steps, self._at_most_damaged = folder, every_steps, at_most_damaged
        self._watch = watch
        super().__init__(machine.world, num_steps=num_trainings * preset.steps)

    @abstractmethod
    def build(self, encoder: Encoder, *, seed: int) -> nn.Module:
        """Build the network on the host; in training, called with a batch, it gives its losses by name."""

    @abstractmethod
    def images(self, encoder: Encoder, *, seed: int) -> BatchStream:
        """Open this rank's batches."""

    @abstractmethod
    def measure(self, network: nn.Module) -> TestOutcome:
        """Test; collective. Calls `leave` for each image."""

    @abstractmethod
    def infos(self) -> dict[str, FigureInfo]:
        """Return what figures there are, the most important one first."""

    def run(self, start: Start, *, seed: int) -> Trained:
        """Train and test; what an earlier process found, or left half-finished, is taken from the folder.

        Raises:
            ValueError: the encoder does not fit, or too many images are damaged.
            OSError: on one rank, such as that of a full disk; the others raise ValueError with its text.
            FailedAloneError: one of several ranks failed within a step.
            StoppedError: a signal asked for it; the state is saved.
        """
        name = f"{start.name} seed {seed}"
        saving = Saving(folder=self._folder / "trainings", every_steps=self._every_steps, subject=start.digest)
        known = {
            "preset": asdict(self._how),
            "data": [self.train_set.identity, self.test_set.identity],
            "precision": self._machine.precision,
            "seed": seed,
        }
        saved = SavedTraining(saving, name, known, world=self._machine.world, device=self._machine.device)
        self._progress.begin(name)
        with saved.held():
            record = saved.record()
            if record is None:
                trained = self._train(start, saved, seed)
                saved.finish({name: each for name, each in asdict(trained).items() if name != "name"})
                return trained
        self._progress.skip(self._how.steps)
        try:
            curve = [(int(step), float(loss)) for step, loss in record.pop("curve")]
            return Trained(curve=curve, name=saved.name, **record)
        except (KeyError, TypeError, ValueError) as error:
            path = self._folder / "trainings" / f"{saved.name}.json"
            raise ValueError(f"{path} is not what a training found ({error!r}): remove it to train again") from None

    def _train(self, start: Start, saved: SavedTraining, seed: int) -> Trained:
        machine, preset = self._machine, self._how
        on_gpu = [machine.device] if machine.device.type == "cuda" else []
        with distributed.leaving_together():
            images = self.images(start.encoder, seed=seed)
        with torch.random.fork_rng(devices=on_gpu), images, ExitStack() as stack:
            with distributed.leaving_together():
                state = self._begin(start, seed)
            # What the network draws itself, such as regions.
            torch.manual_seed((seed << 20) + machine.world.rank)
            if (newest := saved.newest()) is not None:
                state.restore(newest)
                self._progress.skip(state.step)
            batches = self.lasting(batch.to(machine.device) for batch in images.batches(state.step))
            with distributed.leaving_together():
                log = stack.enter_context(self._watched(start, saved, seed, state.step))
            self._take_steps(state, batches, saved, log)
            if preset.precise_batches:
                state.model.train()
                passes = (self._pass(state.model, batches) for _ in range(preset.precise_batches))
                set_precise_statistics(state.model, passes)
                self.agree()
            tested = self.measure(state.model)
            num_untested = sum_of_ranks(tested.num_untested, machine.world)
            with distributed.leaving_together():
                self._refuse_untested(num_untested)
            log(
                {
                    "step": state.step,
                    **{f"test/{name.replace(' ', '_')}": each for name, each in tested.figures.items()},
                }
            )
            with distributed.leaving_together():
                self._keep(state.model, tested.gallery, saved.name, start)
            return Trained(
                name=saved.name,
                figures=tested.figures,
                by_class=tested.by_class,
                curve=state.curve,
                num_damaged=sum_of_ranks(len(images.damaged), machine.world),
                num_untested=num_untested,
            )

    def _watched(self, start: Start, saved: SavedTraining, seed: int, step: int) -> AbstractContextManager[Log]:
        if self._watch is None:
            return nullcontext(_log_nowhere)
        more = {"init": start.name, "seed": seed, "precision": self._machine.precision}
        more |= {"train_digest": self.train_set.identity, "test_digest": self.test_set.identity}
        title = f"{start.name} seed {seed}"
        return self._watch(Course(name=saved.name, title=title, settings=asdict(self._how) | more, step=step))

    def _begin(self, start: Start, seed: int) -> _NetworkState:
        machine = self._machine
        model = self.build(start.encoder, seed=seed)
        if machine.world.world_size > 1:
            use_statistics_of_all_ranks(model, weighted=False)
        model.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - undeclared
        return _NetworkState(
            model=model.train(),
            optimizer=build_network_optimizer(model, self._how),
            scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16"),
            loss=torch.zeros((), device=machine.device),
        )

    def _take_steps(self, state: _NetworkState, batches: Generator[Any], saved: SavedTraining, log: Log) -> None:
        preset = self._how
        parallel = on_all_ranks(state.model, self._machine.world)
        every = max(1, preset.steps // _CURVE_POINTS)
        while state.step < preset.steps:
            batch = next(batches)
            with refusing_alone(self._machine.world):
                self._step(state, parallel, batch)
            self._progress.step()
            stopped_by = self.poll()
            is_saved = stopped_by or saved.is_due(state.step) or state.step == preset.steps
            if is_saved or state.step % every == 0:
                # Before its state takes the place of the one that still learned.
                self.agree(self._why_diverged(state))
            if state.step % every == 0:
                if bool(state.loss.isfinite().item()):
                    state.curve.append((state.step, state.loss.item() / every))
                    loss = state.curve[-1][1]
                    self._progress.note(f"loss {loss:.3f}")
                    log({"step": state.step, "loss": loss, "lr": lr_at(preset, state.step - 1)})
                state.loss.zero_()
            if is_saved:
                state.save(saved)
            if stopped_by:
                raise StoppedError(stopped_by)

    def _why_diverged(self, state: _NetworkState) -> str:
        """Return why a training learns nothing more, if this rank's loss, or a weight in the end, is not a number."""
        is_number = bool(state.loss.isfinite().item())
        # fp16 skips steps whose gradients are no numbers, and goes on with the weights before.
        is_lost = not is_number and not state.scaler.is_enabled()
        if not is_number or state.step == self._how.steps:
            is_lost = is_lost or not _is_finite(state.model)
        if not is_lost:
            return ""
        return (
            f"the loss or a weight is not a number after step {state.step:,}: the training diverged, and its "
            f"figures would mean nothing; give a smaller --lr than {self._how.lr:g}"
        )

    def _step(self, state: _NetworkState, parallel: nn.Module, batch: Any) -> None:
        set_lr(state.optimizer, lr_at(self._how, state.step))
        with self._machine.autocast():
            losses: dict[str, Tensor] = parallel(batch.images, batch.targets)
        loss = torch.stack(list(losses.values())).sum()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.loss += loss.detach()
        state.step += 1

    def _pass(self, model: nn.Module, batches: Iterator[Any]) -> Callable[[], object]:
        def run() -> object:
            self.leave()
            batch = next(batches)
            with refusing_alone(self._machine.world), self._machine.autocast():
                return model(batch.images, batch.targets)

        return run

    def leave(self, reason: str = "") -> None:
        """Leave a test where a signal asks for it, or a rank cannot go on; it is done again from the last state.

        Args:
            reason: why this rank cannot; empty: it can.

        Raises:
            StoppedError, LeftTogetherError: on every rank.
        """
        if stopped_by := self.poll(reason):
            raise StoppedError(stopped_by)

    def _refuse_untested(self, num_untested: int) -> None:
        if num_untested > self._at_most_damaged * len(self.test_set):
            raise ValueError(
                f"{num_untested:,} of {counted(len(self.test_set), 'image')} of {self.test_set.where} cannot be "
                "decoded, more than --max-malformed allows, so the figures would be wrong: copy them again, and the "
                "same command repeats the test alone, or allow a larger share"
            )

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Of what is found, where objects have keypoints."""
        return ()

    def _keep(self, model: nn.Module, gallery: Gallery | None, name: str, start: Start) -> None:
        """Write weights and pictures, on the first rank, under a name that no training with other options has."""
        if gallery is not None:
            gallery.write(self._folder / "pictures" / f"{name}.json")
        if self._machine.world.rank == 0:
            path = self._folder / "trained" / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
            with appearing(path, durable=False) as aside:
                header = described(self._how, self.train_set.class_names, self.keypoint_names, start)
                save_file(tensors, aside, metadata=header)


def _log_nowhere(line: Mapping[str, float]) -> None:
    del line


def _is_finite(model: nn.Module) -> bool:
    return all(value.isfinite().all().item() for value in model.state_dict().values())


def in_turn(items: Iterable[T], do: Callable[[T], None], *, num_turns: int, stop: Callable[[str], None]) -> None:
    """Do something with each of this rank's items; a rank that fails goes along until all leave. Collective at the end.

    Args:
        items: `num_turns` at most.
        do: must not be collective.
        num_turns: the same on all ranks.
        stop: called before each turn, with why this rank cannot go on; empty: it can.

    Raises:
        ValueError, OSError: on every rank, where one of them has failed.
    """
    rest, reason = iter(items), ""
    for _ in range(num_turns):
        stop(reason)
        try:
            for item in () if reason else islice(rest, 1):
                do(item)
        except (ValueError, OSError) as error:
            if distributed.world_size() == 1:
                raise
            reason = str(error) or type(error).__name__
    distributed.leave_together(reason)


def sum_of_ranks(number: int, world: World) -> int:
    """Return the sum of every rank's number on every rank."""
    if world.world_size == 1:
        return number
    of_ranks = [0] * world.world_size
    dist.all_gather_object(of_ranks, number)
    return sum(of_ranks)
