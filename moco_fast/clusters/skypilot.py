"""SkyPilot: a managed job on rented machines, which is started elsewhere when they are taken away."""

from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import ClusterJob, commented, node_script
from moco_fast.clusters.yaml_text import documents

__all__ = ["SkyPilot"]


@dataclass(frozen=True, kw_only=True)
class SkyPilot:
    """A task for `sky jobs launch`."""

    gpu: str
    """As SkyPilot calls it."""
    spot: bool = False
    infra: str | None = None
    """Cloud, or cloud and region, as SkyPilot writes it; None: it chooses."""
    image: str | None = None
    """Image that the ranks run in; None: the machine's own, where the package is installed."""
    volume: str | None = None
    """SkyPilot volume that all machines mount at `mount`; None: their own disks."""
    mount: str
    version: str
    """Of the package, where it is installed."""

    def text(self, job: ClusterJob) -> str:
        """Return the task."""
        head = commented(
            job,
            f"Start with: sky jobs launch -n {job.name} {job.file}",
            f"Follow with: sky jobs logs -n {job.name}",
            "When a machine is taken away, SkyPilot starts the same command on others, and the run goes on.",
        )
        resources: dict[str, Any] = {"accelerators": f"{self.gpu}:{job.gpus}"}
        given = {"use_spot": self.spot or None, "infra": self.infra}
        given["image_id"] = None if self.image is None else f"docker:{self.image}"
        resources |= {name: value for name, value in given.items() if value is not None}
        task: dict[str, Any] = {"name": job.name, "num_nodes": job.nodes, "resources": resources}
        if self.volume is not None:
            task["volumes"] = {self.mount: self.volume}
        if self.image is None:
            task["setup"] = f"pip install 'moco-fast[gpu]=={self.version}'\n"
        first = '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'
        script = node_script(job, rank='"$SKYPILOT_NODE_RANK"', first=first)
        task["run"] = script if self.volume is None else f"cd {self.mount}\n{script}"
        return head + documents(task)
