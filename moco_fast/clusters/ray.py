"""Ray: a cluster of rented or own machines on which packing hands out its shards."""

import re
import shlex
from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import PackingJob, commented, multi_line, quoted
from moco_fast.clusters.yaml_text import documents

__all__ = ["RayCluster"]


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A file for `ray up`."""

    region: str | None = None
    """Of AWS."""
    instance: str | None = None
    """Type of all machines there."""
    hosts: tuple[str, ...] = ()
    """Own machines, in place of AWS: the head, then workers."""
    version: str
    """Of the package that all of them get."""

    def packing(self, job: PackingJob) -> str:
        """Return the file."""
        pack = multi_line([["make-shards", "pack", *map(quoted, job.words), "--executor", "ray"]])
        head = commented(
            job,
            f"Start with: ray up {job.file}",
            f"Pack with: ray exec {job.file} {_one_word(pack)}",
            f"End with: ray down {job.file}",
        )
        cluster: dict[str, Any] = {"cluster_name": job.name}
        cluster |= self._own() if self.hosts else self._rented(job)
        # Other versions of what encodes images could write other bytes; a node that has them is refused.
        cluster["setup_commands"] = [f"pip install 'moco-fast[ray,parquet]=={self.version}'"]
        return head + documents(cluster)

    def _own(self) -> dict[str, Any]:
        head, *workers = self.hosts
        provider = {"type": "local", "head_ip": head, "worker_ips": workers}
        return {
            "max_workers": len(workers),
            "provider": provider,
            "auth": {"ssh_user": "ubuntu"},
        }

    def _rented(self, job: PackingJob) -> dict[str, Any]:
        node = {"node_config": {"InstanceType": self.instance}, "resources": {}}
        workers = job.nodes - 1
        return {
            "max_workers": workers,
            "provider": {"type": "aws", "region": self.region},
            "auth": {"ssh_user": "ubuntu"},
            "available_node_types": {
                "head": {**node, "min_workers": 0, "max_workers": 0},
                "worker": {**node, "min_workers": workers, "max_workers": workers},
            },
            "head_node_type": "head",
        }


def _one_word(command: str) -> str:
    """Return a command as one word of this machine's shell, which leaves what is in it to the cluster's."""
    return shlex.quote(command) if re.search(r'["`$!\\]', command) else f'"{command}"'
