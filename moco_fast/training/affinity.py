"""CPU affinity: a rank on another socket's cores reaches its GPU's memory through both sockets."""

import os
from pathlib import Path

import torch

from shards.ground.cpus import parse_cpus

__all__ = ["stay_near_gpu"]

_PCI_DEVICES = Path("/sys/bus/pci/devices")


def stay_near_gpu(device: torch.device, *, pci_devices: Path = _PCI_DEVICES) -> str:
    """Restrict this process to those of its CPUs that are next to the GPU, if there are any.

    The GPU is identified by its address on the PCI bus, since NVML's numbers ignore CUDA_VISIBLE_DEVICES. Only CPUs
    that this process may already use are requested: in a container, the kernel refuses any other.

    Args:
        device: the GPU.
        pci_devices: the kernel's folder of devices, by address.

    Returns:
        One line that says what was done, or why nothing was.
    """
    properties = torch.cuda.get_device_properties(device)
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    allowed = os.sched_getaffinity(0)
    try:
        near = parse_cpus((pci_devices / address / "local_cpulist").read_text())
        if not near & allowed:
            return (
                f"CPU affinity: unchanged, because none of the {len(allowed)} allowed CPUs is next to the GPU at "
                f"{address}"
            )
        os.sched_setaffinity(0, near & allowed)
    except OSError as error:
        return f"CPU affinity: unchanged, because it could not be set for the GPU at {address} ({error})"
    return f"CPU affinity: {len(near & allowed)} of {len(allowed)} allowed CPUs, those next to the GPU at {address}"
