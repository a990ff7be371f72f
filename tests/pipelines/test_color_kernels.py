"""What a user sees where the GPU's color kernels cannot be compiled; tests/gpu has what they compute."""

import subprocess

import pytest
import torch

from tests.pipelines.color_cases import CASES, images, table_of


class Failing:
    """Stands for a kernel whose launch fails as Triton's does."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, _grid):
        return self

    def __call__(self, *_arguments, **_options):
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler."), "Failed to find C compiler"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "non-zero exit status 1"),
    ],
)
def test_a_missing_compiler_is_named_with_the_ways_out(monkeypatch, error, said):
    from pipelines.backends import color_kernels

    monkeypatch.setattr(color_kernels, "KERNELS", (Failing(error),))
    views, table = torch.from_numpy(images()), table_of(CASES["moco-v2"])
    with pytest.raises(ValueError, match=rf"{said}.*gcc and python3-dev.*--views\.color linear"):
        color_kernels.recolor_batch([views], [table])
    # The linear map needs no kernel.
    color_kernels.recolor_batch([views], [table_of(CASES["moco-v2"], linear=True)])
