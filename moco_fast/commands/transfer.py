"""`moco-fast transfer`: networks trained from encoders, by the papers' protocols."""

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moco_fast.commandline import is_first_rank
from moco_fast.commands.common import Device, positive
from moco_fast.commands.place import Precision, place
from moco_fast.config import Tracker
from moco_fast.transfer.presets import (
    PRESETS,
    SEGMENT_PRESETS,
    DetectPreset,
    SegmentPreset,
    TransferPreset,
    settled,
)
from shards.ground.cpus import available_cpus
from shards.ground.units import counted

if TYPE_CHECKING:
    from moco_fast.evaluation.result import Result
    from moco_fast.transfer.sets import Malformed

__all__ = ["Detect", "Segment", "TransferExport", "TransferPresets", "transfer_commands"]


_OF_KEYPOINTS: tuple[str, ...] = ("min_keypoints", "keypoint_pairs", "keypoint_sigmas")


@dataclass(frozen=True, kw_only=True)
class _TransferOptions:
    """Options of every transfer task."""

    init: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{random,supervised,ENCODER}...")]
    """Initial weights that are compared: random ones, torchvision's supervised ones, and encoders: the folder of a run,
    a file of weights, timm:NAME or torchvision:NAME."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder for states, trained networks and results; made if it is not there."""
    seeds: int = 1
    """Trainings from each of the initial weights; the figures are their means, with 95% intervals."""
    network: str | None = None
    """Network of `random` and `supervised` where no encoder is compared with them, unset: resnet50; otherwise it is the
    encoder's."""
    train: tuple[str, ...] | None = None
    """Parts of the data that are trained on, in place of the preset's."""
    test: tuple[str, ...] | None = None
    """Parts of the data that are tested on, in place of the preset's."""
    batch_size: int | None = None
    """Images in a step, over all ranks; learning rate, steps and warm-up follow it, unless they are given."""
    steps: int | None = None
    """Optimizer steps; the learning rate drops at the same shares of them."""
    lr: float | None = None
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """What takes the steps. `adamw`, which vision transformers need, brings learning rate, weight decay and layer decay
    of its own, unless they are given."""
    weight_decay: float | None = None
    """Decay of the weights, in proportion to the learning rate."""
    layer_decay: float | None = None
    """Learning rate of each stage or block of the encoder, divided by that of the one above it."""
    max_malformed: float = 0.01
    """Share of the images that may be left out since they, or what is marked in them, cannot be used."""
    save_every_steps: int = 500
    """Steps after which a training saves its state."""
    trackers: tuple[Tracker, ...] = ()
    """Where loss, learning rate and figures of each training go, besides the files of --out. No names: nowhere."""
    project: str = "moco-fast"
    """Name of the project (wandb, trackio) or experiment (mlflow) that the trainings are part of."""
    threads: int | None = None
    """Threads per rank that decode. Unset: one per CPU, 16 at most, shared by the ranks of a machine."""
    precision: Precision | None = None
    """Precision of the network. Unset: bf16 on a GPU that has it, else fp32. The papers trained in fp32."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""

    def _check(self, **more: float | None) -> None:
        """Refuse numbers that cannot be. Raises ValueError."""
        numbers = {
            "seeds": self.seeds,
            "save_every_steps": self.save_every_steps,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "lr": self.lr,
            "layer_decay": self.layer_decay,
            "threads": self.threads,
            **more,
        }
        for name, value in numbers.items():
            if value is not None:
                positive(name.replace("_", "-"), value)
        for name, value in (("warmup-steps", self.warmup_steps), ("weight-decay", self.weight_decay)):
            if value is not None and value < 0:
                raise ValueError(f"--{name} is {value:g}, but must be 0 or more")
        if self.layer_decay is not None and self.layer_decay > 1:
            raise ValueError(
                f"--layer-decay is {self.layer_decay:g}, so the first layers would change most: give at most 1"
            )
        if not 0 <= self.max_malformed <= 1:
            raise ValueError(f"--max-malformed is {self.max_malformed}, but must be a share: between 0 and 1")
        if not self.init or len(set(self.init)) < len(self.init):
            raise ValueError(f"--init {' '.join(self.init)}: give one or more, each once")
        from moco_fast.training.trackers import check_installed

        check_installed(self.trackers, option="--trackers")

    def _steps(self) -> dict[str, object]:
        """Return what is given on how steps are taken."""
        names = ("lr", "warmup_steps", "optimizer", "weight_decay", "layer_decay")
        return {name: getattr(self, name) for name in names}

    def _note(self, left_out: "Sequence[Malformed]", num_left: int, where: str, what: str) -> list[str]:
        """Return lines on what is left out, and print them. Raises ValueError: it is more than --max-malformed."""
        from moco_fast.transfer.sets import refuse_malformed

        num_all = num_left + len(left_out)
        notes = refuse_malformed(left_out, num_all, where, at_most=self.max_malformed, what=what)
        _say(notes)
        return notes

    def _note_shared(self, train: Iterable[Hashable], test: Iterable[Hashable]) -> list[str]:
        """Return a line on images that are trained and tested on, if there are some, and print it."""
        num_shared = len(set(train) & set(test))
        if not num_shared:
            return []
        note = f"{counted(num_shared, 'image')} of the test set are trained on, too: figures are too high for others"
        _say([note])
        return [note]

    def _compare(
        self,
        name: str,
        read: Callable[[], tuple[TransferPreset, Any, Any, list[str]]],
        *,
        decode: Literal["auto", "cpu"] = "cpu",
    ) -> int:
        """Read the sets, train, test, print and write; return the exit code.

        Args:
            name: of the preset.
            read: gives it with what the sets settle, the sets, and notes on them.
            decode: as of `Machine`.
        """
        out = Path(self.out)
        from moco_fast.distributed import leaving_together
        from moco_fast.transfer.compare import Comparison, compare, open_inits
        from moco_fast.transfer.detecting import DetectorTrainings
        from moco_fast.transfer.segmenting import SegmenterTrainings
        from moco_fast.transfer.training import Machine
        from moco_fast.transfer.written import refuse_damaged

        with place(None, device=self.device, precision=self.precision) as (device, world, precision):
            with leaving_together():
                preset, train, test, notes = read()
                out.mkdir(parents=True, exist_ok=True)
                refuse_damaged(out)
                inits = open_inits(self.init, network=self.network)
            detects = isinstance(preset, DetectPreset)
            trainings_of: Any = DetectorTrainings if detects else SegmenterTrainings
            threads = self.threads or min(16, available_cpus(world.local_world_size))
            machine = Machine(device=device, world=world, precision=precision, threads=threads, decode=decode)
            with leaving_together():
                trainings = trainings_of(
                    train,
                    test,
                    preset,
                    machine,
                    folder=out,
                    every_steps=self.save_every_steps,
                    num_trainings=len(inits) * self.seeds,
                    at_most_damaged=self.max_malformed,
                    watch=self._watch(name, device) if world.rank == 0 else None,
                )
            comparison = Comparison(
                task="detect" if detects else "segment",
                preset_name=name,
                preset=preset,
                trainings=trainings,
                inits=inits,
                num_seeds=self.seeds,
                out=out,
                notes=tuple(notes),
            )
            results = compare(comparison, machine)
        if is_first_rank():
            self._show(results)
        return 0

    def _show(self, results: "Sequence[Result]") -> None:
        from moco_fast.report.transfers import write_transfers
        from moco_fast.transfer.compare import as_tables, say_notes

        print(as_tables(results))
        say_notes(results)
        print(f"written to {self.out}: results.json, per-class.csv, trained/, report.html", file=sys.stderr)
        write_transfers(Path(self.out))

    def _watch(self, preset_name: str, device: Any) -> Any:
        if not self.trackers:
            return None
        from moco_fast.commands.tracking import tracked

        return partial(
            tracked,
            names=self.trackers,
            project=self.project,
            preset=preset_name,
            out=Path(self.out),
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class Detect(_TransferOptions):
    """Train detectors from encoders' weights and test them; takes hours, and the same command continues.

    Several GPUs: accelerate launch -m moco_fast.cli transfer detect ...
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER...")]
    """Where the benchmark lies as it is published. VOC: folders of years (VOC2007), or one with these in it
    (VOCdevkit). COCO: the folder of `annotations` and images. LVIS: the folders of its files and of COCO's images.
    Cityscapes: the folder of leftImg8bit and gtFine. Or shards of it (`make-shards pack --annotations`)."""
    preset: Literal[
        "voc-c4",
        "voc-c5",
        "coco-c4-1x",
        "coco-c4-2x",
        "coco-fpn-1x",
        "coco-fpn-2x",
        "lvis-fpn-2x",
        "cityscapes-instance",
        "coco-keypoints",
    ] = "voc-c4"
    """Whose settings are taken; what is unset is the preset's (`moco-fast transfer presets`)."""
    classes: tuple[str, ...] | None = None
    """Names of VOC's classes. Unset: its twenty, or those in the training set if it has others."""
    group: int | None = None
    """Neighboring images of a batch that all lie or all stand, so that they need little padding."""
    sides: tuple[int, ...] | None = None
    """Shorter sides of training images in pixels, of which one is drawn for each."""
    test_side: int | None = None
    """Shorter side of test images in pixels."""
    longest: int | None = None
    """Longest side of images in pixels."""
    anchor_sizes: tuple[int, ...] | None = None
    """Sides of the square anchors in pixels; FPN: one for each of its five maps."""
    regions: int | None = None
    """Regions of an image that the head is trained on."""
    detections: int | None = None
    """Most objects that are found in a test image."""
    repeat_threshold: float | None = None
    """Share of the training images below which a class is rare, and its images are repeated within an epoch; 0: none
    are."""
    decode: Literal["auto", "cpu"] = "auto"
    """Where training images are decoded and resized. `auto`: whole baseline JPEGs on a GPU where there is one, whose
    pixels differ a little from Pillow's; all others, and test images, on the CPU."""
    precise_batches: int | None = None
    """Batches that batch-norm statistics are averaged over before the test."""
    masks: bool | None = None
    """COCO: whether masks are trained and tested beside boxes. Unset: if objects have outlines."""
    min_keypoints: int | None = None
    """Marked keypoints that an image has at least to be trained on."""
    keypoint_pairs: tuple[str, ...] | None = None
    """Keypoints that change places in mirrored images, as left_eye:right_eye; nothing after it: none. Unset: as the
    words left and right, or L and R, in their names say."""
    keypoint_sigmas: tuple[float, ...] | None = None
    """How far annotators are apart at each keypoint, relative to an object's size: one for each in the file's order, or
    one for all. Unset: COCO's, for its keypoints."""

    def execute(self) -> int:
        """Train, test, print and write; return the exit code."""
        preset = self._preset()
        return self._compare(self.preset, lambda: self._read(preset), decode=self.decode)

    def _read(self, preset: DetectPreset) -> tuple[DetectPreset, Any, Any, list[str]]:
        from moco_fast.transfer.layouts import read_sets, refuse_unmarked, without_masks

        train, test = read_sets(self.data, preset, class_names=self.classes)
        preset, train, test, notes = without_masks(preset, train, test, asked=bool(self.masks))
        keypoints = train.keypoints
        if keypoints and len(keypoints) > 1 and not keypoints.is_mirrored and self.keypoint_pairs is None:
            notes.append(
                f"no keypoint of {train.where} is named left or right, so none change places in mirrored images: "
                "--keypoint-pairs names those that do"
            )
        _say(notes)
        for each in (train, test):
            num_objects = sum(len(image.boxes) for image in each.images)
            notes += self._note(each.malformed, len(each), each.where, "image")
            notes += self._note(each.malformed_objects, num_objects, each.where, "object")
        refuse_unmarked(train, test, preset)
        notes += self._note_shared((each.path for each in train.images), (each.path for each in test.images))
        return preset, train, test, notes

    def _preset(self) -> DetectPreset:
        """Return the preset with the options. Raises ValueError: one that cannot be."""
        own = {
            "group": self.group,
            "test_side": self.test_side,
            "longest": self.longest,
            "regions": self.regions,
            "detections": self.detections,
            "precise_batches": self.precise_batches,
            "min_keypoints": self.min_keypoints,
        }
        self._check(**own)
        if self.repeat_threshold is not None and not 0 <= self.repeat_threshold <= 1:
            raise ValueError(f"--repeat-threshold is {self.repeat_threshold:g}, but must be a share: between 0 and 1")
        lists = {
            "sides": self.sides,
            "anchor_sizes": self.anchor_sizes,
            "keypoint_sigmas": self.keypoint_sigmas,
            "keypoint_pairs": self.keypoint_pairs,
        }
        for name, values in (("sides", self.sides), ("anchor-sizes", self.anchor_sizes)):
            for value in values or ():
                positive(name, value)
        for sigma in self.keypoint_sigmas or ():
            positive("keypoint-sigmas", sigma)
        self._refuse_idle(PRESETS[self.preset])
        more = {"masks": self.masks, "repeat_threshold": self.repeat_threshold, "train": self.train, "test": self.test}
        given = {**self._steps(), **more, **own, **lists}
        preset = settled(PRESETS[self.preset], given, batch_size=self.batch_size, steps=self.steps)
        if preset.batch_size % preset.group:
            raise ValueError(
                f"--batch-size {preset.batch_size} is not a multiple of --group {preset.group}: give another of the two"
            )
        return preset

    def _refuse_idle(self, preset: DetectPreset) -> None:
        """Refuse options that mean nothing beside the preset. Raises ValueError."""
        idle: dict[str, str] = {} if preset.keypoints else dict.fromkeys(_OF_KEYPOINTS, "which has no keypoints")
        if not preset.masks or preset.layout == "cityscapes":
            idle["masks"] = "whose figures are all of masks" if preset.masks else "which has no masks"
        for name, why in idle.items():
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} means nothing for --preset {self.preset}, {why}: leave it out")


