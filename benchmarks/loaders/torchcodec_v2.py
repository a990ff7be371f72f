"""torchcodec's JPEG decoder, torchvision's v2 transforms."""

from torchcodec.decoders import decode_jpeg

from loaders.base import Opened, Options, open_data_loader, tensor_views


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    views = tensor_views(options.size)
    return open_data_loader(options, lambda encoded: views(decode_jpeg(encoded)))
