"""Training and test of detectors: by all ranks together, one after the other, resumable at any step."""

import re
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - no public name
from torch.optim import Optimizer
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from moco_fast.checkpoint import Checkpoint, part
from moco_fast.encoders.encoder import Encoder
from moco_fast.evaluation.base import Saving
from moco_fast.evaluation.saving import SavedTraining
from moco_fast.evaluation.training import SteppedWork, on_all_ranks, refusing_alone
from moco_fast.interrupt import StoppedError
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.optimizers.optim import build_sgd, load_optimizer_tensors, optimizer_tensors
from moco_fast.transfer.coco import encoded_masks
from moco_fast.transfer.layouts import measured
from moco_fast.transfer.loader import HeldOutImage, HeldOutImages, TargetBatch, TrainingImages
from moco_fast.transfer.metrics import ClassPrecision, Detections
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.precise import set_precise_statistics
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.sets import DetectionSet
from pipelines.world import World
from shards.ground.files import appearing

__all__ = ["DetectorTrainings", "Machine", "Start", "TrainedDetector", "build_detector_optimizer", "find_all", "lr_at"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CURVE_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where detectors are trained."""

    device: torch.device
    world: World = field(default_factory=World)
    precision: str = "fp32"
    threads: int = 4
    """That decode, for this rank."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the network computes in the precision."""
        dtype = _HALF.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What a detector begins with."""

    name: str
    """A few words, for the progress bar and files."""
    encoder: Encoder
    digest: str
    """Of the encoder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedDetector:
    """What a training found."""

    precisions: dict[str, list[ClassPrecision]]
    """Of boxes, and of masks where there are."""
    curve: list[tuple[int, float]]
    """(step, mean of the loss since the point before)."""
    num_damaged: int
    """Images of the training set that could not be decoded."""
    num_untested: int
    """Those of the test set; nothing is found in them."""


@dataclass(kw_only=True, eq=False)
class _DetectorState:
    """What a training has become."""

    model: GeneralizedRCNN
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    loss: Tensor
    """Sum since the last point of the curve."""
    step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    def save(self, saved: SavedTraining) -> None:
        saved.save(
            self.step,
            model={f"detector.{name}": value for name, value in self.model.state_dict().items()},
            optimizer=optimizer_tensors(self.optimizer, self.model),
            numbers={"curve": self.curve, "loss": self.loss.item(), "scaler": self.scaler.state_dict()},
        )

    def restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(part(saved.model, "detector"))
        load_optimizer_tensors(self.optimizer, self.model, saved.optimizer)
        if saved.numbers["scaler"]:
            self.scaler.load_state_dict(saved.numbers["scaler"])
        self.loss.fill_(saved.numbers["loss"])
        self.step, self.curve = saved.step, [(int(step), loss) for step, loss in saved.numbers["curve"]]


class DetectorTrainings(SteppedWork):
    """Trainings and tests of detectors on the same sets; collective.

    The images of a step, their sizes and all first weights are functions of the seed; which anchors and regions are
    drawn, each rank decides for its own images.

    Args:
        train: set that is learned from; images without boxes are left out.
        test: set that is tested on.
        preset: how.
        machine: where.
        folder: for states, as `SavedTraining` keeps them, and for the detectors.
        every_steps: steps between two states.
        num_trainings: for the time left.
        at_most_damaged: share of the training images that may be undecodable.

    Raises:
        ValueError: the batch cannot be divided among the ranks.
    """

    def __init__(
        self,
        train: DetectionSet,
        test: DetectionSet,
        preset: DetectPreset,
        machine: Machine,
        *,
        folder: Path,
        every_steps: int,
        num_trainings: int,
        at_most_damaged: float,
    ) -> None:
        if preset.batch_size % machine.world.world_size:
            raise ValueError(
                f"--batch-size {preset.batch_size} is not a multiple of the {machine.world.world_size} ranks: choose "
                "one that is"
            )
        self._train_set, self._test_set, self._preset, self._machine = train.with_boxes, test, preset, machine
        self._folder, self._every_steps, self._at_most_damaged = folder, every_steps, at_most_damaged
        super().__init__(machine.world, num_steps=num_trainings * preset.steps)

    def run(self, start: Start, *, seed: int) -> TrainedDetector:
        """Train and test; what an earlier process found, or left half-finished, is taken from the folder.

        Raises:
            ValueError: the encoder does not fit, or too many images are damaged.
            RuntimeError: one of several ranks failed while they trained.
            StoppedError: a signal asked for it; the state is saved.
        """
        name = f"{start.name} seed {seed}"
        saving = Saving(folder=self._folder / "trainings", every_steps=self._every_steps, subject=start.digest)
        known = {
            "preset": asdict(self._preset),
            "data": [self._train_set.identity, self._test_set.identity],
            "precision": self._machine.precision,
            "seed": seed,
        }
        saved = SavedTraining(saving, name, known, world=self._machine.world, device=self._machine.device)
        self._bar.set_description(name)
        with saved.held():
            record = saved.record()
            if record is None:
                trained = self._train(start, saved, seed, name)
                with refusing_alone(self._machine.world):
                    saved.finish(asdict(trained))
                return trained
        self._bar.update(self._preset.steps)
        precisions = {
            kind: [ClassPrecision(**each | {"at": tuple(each["at"])}) for each in of_kind]
            for kind, of_kind in record.pop("precisions").items()
        }
        curve = [(int(step), float(loss)) for step, loss in record.pop("curve")]
        return TrainedDetector(precisions=precisions, curve=curve, **record)

    def _train(self, start: Start, saved: SavedTraining, seed: int, name: str) -> TrainedDetector:
        machine, preset = self._machine, self._preset
        on_gpu = [machine.device] if machine.device.type == "cuda" else []
        images = TrainingImages(
            self._train_set,
            preset,
            seed=seed,
            world=machine.world,
            threads=machine.threads,
            at_most_damaged=self._at_most_damaged,
        )
        with torch.random.fork_rng(devices=on_gpu), images, refusing_alone(machine.world):
            state = self._begin(start, seed)
            # Which anchors and regions are drawn.
            torch.manual_seed((seed << 20) + machine.world.rank)
            if (newest := saved.newest()) is not None:
                state.restore(newest)
                self._bar.update(state.step)
            batches = (batch.to(machine.device) for batch in images.batches(state.step))
            self._take_steps(state, batches, saved)
            state.model.train()
            passes = (self._pass(state.model, batch) for batch in islice(batches, preset.precise_batches))
            set_precise_statistics(state.model, passes)
            found, num_untested = find_all(state.model, self._test_set, preset, machine, stop=self._leave)
            self._keep(state.model, name)
            return TrainedDetector(
                precisions=dict(measured(found, self._test_set)),
                curve=state.curve,
                num_damaged=_sum_over_ranks(len(images.damaged), machine.world),
                num_untested=num_untested,
            )

    def _begin(self, start: Start, seed: int) -> _DetectorState:
        machine = self._machine
        model = build_detector(start.encoder, self._preset, num_classes=len(self._train_set.class_names), seed=seed)
        if machine.world.world_size > 1:
            use_statistics_of_all_ranks(model, weighted=False)
        model.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - undeclared
        return _DetectorState(
            model=model.train(),
            optimizer=build_detector_optimizer(model, self._preset),
            scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16"),
            loss=torch.zeros((), device=machine.device),
        )

    def _take_steps(self, state: _DetectorState, batches: Generator[TargetBatch], saved: SavedTraining) -> None:
        preset = self._preset
        parallel = on_all_ranks(state.model, self._machine.world)
        every = max(1, preset.steps // _CURVE_POINTS)
        while state.step < preset.steps:
            self._step(state, parallel, next(batches))
            self._bar.update()
            if state.step % every == 0:
                state.curve.append((state.step, state.loss.item() / every))
                state.loss.zero_()
                self._bar.set_postfix(loss=f"{state.curve[-1][1]:.3f}", refresh=False)
            stopped_by = self._stop.poll()
            if stopped_by or saved.is_due(state.step) or state.step == preset.steps:
                state.save(saved)
            if stopped_by:
                raise StoppedError(stopped_by)

    def _step(self, state: _DetectorState, parallel: nn.Module, batch: TargetBatch) -> None:
        rate = lr_at(self._preset, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with self._machine.autocast():
            losses: dict[str, Tensor] = parallel(batch.images, batch.targets)
        loss = torch.stack(list(losses.values())).sum()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.loss += loss.detach()
        state.step += 1

    def _pass(self, model: nn.Module, batch: TargetBatch) -> Callable[[], object]:
        def run() -> object:
            self._leave()
            with self._machine.autocast():
                return model(batch.images, batch.targets)

        return run

    def _leave(self) -> None:
        """Leave a test where a signal asks for it; it is done again from the last state."""
        if stopped_by := self._stop.poll():
            raise StoppedError(stopped_by)

    def _keep(self, model: nn.Module, name: str) -> None:
        """Write the detector's weights, on the first rank."""
        if self._machine.world.rank == 0:
            path = self._folder / "detectors" / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.safetensors"
            path.parent.mkdir(exist_ok=True)
            tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
            with appearing(path, durable=False) as aside:
                save_file(tensors, aside, metadata={"classes": "\n".join(self._train_set.class_names)})


def lr_at(preset: DetectPreset, step: int) -> float:
    """Return the learning rate of a step, from 0 (WarmupMultiStepLR of detectron2)."""
    rising = min(1.0, step / preset.warmup_steps) if preset.warmup_steps else 1.0
    drops = sum(step >= round(share * preset.steps) for share in preset.drops)
    return preset.lr * 0.1**drops * (0.001 * (1 - rising) + rising)


def build_detector_optimizer(model: nn.Module, preset: DetectPreset) -> Optimizer:
    """Build SGD of all parameters; those of batch norm do not decay (WEIGHT_DECAY_NORM of detectron2)."""
    norms = [value for layer in model.modules() if isinstance(layer, _BatchNorm) for value in layer.parameters()]
    spared = set(map(id, norms))
    others = [value for value in model.parameters() if id(value) not in spared]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return build_sgd(groups, lr=preset.lr, momentum=preset.momentum, weight_decay=preset.weight_decay)


@torch.no_grad()
def find_all(
    model: nn.Module, data: DetectionSet, preset: DetectPreset, machine: Machine, *, stop: Callable[[], None]
) -> tuple[Detections, int]:
    """Find objects in all images of a set; collective, every rank gets all of them.

    Args:
        model: on the machine's device; it is left in evaluation mode.
        data: the set.
        preset: sizes of images.
        machine: where; ranks share the images.
        stop: called before each image, by every rank equally often.

    Returns:
        what was found, and the number of images that cannot be decoded.
    """
    model.eval()
    parts: list[tuple[Any, ...]] = []
    num_untested = 0
    images = HeldOutImages(data, preset, world=machine.world, threads=machine.threads)
    for each in images:
        stop()
        if each.image is None:
            num_untested += 1
            continue
        with machine.autocast():
            [found] = model([each.image.to(machine.device)])
        parts.append(_as_arrays(found, each))
    if len(images) * machine.world.world_size < len(data):
        stop()  # This rank has one image less than the first.
    of_ranks = [parts]
    if machine.world.world_size > 1:
        of_ranks *= machine.world.world_size
        dist.all_gather_object(of_ranks, parts)
    empty = (np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty(0, np.float32), [])
    *arrays, masks = zip(empty, *(each for part in of_ranks for each in part), strict=True)
    image, boxes, classes, scores = map(np.concatenate, arrays)
    runs = [each for of_image in masks for each in of_image] if preset.masks else None
    detections = Detections(image=image, boxes=boxes, classes=classes, scores=scores, masks=runs)
    return detections, _sum_over_ranks(num_untested, machine.world)


def _as_arrays(found: dict[str, Tensor], image: HeldOutImage) -> tuple[Any, ...]:
    """Return image, boxes, classes, scores and masks of an image's detections, in its own pixels."""
    boxes = found["boxes"].float() * found["boxes"].new_tensor(image.scale * 2, dtype=torch.float32)
    masks: list[Any] = []
    if "masks" in found:
        pasted = paste_masks_in_image(found["masks"], boxes, image.size)  # (D, 1, height, width) 0..1
        masks = encoded_masks((pasted[:, 0] >= 0.5).to(torch.uint8).cpu().numpy())
    classes, scores = found["labels"].cpu().numpy() - 1, found["scores"].float().cpu().numpy()
    return np.full(len(boxes), image.number), boxes.cpu().numpy(), classes, scores, masks


def _sum_over_ranks(number: int, world: World) -> int:
    if world.world_size == 1:
        return number
    of_ranks = [0] * world.world_size
    dist.all_gather_object(of_ranks, number)
    return sum(of_ranks)
