"""Inputs of tasks: features from the cache, made once by all ranks together, or of a live encoder, kept in memory."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast import distributed
from moco_fast.encoders.encoder import Encoder
from moco_fast.encoders.layers import layer_shapes
from moco_fast.evaluation.base import Outcome, Saving, Split, Task, Want
from moco_fast.evaluation.cache import FeatureCache, FeatureKey, RowsFile
from moco_fast.evaluation.features import (
    Features,
    eval_mode,
    evenly,
    extract_layers,
    feature_batches,
    gather,
    near,
    spread,
    with_progress,
)
from moco_fast.evaluation.known import KnownSets
from moco_fast.interrupt import may_be_interrupted
from pipelines.backends.registry import choose
from pipelines.batch import Batch
from pipelines.config import DataConfig, central_crop
from pipelines.loader import ListLoader, open_loader, suited_to
from pipelines.world import World
from shards.sets import ShardSet

__all__ = [
    "CachedFeatures",
    "FeatureSource",
    "Images",
    "LiveFeatures",
    "PerImage",
    "Subject",
    "TaskInputs",
    "measure_on",
]

_LARGEST = 1e18  # of which squares can still be added up in float32
_BROKEN = (
    "the encoder's features are not finite, or larger than 1e18: it has diverged, so evaluate an earlier checkpoint"
)
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

    def loader(self, split: Split, samples: np.ndarray) -> ListLoader:
        """Open this rank's part of samples of a set, as central squares."""
        shards = self.sets[split]
        views = central_crop(self.size, side=self.crop)
        data = suited_to(self.data, shards)
        return open_loader(data, views, samples=samples, device=self.device, world=self.world, shards=shards)

    def title(self, split: Split) -> str | None:
        """Return the title of a progress bar; only the first rank shows one."""
        name = {"train": "training"}.get(split, split)
        return f"features of the {name} set" if self.world.rank == 0 else None


class Images(Protocol):
    """Images from elsewhere than the subject's sets."""

    @property
    def digest(self) -> str:
        """Of what they are: numbers computed of them are cached under it."""
        ...

    @property
    def num_samples(self) -> int:
        """How many there are."""
        ...

    def loader(
        self, samples: np.ndarray, *, size: int, batch_size: int, device: torch.device, world: World
    ) -> AbstractContextManager[Iterable[Batch]]:
        """Open this rank's part of some of them, one contiguous part per rank, as squares of `size` pixels."""
        ...


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """Numbers that a task computes itself for each image."""

    name: str
    """Everything that decides the numbers beside encoder, images and view: they are cached under it."""
    title: str
    """Of a progress bar."""
    dim: int
    """Numbers for each image."""
    function: Callable[[Batch], Tensor]
    """Images of this rank (B, 3, S, S) uint8, on the device, with numbers and labels -> (B, dim); the encoder is in
    eval mode."""
    split: Split = "test"
    """Set whose images they are, as central squares, unless there are `images`."""
    images: Images | None = None
    at_most: int | None = None
    """At most so many images, evenly spread; None: all."""


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

    def per_image(self, made: PerImage) -> Features:
        """Return a task's own numbers for each image, in order of sample number; collective."""
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
            with distributed.leaving_together(), may_be_interrupted():
                of_rank = self._extract(split, samples, layers)
            for layer, features in of_rank.items():
                self._found[split, layer] = found = gather(features)
                if bool(_are_broken(found.values).any()):
                    raise ValueError(_BROKEN)

    def _extract(self, split: Split, samples: np.ndarray, layers: Sequence[str]) -> dict[str, Features]:
        subject = self.subject
        with subject.loader(split, samples) as loader, subject.autocast():
            return extract_layers(
                subject.encoder, loader, device=subject.device, layers=layers, title=subject.title(split)
            )

    def get(self, want: Want) -> Features:
        """Return what was prepared."""
        found = self._found[want.split, want.layer]
        if want.at_most is not None and want.at_most < len(found):
            found = found.rows(torch.from_numpy(evenly(len(found), want.at_most)))
        return replace(found, values=normalize(found.values)) if want.unit else found

    def per_image(self, made: PerImage) -> Features:
        """Compute and bring together on every rank; collective."""
        parts = list(_batches(self.subject, made, _samples(self.subject, made)))
        values, batches = [part for part, _ in parts], [batch for _, batch in parts]
        empty = torch.empty(0, dtype=torch.int64)
        return gather(
            Features(
                values=torch.cat([torch.empty(0, made.dim, device=self.subject.device), *values]),
                labels=torch.cat([empty, *(batch.label for batch in batches)]),
                index=torch.cat([empty, *(batch.index for batch in batches)]),
            )
        )


