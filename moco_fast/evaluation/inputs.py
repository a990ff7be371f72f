"""Inputs of tasks: features from the cache, made once by all ranks together, or of a live encoder, kept in memory."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from moco_fast import distributed
from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.layers import layer_shapes
from moco_fast.evaluation.base import Outcome, Split, Task, Want
from moco_fast.evaluation.cache import FeatureCache, FeatureKey, RowsFile, data_digest
from moco_fast.evaluation.features import Features, evenly, extract_layers, feature_batches, gather, spread
from moco_fast.evaluation.labels import common_classes, label_counts
from pipelines.backends.registry import choose
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader, suited_to
from pipelines.world import World
from shards.sets import ShardSet

__all__ = ["CachedFeatures", "FeatureSource", "LiveFeatures", "Subject", "TaskInputs", "measure_on"]

_BROKEN = "the encoder's features are not finite: it has diverged, evaluate an earlier checkpoint"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder, the sets that it is measured on, and how it sees them."""

    encoder: Encoder
    """On `device`."""
    digest: str = ""
    """Of the encoder: what its features are cached under."""
    sets: Mapping[Split, ShardSet]
    size: int
    """Height and width of the images in pixels."""
    crop: float
    """Side of the central square, as a share of the shorter side."""
    data: DataConfig
    """Batch size, backend and cache of shards; which shards it names is of no matter."""
    device: torch.device
    world: World = World()
    precision: str = "fp32"
    """fp32, tf32, bf16 or fp16."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the encoder computes in the precision."""
        dtype = _HALF.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def samples(self, split: Split, at_most: int | None) -> np.ndarray:
        """Return the dense sample numbers that are wanted of a set."""
        chosen = None if at_most is None else spread(self.sets[split], at_most)
        return np.arange(self.sets[split].num_samples) if chosen is None else chosen

    def loader(self, split: Split, samples: np.ndarray) -> Any:
        """Open this rank's part of samples of a set, as central squares."""
        shards = self.sets[split]
        views = central_crop(self.size, side=self.crop)
        data = suited_to(self.data, shards)
        return open_loader(data, views, samples=samples, device=self.device, world=self.world, shards=shards)

    def title(self, split: Split) -> str | None:
        """Return the title of a progress bar; only the first rank shows one."""
        name = {"train": "training"}.get(split, split)
        return f"features of the {name} set" if self.world.rank == 0 else None


class FeatureSource(Protocol):
    """Where features come from."""

    def prepare(self, wants: Iterable[Want]) -> None:
        """Get features ready, before a task measures; collective.

        Raises:
            ValueError: features are not finite, or an encoder lacks a layer.
        """
        ...

    def get(self, want: Want) -> Features:
        """Return prepared features of all samples that are wanted, in order of sample number."""
        ...


@dataclass(kw_only=True)
class LiveFeatures:
    """Features of an encoder that changes: computed whenever they are prepared, and kept in memory.

    Tasks that want fewer samples of a set than others take theirs, evenly spread, from those of the others.
    """

    subject: Subject
    at_most: Mapping[Split, int] = field(default_factory=dict[Split, int])
    """Bounds what tasks get of a set, however much they want."""
    _found: dict[tuple[Split, str], Features] = field(default_factory=dict[tuple[Split, str], Features])

    def prepare(self, wants: Iterable[Want]) -> None:
        """Run the encoder over each set once, and bring its features together on every rank; collective."""
        for split, of_split in _by_split(wants).items():
            num_samples = self.subject.sets[split].num_samples
            most = max(num_samples if want.at_most is None else want.at_most for want in of_split)
            samples = self.subject.samples(split, min(most, self.at_most.get(split, most)))
            layers = tuple(dict.fromkeys(want.layer for want in of_split))
            with self.subject.loader(split, samples) as loader, self.subject.autocast():
                of_rank = extract_layers(
                    self.subject.encoder,
                    loader,
                    device=self.subject.device,
                    layers=layers,
                    title=self.subject.title(split),
                )
            for layer, features in of_rank.items():
                self._found[split, layer] = found = gather(features)
                if not bool(found.values.isfinite().all()):
                    raise ValueError(_BROKEN)

    def get(self, want: Want) -> Features:
        """Return what was prepared."""
        found = self._found[want.split, want.layer]
        if want.at_most is not None and want.at_most < len(found):
            found = found.rows(torch.from_numpy(evenly(len(found), want.at_most)))
        return replace(found, values=normalize(found.values)) if want.unit else found


