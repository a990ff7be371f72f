"""stable-pretraining's transforms of dictionaries, at the recipe's settings."""

import io
from typing import Any

from PIL import Image
from stable_pretraining.data import transforms
from torch.utils.data import default_collate

from loaders.base import MEAN, STD, Opened, Options, open_data_loader


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((options.size, options.size), scale=(0.2, 1.0)),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.PILGaussianBlur(sigma=(0.1, 2.0), p=0.5),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ToImage(mean=MEAN, std=STD),
    )
    both = transforms.MultiViewTransform([view, view])

    def collate(samples: list[Any]) -> Any:
        # What it drew stands beside each image and is collated, too.
        return [each["image"] for each in default_collate([sample["views"] for sample in samples])]

    return open_data_loader(options, lambda encoded: both({"image": Image.open(io.BytesIO(encoded))}), collate)
