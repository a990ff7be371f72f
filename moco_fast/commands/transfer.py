"""`moco-fast transfer`: detectors trained from encoders, by the papers' protocols."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moco_fast.commandline import is_first_rank
from moco_fast.commands.common import Device, positive
from moco_fast.commands.place import Precision, place
from moco_fast.transfer.presets import PRESETS, DetectPreset, settled
from shards.ground.cpus import available_cpus

if TYPE_CHECKING:
    from moco_fast.transfer.sets import DetectionSet

__all__ = ["Detect", "TransferPresets", "transfer_commands"]


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Train detectors from encoders' weights and test them; takes hours, and the same command continues.

    Several GPUs: accelerate launch -m moco_fast.cli transfer detect ...
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER...")]
    """Where the benchmark lies as it is published. VOC: folders of years (VOC2007), or one with these in it
    (VOCdevkit). COCO: the folder of `annotations` and images."""
    init: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{random,supervised,ENCODER}...")]
    """Initial weights that are compared: random ones, torchvision's supervised ones, and encoders: the folder of a run,
    a file of weights, timm:NAME or torchvision:NAME."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder for states, trained detectors and results; made if it is not there."""
    preset: Literal["voc-c4", "voc-c5", "coco-c4-1x", "coco-c4-2x", "coco-fpn-1x", "coco-fpn-2x"] = "voc-c4"
    """Whose settings are taken; what is unset below is the preset's (`moco-fast transfer presets`)."""
    seeds: int = 1
    """Trainings from each of the initial weights; the figures are their means, with 95% intervals."""
    network: str = "resnet50"
    """Network of `random` and `supervised` where no encoder is compared with them; otherwise it is the encoder's."""
    train: tuple[str, ...] | None = None
    """Parts that are trained on, such as VOC2007/trainval or train2017."""
    test: tuple[str, ...] | None = None
    """Parts that are tested on, such as VOC2007/test or val2017."""
    classes: tuple[str, ...] | None = None
    """Names of VOC's classes. Unset: its twenty, or those in the training set if it has others."""
    batch_size: int | None = None
    """Images in a step, over all ranks; learning rate and steps follow it, unless they are given."""
    group: int | None = None
    """Neighboring images of a batch that all lie or all stand, so that they need little padding."""
    steps: int | None = None
    """Optimizer steps; the learning rate drops at the same shares of them."""
    lr: float | None = None
    """Peak learning rate."""
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
    precise_batches: int | None = None
    """Batches that batch-norm statistics are averaged over before the test."""
    max_malformed: float = 0.01
    """Share of the images that may be left out since they, or what is marked in them, cannot be used."""
    save_every_steps: int = 500
    """Steps after which a training saves its state."""
    threads: int | None = None
    """Threads per rank that decode. Unset: one per CPU, 16 at most, shared by the ranks of a machine."""
    precision: Precision | None = None
    """Precision of the network. Unset: bf16 on a GPU that has it, else fp32. The papers trained in fp32."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""

    def execute(self) -> int:
        """Train, test, print and write; return the exit code."""
        preset = self._preset()
        train, test, notes = self._sets(preset)
        Path(self.out).mkdir(parents=True, exist_ok=True)
        from moco_fast.transfer.compare import Comparison, as_tables, compare, open_inits, say_notes
        from moco_fast.transfer.training import Machine

        inits = open_inits(self.init, network=self.network)
        with place(None, device=self.device, precision=self.precision) as (device, world, precision):
            threads = self.threads or min(16, available_cpus(world.local_world_size))
            comparison = Comparison(
                preset_name=self.preset,
                preset=preset,
                train=train,
                test=test,
                inits=inits,
                num_seeds=self.seeds,
                out=Path(self.out),
                every_steps=self.save_every_steps,
                at_most_damaged=self.max_malformed,
                notes=notes,
            )
            results = compare(comparison, Machine(device=device, world=world, precision=precision, threads=threads))
        if is_first_rank():
            print(as_tables(results))
            say_notes(results)
            print(f"written to {self.out}: results.json, per-class.csv, detectors/", file=sys.stderr)
        return 0

    def _preset(self) -> DetectPreset:
        """Return the preset with the options. Raises ValueError: one that cannot be."""
        numbers = {
            "seeds": self.seeds,
            "save-every-steps": self.save_every_steps,
            "batch-size": self.batch_size,
            "group": self.group,
            "steps": self.steps,
            "lr": self.lr,
            "test-side": self.test_side,
            "longest": self.longest,
            "regions": self.regions,
            "precise-batches": self.precise_batches,
            "threads": self.threads,
        }
        for name, value in numbers.items():
            if value is not None:
                positive(name, value)
        for name, values in (("sides", self.sides), ("anchor-sizes", self.anchor_sizes)):
            for value in values or ():
                positive(name, value)
        if not 0 <= self.max_malformed <= 1:
            raise ValueError(f"--max-malformed is {self.max_malformed}, but must be a share: between 0 and 1")
        for name, given in (("data", self.data), ("init", self.init)):
            if not given or len(set(given)) < len(given):
                raise ValueError(f"--{name} {' '.join(given)}: give one or more, each once")
        preset = settled(
            PRESETS[self.preset],
            batch_size=self.batch_size,
            steps=self.steps,
            train=self.train,
            test=self.test,
            group=self.group,
            lr=self.lr,
            sides=self.sides,
            test_side=self.test_side,
            longest=self.longest,
            anchor_sizes=self.anchor_sizes,
            regions=self.regions,
            precise_batches=self.precise_batches,
        )
        if preset.batch_size % preset.group:
            raise ValueError(
                f"--batch-size {preset.batch_size} is not a multiple of --group {preset.group}: give another of the two"
            )
        return preset

    def _sets(self, preset: DetectPreset) -> "tuple[DetectionSet, DetectionSet, tuple[str, ...]]":
        """Read the annotations; also return a line for each reason why images are left out."""
        from moco_fast.transfer.layouts import read_sets
        from moco_fast.transfer.sets import refuse_malformed

        train, test = read_sets(self.data, preset, class_names=self.classes)
        notes: list[str] = []
        for each in (train, test):
            num_objects = sum(len(image.boxes) for image in each.images)
            for left_out, num_left, what in (
                (each.malformed, len(each), "image"),
                (each.malformed_objects, num_objects, "object"),
            ):
                num_all = num_left + len(left_out)
                notes += refuse_malformed(left_out, num_all, each.where, at_most=self.max_malformed, what=what)
        if is_first_rank():
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
        return train, test, tuple(notes)


@dataclass(frozen=True, kw_only=True)
class TransferPresets:
    """Print the presets with their settings and the published figures of their protocols."""

    def execute(self) -> int:
        """Print; return the exit code."""
        from moco_fast.evaluation.published import PUBLISHED
        from moco_fast.evaluation.result import aligned

        for name, preset in PRESETS.items():
            print(f"{name}: {preset.title}")
            for option, value in asdict(preset).items():
                if option != "title":
                    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    print(f"  {option.replace('_', '-')}: {shown}")
            rows = [each for each in PUBLISHED if each.task == f"detect {name}"]
            lines = [[each.pretraining, each.figure, f"{each.value:g}", each.source] for each in rows]
            print(aligned([["trained by", "figure", "in %", "source"], *lines]))
        return 0


def transfer_commands() -> Any:
    """Return the union of the subcommands of `moco-fast transfer`, for tyro."""
    return (
        Annotated[Detect, tyro.conf.subcommand("detect")] | Annotated[TransferPresets, tyro.conf.subcommand("presets")]
    )
