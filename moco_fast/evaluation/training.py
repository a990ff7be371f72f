"""Training of a backbone and a classifier on live, augmented views: by all ranks together, resumable."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moco_fast import distributed
from moco_fast.checkpoint import Checkpoint, part
from moco_fast.evaluation.base import Inputs, Split
from moco_fast.evaluation.classifier import BackboneClassifier, build_classifier
from moco_fast.evaluation.features import Features, gather
from moco_fast.evaluation.labels import mean_per_class
from moco_fast.evaluation.progress import StepProgress
from moco_fast.evaluation.recipes import Recipe, build_recipe_optimizer, loss_of, mix
from moco_fast.evaluation.saving import SavedTraining
from moco_fast.interrupt import StoppedError
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.optimizers.optim import load_optimizer_tensors, optimizer_tensors
from moco_fast.speaking import FailedAloneError
from moco_fast.stop import StopSignal
from pipelines.batch import Batch
from pipelines.config import ViewSpec
from pipelines.loader import Loader, open_loader, suited_to
from pipelines.world import World
from shards.ground.digests import digest

__all__ = ["Scores", "SteppedWork", "Training", "Trainings", "on_all_ranks", "refusing_alone"]

T = TypeVar("T")

_WEEK_S = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A training: what is learned, how, and what it is tested on."""

    name: str
    """A few words, for the progress bar and the folder of its state."""
    recipe: Recipe
    labels: Tensor
    """(N,) int64 on the host, of every sample of the training set; -1: it is not learned from."""
    tested_on: Split
    tested_labels: Tensor
    """(M,) int64 on the host, of every sample of that set; -1: it is not tested."""
    every_epoch: bool = False
    """Test after every epoch, too."""

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """Dense sample numbers that are learned from."""
        return np.flatnonzero(self.labels.numpy() >= 0)

    @property
    def num_steps(self) -> int:
        """Length."""
        return self.recipe.num_steps(len(self.samples))

    def as_known(self, seed: int) -> dict[str, Any]:
        """Return all that decides what the training finds, besides encoder and images."""
        recipe = asdict(self.recipe)
        labels = [digest(labels.numpy().tobytes()) for labels in (self.labels, self.tested_labels)]
        return {"recipe": recipe, "labels": labels, "on": [self.tested_on, self.every_epoch], "seed": seed}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a trained classifier is worth."""

    top1: float
    top5: float | None
    """None where there are no more than five classes."""
    mean_per_class: float
    num_tested: int
    has_diverged: bool = False
    """Whether some scores were no numbers; such samples count as wrong."""
    curve: tuple[float, ...] = ()
    """Top-1 after each epoch, where it was asked for."""


@dataclass(kw_only=True, eq=False)
class _State:
    """What a training has become."""

    model: BackboneClassifier
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    curve: list[float] = field(default_factory=list[float])

    def tensors(self) -> dict[str, Tensor]:
        return {f"classifier.{name}": value for name, value in self.model.state_dict().items()}

    def numbers(self, loader: Loader) -> dict[str, Any]:
        return {"loader": loader.state_dict(), "scaler": self.scaler.state_dict(), "curve": list(self.curve)}

    def restore(self, saved: Checkpoint, loader: Loader) -> None:
        self.model.load_state_dict(part(saved.model, "classifier"))
        load_optimizer_tensors(self.optimizer, self.model, saved.optimizer)
        loader.load_state_dict(saved.numbers["loader"])
        if saved.numbers["scaler"]:
            self.scaler.load_state_dict(saved.numbers["scaler"])
        self.step, self.curve = saved.step, list(saved.numbers["curve"])


class SteppedWork:
    """Work in steps by all ranks: its stop signal and its progress; a context that ends both.

    A rank that cannot go on takes part in the others' steps until all know of it: then all leave, with its reason.

    Args:
        world: the ranks; the first one shows the progress.
        num_steps: for the time left.
    """

    def __init__(self, world: World, *, num_steps: int) -> None:
        self._stop = StopSignal(timeout_s=_WEEK_S)
        self._progress = StepProgress(num_steps, shown=world.rank == 0)
        self._reason = ""  # why this rank cannot go on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self._progress.close()
        failed: FailedAloneError | None = None
        # What a collective raises where the rank that it waits for has gone.
        if isinstance(error, RuntimeError) and not isinstance(error, FailedAloneError):
            failed = distributed.failed_alone()
        try:
            self._stop.close()
        except RuntimeError:
            if failed is None:
                raise
        if failed is not None:
            raise failed from error

    def say(self, line: str) -> None:
        """Print a line on the first rank; a progress bar stays below it."""
        self._progress.say(line)

    def lasting(self, batches: Iterator[T]) -> Generator[T]:
        """Give this rank's batches; where one cannot be had, the last one again, until all ranks leave.

        Raises:
            ValueError, OSError: by the first batch, on every rank, where one has none.
        """
        with distributed.leaving_together():
            last = next(batches)
        while True:
            yield last
            if not self._reason:
                try:
                    last = next(batches)
                except (ValueError, OSError) as error:
                    if distributed.world_size() == 1:
                        raise
                    self._reason = str(error) or type(error).__name__

    def poll(self, reason: str = "") -> int:
        """Return the signal that all ranks have agreed to stop for, or 0; collective, beside the step.

        Args:
            reason: why this rank cannot go on; empty: it can.

        Raises:
            LeftTogetherError: on every rank, where one had a reason by the call before.
        """
        self._reason = self._reason or reason
        if self._reason:
            self._stop.ask(1)
        stopped_by = self._stop.poll()
        if self._stop.granted():
            self.agree()
        return stopped_by

    def agree(self, reason: str = "") -> None:
        """Leave on every rank now, where one of them cannot go on; collective, and all wait for each other.

        Raises:
            LeftTogetherError: one has a reason.
        """
        distributed.leave_together(self._reason or reason)


class Trainings(SteppedWork):
    """The trainings of one task, one after the other; collective.

    The order of samples, their augmentation and all first weights are functions of the seed, and batch norm has the
    statistics of the global batch: what is found does not depend on the number of ranks, but for rounding, unless the
    recipe mixes samples or leaves out blocks, which every rank does among its own ones.

    Args:
        inputs: encoder, sets, seed, and where states are kept.
        num_steps: of all trainings together, for the time left.
    """

    def __init__(self, inputs: Inputs, *, num_steps: int) -> None:
        super().__init__(inputs.world, num_steps=num_steps)
        self._inputs = inputs

    def run(self, training: Training) -> Scores:
        """Train and test; what an earlier process found, or left half-finished, is taken from the cache.

        Raises:
            ValueError: the encoder or the samples do not fit the recipe.
            OSError: on one rank, such as that of a full disk; the others raise ValueError with its text.
            RuntimeError: one of several ranks failed within a step.
            StoppedError: a signal asked for it; the state is saved.
        """
        inputs = self._inputs
        known = training.as_known(inputs.seed)
        saved = SavedTraining(inputs.saving, training.name, known, world=inputs.world, device=inputs.device)
        self._progress.begin(training.name)
        with saved.held():
            record = saved.record()
            if record is None:
                tested = self._train(training, saved)
                saved.finish(asdict(tested))
            else:
                tested = replace(Scores(**record), curve=tuple(record["curve"]))
                self._progress.skip(training.num_steps)
        where = "the test set" if training.tested_on == "test" else "a part of the training set"
        self.say(f"{training.name}: {100 * tested.top1:.2f}% of {where}")
        return tested

    def _train(self, training: Training, saved: SavedTraining) -> Scores:
        inputs = self._inputs
        on_gpu = [inputs.device] if inputs.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu), self._loader(training) as loader:
            state = self._begin(training)
            # Of the blocks that are left out, which ranks draw for their own samples.
            torch.manual_seed((inputs.seed << 20) + inputs.world.rank)
            newest = saved.newest()
            if newest is not None:
                state.restore(newest, loader)
                self._progress.skip(state.step)
            query = on_all_ranks(state.model, inputs.world)
            num_steps, batches = training.num_steps, self.lasting(_endless(loader))
            while state.step < num_steps:
                batch = next(batches)
                with refusing_alone(inputs.world):
                    self._step(state, query, batch, training)
                self._progress.step()
                if training.every_epoch and state.step % len(loader) == 0:
                    self.agree()
                    state.curve.append(self._test(state.model, training).top1)
                stopped_by = self.poll()
                if stopped_by or state.step == num_steps or saved.is_due(state.step):
                    self.agree()
                if stopped_by or (state.step < num_steps and saved.is_due(state.step)):
                    saved.save(
                        state.step,
                        model=state.tensors(),
                        optimizer=optimizer_tensors(state.optimizer, state.model),
                        numbers=state.numbers(loader),
                    )
                if stopped_by:
                    raise StoppedError(stopped_by)
        return replace(self._test(state.model, training), curve=tuple(state.curve))

    def _loader(self, training: Training) -> Loader:
        inputs, samples = self._inputs, training.samples
        shards = inputs.set_of("train")
        if len(samples) < training.recipe.batch_size:
            raise ValueError(
                f"{len(samples)} samples are learned from, less than one batch of {training.recipe.batch_size}: give "
                f"--batch-size {len(samples)} at most, or more samples"
            )
        data = suited_to(replace(inputs.data, batch_size=training.recipe.batch_size), shards)
        return open_loader(
            data,
            (ViewSpec(size=inputs.size, recipe=training.recipe.view),),
            seed=inputs.seed,
            # All of them are read as they lie on disk.
            among=None if len(samples) == shards.num_samples else samples,
            device=inputs.device,
            world=inputs.world,
            shards=shards,
        )

    def _begin(self, training: Training) -> _State:
        inputs, recipe = self._inputs, training.recipe
        model = build_classifier(
            inputs.encoder,
            inputs.num_classes,
            seed=inputs.seed,
            drop_path=recipe.drop_path,
            from_scratch=recipe.from_scratch,
        )
        if inputs.world.world_size > 1:
            _synchronize(model)
        model.to(inputs.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - undeclared
        optimizer = build_recipe_optimizer(model.encoder.backbone, model.head, recipe)
        scaler = torch.amp.GradScaler(inputs.device.type, enabled=inputs.precision == "fp16")
        return _State(model=model.train(), optimizer=optimizer, scaler=scaler)

    def _step(self, state: _State, query: nn.Module, batch: Batch, training: Training) -> None:
        """Take one step; nothing in it waits for the device."""
        inputs, recipe = self._inputs, training.recipe
        lr = recipe.lr_at(state.step, training.num_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        labels = training.labels[batch.index].to(inputs.device, non_blocking=True)
        mixed = mix(batch.views[0], labels, recipe, num_classes=inputs.num_classes, seed=(inputs.seed, state.step))
        with inputs.autocast():
            logits = query(mixed.images)
        state.scaler.scale(loss_of(logits, mixed.targets, recipe)).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1

    def _test(self, model: BackboneClassifier, training: Training) -> Scores:
        return score_classifier(
            model, self._inputs, training.tested_on, training.tested_labels, num_classes=self._inputs.num_classes
        )


@torch.no_grad()
def score_classifier(
    model: BackboneClassifier, inputs: Inputs, split: Split, labels: Tensor, *, num_classes: int
) -> Scores:
    """Test a classifier on the central squares of samples; collective, every rank gets the same.

    Args:
        model: on the device of the inputs; its mode is left as it was.
        inputs: the sets.
        split: the set.
        labels: (N,) of all samples of the set; those with -1 are not tested.
        num_classes: C.
    """
    was_training, top = model.training, min(5, num_classes)
    model.eval()
    found = [torch.empty(0, top + 1, dtype=torch.int64, device=inputs.device)]
    index = [torch.empty(0, dtype=torch.int64)]
    samples = np.flatnonzero(labels.numpy() >= 0)
    with distributed.leaving_together(), inputs.images(split, samples) as loader, inputs.autocast():
        for batch in loader:
            logits = model(batch.views[0]).float()
            is_broken = ~logits.isfinite().all(dim=1, keepdim=True)
            ranked = logits.topk(top, dim=1).indices.masked_fill(is_broken, -1)
            found.append(torch.cat([ranked, is_broken.long()], dim=1))
            index.append(batch.index)
    model.train(was_training)
    numbers = torch.cat(index)
    gathered = gather(Features(values=torch.cat(found), labels=labels[numbers], index=numbers))
    values = gathered.values.cpu()
    right = values[:, :top] == gathered.labels[:, None]
    return Scores(
        top1=right[:, 0].double().mean().item(),
        top5=right.any(dim=1).double().mean().item() if num_classes > 5 else None,
        mean_per_class=mean_per_class(right[:, 0], gathered.labels, num_classes=num_classes),
        num_tested=len(values),
        has_diverged=bool(values[:, top].any()),
    )


def _endless(loader: Loader) -> Generator[Batch]:
    """Give batches from the loader's place on, epoch after epoch."""
    while True:
        yield from loader


def _synchronize(model: BackboneClassifier) -> None:
    try:
        use_statistics_of_all_ranks(model)
    except ValueError as error:
        problem = str(error).partition(":")[0]
        raise ValueError(f"{problem}: train this encoder in one process") from None


def on_all_ranks(model: nn.Module, world: World) -> nn.Module:
    """Average gradients over ranks (DDP); alone, it is the model itself."""
    if world.world_size == 1:
        return model
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    parallel.broadcast_buffers = False  # Batch norm's are the same on every rank.
    return parallel


@contextmanager
def refusing_alone(world: World) -> Generator[None]:
    """Make the failure of one of several ranks within a step end all: the others wait for it in its collectives.

    Raises:
        FailedAloneError: with the reason of this rank, where there are others.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if world.world_size == 1:
            raise
        raise distributed.failing_alone(str(error) or type(error).__name__) from error
