"""Forms of files that schedulers read, as far as ours use them: names that they know, and what each may hold.

The facts are from kubeflow/trainer 8c0f505 (manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml and
_trainingruntimes.yaml, pkg/webhooks/trainingruntime_webhook.go), SkyPilot 0.14.1 (sky/utils/schemas.py) and
compose-spec/compose-spec 170098b (schema/compose-spec.json). A name that is not here is refused. What Kubernetes itself
defines, pods and Jobs, is `ANYTHING` here: kubernetes_validate knows it.
"""

import re
from typing import Any

ANYTHING = object()
EACH = "each name"
"""Key of a form: what every value has to be, whatever it is called."""


def problems(value: Any, form: Any, place: str = "") -> list[str]:
    """Return what of a value does not fit its form: a type, a pattern, one of a set, a list of one form, or names."""
    if form is ANYTHING:
        return []
    if isinstance(form, type):
        # In YAML, yes and no are no numbers.
        return [] if type(value) is form else [f"{place} is {value!r}, not {form.__name__}"]
    if isinstance(form, re.Pattern):
        return [] if isinstance(value, str) and form.fullmatch(value) else [f"{place} is {value!r}"]
    if isinstance(form, frozenset):
        return [] if value in form else [f"{place} is {value!r}"]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{place} is not a list"]
        return [found for number, each in enumerate(value) for found in problems(each, form[0], f"{place}[{number}]")]
    if not isinstance(value, dict):
        return [f"{place} is not of names"]
    found = []
    for name, each in value.items():
        inner = form.get(name, form.get(EACH))
        found += [f"{place}.{name} is not known"] if inner is None else problems(each, inner, f"{place}.{name}")
    return found


_METADATA = {"name": str, "namespace": str, "labels": {EACH: str}}
_TRAINER = frozenset({"trainer.kubeflow.org/v1alpha1"})

TRAIN_JOB = {
    "apiVersion": _TRAINER,
    "kind": frozenset({"TrainJob"}),
    "metadata": _METADATA,
    "spec": {
        "runtimeRef": {
            "apiGroup": frozenset({"trainer.kubeflow.org"}),
            "kind": frozenset({"TrainingRuntime", "ClusterTrainingRuntime"}),
            "name": str,
        },
        "trainer": {
            "image": str,
            "command": [str],
            "args": [str],
            "env": ANYTHING,
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": ANYTHING,
        },
        "suspend": bool,
        "activeDeadlineSeconds": int,
    },
}

# trainjob_types.go, TrainerStatus
TRAINER_STATUS = {
    "progressPercentage": int,
    "estimatedRemainingSeconds": int,
    "metrics": [{"name": re.compile(r".{1,64}"), "value": re.compile(r".{1,64}")}],
    "lastUpdatedTime": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)"),
}

_RULE = {
    "name": str,
    "action": frozenset({"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"}),
    "targetReplicatedJobs": [str],
    "onJobFailureReasons": [
        # batch/v1, reasons of a Job's condition Failed.
        frozenset(
            {
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            }
        )
    ],
}
TRAINING_RUNTIME = {
    "apiVersion": _TRAINER,
    "kind": frozenset({"TrainingRuntime"}),
    "metadata": _METADATA,
    "spec": {
        "mlPolicy": {"numNodes": int, "torch": {}},
        "template": {
            "metadata": _METADATA,
            "spec": {
                "failurePolicy": {
                    "maxRestarts": int,
                    "restartStrategy": frozenset({"Recreate", "BlockingRecreate", "InPlaceRestart"}),
                    "rules": [_RULE],
                },
                "replicatedJobs": [
                    # The webhook refuses other numbers for what trains.
                    {
                        "name": str,
                        "replicas": frozenset({1}),
                        "template": {"metadata": _METADATA, "spec": ANYTHING},
                    }
                ],
            },
        },
    },
}

SKY_TASK = {
    "name": str,
    "num_nodes": int,
    "resources": {
        "infra": re.compile(r"[a-z0-9*]+(/[^/\s]+){0,2}"),
        "accelerators": str,
        "use_spot": bool,
        "image_id": str,
        "disk_size": int,
        "job_recovery": str,
    },
    "envs": {EACH: str},
    "volumes": {EACH: str},
    "setup": str,
    "run": str,
}

_DEVICE = {"driver": str, "count": int, "device_ids": [str], "capabilities": [str]}
_SERVICE = {
    "image": str,
    "command": [str],
    "working_dir": str,
    "volumes": [str],
    "read_only": bool,
    "tmpfs": [str],
    "ipc": str,
    "shm_size": str,
    "ulimits": {EACH: int},
    "restart": re.compile(r"no|always|unless-stopped|on-failure(:\d+)?"),
    "stop_grace_period": re.compile(r"\d+s"),
    "environment": {EACH: str},
    "deploy": {"resources": {"reservations": {"devices": [_DEVICE]}}},
}
COMPOSE = {"name": re.compile(r"[a-z0-9][a-z0-9_-]*"), "services": {EACH: _SERVICE}, "volumes": {EACH: {"name": str}}}
