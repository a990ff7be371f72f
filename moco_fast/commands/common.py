"""What several commands share: the device, and options that fall back on the run's."""

from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "choose_device", "given", "positive"]

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")
Number = TypeVar("Number", int, float)


def choose_device(device: Device) -> "torch.device":
    """Resolve `auto`. Raises ValueError where a GPU was asked for and torch finds none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; take --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def given(value: T | None, otherwise: T) -> T:
    """Return the option's value, or what stands in for it where it is unset."""
    return otherwise if value is None else value


def positive(option: str, value: Number) -> Number:
    """Return the value. Raises ValueError if it is not above 0."""
    if not value > 0:
        raise ValueError(f"--{option} is {value}, but must be above 0")
    return value
