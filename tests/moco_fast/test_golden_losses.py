"""The first losses of every preset, small, as they were when they were written down; see golden_losses.py."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from moco_fast.presets import PRESETS

FOLDER = Path(__file__).parent
GOLDEN = json.loads((FOLDER / "golden_losses.json").read_text())


def recorder():
    spec = importlib.util.spec_from_file_location("golden_losses", FOLDER / "golden_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_preset_has_its_losses():
    assert GOLDEN.keys() == PRESETS.keys()


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_begins_with_the_losses_that_were_written_down(packed_demo, name):
    golden = recorder()
    config = golden.configuration(name, packed_demo.train, calm=True)
    runtime = golden.start(config.run, env={})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        watched = golden.record(config, runtime, num_steps=len(GOLDEN[name]))["watched"]
    finally:
        torch.set_num_threads(before)
        runtime.close()
    # Without vector instructions these are up to 3e-5 away, and further with every step, for each passes rounding on.
    assert [float.fromhex(loss) for loss in watched["loss"]] == pytest.approx(GOLDEN[name], rel=1e-4)
