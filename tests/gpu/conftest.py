import os
import sys

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """What is compared with the CPU: the GPU, or with DEVICE=cpu the CPU itself, to see that the tests are in order."""
    return torch.device(os.environ.get("DEVICE", "cuda"))


@pytest.fixture(scope="session")
def on_gpu(device):
    """Whether there is a GPU, which a stand-in is not (tests/fake_cuda.py)."""
    return device.type == "cuda" and "tests.fake_cuda" not in sys.modules