@dataclass(kw_only=True)
class CachedFeatures:
    """Features from a cache on disk; what it lacks is computed once, for all tasks, by all ranks."""

    subject: Subject
    cache: FeatureCache
    _digests: dict[Split, str] = field(default_factory=dict[Split, str])

    def prepare(self, wants: Iterable[Want]) -> None:
        """Compute what the cache lacks, all layers of a set in one pass; collective.

        Raises:
            ValueError: features are not finite, or an encoder lacks a layer.
            OSError: the disk is full.
        """
        for split, of_split in _by_split(replace(self._settled(want), unit=False) for want in wants).items():
            # Where one task needs all samples, those that need some of them take theirs.
            if any(want.at_most is None for want in of_split):
                of_split = [replace(want, at_most=None) for want in of_split]
            for at_most in dict.fromkeys(want.at_most for want in of_split):
                layers = dict.fromkeys(want.layer for want in of_split if want.at_most == at_most)
                self._prepare(split, at_most, tuple(layers))

    def get(self, want: Want) -> Features:
        """Map from the file, or from that of all samples."""
        found = self._find(self._settled(want))
        if found is None:
            raise LookupError(f"{want} was not prepared")
        return replace(found, values=normalize(found.values.to(self.subject.device))) if want.unit else found

    def _settled(self, want: Want) -> Want:
        num_samples = self.subject.sets[want.split].num_samples
        return want if want.at_most is None or want.at_most < num_samples else replace(want, at_most=None)

    def _find(self, want: Want) -> Features | None:
        key = self._key(want)
        found = self.cache.find(key)
        if found is not None or want.at_most is None:
            return found
        whole = self.cache.find(key.whole())
        if whole is None:
            return None
        return whole.rows(torch.from_numpy(self.subject.samples(want.split, want.at_most)))

    def _key(self, want: Want) -> FeatureKey:
        subject = self.subject
        shards = subject.sets[want.split]
        digest = self._digests.setdefault(want.split, "") or data_digest(shards)
        self._digests[want.split] = digest
        backend = suited_to(subject.data, shards).backend
        decoder, _ = choose(backend, device=subject.device, size=subject.size, kind=shards.kind)
        return FeatureKey(
            encoder=subject.digest,
            data=digest,
            size=subject.size,
            crop=subject.crop,
            decoder=f"{decoder} on {subject.device.type}",
            precision=subject.precision,
            layer=want.layer,
            at_most=want.at_most,
        )

    def _prepare(self, split: Split, at_most: int | None, layers: Sequence[str]) -> None:
        wants = [Want(split=split, layer=layer, at_most=at_most) for layer in layers]
        is_first = self.subject.world.rank == 0
        with ExitStack() as stack:
            missing: list[Want] = []
            if is_first and any(self._find(want) is None for want in wants):
                stack.enter_context(self.cache.held([self._key(want) for want in wants]))
                # Another process may have written them meanwhile.
                missing = [want for want in wants if self._find(want) is None]
            missing = distributed.tell_all(missing)
            if missing:
                self._compute(split, at_most, missing, stack)

    def _compute(self, split: Split, at_most: int | None, wants: Sequence[Want], stack: ExitStack) -> None:
        subject, world = self.subject, self.subject.world
        samples = subject.samples(split, at_most)
        keys = {want.layer: self._key(want) for want in wants}
        shapes = layer_shapes(subject.encoder, tuple(keys), size=subject.size)
        if world.rank == 0:
            sizes = [shapes[layer] for layer in keys]
            stack.enter_context(self.cache.appearing(list(keys.values()), num_rows=len(samples), shapes=sizes))
        distributed.tell_all(None)  # The files are there.
        files = {layer: self._open(key) for layer, key in keys.items()}
        row = len(samples) * world.rank // world.world_size  # where the loader begins this rank's part
        num_broken = torch.zeros(1, dtype=torch.int64, device=subject.device)
        distributed.leave_together()  # All ranks see the files.
        with subject.loader(split, samples) as loader, subject.autocast():
            batches = feature_batches(
                subject.encoder, loader, device=subject.device, layers=tuple(keys), title=subject.title(split)
            )
            for features, batch in batches:
                for layer, values in features.items():
                    num_broken += (~values.isfinite()).sum()
                    files[layer].write(row, values, batch.label, batch.index)
                row += len(batch.index)
        for file in files.values():
            file.close()
        distributed.leave_together()
        if world.world_size > 1:
            dist.all_reduce(num_broken)  # All rows are written.
        if num_broken:
            raise ValueError(_BROKEN)
        if world.rank == 0:
            stack.close()
        distributed.tell_all(None)  # The files have their names.

    def _open(self, key: FeatureKey) -> RowsFile:
        aside = self.cache.aside(key)
        if not aside.is_file():
            raise ValueError(
                f"rank {self.subject.world.rank} does not see {aside}, which the first rank made: --cache must be a "
                "folder that all nodes share"
            )
        return RowsFile(aside)


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """What a task is given; see moco_fast.evaluation.base.Inputs."""

    subject: Subject
    source: FeatureSource
    seed: int = 0
    world: World = World()
    _kept: dict[Any, Features] = field(default_factory=dict[Any, Features], repr=False)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.subject.device

    @property
    def encoder(self) -> Encoder:
        """The encoder, on the device."""
        return self.subject.encoder

    @property
    def data(self) -> DataConfig:
        """How images are read."""
        return self.subject.data

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return self.subject.size

    @property
    def num_classes(self) -> int:
        """Classes that have names; of shards that others wrote, whose classes have none, as many as labels ask for."""
        sets = self.subject.sets
        return max(_num_classes(sets[split]) for split in ("train", "test") if split in sets)

    def refuse_other_classes(self) -> None:
        """Refuse a training and a test set that number their classes differently. Raises ValueError."""
        common_classes(self.subject.sets["train"], self.subject.sets["test"])

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the name of each label of a set; see Known."""
        return self.subject.sets[split].class_names

    def label_counts(self, split: Split) -> npt.NDArray[np.int64]:
        """Return how many samples of a set have each label; see Known."""
        return label_counts(self.subject.sets[split])

    def set_of(self, split: Split) -> ShardSet:
        """Return the set of a split."""
        return self.subject.sets[split]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the encoder computes in the evaluation's precision."""
        return self.subject.autocast()

    def features(self, want: Want, *, labeled: bool = True) -> Features:
        """Return features in order of sample number; see Inputs."""
        asked = (want, labeled)
        if asked not in self._kept:
            self._kept[asked] = self._make(want, labeled=labeled)
        return self._kept[asked]

    def _make(self, want: Want, *, labeled: bool) -> Features:
        found = self.source.get(want)
        keep = found.labels >= 0
        if labeled and not bool(keep.all()):
            found = found.rows(keep)
        if labeled and not len(found):
            where = self.subject.sets[want.split].where
            raise ValueError(f"{where} holds no labeled sample, so there is nothing to compare: pack it with labels")
        return found


def _by_split(wants: Iterable[Want]) -> dict[Split, list[Want]]:
    found: dict[Split, list[Want]] = {}
    for want in dict.fromkeys(wants):
        found.setdefault(want.split, []).append(want)
    return found


def _num_classes(shards: ShardSet) -> int:
    return len(shards.class_names) or len(label_counts(shards))


def measure_on(task: Task, inputs: TaskInputs) -> Outcome:
    """Measure a task whose features are prepared; collective, every rank gets the outcome.

    Raises:
        ValueError: on every rank, where the task cannot be measured on one of them.
    """
    outcome = None
    with distributed.leaving_together():
        if task.shared or inputs.world.rank == 0:
            outcome = task.measure(inputs if task.shared else replace(inputs, world=World()))
    if not task.shared:
        outcome = distributed.tell_all(outcome)
    assert outcome is not None
    return outcome
