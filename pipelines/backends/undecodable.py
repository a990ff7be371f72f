"""Samples that a decoder of whole batches refuses: found, and replaced by the rule that holds for damaged ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from pipelines.backends.base import Job
from pipelines.reading.readahead import EncodedBatch
from pipelines.reading.reader import DamagedSampleError, Reader, name_sample
from pipelines.reading.samples import PendingSamples
from shards.ground.arrays import Encoded

__all__ = ["Undecodable"]


class Undecodable:
    """The samples of a job that its decoder refuses.

    Args:
        job: whose samples; its `skip` says whether others may take their places.
        can_decode: whether the decoder takes all of some encoded images.
        decoder: name of the decoder, for messages.
    """

    def __init__(self, job: Job, can_decode: Callable[[Sequence[Encoded]], bool], *, decoder: str) -> None:
        self._job = job
        self._can_decode = can_decode
        self._decoder = decoder
        self._known: set[int] = set()

    def find(self, batches: Sequence[EncodedBatch]) -> bool:
        """Look for them among batches of which one failed; return whether there are any.

        Raises:
            DamagedSampleError: there are, and the job does not skip.
        """
        encoded = {
            sample: image
            for batch in batches
            for sample, image in zip(batch.samples.tolist(), batch.encoded, strict=True)
        }
        found = self._refused(list(encoded), encoded)
        if found and not self._job.skip:
            keys = dict(chain.from_iterable(zip(b.samples.tolist(), b.keys.tolist(), strict=True) for b in batches))
            name = name_sample(self._job.shards, found[0], keys[found[0]])
            raise DamagedSampleError(f"{name} cannot be decoded by {self._decoder}")
        self._known.update(found)
        return bool(found)

    def replace(self, batch: EncodedBatch) -> EncodedBatch:
        """Put the next good sample of the set in the place of each that was found in any batch so far."""
        places = [place for place, sample in enumerate(batch.samples.tolist()) if sample in self._known]
        if not places:
            return batch
        samples, labels, keys = batch.samples.copy(), batch.labels.copy(), batch.keys.copy()
        encoded, tables, replaced = list(batch.encoded), batch.tables, batch.replaced
        # Opened when needed: most sets have no such sample.
        reader = Reader(self._job.shards, num_threads=1)
        try:
            for place in places:
                taken = PendingSamples(reader, samples[place : place + 1]).take(self._decodable, skip=True)
                samples[place], labels[place] = taken.samples[0], taken.records["label"][0]
                keys[place], encoded[place] = taken.records["position"][0], taken.images[0]
                drawn = self._job.draw(batch.epoch, taken.samples, taken.records)
                tables = tuple(table.with_row(place, one) for table, one in zip(tables, drawn, strict=True))
                replaced += taken.replaced
        finally:
            reader.close()
        return replace(
            batch, samples=samples, labels=labels, keys=keys, encoded=encoded, tables=tables, replaced=replaced
        )

    def _refused(self, samples: Sequence[int], encoded: dict[int, Encoded]) -> list[int]:
        """Find them by halves: a decoder that fails does not say at which image."""
        if not samples or self._can_decode([encoded[sample] for sample in samples]):
            return []
        if len(samples) == 1:
            return list(samples)
        middle = len(samples) // 2
        return self._refused(samples[:middle], encoded) + self._refused(samples[middle:], encoded)

    def _decodable(self, encoded: Encoded) -> Encoded:
        if not self._can_decode([encoded]):
            raise ValueError(f"cannot be decoded by {self._decoder}")
        return encoded
