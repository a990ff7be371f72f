"""The authors' main_moco.py with --aug-plus: PIL and torchvision's transforms."""

import io
import random
from typing import Any

from PIL import Image, ImageFilter
from torchvision import transforms

from loaders.base import MEAN, STD, Opened, Options, open_data_loader


class PilBlur:
    """Gaussian blur as in SimCLR and MoCo v2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PilBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )

    def views(encoded: bytes) -> Any:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return transform(image), transform(image)

    return open_data_loader(options, views)
