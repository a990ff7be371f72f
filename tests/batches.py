"""Batches of noise for tests of the step."""

import torch

from pipelines.batch import Batch


def random_batch(seed: int, num: int, side: int, *, first: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Draw two unrelated views, (num, 3, side, side) uint8 and channels_last as loaders give them, without labels.

    Args:
        seed: of the pixels.
        num: samples.
        side: height and width in pixels.
        first: dense number of the first sample; the others follow it.
        device: where the views shall be; the pixels are the same on all.
    """
    generator = torch.Generator().manual_seed(seed)
    views = tuple(
        torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=generator).to(
            device, memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    index = torch.arange(first, first + num)
    return Batch(views=views, index=index, label=torch.full((num,), -1))
