"""Depth of a packing's images, decided once for all of them."""

from contextlib import closing, suppress

import numpy as np

from shards.config import PackConfig
from shards.ground.errors import Rejected
from shards.ground.progress import ProgressBars
from shards.ground.units import counted
from shards.images.depth import Values, may_be_deep, measure, range_of
from shards.images.isolation import Limits, run_codecs
from shards.packing.inputs import read_inputs
from shards.packing.plan import PackPlan

__all__ = ["choose_depth"]

_TRIED = 128


def choose_depth(config: PackConfig, plan: PackPlan, progress: ProgressBars) -> str:
    """Return EncodeConfig.depth_range without `auto`: decided by inputs that are spread evenly over the listing.

    Args:
        config: of the packing.
        plan: the listing.
        progress: takes what was found.
    """
    if config.depth_range != "auto" or config.annotations:
        return config.depth_range
    num_inputs = plan.num_positions
    tried = np.unique(np.linspace(0, num_inputs - 1, min(_TRIED, num_inputs)).astype(np.int64))
    found: list[Values] = []
    with closing(read_inputs(plan, plan.rows_at(tried))) as inputs:
        for item in inputs:
            if isinstance(item.data, bytes) and may_be_deep(item.data):
                # What crashes here is rejected when it is packed.
                with suppress(Rejected):
                    values = run_codecs(measure, Limits.of(config.max_pixels), item.data, config.max_pixels)
                    found += [values] if values is not None else []
    wanted = range_of(found)
    for is_float, what, used in (
        (False, "images of 16 bits", f"read as {wanted.bits} bits"),
        (True, "floating-point images", f"read from {wanted.low:g} to {wanted.high:g}"),
    ):
        own = [values for values in found if values.is_float == is_float]
        if own:
            low, high = min(values.low for values in own), max(values.high for values in own)
            progress.say(
                f"{what}: {len(own):,} of {counted(len(tried), 'tried input')}, with values from {low:g} to {high:g}: "
                f"{used} (--depth-range)"
            )
    return str(wanted)
