"""The files of moco_fast/launch do what their comments say, with the accelerate that is installed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parent.parent / "moco_fast" / "launch"

# Every rank says what it sees, in a file of its own: the ranks' lines on stdout may run into each other.
REPORT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
world = {
    "launched": int(os.environ.get("WORLD_SIZE", 1)),
    "accelerator": accelerator.num_processes,
    "sum": accelerator.reduce(torch.ones(()), "sum").item(),
    "threads": torch.get_num_threads(),
}
Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(world))
accelerator.end_training()
"""


def launch(folder, *arguments, **environment):
    script = folder / "report.py"
    script.write_text(REPORT)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(script), str(folder)],
        env=inherited | {"GLOO_SOCKET_IFNAME": "lo", "HF_HOME": str(folder / "hf")} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*launchers):
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=180)
        assert launcher.returncode == 0, errors


def reports(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision is None, "precision is the trainer's to choose"
    multi_gpu = config.distributed_type == "MULTI_GPU" and not config.use_cpu
    assert config.enable_cpu_affinity == multi_gpu


def test_one_process_uses_the_cores_it_is_given(tmp_path):
    finish(launch(tmp_path, "--config_file", str(CONFIGS / "cpu-1.yaml"), OMP_NUM_THREADS="2"))
    assert reports(tmp_path) == [{"launched": 1, "accelerator": 1, "sum": 1, "threads": 2}]


@pytest.mark.slow
def test_two_processes_are_one_world_and_share_the_cores(tmp_path):
    finish(launch(tmp_path, "--config_file", str(CONFIGS / "cpu-2.yaml")))
    worlds = reports(tmp_path)
    threads = worlds[0]["threads"]
    assert worlds == [{"launched": 2, "accelerator": 2, "sum": 2, "threads": threads}] * 2
    assert 1 <= threads <= max(1, os.cpu_count() // 2)


@pytest.mark.slow
def test_two_launchers_are_one_world(tmp_path, free_port):
    common = ["--config_file", str(CONFIGS / "multi-node.yaml"), "--num_machines", "2", "--num_processes", "2"]
    common += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port)]
    finish(*(launch(tmp_path, *common, "--machine_rank", str(rank)) for rank in range(2)))
    assert [world["sum"] for world in reports(tmp_path)] == [2, 2]


def test_several_machines_need_a_number_of_processes(tmp_path):
    launcher = launch(tmp_path, "--config_file", str(CONFIGS / "multi-node.yaml"))
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "--num_processes" in errors


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
