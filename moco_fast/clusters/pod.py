"""Pod of a Kubernetes cluster, the same for every kind of job: volumes, a read-only root, time to save."""

from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import GRACE_S

__all__ = ["DISRUPTED", "IGNORE_DISRUPTION", "PodPlan"]

_CACHE, _TEMPORARY, _SHARED_MEMORY = "/var/cache/moco", "/tmp", "/dev/shm"  # noqa: S108 - of the container
_USER = 10001  # of the image

DISRUPTED = [{"type": "DisruptionTarget", "status": "True"}]
IGNORE_DISRUPTION = {"rules": [{"action": "Ignore", "onPodConditions": DISRUPTED}]}
"""Policy of a Job for which a pod that is moved off its node is no failure."""


@dataclass(frozen=True, kw_only=True)
class PodPlan:
    """What the pods of a job have."""

    image: str
    claim: str | None
    """Volume claim that all pods mount at `mount`; None: everything is in buckets."""
    mount: str
    secret: str | None = None
    """Secret whose keys become variables of the environment, such as credentials of a bucket."""
    namespace: str | None = None

    @property
    def kubectl(self) -> str:
        """The command that finds what was made."""
        return "kubectl" if self.namespace is None else f"kubectl -n {self.namespace}"

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of an object."""
        return {"name": name} | ({} if self.namespace is None else {"namespace": self.namespace})

    def spec(self, script: str, *, container: str, resources: dict[str, Any]) -> dict[str, Any]:
        """Return the specification of a pod.

        Args:
            script: for bash.
            container: name of the container that runs it.
            resources: what it needs.
        """
        mounts = {"cache": _CACHE, "tmp": _TEMPORARY, "shm": _SHARED_MEMORY}
        volumes: list[dict[str, Any]] = [
            # Caches of compiled code and of shards in buckets.
            {"name": "cache", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            # NCCL and worker processes share memory; the default is 64 MB.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ]
        if self.claim is not None:
            mounts = {"data": self.mount, **mounts}
            volumes.insert(0, {"name": "data", "persistentVolumeClaim": {"claimName": self.claim}})
        work: dict[str, Any] = {
            "name": container,
            "image": self.image,
            # Not `command`: the image keeps its entry point.
            "args": ["bash", "-c", script],
            "workingDir": _TEMPORARY if self.claim is None else self.mount,
            "resources": resources,
            "securityContext": {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False},
            "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
        }
        if self.secret is not None:
            work["envFrom"] = [{"secretRef": {"name": self.secret}}]
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_S,
            "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "fsGroup": _USER},
            "containers": [work],
            "volumes": volumes,
        }
