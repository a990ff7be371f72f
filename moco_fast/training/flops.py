"""Model FLOPS utilization: operations of a step, counted once, and what devices can do at most."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage] - public, but not declared so
from torch.utils.flop_counter import FlopCounterMode

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder
from moco_fast.training.build import Parts
from moco_fast.training.runtime import Runtime

__all__ = ["PEAKS", "count_flops", "encoder_flops", "peak_flops", "sample_flops", "step_flops"]

_TERA = 1e12

PEAKS: dict[str, dict[str, float]] = {
    # Volta, data sheet volta-v100-datasheet-update-us-1165301-r5
    "V100 SXM2": {"fp16": 125, "fp32": 15.7},
    "V100 PCIE": {"fp16": 112, "fp32": 14},
    # Turing, data sheet t4-tensor-core-datasheet-951643
    "T4": {"fp16": 65, "fp32": 8.1},
    # Ampere, data sheets nvidia-a100-datasheet-us-nvidia-1758950-r4 (SXM and PCIe alike), a10-datasheet; A30, A40
    "A100": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    "A10": {"fp16": 125, "bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "A30": {"fp16": 165, "bf16": 165, "fp32": 10.3},
    "A40": {"fp16": 149.7, "bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    # Ada, nvidia-ada-gpu-architecture-whitepaper-v2.1 and L40S's data sheet
    "L4": {"fp16": 121, "bf16": 121, "tf32": 60, "fp32": 30.3},
    "L40S": {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6},
    # Hopper, nvidia.com/en-us/data-center/h100 and h200, whose tensor-core figures with sparsity are twice these; SXM
    # and PCIe of H100 as in its white paper
    "H100 PCIe": {"fp16": 756, "bf16": 756, "tf32": 378, "fp32": 51.2},
    "H100 NVL": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "H100": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H200 NVL": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "H200": {"fp16": 989.5, "bf16": 989.5, "tf32": 494.5, "fp32": 67},
    # Blackwell, data sheet of HGX B200: 4.5 and 2.2 PFLOPS with sparsity
    "B200": {"fp16": 2250, "bf16": 2250, "tf32": 1100, "fp32": 75},
}
"""TFLOPS without sparsity, by words of a device's name: fp16, bf16 and tf32 of tensor cores, fp32 without them.

Sources are NVIDIA's, read in November 2026 where others state them (V100, T4, A100, A10, L4, H100 in Lightning's
`fabric/utilities/throughput.py`; A40, L40S and B200 in copies of their data sheets; H100 NVL and H200 in quotes of
their pages; fp16 and fp32 of A30 in tables of several projects, and its tf32 is missing because none states it).
"""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the operations per second of a device in a precision; None: the table does not have it, or it is a slice.

    Args:
        device_name: as torch.cuda.get_device_name gives it, such as `NVIDIA H100 80GB HBM3`.
        precision: fp32, tf32, bf16 or fp16.
    """
    words = set(device_name.replace("-", " ").split())
    fitting = [name for name in PEAKS if set(name.split()) <= words]
    # A slice of a GPU (`NVIDIA A100-SXM4-40GB MIG 1g.5gb`) has a part of its cores.
    if not fitting or "MIG" in words:
        return None
    found = PEAKS[max(fitting, key=len)].get(precision)
    return None if found is None else found * _TERA


def count_flops(config: Config, runtime: Runtime, parts: Parts) -> tuple[float, float] | None:
    """Return the operations of a rank's step, and per second of its device at most; None: no GPU that we know."""
    if runtime.rank or runtime.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(runtime.device), runtime.precision)
    if peak is None:
        return None
    key = parts.objective.modules.get("key")
    return step_flops(config, parts.query, key, world_size=runtime.world_size), peak


def step_flops(config: Config, query: Encoder, key: nn.Module | None, *, world_size: int) -> float:
    """Return the floating-point operations of one rank's optimizer step: those of the encoders' products.

    A multiplication and an addition are two. Losses, norms and the optimizer are left out, as is usual.

    Args:
        config: of the run.
        query: the query encoder, not wrapped.
        key: the key encoder, if the method has one.
        world_size: ranks that share a batch.
    """
    num_samples = config.data.batch_size // world_size * config.optim.accumulate
    return num_samples * sample_flops(config, query, key)


def sample_flops(config: Config, query: Encoder, key: nn.Module | None) -> float:
    """Return the operations of a training step per sample, with all its views."""
    trained, kept = config.method.num_encoded
    per_sample = trained * encoder_flops(query, config.views.size, backward=True)
    if key is not None and kept:
        per_sample += kept * encoder_flops(key, config.views.size, backward=False)
    if config.views.num_small:
        per_sample += config.views.num_small * encoder_flops(query, config.views.small_size, backward=True)
    return per_sample


def encoder_flops(encoder: nn.Module, size: int, *, backward: bool) -> float:
    """Count the operations of an encoder on one image (3, size, size), on shapes alone; nothing of it changes."""
    modes = {module: module.training for module in encoder.modules()}
    meta: dict[str, Tensor] = {}
    for name, each in (*encoder.named_parameters(), *encoder.named_buffers()):
        meta[name] = torch.empty_like(each, device="meta").requires_grad_(backward and each.requires_grad)
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        # Statistics of batches would need the other ranks.
        encoder.eval()
        stack.callback(_set_modes, modes)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(counter)
        images = torch.empty(1, 3, size, size, dtype=torch.uint8, device="meta")
        out = functional_call(encoder, meta, (images.contiguous(memory_format=torch.channels_last),))
        if backward:
            out.sum().backward()
    return float(counter.get_total_flops())


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
