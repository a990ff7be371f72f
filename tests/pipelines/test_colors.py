"""Torchvision's color operations on the CPU, and the GPU's kernels as far as they go without a GPU (tests/gpu)."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pipelines.backends.colors import recolor
from pipelines.plan.augment import Stage, color_chain
from tests.pipelines.color_cases import CASES, differences, images, table_of

# Mean difference from torchvision in levels. OpenCV rounds hue and saturation where Pillow truncates them, and the
# picture of all hues has them at their largest.
LARGEST_MEAN = {"moco-v1": 1.0, "moco-v2": 1.0, "moco-v3": 1.0, "brightness": 0.01, "contrast": 0.01}
LARGEST_MEAN |= {"saturation": 0.1, "hue": 1.0, "far beyond": 1.0, "grayscale": 0.001}


def by_opencv(batch, table):
    for row, image in enumerate(batch):
        recolor(table, row, image)
    return batch


def test_a_view_is_recolored_as_torchvision_does_it():
    found = differences(by_opencv)
    for name, (mean, _) in found.items():
        assert mean <= LARGEST_MEAN[name], name


def test_without_jitter_no_value_changes():
    found = by_opencv(images(), table_of(CASES["grayscale"]))
    kept = ~table_of(CASES["grayscale"]).grayscale
    assert kept.any()
    assert np.array_equal(found[kept], images()[kept])


@pytest.mark.parametrize("name", CASES)
def test_a_chain_names_what_is_done_and_nothing_else(name):
    table = table_of(CASES[name])
    stages, factors = color_chain(table)
    for row in range(len(stages)):
        expected = []
        if table.grayscale[row] and table.grayscale_first:
            expected.append((Stage.GRAYSCALE, 1.0))
        for stage in table.jitter_order[row].tolist():
            factor = table.factors[row, stage]
            if stage == Stage.HUE and factor != 0:
                expected.append((Stage.HUE, float(np.array(int(255 * factor)).astype(np.uint8))))
            elif stage != Stage.HUE and factor != 1:
                expected.append((stage, float(np.float32(factor))))
        if table.grayscale[row] and not table.grayscale_first:
            expected.append((Stage.GRAYSCALE, 1.0))
        if table.solarize[row]:
            expected.append((Stage.SOLARIZE, 1.0))
        found = zip(stages[row].tolist(), factors[row].tolist(), strict=True)
        assert [(stage, factor) for stage, factor in found if stage != Stage.NOTHING] == expected


def test_the_linear_map_leaves_only_solarize_to_a_chain():
    table = table_of(CASES["moco-v3"], linear=True)
    stages, _ = color_chain(table)
    assert set(stages[table.solarize].ravel()) == {Stage.SOLARIZE, Stage.NOTHING}
    assert set(stages[~table.solarize].ravel()) == {Stage.NOTHING}


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipelines.backends.color_kernels import KERNELS
from tests.pipelines.test_colors import SIGNATURE

for kernel in KERNELS:
    for capability in (80, 90, 100):
        source = ASTSource(fn=kernel, signature=SIGNATURE, constexprs={"block": 512})
        options = {"num_warps": 4, "enable_fp_fusion": False}
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"]
        assert "fma.rn" not in compiled.asm["ptx"]
        print(compiled.name)
"""
SIGNATURE = {"pixels": "*u8", "stages": "*i32", "factors": "*fp32", "sums": "*i32", "num_pixels": "i32"}
SIGNATURE |= {"block": "constexpr"}


def test_the_kernels_compile_for_gpus_from_ampere_to_blackwell(tmp_path):
    """Triton brings its own assembler: what it refuses would be refused on the first GPU, too."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_sum_gray"] * 3 + ["_recolor"] * 3
