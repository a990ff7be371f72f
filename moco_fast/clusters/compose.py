"""Docker Compose: one machine, with a container that continues its run when it is started again."""

from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import GRACE_S, ClusterJob, commented, node_script
from moco_fast.clusters.yaml_text import documents

__all__ = ["Compose"]

_STACK_BYTES = 64 << 20
"""What NVIDIA asks for with its images."""


@dataclass(frozen=True, kw_only=True)
class Compose:
    """A file for `docker compose`."""

    image: str
    mount: str
    """Where the folder of the file is seen in the container: shards, and folders of runs."""
    retries: int = 3
    """How often a container that failed is started again."""

    def text(self, job: ClusterJob) -> str:
        """Return the file."""
        head = commented(
            job,
            f"Start with: docker compose -f {job.file} up -d",
            f"Follow with: docker compose -f {job.file} logs -f",
            f"Stop with a checkpoint: docker compose -f {job.file} stop; `up` continues",
        )
        # Compose replaces variables in all texts; two signs are one.
        script = node_script(job, rank="0", first="localhost").replace("$", "$$")
        gpus = {"driver": "nvidia", "count": job.gpus, "capabilities": ["gpu"]}
        service: dict[str, Any] = {
            "image": self.image,
            "command": ["bash", "-c", script],
            "working_dir": self.mount,
            "volumes": [f".:{self.mount}", "cache:/var/cache/moco"],
            "read_only": True,
            "tmpfs": ["/tmp"],  # noqa: S108 - of the container
            # NCCL and worker processes share memory; the default is 64 MB.
            "ipc": "host",
            "ulimits": {"memlock": -1, "stack": _STACK_BYTES},
            "restart": f"on-failure:{self.retries}",
            "stop_grace_period": f"{GRACE_S}s",
            "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
        }
        return head + documents({"name": job.name, "services": {"train": service}, "volumes": {"cache": {}}})
