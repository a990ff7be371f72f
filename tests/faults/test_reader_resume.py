import json

import pytest

from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

pytestmark = pytest.mark.faults

SCRIPT = """
import hashlib, json, os, signal, sys, torch
from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
shards, backend, state, left = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
loader = open_loader(DataConfig(shards=shards, batch_size=12, backend=backend, num_threads=1), ViewsConfig(size=24),
                     seed=9, device=torch.device("cpu"))
loader.load_state_dict(state)
while loader.state_dict()["epoch"] < 3:
    for batch in loader:
        content = b"".join(t.contiguous().numpy().tobytes() for t in (*batch.views, batch.index))
        print(json.dumps([hashlib.sha256(content).hexdigest(), loader.state_dict()]), flush=True)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    import numpy as np

    rng = np.random.default_rng(1)
    images = [jpeg(smooth_image(rng, 40, 50)) for _ in range(40)]
    return write_shards(tmp_path_factory.mktemp("resume"), images)


def batches(python, shards, backend, state, *, kill_after=-1):
    """[digest, state after it] of every batch up to the end of the third epoch, or to the kill."""
    done = python.run("-c", SCRIPT, shards, backend, json.dumps(state), kill_after)
    assert done.returncode == (0 if kill_after < 0 else -9), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_batches_after_a_kill_are_those_of_an_uninterrupted_run_to_the_bit(warm_python, shards, backend):
    start = {"epoch": 0, "step": 0}
    whole = batches(warm_python, shards, backend, start)
    assert len(whole) == len({digest for digest, _ in whole}) == 9
    # In mid-epoch, and right after an epoch's end.
    first = batches(warm_python, shards, backend, start, kill_after=2)
    second = batches(warm_python, shards, backend, first[-1][1], kill_after=4)
    third = batches(warm_python, shards, backend, second[-1][1])
    assert first + second + third == whole