@dataclass(frozen=True, kw_only=True)
class Segment(_TransferOptions):
    """Train networks that name every pixel's class, and test them; takes hours, and the same command continues.

    Several GPUs: accelerate launch -m moco_fast.cli transfer segment ...
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER...")]
    """Where the benchmark lies as it is published. VOC: the folder VOC2012, or one with it in it (VOCdevkit).
    Cityscapes: the folder of leftImg8bit and gtFine. Or shards of it (`make-shards pack --annotations`)."""
    preset: Literal["voc-semantic", "cityscapes-semantic"] = "voc-semantic"
    """Whose settings are taken; what is unset is the preset's (`moco-fast transfer presets`)."""
    crop: int | None = None
    """Height and width of training images in pixels."""
    head: Literal["fcn", "deeplabv3"] | None = None
    """What scores the pixels: the paper's two convolutions, or DeepLabV3's head. Unset: the preset's, `fcn`."""
    scales: tuple[float, float] | None = None
    """What the size of a training image is multiplied with, at least and at most."""

    def execute(self) -> int:
        """Train, test, print and write; return the exit code."""
        preset = self._preset()
        return self._compare(self.preset, lambda: self._read(preset))

    def _read(self, preset: SegmentPreset) -> tuple[SegmentPreset, Any, Any, list[str]]:
        from moco_fast.transfer.pixel_sets import read_pixel_sets, refuse_open

        train, test = read_pixel_sets(self.data, preset)
        notes = [note for each in (train, test) for note in self._note(each.malformed, len(each), each.where, "image")]
        for each in (train, test):
            if not len(each):
                raise ValueError(f"all images of {each.where} are left out: there is nothing to train or to test on")
            refuse_open(each)
        notes += self._note_shared((each.image for each in train.images), (each.image for each in test.images))
        return preset, train, test, notes

    def _preset(self) -> SegmentPreset:
        """Return the preset with the options. Raises ValueError: one that cannot be."""
        self._check(crop=self.crop)
        if self.scales is not None and not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"--scales {self.scales[0]:g} {self.scales[1]:g}: give two above 0, the smaller one first")
        own = {"crop": self.crop, "scales": self.scales, "head": self.head}
        given = {**self._steps(), **own, "train": self.train, "test": self.test}
        return settled(SEGMENT_PRESETS[self.preset], given, batch_size=self.batch_size, steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class TransferPresets:
    """Print the presets with their settings and the published figures of their protocols."""

    def execute(self) -> int:
        """Print; return the exit code."""
        from moco_fast.evaluation.published import PUBLISHED
        from moco_fast.evaluation.result import aligned

        for task, presets in (("detect", PRESETS), ("segment", SEGMENT_PRESETS)):
            for name, preset in presets.items():
                print(f"{task} --preset {name}: {preset.title}")
                for option, value in asdict(preset).items():
                    if option != "title" and value is not None:
                        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                        print(f"  {option.replace('_', '-')}: {shown}")
                rows = [each for each in PUBLISHED if each.task == f"{task} {name}"]
                lines = [[each.pretraining, each.figure, f"{each.value:g}", each.source] for each in rows]
                if lines:
                    print(aligned([["trained by", "figure", "in %", "source"], *lines]))
        return 0


def _say(notes: Iterable[str]) -> None:
    if is_first_rank():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class TransferExport:
    """Write a trained network as a program for images of any size, load it again, and compare what both give."""

    network: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """File of OUT/trained."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """File to write (torch-export: .pt2, onnx: .onnx)."""
    format: Literal["torch-export", "onnx"] = "torch-export"
    """torch.export's program, or ONNX's."""

    def execute(self) -> int:
        """Export; return the exit code."""
        from moco_fast.transfer.programs import export_trained, usage_of

        trained, num_compared = export_trained(self.network, self.format, self.out)
        what = "object" if isinstance(trained.preset, DetectPreset) else "image"
        print(f"{self.out}: the same as the network for {counted(num_compared, what)} in images of several sizes")
        print(f"\n{usage_of(trained, self.format, self.out)}")
        return 0


def transfer_commands() -> Any:
    """Return the union of the subcommands of `moco-fast transfer`, for tyro."""
    return (
        Annotated[Detect, tyro.conf.subcommand("detect")]
        | Annotated[Segment, tyro.conf.subcommand("segment")]
        | Annotated[TransferExport, tyro.conf.subcommand("export")]
        | Annotated[TransferPresets, tyro.conf.subcommand("presets")]
    )
