"""Kubeflow Trainer v2: a TrainJob, and the TrainingRuntime that says what its pods have."""

from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import ClusterJob, commented, node_script
from moco_fast.clusters.pod import DISRUPTED, PodPlan
from moco_fast.clusters.yaml_text import documents

__all__ = ["TrainJob"]

_API = "trainer.kubeflow.org/v1alpha1"
# What Trainer looks for (kubeflow/trainer, pkg/constants/constants.go): the label of the replicated job that trains,
# and the name of the container in it that is given PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT.
_TRAINS = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
_NODE = "node"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A TrainJob for `kubectl apply`, with a runtime of its own: ready-made ones have no shared memory to speak of."""

    pods: PodPlan
    retries: int = 20
    """How often all pods are started again because one failed."""

    def text(self, job: ClusterJob) -> str:
        """Return the two objects."""
        head = commented(
            job,
            f"Start with: kubectl apply -f {job.file}",
            f"Follow with: {self.pods.kubectl} logs -f job/{job.name}-{_NODE}-0",
            "When a pod ends early, all are started again, and the run goes on from its newest checkpoint.",
        )
        return head + documents(self._runtime(job), self._job(job))

    def _job(self, job: ClusterJob) -> dict[str, Any]:
        return {
            "apiVersion": _API,
            "kind": "TrainJob",
            "metadata": self.pods.metadata(job.name),
            "spec": {
                "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
                "trainer": {"numNodes": job.nodes, "numProcPerNode": job.gpus},
            },
        }

    def _runtime(self, job: ClusterJob) -> dict[str, Any]:
        script = node_script(job, rank='"$PET_NODE_RANK"', first='"$PET_MASTER_ADDR"', port='"$PET_MASTER_PORT"')
        pod = self.pods.spec(script, container=_NODE, resources={"limits": {"nvidia.com/gpu": job.gpus}})
        return {
            "apiVersion": _API,
            "kind": "TrainingRuntime",
            "metadata": self.pods.metadata(job.name),
            "spec": {
                "mlPolicy": {"numNodes": job.nodes, "torch": {}},
                "template": {"spec": self._job_set(pod)},
            },
        }

    def _job_set(self, pod: dict[str, Any]) -> dict[str, Any]:
        moved = {
            "name": "moved",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
        spec = {
            # One pod cannot come back alone: the others wait for the one that they knew.
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onPodConditions": DISRUPTED}]},
            "template": {"spec": pod},
        }
        return {
            # A pod that is moved off its node does not count.
            "failurePolicy": {"maxRestarts": self.retries, "rules": [moved]},
            "replicatedJobs": [
                {"name": _NODE, "replicas": 1, "template": {"metadata": {"labels": _TRAINS}, "spec": spec}}
            ],
        }
