import numpy as np
import pytest
import torch

from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.preview import draw, sheet

VIEWS = ViewsConfig(size=24)


def test_a_preview_shows_what_training_sees(small_shards):
    data = DataConfig(shards=str(small_shards), batch_size=16)
    with open_loader(data, VIEWS, seed=5, device=torch.device("cpu")) as loader:
        loader.load_state_dict({"epoch": 2, "step": 3})
        batch = next(iter(loader))
    previews = draw(str(small_shards), VIEWS, seed=5, epoch=2, indices=batch.index.tolist())
    for row, preview in enumerate(previews):
        assert preview.index == int(batch.index[row])
        assert np.array_equal(preview.view_q, batch.view_q[row].permute(1, 2, 0).numpy())
        assert np.array_equal(preview.view_k, batch.view_k[row].permute(1, 2, 0).numpy())
        height, width = preview.original.shape[:2]
        for x, y, w, h in (preview.box_q, preview.box_k):
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height


def test_a_sheet_holds_every_sample(small_shards):
    previews = draw(str(small_shards), VIEWS, seed=0, epoch=0, indices=[0, 1, 2, 3, 4])
    image = sheet(previews, side=50, columns=2)
    assert image.size == (2 * (150 + 32), 3 * 58 + 8)
    pixels = np.asarray(image)
    tile = pixels[8:58, 66:116]
    assert np.abs(tile[4:-4, 4:-4].astype(int).mean((0, 1)) - previews[0].view_q.mean((0, 1))).max() < 12


def test_a_sample_that_is_not_there_is_refused(small_shards):
    with pytest.raises(ValueError, match="beyond the 100 samples"):
        draw(str(small_shards), VIEWS, seed=0, epoch=0, indices=[100])
