"""Kubernetes: an indexed Job with one pod per node, which find each other through a headless Service."""

from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import GRACE_S, ClusterJob, shell_command
from moco_fast.clusters.yaml_text import yaml_text

__all__ = ["Kubernetes"]

_HEAD = """\
# Start with: kubectl apply -f {file}
# Follow with: kubectl logs -f job/{name}
# A pod that ends early is started again, and the run goes on from its newest checkpoint.
"""
_CACHE, _TEMPORARY, _SHARED_MEMORY = "/var/cache/moco", "/tmp", "/dev/shm"  # noqa: S108 - of the container


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """A Job and a Service for `kubectl apply`."""

    image: str
    claim: str
    """Volume claim that all pods mount at `mount`: shards, and folders of runs."""
    mount: str
    namespace: str | None = None
    retries: int = 20
    """How many pods may fail before the Job does."""

    def text(self, job: ClusterJob) -> str:
        """Return the two objects."""
        head = _HEAD.format(file=job.file or f"{job.name}.yaml", name=job.name)
        return head + "---\n".join(yaml_text(each) for each in (self._service(job), self._job(job)))

    def _metadata(self, job: ClusterJob) -> dict[str, Any]:
        return {"name": job.name} | ({} if self.namespace is None else {"namespace": self.namespace})

    def _service(self, job: ClusterJob) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self._metadata(job),
            "spec": {
                "clusterIP": "None",
                # Ranks look for each other before any of them is ready.
                "publishNotReadyAddresses": True,
                "selector": {"job-name": job.name},
            },
        }

    def _job(self, job: ClusterJob) -> dict[str, Any]:
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self._metadata(job),
            "spec": {
                "completionMode": "Indexed",
                "completions": job.nodes,
                "parallelism": job.nodes,
                "backoffLimit": self.retries,
                # A pod that is moved off its node is no failure.
                "podFailurePolicy": {
                    "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
                },
                "template": {"spec": self._pod(job)},
            },
        }

    def _pod(self, job: ClusterJob) -> dict[str, Any]:
        first = f"{job.name}-0.{job.name}"
        command = shell_command(job, rank='"$JOB_COMPLETION_INDEX"', first=first)
        return {
            "subdomain": job.name,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_S,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001},
            "containers": [
                {
                    "name": "train",
                    "image": self.image,
                    # Not `command`: the image keeps its entry point.
                    "args": ["bash", "-c", f"exec {command}\n"],
                    "workingDir": self.mount,
                    "resources": {"limits": {"nvidia.com/gpu": job.gpus}},
                    "securityContext": {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False},
                    "volumeMounts": [
                        {"name": "data", "mountPath": self.mount},
                        # Caches of compiled code and of shards in buckets.
                        {"name": "cache", "mountPath": _CACHE},
                        {"name": "tmp", "mountPath": _TEMPORARY},
                        # NCCL and worker processes share memory; the default is 64 MB.
                        {"name": "shm", "mountPath": _SHARED_MEMORY},
                    ],
                }
            ],
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": self.claim}},
                {"name": "cache", "emptyDir": {}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }
