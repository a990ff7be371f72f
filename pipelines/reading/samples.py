"""Samples whose bytes are good: read, checked, and replaced where they are damaged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.reading.reader import DamagedSampleError, Outcome, Reader
from shards.ground.arrays import Indices
from shards.sets.record import REFUSED, Flag, flag_name

__all__ = ["Good", "PendingSamples", "Taken", "as_read"]

Image = TypeVar("Image")

_LONGEST_SEARCH = 1000


class Good(NamedTuple, Generic[Image]):
    """A sample whose bytes are good."""

    sample: int
    """Dense sample number."""
    record: npt.NDArray[np.void]
    """(1,) of shards.sets.record.RECORD."""
    image: Image
    """What `convert` made."""
    replaced: str | None
    """What was wrong with the sample that this one took the place of; None if it is the one that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Taken(Generic[Image]):
    """Samples whose bytes are good."""

    samples: Indices
    """(n,) dense sample numbers."""
    records: npt.NDArray[np.void]
    """(n,) of shards.sets.record.RECORD."""
    images: list[Image]
    """n of what `convert` made."""
    replaced: tuple[str, ...]
    """What was wrong with each sample that another took the place of."""


class PendingSamples:
    """Samples whose bytes are on their way: into a buffer one behind the other, or into a new one."""

    def __init__(
        self,
        reader: Reader,
        samples: Indices,
        *,
        records: npt.NDArray[np.void] | None = None,
        into: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self._reader = reader
        self.samples = samples
        """(n,) dense sample numbers that were asked for."""
        self.records = reader.records(samples) if records is None else records
        """(n,) of shards.sets.record.RECORD."""
        self.sizes: Indices = self.records["size"].astype(np.int64)
        """(n,) bytes of each of them."""
        self._bytes = reader.submit(samples, self.records, into=into)

    def take(self, convert: Callable[[npt.NDArray[np.uint8]], Image], *, skip: bool) -> Taken[Image]:
        """Wait for the bytes and convert each sample's, as `each` does, and give them all at once."""
        samples, records = self.samples.copy(), self.records.copy()
        images: list[Image] = []
        replaced: list[str] = []
        for place, good in enumerate(self.each(convert, skip=skip)):
            images.append(good.image)
            if good.replaced is not None:
                samples[place], records[place] = good.sample, good.record[0]
                replaced.append(good.replaced)
        return Taken(samples=samples, records=records, images=images, replaced=tuple(replaced))

    def each(self, convert: Callable[[npt.NDArray[np.uint8]], Image], *, skip: bool) -> Iterator[Good[Image]]:
        """Wait for the bytes and convert one sample after the other.

        Where `skip`, a sample that is damaged, that `make-shards index` found unfit or that `convert` refuses with
        ValueError is replaced by the next one of the set that is not. That rule knows no rank, so order and batches
        stay the same for any number of them.

        Raises:
            DamagedSampleError: without `skip`, or when all samples are damaged, or 1,000 in a row.
        """
        for place, outcome in enumerate(self._bytes.outcomes()):
            sample, record = int(self.samples[place]), self.records[place : place + 1]
            fit = self._refuse(outcome, sample, record[0]) if skip else outcome
            converted = self._convert(fit, sample, convert)
            replaced = None
            if isinstance(converted, DamagedSampleError) and skip:
                replaced = str(converted)
                sample, converted = self._next_good(sample, convert)
                record = self._reader.records(np.array([sample]))
            if isinstance(converted, DamagedSampleError):
                raise converted
            yield Good(sample=sample, record=record, image=converted, replaced=replaced)

    def _refuse(self, outcome: Outcome, sample: int, record: np.void) -> Outcome:
        """Turn what `make-shards index` found unfit into an error that says so."""
        flags = Flag(int(record["flags"])) & REFUSED
        if not flags:
            return outcome
        return DamagedSampleError(f"{self._reader.describe(sample)} is {', '.join(flag_name(flag) for flag in flags)}")

    def _convert(
        self, outcome: Outcome, sample: int, convert: Callable[[npt.NDArray[np.uint8]], Image]
    ) -> Image | DamagedSampleError:
        if isinstance(outcome, DamagedSampleError):
            return outcome
        try:
            return convert(outcome)
        except ValueError as error:
            return DamagedSampleError(f"{self._reader.describe(sample)} {error}")

    def _next_good(
        self, sample: int, convert: Callable[[npt.NDArray[np.uint8]], Image]
    ) -> tuple[int, Image | DamagedSampleError]:
        converted: Image | DamagedSampleError = DamagedSampleError("")
        for _ in range(min(_LONGEST_SEARCH, self._reader.num_samples)):
            sample = (sample + 1) % self._reader.num_samples
            one = np.array([sample])
            records = self._reader.records(one)
            [outcome] = self._reader.submit(one, records).outcomes()
            converted = self._convert(self._refuse(outcome, sample, records[0]), sample, convert)
            if not isinstance(converted, DamagedSampleError):
                break
        return sample, converted


def as_read(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Convert nothing: for `PendingSamples.take`."""
    return encoded
