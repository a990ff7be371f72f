"""What a run at scale needs, and what limits it: arithmetic on stated rates. Does not import torch.

Rates are decimal (1 GB is 1e9 bytes), as networks and disks are sold.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moco_fast.saving.due import best_interval

__all__ = ["MLPERF_BYTES_PER_S", "Machines", "Needs", "Workload", "needs"]

MLPERF_BYTES_PER_S = 205e6
"""What MLPerf Storage lets one H100 read for its ResNet-50: 1,786 images/s."""
_FETCH_CPU_S_PER_BYTE = 3.25e-9
"""CPU seconds of fetching from an object store, mostly the kernel's: 3.0 to 3.5 s per GB, measured with whole pieces.
Chunks take 1.2 on one machine without TLS (benchmarks/results/fetching.md); with TLS nothing was measured."""
_LOAD_CPU_S_PER_SAMPLE = 67e-6
"""CPU seconds of reading and checking a sample and drawing its views, while the GPU decodes: at 32 images per rank, the
dearest of benchmarks/results/host.md."""
_CPU_SHARE = 0.4
"""Share of a host's cores that may be busy before GPUs wait: SPDL's authors saw training lose 29% on busy hosts."""
_OVERHEAD_BYTES = 512 + 256 + 40
"""Of a sample besides its bytes: a tar header, what fills its bytes up to 512, a record of the index."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained on what."""

    num_images: int
    image_bytes: float
    """Mean size as stored."""
    shard_bytes: float
    num_passes: float
    """Passes over the images."""
    batch_size: int
    checkpoint_bytes: float


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What it is trained on. Rates of None are unknown and limit nothing."""

    num_nodes: int
    gpus_per_node: int
    step_per_s: float
    """Samples per second that one GPU trains on."""
    loader_per_s: float | None
    """Samples per second that the loader of one rank makes."""
    network_bytes_per_s: float
    """Of one node, from where the shards are."""
    disk_bytes_per_s: float | None
    """Of one node's disks, reading the cache."""
    cache_bytes: float
    """Of one node."""
    cores: int | None
    """CPU cores of one node."""
    gpu_failure_hours: float
    """Mean hours between two failures of one GPU with its share of the machine."""
    restart_s: float
    """From a failure to the first new step."""
    copy_bytes_per_s: float
    """At which a checkpoint leaves the GPU, while training stands still."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the run needs. Rates are bytes or samples per second."""

    num_shards: int
    storage_bytes: float
    samples_per_s: float
    """Of all GPUs, as far as the bottleneck lets them."""
    bottleneck: str
    spare: Mapping[str, float]
    """For each known limit but the GPUs: its samples per second as a multiple of what the GPUs train on."""
    node_bytes_per_s: float
    """What a node reads."""
    all_bytes_per_s: float
    mlperf_accelerators_per_gpu: float
    network_share: float
    """Share of the images that comes over the network from the second epoch on. Every epoch deals the shards to the
    nodes differently, so a node finds what it needs in its cache as often as the cache holds a part of the set."""
    cores_per_node: float
    """CPU cores that reading and fetching keep busy on a node."""
    num_steps: int
    epoch_s: float
    run_s: float
    """With saves, failures and what is repeated after them."""
    checkpoint_bytes: float
    save_s: float
    """How long training stands still for a checkpoint."""
    checkpoint_interval_s: float
    run_failure_hours: float
    num_failures: float
    lost_share: float
    """Share of the time that goes to saves, to repeated steps and to restarts."""
    gpu_hours: float


def needs(work: Workload, machines: Machines) -> Needs:
    """Work out what a run needs.

    A bottleneck is what gives the fewest samples per second: GPUs, the loader, the network, the disks or the CPU.
    """
    num_gpus = machines.num_nodes * machines.gpus_per_node
    total_bytes = work.num_images * work.image_bytes
    network_share = 1 - min(1.0, machines.cache_bytes / total_bytes)
    gpus_per_s = num_gpus * machines.step_per_s
    limits = _limits(work, machines, network_share)
    samples_per_s = min([gpus_per_s, *limits.values()])
    slowest = min(limits, key=lambda name: limits[name])
    bottleneck = slowest if limits[slowest] < gpus_per_s else "GPUs"
    failure_s = 3600 * machines.gpu_failure_hours / num_gpus
    save_s = work.checkpoint_bytes / machines.copy_bytes_per_s
    interval_s = best_interval(save_s, failure_s)
    # After a failure, half an interval is repeated on average.
    lost = save_s / (interval_s + save_s) + (interval_s / 2 + machines.restart_s) / failure_s
    epoch_s = work.num_images / samples_per_s
    run_s = work.num_passes * epoch_s / max(1 - lost, 0.01)
    node_bytes_per_s = samples_per_s * work.image_bytes / machines.num_nodes
    return Needs(
        num_shards=math.ceil(total_bytes / work.shard_bytes),
        storage_bytes=total_bytes + work.num_images * _OVERHEAD_BYTES,
        samples_per_s=samples_per_s,
        bottleneck=bottleneck,
        spare={name: limit / gpus_per_s for name, limit in limits.items()},
        node_bytes_per_s=node_bytes_per_s,
        all_bytes_per_s=node_bytes_per_s * machines.num_nodes,
        mlperf_accelerators_per_gpu=node_bytes_per_s / machines.gpus_per_node / MLPERF_BYTES_PER_S,
        network_share=network_share,
        cores_per_node=samples_per_s / machines.num_nodes * _cpu_s_per_sample(work, network_share),
        num_steps=max(1, round(work.num_passes * work.num_images / work.batch_size)),
        epoch_s=epoch_s,
        run_s=run_s,
        checkpoint_bytes=work.checkpoint_bytes,
        save_s=save_s,
        checkpoint_interval_s=interval_s,
        run_failure_hours=failure_s / 3600,
        num_failures=run_s / failure_s,
        lost_share=min(lost, 0.99),
        gpu_hours=num_gpus * run_s / 3600,
    )


def _limits(work: Workload, machines: Machines, network_share: float) -> dict[str, float]:
    """Return the samples per second that each limit but the GPUs allows, over all nodes."""
    nodes = machines.num_nodes
    limits = {"network": nodes * machines.network_bytes_per_s / work.image_bytes / max(network_share, 1e-9)}
    if machines.loader_per_s is not None:
        limits["loader"] = nodes * machines.gpus_per_node * machines.loader_per_s
    if machines.disk_bytes_per_s is not None:
        # What came over the network is written first, and every sample is read from the disk.
        limits["disks"] = nodes * machines.disk_bytes_per_s / work.image_bytes / (1 + network_share)
    if machines.cores is not None:
        limits["CPU"] = nodes * _CPU_SHARE * machines.cores / _cpu_s_per_sample(work, network_share)
    return limits


def _cpu_s_per_sample(work: Workload, network_share: float) -> float:
    return _LOAD_CPU_S_PER_SAMPLE + network_share * work.image_bytes * _FETCH_CPU_S_PER_BYTE
