import os
from pathlib import Path

import pytest


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with the schedulers' tools in PATH; `tools` fills in what training does."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_NNODES": "3"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path
