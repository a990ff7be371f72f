"""The kernels that recolor a batch on the GPU; with DEVICE=cpu, by Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.color_cases import CASES, run

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def interpreted():
    # In a process of its own: Triton reads the setting when it is imported.
    command = [sys.executable, "-m", "tests.pipelines.color_cases"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, check=True
    )
    return json.loads(done.stdout)


def test_a_batch_is_recolored_as_torchvision_does_it(device):
    found = run(device) if device.type == "cuda" else interpreted()
    assert set(found) == {*CASES, "linear"}
    for name, (mean, share) in found.items():
        # Where a product of floats falls on the edge of an integer; a step of hue is some levels.
        assert mean < 0.02, name
        assert share < 0.02, name
