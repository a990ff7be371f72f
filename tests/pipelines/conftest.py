import numpy as np
import pytest

from tests.pipelines.shard_files import jpeg, smooth_image, write_shards


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory):
    """100 images of 40 to 89 pixels a side in 4 shards; the label is the dense sample number."""
    rng = np.random.default_rng(0)
    sides = rng.integers(40, 90, (100, 2)).tolist()
    images = [jpeg(smooth_image(rng, width, height)) for width, height in sides]
    return write_shards(tmp_path_factory.mktemp("small"), images, per_shard=25, labels=list(range(100)))
