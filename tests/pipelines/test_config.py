import subprocess
import sys
from dataclasses import replace

import pytest

from pipelines.config import VIEWS, DataConfig, ViewConfig, ViewsConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(shards="x", batch_size=0), r"data\.batch_size is 0"),
        (lambda: DataConfig(shards="x", num_threads=-1), r"data\.num_threads is -1"),
        (lambda: DataConfig(shards="x", hw_decoder_load=1.5), r"data\.hw_decoder_load is 1.5: a share"),
        (lambda: ViewConfig(blur_p=1.5), "blur_p is 1.5: a probability"),
        (lambda: ViewConfig(contrast=-0.1), "contrast is -0.1"),
        (lambda: ViewConfig(hue=0.6), "hue is 0.6"),
        (lambda: ViewConfig(crop_scale=(0.0, 1.0)), "crop_scale is 0.0 to 1.0"),
        (lambda: ViewConfig(crop_scale=(0.2, 1.1)), "crop_scale is 0.2 to 1.1"),
        (lambda: ViewConfig(crop_ratio=(2.0, 1.0)), "crop_ratio is 2.0 to 1.0"),
        (lambda: ViewConfig(blur_sigma=(0.0, 1.0)), "blur_sigma is 0.0 to 1.0"),
        (lambda: ViewsConfig(size=4), r"views\.size is 4"),
    ],
)
def test_values_that_make_no_sense_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_recipes_hold_the_published_numbers():
    v1, v2, v3, cifar = (VIEWS[name] for name in ("moco-v1", "moco-v2", "moco-v3", "cifar10"))
    assert v1.query == v1.key == replace(v2.query, jitter_p=1.0, hue=0.4, grayscale_first=True, blur_p=0.0)
    assert v2.query == v2.key == ViewConfig()
    strengths = (v2.query.brightness, v2.query.contrast, v2.query.saturation, v2.query.hue)
    assert (strengths, v2.query.jitter_p, v2.query.grayscale_p) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert (v2.query.crop_scale, v2.query.blur_p, v2.query.blur_sigma) == ((0.2, 1.0), 0.5, (0.1, 2.0))
    assert (v3.query.saturation, v3.query.blur_p, v3.query.solarize_p) == (0.2, 1.0, 0.0)
    assert v3.key == replace(v3.query, blur_p=0.1, solarize_p=0.2)
    assert VIEWS["moco-v3-vit"].key == replace(v3.key, crop_scale=(0.08, 1.0))
    dino = VIEWS["dino"]
    assert (dino.size, dino.num_small, dino.small_size) == (224, 8, 96)
    assert dino.query == replace(v3.query, crop_scale=(0.4, 1.0))
    assert dino.key == replace(v3.key, crop_scale=(0.4, 1.0))
    assert dino.small == replace(v3.query, crop_scale=(0.05, 0.4), blur_p=0.5)
    assert (cifar.size, cifar.query.crop_scale, cifar.query.blur_p) == (32, (0.08, 1.0), 0.0)


def test_the_configuration_costs_no_library():
    script = "import sys, pipelines.config; print({'torch', 'numpy', 'nvidia'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"