@dataclass(kw_only=True)
class CachedFeatures:
    """Features from a cache on disk; what it lacks is computed once, for all tasks, by all ranks."""

    subject: Subject
    cache: FeatureCache
    _mapped: dict[FeatureKey, Features] = field(default_factory=dict[FeatureKey, Features])
    """Files that were prepared: what is mapped stays, even where room is made for the next set."""

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
        return replace(found, values=normalize(near(found.values, self.subject.device))) if want.unit else found

    def _settled(self, want: Want) -> Want:
        num_samples = self.subject.sets[want.split].num_samples
        return want if want.at_most is None or want.at_most < num_samples else replace(want, at_most=None)

    def per_image(self, made: PerImage) -> Features:
        """Map from the file, or compute first what is not there; collective."""
        key, samples = self._key_of(made), _samples(self.subject, made)

        def compute(stack: ExitStack) -> None:
            with closing(_batches(self.subject, made, samples)) as batches:
                rows = (({made.name: values}, batch) for values, batch in batches)
                self._write({made.name: key}, [(made.dim,)], len(samples), rows, stack)

        self._fill([key], lambda: self._look_up(key, samples) is None, compute)
        found = self._look_up(key, samples)
        if found is None:
            raise LookupError(f"{made.name} is not in the cache any more: another process made room")
        return found

    def _find(self, want: Want) -> Features | None:
        return self._look_up(self._key(want), self.subject.samples(want.split, want.at_most))

    def _look_up(self, key: FeatureKey, samples: np.ndarray) -> Features | None:
        found = self._map(key)
        if found is not None or key.at_most is None:
            return found
        whole = self._map(key.whole())
        if whole is None:
            return None
        return whole.rows(torch.from_numpy(samples))

    def _map(self, key: FeatureKey) -> Features | None:
        return self._mapped[key] if key in self._mapped else self.cache.find(key)

    def _key_of(self, made: PerImage) -> FeatureKey:
        key = self._key(self._settled(Want(split=made.split, layer=made.name, at_most=made.at_most)))
        if made.images is None:
            return key
        at_most = made.at_most if made.at_most is None or made.at_most < made.images.num_samples else None
        return replace(key, data=made.images.digest, crop=1.0, decoder="files", at_most=at_most)

    def _key(self, want: Want) -> FeatureKey:
        subject = self.subject
        shards = subject.sets[want.split]
        backend = suited_to(subject.data, shards).backend
        decoder, _ = choose(backend, device=subject.device, size=subject.size, kind=shards.kind)
        return FeatureKey(
            encoder=subject.digest,
            data=shards.manifest.identity,
            size=subject.size,
            crop=subject.crop,
            decoder=f"{decoder} on {subject.device.type}",
            precision=subject.precision,
            layer=want.layer,
            at_most=want.at_most,
        )

    def _prepare(self, split: Split, at_most: int | None, layers: Sequence[str]) -> None:
        wants = [Want(split=split, layer=layer, at_most=at_most) for layer in layers]

        def compute(stack: ExitStack) -> None:
            missing = distributed.tell_all([want for want in wants if self._find(want) is None])
            self._compute(split, at_most, missing, stack)

        keys = [self._key(want) for want in wants]
        self._fill(keys, lambda: any(self._find(want) is None for want in wants), compute)
        for key in keys:
            for each in dict.fromkeys((key, key.whole())):
                if (found := self._map(each)) is not None:
                    self._mapped[each] = found
                    break
            else:
                raise ValueError(
                    f"features of the {split} set are not in {self.cache.folder} any more: another process made room "
                    "there, so give more of it with --cache-gib, or another folder with --cache"
                )

    def _fill(
        self, keys: Sequence[FeatureKey], is_missing: Callable[[], bool], compute: Callable[[ExitStack], None]
    ) -> None:
        """Compute what is missing while no other process does; collective."""
        with ExitStack() as stack:
            must_compute = False
            if self.subject.world.rank == 0 and is_missing():
                stack.enter_context(self.cache.held(keys))
                # Another process may have written them meanwhile.
                must_compute = is_missing()
            distributed.leave_together()
            if distributed.tell_all(must_compute):
                compute(stack)

    def _compute(self, split: Split, at_most: int | None, wants: Sequence[Want], stack: ExitStack) -> None:
        subject = self.subject
        samples = subject.samples(split, at_most)
        keys = {want.layer: self._key(want) for want in wants}
        shapes = layer_shapes(subject.encoder, tuple(keys), size=subject.size)
        with subject.loader(split, samples) as loader, subject.autocast():
            batches = feature_batches(
                subject.encoder, loader, device=subject.device, layers=tuple(keys), title=subject.title(split)
            )
            self._write(keys, [shapes[layer] for layer in keys], len(samples), batches, stack)

    def _write(
        self,
        keys: Mapping[str, FeatureKey],
        shapes: Sequence[tuple[int, ...]],
        num_rows: int,
        batches: Iterable[tuple[Mapping[str, Tensor], Batch]],
        stack: ExitStack,
    ) -> None:
        """Write the rows of all ranks into files of which each holds one part; collective."""
        world = self.subject.world
        if world.rank == 0:
            stack.enter_context(self.cache.appearing(list(keys.values()), num_rows=num_rows, shapes=shapes))
        distributed.leave_together()  # The files are there.
        files = {name: self._open(key) for name, key in keys.items()}
        row = num_rows * world.rank // world.world_size  # where the loader begins this rank's part
        num_broken = torch.zeros(1, dtype=torch.int64, device=self.subject.device)
        distributed.leave_together()  # All ranks see the files.
        for found, batch in batches:
            for name, values in found.items():
                num_broken += _are_broken(values).sum()
                files[name].write(row, values, batch.label, batch.index)
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
        distributed.leave_together()  # The files have their names.

    def _open(self, key: FeatureKey) -> RowsFile:
        aside = self.cache.aside(key)
        if not aside.is_file():
            raise ValueError(
                f"rank {self.subject.world.rank} does not see {aside}, which the first rank made: --cache must be a "
                "folder that all nodes share"
            )
        return RowsFile(aside)


