"""solo-learn's transform for ImageNet, with the settings of its MoCo v2+ configuration.

Its package, pinned to torch 1.9.1 and pytorch-lightning 1, can't be imported beside a current torch; the file with its
transforms can, alone.
"""

import io
from importlib import util
from pathlib import Path
from types import ModuleType

from PIL import Image

from loaders.base import Opened, Options, open_data_loader


def _transforms() -> ModuleType:
    package = util.find_spec("solo")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "utils" / "pretrain_dataloader.py"
    spec = util.spec_from_file_location("solo_pretrain_dataloader", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_batches(options: Options) -> Opened:
    """Open a DataLoader of its views."""
    solo = _transforms()
    transform = solo.ImagenetTransform(0.4, 0.4, 0.4, 0.1, min_scale=0.2, crop_size=options.size)
    both = solo.NCropAugmentation(transform, 2)
    return open_data_loader(options, lambda encoded: both(Image.open(io.BytesIO(encoded)).convert("RGB")))
