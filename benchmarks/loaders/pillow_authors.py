"""The authors' main_moco.py with --aug-plus: PIL and torchvision's transforms."""

import io
import random
from typing import Any

from PIL import Image, ImageFilter
from torchvision import transforms

from loaders.base import MEAN, STD, Opened, Options, Views, open_data_loader


class PilBlur:
    """Gaussian blur as in SimCLR and MoCo v2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pil_views(size: int) -> Views:
    """Both views by torchvision's transforms of PIL images, from encoded bytes or an image that is decoded already."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PilBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )

    def views(encoded: bytes | Image.Image) -> Any:
        image = encoded if isinstance(encoded, Image.Image) else Image.open(io.BytesIO(encoded)).convert("RGB")
        return transform(image), transform(image)

    return views


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    return open_data_loader(options, pil_views(options.size))