@dataclass(frozen=True, kw_only=True)
class TaskInputs(KnownSets):
    """What a task is given; see moco_fast.evaluation.base.Inputs."""

    subject: Subject
    source: FeatureSource
    seed: int = 0
    world: World = World()
    saving: Saving | None = None
    at_most: Mapping[Split, int] = field(default_factory=dict[Split, int])
    """Bounds the samples of a set that are looked at."""
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
    def precision(self) -> str:
        """That the encoder computes in."""
        return self.subject.precision

    @property
    def sets(self) -> Mapping[Split, ShardSet]:
        """The sets of the subject."""
        return self.subject.sets

    def for_task(self, task: Task) -> "TaskInputs":
        """Return the same, of no more samples than a task looks at."""
        bounds = {
            split: max(want.at_most for want in wants if want.at_most is not None)
            for split, wants in _by_split(task.wants()).items()
            if all(want.at_most is not None for want in wants)
        }
        tighter = {split: min(most, self.at_most.get(split, most)) for split, most in bounds.items()}
        return replace(self, at_most={**self.at_most, **tighter})

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which the encoder computes in the evaluation's precision."""
        return self.subject.autocast()

    def images(self, split: Split, samples: npt.NDArray[np.int64]) -> ListLoader:
        """Open this rank's part of samples of a set, as central squares."""
        return self.subject.loader(split, samples)

    def features(self, want: Want, *, labeled: bool = True) -> Features:
        """Return features in order of sample number; see Inputs."""
        asked = (want, labeled)
        if asked not in self._kept:
            self._kept[asked] = self._make(want, labeled=labeled)
        return self._kept[asked]

    def per_image(self, made: PerImage) -> Features:
        """Compute numbers for each labeled image, or find them in the cache; see Inputs."""
        return _labeled(self.source.per_image(made))

    def _make(self, want: Want, *, labeled: bool) -> Features:
        found = self.source.get(want)
        if labeled:
            found = _labeled(found)
        if labeled and not len(found):
            where = self.subject.sets[want.split].where
            raise ValueError(f"{where} holds no labeled sample, so there is nothing to compare: pack it with labels")
        return found


def _by_split(wants: Iterable[Want]) -> dict[Split, list[Want]]:
    found: dict[Split, list[Want]] = {}
    for want in dict.fromkeys(wants):
        found.setdefault(want.split, []).append(want)
    return found


def _are_broken(values: Tensor) -> Tensor:
    return ~(values.abs() <= _LARGEST)


def _labeled(features: Features) -> Features:
    keep = features.labels >= 0
    return features if bool(keep.all()) else features.rows(keep)


def _samples(subject: Subject, made: PerImage) -> np.ndarray:
    if made.images is None:
        return subject.samples(made.split, made.at_most)
    num_samples, at_most = made.images.num_samples, made.at_most
    return np.arange(num_samples) if at_most is None or num_samples <= at_most else evenly(num_samples, at_most)


def _batches(subject: Subject, made: PerImage, samples: np.ndarray) -> Generator[tuple[Tensor, Batch]]:
    """Give this rank's part of a task's own numbers, batch by batch."""
    world = subject.world
    if made.images is None:
        loader = subject.loader(made.split, samples)
    else:
        batch_size = max(1, subject.data.batch_size // world.world_size)
        loader = made.images.loader(
            samples, size=subject.size, batch_size=batch_size, device=subject.device, world=world
        )
    title = made.title if world.rank == 0 else None
    with loader as batches, eval_mode(subject.encoder), torch.no_grad():
        for batch in with_progress(batches, title):
            yield made.function(batch).float(), batch


def measure_on(task: Task, inputs: TaskInputs) -> Outcome:
    """Measure a task whose features are prepared; collective, every rank gets the outcome.

    Raises:
        ValueError: on every rank, where the task cannot be measured on one of them.
    """
    outcome = None
    with distributed.leaving_together():
        if task.shared and inputs.world.world_size > 1:
            outcome = task.measure(inputs)  # It has collectives, in which others would wait for a rank that leaves.
        elif inputs.world.rank == 0:
            with may_be_interrupted():
                outcome = task.measure(replace(inputs, world=World()))
    if not task.shared:
        outcome = distributed.tell_all(outcome)
    assert outcome is not None
    return outcome
