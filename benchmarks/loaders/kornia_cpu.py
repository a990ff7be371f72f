"""kornia on a CPU: photos have sizes of their own, so each is cropped alone; what follows takes the whole batch."""

from typing import Any

import kornia.augmentation as augmentation
import numpy as np
import torch
from kornia_rs.io import decode_image_jpeg

from loaders.base import Opened, Options, open_data_loader


def open_batches(options: Options) -> Opened:
    """Open a DataLoader whose workers make whole batches."""
    crop = augmentation.RandomResizedCrop((options.size, options.size), scale=(0.2, 1.0))
    rest = augmentation.AugmentationSequential(
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
        augmentation.RandomHorizontalFlip(p=0.5),
    )

    def crops(encoded: bytes) -> Any:
        pixels = torch.from_numpy(np.asarray(decode_image_jpeg(encoded))).permute(2, 0, 1)
        # Gray photos have one channel.
        image = pixels.expand(3, -1, -1)[None].float() / 255
        return crop(image), crop(image)

    @torch.no_grad()
    def collate(samples: list[Any]) -> Any:
        return [rest(torch.cat(view)) for view in zip(*samples, strict=True)]

    return open_data_loader(options, crops, collate)
