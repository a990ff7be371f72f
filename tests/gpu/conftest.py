import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """What is compared with the CPU: the GPU, or with DEVICE=cpu the CPU itself, to see that the tests are in order."""
    return torch.device(os.environ.get("DEVICE", "cuda"))
