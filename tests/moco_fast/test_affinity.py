import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moco_fast.training.affinity import stay_near_gpu

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
ADDRESS = "0001:9b:02.0"


class Machine:
    """A machine with one GPU, and a process that may use some of its CPUs."""

    def __init__(self, pci_devices, allowed):
        self.pci_devices, self.affinity = pci_devices, set(allowed)
        (pci_devices / ADDRESS).mkdir()

    def set_affinity(self, pid, cpus):
        # As the kernel does: CPUs outside the cpuset are dropped, and nothing left is an error.
        if not set(cpus) & self.affinity:
            raise OSError(22, "Invalid argument")
        self.affinity &= set(cpus)

    def bind(self, local_cpulist=None):
        if local_cpulist is not None:
            (self.pci_devices / ADDRESS / "local_cpulist").write_text(local_cpulist)
        return stay_near_gpu(GPU, pci_devices=self.pci_devices)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    properties = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x9B, pci_device_id=2)
    made = Machine(tmp_path, range(8))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(made.affinity))
    monkeypatch.setattr(os, "sched_setaffinity", made.set_affinity)
    return made


def test_a_process_is_kept_on_the_cpus_next_to_its_gpu(machine):
    told = machine.bind("4-7,12-15\n")
    assert machine.affinity == {4, 5, 6, 7}
    assert told == f"CPU affinity: 4 of 8 allowed CPUs, those next to the GPU at {ADDRESS}"


@pytest.mark.parametrize("local_cpulist", ["12-15\n", "\n", None])
def test_all_cpus_are_kept_where_no_allowed_one_is_near(machine, local_cpulist):
    told = machine.bind(local_cpulist)
    assert machine.affinity == set(range(8))
    assert told.startswith("CPU affinity: unchanged, because ")


def test_a_kernel_that_refuses_ends_nothing(machine, monkeypatch):
    def refuse(pid, cpus):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert "Operation not permitted" in machine.bind("0-3\n")


def test_the_launchers_wish_is_ours_to_grant():
    # accelerate would ask NVML, which this machine lacks, and end the start.
    code = (
        "import torch, tests.fake_cuda as fake; fake.install()\n"
        "from moco_fast.config import RunConfig\n"
        "from moco_fast.training.runtime import start\n"
        "print(*start(RunConfig(device='cuda')).notes, sep='\\n')\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_CPU_AFFINITY": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CPU affinity: " in done.stdout
