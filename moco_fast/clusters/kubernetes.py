"""Kubernetes: indexed Jobs. A pod per node that trains, which meet through a Service; a pod per part that is packed."""

from dataclasses import dataclass
from typing import Any

from moco_fast.clusters.job import ClusterJob, PackingJob, commented, node_script
from moco_fast.clusters.pod import IGNORE_DISRUPTION, PodPlan
from moco_fast.clusters.yaml_text import documents

__all__ = ["Kubernetes"]


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """Objects for `kubectl apply`."""

    pods: PodPlan
    retries: int = 20
    """How many pods may fail before the Job does."""

    def text(self, job: ClusterJob) -> str:
        """Return a Service and the Job that trains."""
        head = commented(
            job,
            f"Start with: kubectl apply -f {job.file}",
            f"Follow with: {self.pods.kubectl} logs -f job/{job.name}",
            "A pod that ends early is started again, and the run goes on from its newest checkpoint.",
        )
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self.pods.metadata(job.name),
            "spec": {
                "clusterIP": "None",
                # Ranks look for each other before any of them is ready.
                "publishNotReadyAddresses": True,
                "selector": {"job-name": job.name},
            },
        }
        script = node_script(job, rank='"$JOB_COMPLETION_INDEX"', first=f"{job.name}-0.{job.name}")
        resources = {"limits": {"nvidia.com/gpu": job.gpus}}
        pod = {"subdomain": job.name} | self.pods.spec(script, container="train", resources=resources)
        indexed = {"completionMode": "Indexed", "completions": job.nodes, "parallelism": job.nodes}
        return head + documents(service, self._job(job.name, indexed, pod))

    def packing(self, job: PackingJob) -> str:
        """Return the Job that packs, a pod for each part, and the one that finishes, which waits until it is let go."""
        finishing, kubectl = f"{job.name}-finish", self.pods.kubectl
        head = commented(
            job,
            f"Start with: kubectl apply -f {job.file}",
            f"When it is done: {kubectl} wait --for=condition=complete --timeout=-1s job/{job.name}",
            f'                 {kubectl} patch job/{finishing} -p \'{{"spec": {{"suspend": false}}}}\'',
            "A pod that ends early is started again, and its part goes on where it was.",
        )
        pod, last = (
            self.pods.spec(f"exec {command}\n", container="pack", resources={"limits": {"cpu": cpus}})
            for command, cpus in ((job.command("$JOB_COMPLETION_INDEX"), job.cpus), (job.finish, 1))
        )
        indexed = {"completionMode": "Indexed", "completions": job.parts, "parallelism": min(job.nodes, job.parts)}
        return head + documents(self._job(job.name, indexed, pod), self._job(finishing, {"suspend": True}, last))

    def _job(self, name: str, options: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any]:
        rest = {"backoffLimit": self.retries, "podFailurePolicy": IGNORE_DISRUPTION, "template": {"spec": pod}}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self.pods.metadata(name),
            "spec": options | rest,
        }
