"""Tensors that a test leaves behind."""

import gc

import torch
from torch import Tensor

__all__ = ["NewTensors"]


def _tensors() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


class NewTensors:
    """Count of the tensors made since: what other tests left, such as those of a compiler, has no size to ask for."""

    def __init__(self) -> None:
        self._old = _tensors()  # Kept alive, so that no new tensor gets the identity of an old one.

    def count(self) -> tuple[int, int]:
        """Return how many there are and how many bytes they have."""
        old = {id(each) for each in self._old}
        new = [each for each in _tensors() if id(each) not in old]
        return len(new), sum(each.nbytes for each in new)
