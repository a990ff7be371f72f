"""torchvision's JPEG decoder and v2 transforms on uint8 tensors."""

from loaders.base import Opened, Options, decoded, open_data_loader, tensor_views


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    views = tensor_views(options.size)
    return open_data_loader(options, lambda encoded: views(decoded(encoded)))
