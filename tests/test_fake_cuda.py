"""The GPU's tests on a GPU that is not there, warnings included: what they do around the device cannot fail there."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.gpu.waiting import no_host_sync

ROOT = Path(__file__).parent.parent
LONG = "memory_stays_flat"


@pytest.mark.slow
def test_the_gpus_tests_pass_and_meet_the_warnings():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.fake_cuda", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["-k", f"not ({LONG})", "tests/gpu"]
    env = os.environ | {"DEVICE": "cuda", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stdout
    assert "fake GPU: warned of the sync debug mode: True, of TF32: True, events: True" in done.stdout


@pytest.mark.parametrize("fails", [False, True])
def test_the_sync_mode_is_reset_though_setting_it_warns(monkeypatch, fails):
    mode = [0]

    def set_mode(wanted):
        # As torch does: the warning leaves the call when the mode is set already.
        mode[0] = {"error": 2}.get(wanted, wanted)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect", stacklevel=2)
        if fails and mode[0] == 2:
            raise RuntimeError("the driver is gone")

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    gpu = torch.device("cuda", 0)
    if fails:
        with pytest.raises(RuntimeError, match="driver is gone"), no_host_sync(gpu):
            raise AssertionError("not reached")
    else:
        with no_host_sync(gpu):
            assert mode == [2]
    assert mode == [0]
