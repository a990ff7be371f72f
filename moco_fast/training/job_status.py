"""Progress of a run in the status of its TrainJob, for `kubectl get trainjob -o yaml` and Kubeflow's dashboards.

Kubeflow Trainer v2, where its feature gate TrainJobStatus is on, gives a pod an address, a certificate and a token that
it replaces now and then (kubeflow/trainer, docs/user-guides/trainjob-progress.md). Elsewhere nothing is sent.
"""

import json
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["JobStatus", "open_job_status"]

_NAMES = ("KUBEFLOW_TRAINER_SERVER_URL", "KUBEFLOW_TRAINER_SERVER_CA_CERT", "KUBEFLOW_TRAINER_SERVER_TOKEN")
_EVERY_S = 10.0
_TIMEOUT_S = 5.0
_MAX_NAME = 64  # characters, of Trainer's form


def open_job_status(env: Mapping[str, str], *, num_steps: int) -> "JobStatus | None":
    """Return what sends the progress of a run of so many steps; None: the environment is not that of a TrainJob."""
    if not all(name in env for name in _NAMES):
        return None
    return JobStatus(*(env[name] for name in _NAMES), num_steps=num_steps)


class JobStatus:
    """Thread that sends the last line of metrics; what cannot be sent is left out.

    Args:
        url: to send to.
        certificate: file of the server's.
        token: file that holds it.
        num_steps: of the run.
    """

    def __init__(self, url: str, certificate: str, token: str, *, num_steps: int) -> None:
        self._url, self._certificate, self._token, self._num_steps = url, certificate, token, num_steps
        self._line: dict[str, Any] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_on, name="job status", daemon=True)
        self._thread.start()

    def tell(self, line: Mapping[str, Any]) -> None:
        """Note a line of metrics, with its step, to be sent soon."""
        self._line = {**(self._line or {}), **line}

    def close(self) -> None:
        """Send the last line, within a limit."""
        self._closing.set()
        self._thread.join()

    def _send_on(self) -> None:
        sent, is_over = None, False
        while not is_over:
            is_over = self._closing.wait(_EVERY_S)
            if (line := self._line) is not None and line is not sent:
                # A server that is gone for a while costs a line, not the run.
                with suppress(OSError, ValueError):
                    self._send(line)
                    sent = line

    def _send(self, line: Mapping[str, Any]) -> None:
        token = Path(self._token).read_text().strip()
        request = urllib.request.Request(  # noqa: S310 - an address of the cluster's own
            self._url,
            data=json.dumps({"trainerStatus": status(line, self._num_steps)}).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            method="POST",
        )
        context = ssl.create_default_context(cafile=self._certificate)
        urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context).close()  # noqa: S310 - as above


def status(line: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Return a line of metrics in the form of Trainer's TrainerStatus."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and len(name) <= _MAX_NAME}
    found: dict[str, Any] = {
        "progressPercentage": min(100, 100 * int(line["step"]) // num_steps),
        "metrics": [{"name": name, "value": _text(value)} for name, value in numbers.items()],
        "lastUpdatedTime": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if (left := line.get("time_left_s")) is not None:
        found["estimatedRemainingSeconds"] = max(0, int(left))
    return found


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
