"""What has to be installed for a command: training and evaluation need packages that packing does not."""

__all__ = ["OF_TRAINING", "how_to_install"]

OF_TRAINING = (
    "accelerate",
    "jinja2",
    "matplotlib",
    "safetensors",
    "sklearn",
    "tensorboard",
    "timm",
    "torch",
    "torchvision",
    "webdataset",
)
"""Modules of the packages that the extra `train` names."""


def how_to_install(error: ModuleNotFoundError) -> str:
    """Return what a person has to install.

    Raises:
        ModuleNotFoundError: the same one, if its module is none of these.
    """
    name = (error.name or "").partition(".")[0]
    if name not in OF_TRAINING:
        raise error
    return f"{name} is not installed: pip install 'moco-fast[gpu]', or 'moco-fast[train]' where there is no GPU"
