"""What encoders are compared with: raw pixels."""

from torch import nn

from moco_fast.encoders.encoder import Encoder

__all__ = ["raw_pixels"]

_MAX_SIDE = 32


def raw_pixels(like: Encoder) -> Encoder:
    """Return what looks like an encoder, but whose features are the pixels, shrunk to at most 32 x 32.

    Args:
        like: whose images and normalization it has.
    """
    side = min(like.image_size, _MAX_SIDE)
    mean, std = (
        (values.tolist())
        for values in (-like.pixel_shift * (255 * like.pixel_scale) ** -1, 1 / (255 * like.pixel_scale))
    )
    (m0, m1, m2), (s0, s1, s2) = mean, std
    num_values = 3 * side**2
    return Encoder(
        nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()),
        nn.Identity(),
        feature_dim=num_values,
        dim=num_values,
        mean=(m0, m1, m2),
        std=(s0, s1, s2),
        image_size=like.image_size,
        crop=like.crop,
    ).eval()
