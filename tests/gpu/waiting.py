"""Where the host may not wait for the GPU, and the warnings that torch gives about what these tests set."""

import warnings
from contextlib import contextmanager

import torch

ABOUT_SYNC_MODE = "Synchronization debug mode is a prototype feature"
"""From `set_sync_debug_mode`, after it has set the mode."""
ABOUT_TF32 = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled"
"""From inductor (torch 2.11), where full precision is asked for."""
ABOUT_EMPTY_GRAPH = "The CUDA Graph is empty"
"""From the graph by which inductor holds its memory pool (torch 2.11, _inductor/cudagraph_trees.py), which records the
warning unless warnings are errors."""


@contextmanager
def no_host_sync(device):
    """Fail at the first operation that makes the host wait for the GPU; whatever happens, leave the mode as it was."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ABOUT_SYNC_MODE, category=UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
