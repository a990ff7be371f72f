"""Memory stays where the first batches have brought it."""

import psutil
import pytest
import torch

from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader

NUM_BATCHES = 1000
BATCH_SIZE = 8
SIZE = 48


def resident_bytes() -> int:
    """Of this process and its children."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(each.memory_info().rss for each in family)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_memory_is_flat_over_a_thousand_batches(small_shards, backend):
    data = DataConfig(shards=str(small_shards), batch_size=BATCH_SIZE, backend=backend, num_threads=1)
    view_bytes = BATCH_SIZE * 2 * SIZE * SIZE * 3
    # Every epoch has the same samples: the largest batch has been met when the first tenth is over.
    marks = {}
    with open_loader(data, ViewsConfig(size=SIZE), seed=0, device=torch.device("cpu")) as loader:
        number = 0
        while number < NUM_BATCHES:
            for _ in loader:
                number += 1
                if number in (NUM_BATCHES // 10, NUM_BATCHES):
                    marks[number] = resident_bytes()
    grown = marks[NUM_BATCHES] - marks[NUM_BATCHES // 10]
    # A tenth of what it would be if each batch's views stayed, or their encoded images.
    assert grown < 0.1 * 0.9 * NUM_BATCHES * view_bytes, f"{grown / 2**20:.1f} MiB"
