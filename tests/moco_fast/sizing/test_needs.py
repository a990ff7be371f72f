import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.saving.due import best_interval
from moco_fast.sizing.needs import Machines, Workload, needs

WORK = Workload(
    num_images=1_000_000_000,
    image_bytes=110e3,
    shard_bytes=512e6,
    num_passes=2,
    batch_size=8192,
    checkpoint_bytes=370e6,
)
MACHINES = Machines(
    num_nodes=8,
    gpus_per_node=8,
    step_per_s=5_400,
    loader_per_s=None,
    network_bytes_per_s=12.5e9,
    disk_bytes_per_s=None,
    cache_bytes=0,
    cores=None,
    gpu_failure_hours=50_000,
    restart_s=600,
    copy_bytes_per_s=1e9,
)


def test_a_billion_images_on_one_node() -> None:
    """The figures of an 8-GPU node at 5,400 samples/s per GPU: 6.4 hours a pass, 4.75 GB/s."""
    found = needs(WORK, replace(MACHINES, num_nodes=1))
    assert found.num_shards == math.ceil(110e12 / 512e6)
    assert found.storage_bytes == pytest.approx(110e12, rel=0.01)
    assert found.bottleneck == "GPUs"
    assert found.samples_per_s == 43_200
    assert found.epoch_s / 3600 == pytest.approx(6.43, abs=0.01)
    assert found.node_bytes_per_s == found.all_bytes_per_s == pytest.approx(4.752e9)
    # Of MLPerf's H100s at 205 MB/s each, a GPU here is 2.9, and 0.8 at 31 kB.
    assert found.mlperf_accelerators_per_gpu == pytest.approx(2.9, abs=0.05)
    small = needs(replace(WORK, image_bytes=31e3), replace(MACHINES, num_nodes=1))
    assert small.mlperf_accelerators_per_gpu == pytest.approx(0.8, abs=0.05)
    assert found.num_steps == round(2e9 / 8192)


def test_failures_and_saves() -> None:
    """64 GPUs for 6 days fail with 17%."""
    found = needs(WORK, MACHINES)
    assert found.run_failure_hours == 50_000 / 64
    assert -math.expm1(-6 * 24 / found.run_failure_hours) == pytest.approx(0.17, abs=0.005)
    assert found.save_s == pytest.approx(0.37)
    assert found.checkpoint_interval_s == best_interval(found.save_s, 3600 * found.run_failure_hours)
    assert found.num_failures == pytest.approx(found.run_s / 3600 / found.run_failure_hours)
    assert found.run_s == pytest.approx(2 * found.epoch_s / (1 - found.lost_share))
    assert found.gpu_hours == pytest.approx(64 * found.run_s / 3600)


@pytest.mark.parametrize(
    ("change", "slowest"),
    [
        ({"network_bytes_per_s": 1e9}, "network"),
        ({"loader_per_s": 2_000}, "loader"),
        ({"disk_bytes_per_s": 2e9}, "disks"),
        ({"cores": 8}, "CPU"),
    ],
)
def test_the_slowest_part_limits(change: dict[str, float], slowest: str) -> None:
    found = needs(WORK, replace(MACHINES, **change))  # pyright: ignore[reportArgumentType] - any field
    assert found.bottleneck == slowest
    assert found.samples_per_s == pytest.approx(found.spare[slowest] * 64 * 5_400)
    assert found.spare[slowest] == min(found.spare.values()) < 1


def test_a_cache_of_the_whole_set_needs_no_network() -> None:
    machines = replace(MACHINES, network_bytes_per_s=1e8)
    assert needs(WORK, machines).bottleneck == "network"
    assert needs(WORK, replace(machines, cache_bytes=55e12)).network_share == pytest.approx(0.5)
    whole = needs(WORK, replace(machines, cache_bytes=110e12))
    assert (whole.network_share, whole.bottleneck) == (0, "GPUs")


rates = st.floats(1, 1e12)


@given(
    image_bytes=st.floats(1e3, 1e7),
    nodes=st.integers(1, 1000),
    network=rates,
    disks=st.none() | rates,
    loader=st.none() | st.floats(1, 1e5),
    cores=st.none() | st.integers(1, 512),
    cache=st.floats(0, 1e15),
)
def test_no_limit_is_exceeded_and_larger_images_are_never_faster(
    image_bytes: float,
    nodes: int,
    network: float,
    disks: float | None,
    loader: float | None,
    cores: int | None,
    cache: float,
) -> None:
    machines = replace(
        MACHINES,
        num_nodes=nodes,
        network_bytes_per_s=network,
        disk_bytes_per_s=disks,
        loader_per_s=loader,
        cores=cores,
        cache_bytes=cache,
    )
    work = replace(WORK, image_bytes=image_bytes)
    found = needs(work, machines)
    gpus = nodes * 8 * 5_400
    assert 0 < found.samples_per_s <= gpus
    assert all(found.samples_per_s <= gpus * spare * (1 + 1e-9) for spare in found.spare.values())
    assert (found.bottleneck == "GPUs") == (found.samples_per_s == gpus)
    assert found.node_bytes_per_s * found.network_share <= network * (1 + 1e-9)
    assert 0 < found.lost_share < 1
    larger = needs(replace(work, image_bytes=2 * image_bytes), machines)
    assert larger.samples_per_s <= found.samples_per_s * (1 + 1e-9)
    assert larger.storage_bytes > found.storage_bytes
