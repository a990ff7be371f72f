"""Stored size of photographs: what it gives and costs, in the line that packing ends with."""

from shards.config import EncodeConfig

__all__ = ["describe_stored_size"]

# All figures are of a thousand photographs of ImageNet's size (benchmarks/results/stored_size.md). At 256 pixels they
# have 30 kB in place of 110: below this, there is little to gain.
_WORTHWHILE_BYTES = 60_000
_FULL_SIDE = 375
"""Median of their shorter sides, in pixels."""


def describe_stored_size(
    encoding: EncodeConfig, *, bytes_per_image: float, resized_share: float, has_annotations: bool
) -> str | None:
    """Return a line about the size at which images are stored; None: there is nothing to say.

    Args:
        encoding: how they are encoded.
        bytes_per_image: mean over the packed ones.
        resized_share: of the packed ones that were larger than `encoding.resize`.
        has_annotations: whether every byte of them stays as it was.
    """
    if has_annotations:
        return None
    if encoding.resize is None:
        if bytes_per_image < _WORTHWHILE_BYTES:
            return None
        return (
            f"{bytes_per_image / 1e3:,.0f} kB per image; stored at 256 pixels (--resize 256), photos of ImageNet's "
            "size take 27% of the bytes and 55% of the processor time for their views, but small crops lose detail "
            "(docs/packing.md)"
        )
    if encoding.resize_mode != "shorter" or encoding.resize >= _FULL_SIDE or resized_share < 0.5:
        return None
    return (
        f"stored at {encoding.resize} pixels: more crops have fewer pixels than a view and are enlarged, of MoCo v2's "
        "from photos of ImageNet's size 73% at 256 pixels, 38% at 320 and 23% at full size (docs/packing.md)"
    )
