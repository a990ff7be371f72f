import numpy as np
import pytest
import torch

from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.preview import differences, draw, sheet
from shards.sets import open_set

VIEWS = ViewsConfig(size=24)


def test_a_preview_shows_what_training_sees(small_shards):
    data = DataConfig(shards=str(small_shards), batch_size=16)
    with open_loader(data, VIEWS, seed=5, device=torch.device("cpu")) as loader:
        loader.load_state_dict({"epoch": 2, "step": 3})
        batch = next(iter(loader))
    previews = draw(open_set(small_shards), VIEWS, seed=5, epoch=2, indices=batch.index.tolist())
    for row, preview in enumerate(previews):
        assert preview.index == int(batch.index[row])
        for shown, view in zip(preview.views, batch.views, strict=True):
            assert np.array_equal(shown, view[row].permute(1, 2, 0).numpy())
        height, width = preview.original.shape[:2]
        for x, y, w, h in preview.boxes:
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height


def test_a_sheet_holds_every_sample(small_shards):
    previews = draw(open_set(small_shards), VIEWS, seed=0, epoch=0, indices=[0, 1, 2, 3, 4])
    image = sheet(previews, side=50, columns=2)
    assert image.size == (2 * (150 + 32), 3 * 58 + 8)
    pixels = np.asarray(image)
    tile = pixels[8:58, 66:116]
    assert np.abs(tile[4:-4, 4:-4].astype(int).mean((0, 1)) - previews[0].views[0].mean((0, 1))).max() < 12


def test_a_sheet_shows_how_far_two_backends_are_apart(small_shards):
    ours, others = (
        draw(open_set(small_shards), VIEWS, seed=0, epoch=0, indices=[3, 5], backend=backend)
        for backend in ("dali", "torch")
    )
    apart = differences(ours, others)
    assert [of_view.shape for of_view in apart] == [(2, 24, 24, 3)] * 2
    assert all(0 < of_view.mean() < 2 for of_view in apart)
    assert np.array_equal(apart[0][1], np.abs(ours[1].views[0].astype(int) - others[1].views[0]))
    image = sheet(ours, others, side=24, columns=1)
    assert image.size == (5 * 32 + 8, 2 * 32 + 8)
    # The tile after the second sample's query view, less its frame.
    tile = np.asarray(image)[40:64, 72:96][2:-2, 2:-2]
    assert np.array_equal(tile, (apart[0][1].astype(int) * 16).clip(0, 255)[2:-2, 2:-2])
    assert not any(of_view.any() for of_view in differences(ours, ours))


def test_a_sample_that_is_not_there_is_refused(small_shards):
    with pytest.raises(ValueError, match="beyond the 100 samples"):
        draw(open_set(small_shards), VIEWS, seed=0, epoch=0, indices=[100])
