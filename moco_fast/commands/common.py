"""Common parts of commands: the choice of a device, and options that default to the run's."""

import math
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "choose_device", "given", "positive"]

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")
Number = TypeVar("Number", int, float)


def choose_device(device: Device) -> "torch.device":
    """Resolve `auto`. Raises ValueError: a GPU is requested, but torch finds none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def given(value: T | None, otherwise: T) -> T:
    """Return the option's value, or `otherwise` if it is unset."""
    return otherwise if value is None else value


def positive(option: str, value: Number) -> Number:
    """Return the value. Raises ValueError: it is not above 0, or is infinite."""
    if not value > 0:
        raise ValueError(f"--{option} is {value}, but must be above 0")
    if value == math.inf:
        raise ValueError(f"--{option} is {value}, but must be a number: nothing can be worked out of it")
    return value
