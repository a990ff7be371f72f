"""Place of a command's work: the processes of a launch, if there are any, the device and the precision."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from moco_fast.commands.common import Device, choose_device
from moco_fast.speaking import note_met
from pipelines.config import DataConfig

if TYPE_CHECKING:
    import torch

    from moco_fast.config import Config
    from pipelines.world import World

__all__ = ["Precision", "data_of", "place"]

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

_WEEK_S = 7 * 24 * 3600.0  # that ranks wait for the first one, while it works alone


@contextmanager
def place(
    run: "Config | None", *, device: Device, precision: Precision | None
) -> "Generator[tuple[torch.device, World, str]]":
    """Join the other processes, if there are any, and settle device and precision.

    Args:
        run: of the encoder, whose precision is taken where none is given.
        device: as it was asked for.
        precision: as it was asked for; None: the run's.

    Raises:
        ValueError: the device is not there, or lacks the precision.
    """
    import torch

    from moco_fast.config import RunConfig
    from moco_fast.training.runtime import allow_tf32, choose_precision, start
    from pipelines.world import World

    may_use_gpu = device != "cpu" and torch.cuda.is_available()
    # A precision that only GPUs have was chosen for the run's.
    of_run = run.run.precision if run is not None and may_use_gpu else "auto"
    asked = precision or of_run
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        runtime = start(RunConfig(device=device, precision=asked, timeout_s=_WEEK_S))
        note_met()
        try:
            yield runtime.device, runtime.world, runtime.precision
        finally:
            runtime.close()
        return
    chosen = choose_device(device)
    on_gpu = chosen.type == "cuda"
    if asked in ("tf32", "fp16") and not on_gpu:
        raise ValueError(f"--precision {asked} needs a GPU: on the CPU take fp32 or bf16")
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    settled, _ = choose_precision(asked, os.environ.get("ACCELERATE_MIXED_PRECISION"), has_bf16=has_bf16)
    if on_gpu:
        allow_tf32(settled == "tf32")
    yield chosen, World(), settled


def data_of(run: "Config | None", device: "torch.device") -> DataConfig:
    """Return how images are read: as an encoder's run did, without options that mean nothing here.

    Args:
        run: of the encoder; None: it is not from a run.
        device: where the images are wanted, which may not be the run's.
    """
    data = DataConfig(shards="") if run is None else run.data
    hw_decoder_load = data.hw_decoder_load if device.type == "cuda" else None
    return replace(
        data,
        shards="",
        stream_samples=None,
        read_threads=None,
        cache_decoded=None,
        cache_decoded_in=None,
        hw_decoder_load=hw_decoder_load,
    )
