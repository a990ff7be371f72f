"""Reading of a checkpoint by many ranks: each machine reads its files once."""

from pathlib import Path

from moco_fast import checkpoint, distributed
from moco_fast.checkpoint import Checkpoint

__all__ = ["load_together"]


def load_together(path: Path, *, is_first_of_node: bool) -> Checkpoint:
    """Read a checkpoint on every rank; collective.

    One rank of each node reads the files and compares their digests. The others then map them: their tensors are in the
    memory that the kernel has read the files into, which all processes share.

    Args:
        path: of the checkpoint.
        is_first_of_node: whether this rank reads for its node.

    Raises:
        ValueError: some node cannot read it, or it is damaged; on all ranks.
    """
    found = None
    with distributed.leaving_together():
        if is_first_of_node:
            found = checkpoint.load(path)
    with distributed.leaving_together():
        return found or checkpoint.load(path, is_checked=True)
