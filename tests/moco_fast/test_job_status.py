"""Progress in a TrainJob's status, against an HTTPS server that asks for what Kubeflow Trainer's asks for."""

import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moco_fast.training import job_status
from moco_fast.training.job_status import open_job_status, status
from tests.moco_fast.clusters.forms import TRAINER_STATUS, problems


def write_certificate(folder: Path) -> Path:
    """Write certificate and key of 127.0.0.1 as one file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    begin = datetime.now(UTC) - timedelta(hours=1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(begin)
    made = made.not_valid_after(begin + timedelta(days=1)).add_extension(x509.BasicConstraints(True, None), True)
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = made.add_extension(names, False).sign(key, hashes.SHA256())
    form = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "server.pem"
    path.write_bytes(certificate.public_bytes(form) + key.private_bytes(form, *plain))
    return path


class StatusServer:
    """What was sent, and the token that is asked for."""

    def __init__(self, certificate: Path, token: Path) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.came = threading.Event()
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                allowed = self.headers["Authorization"] == f"Bearer {token.read_text()}"
                self.send_response(200 if allowed else 403)
                self.end_headers()
                if allowed:
                    ours.bodies.append(json.loads(body))
                ours.came.set()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_port}/status"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def kubeflow(tmp_path: Path) -> Iterator[tuple[StatusServer, dict[str, str], Path]]:
    """A server, the environment that Trainer gives a pod, and the file of the token."""
    certificate, token = write_certificate(tmp_path), tmp_path / "token"
    token.write_text("first")
    server = StatusServer(certificate, token)
    env = {
        "KUBEFLOW_TRAINER_SERVER_URL": server.url,
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(certificate),
        "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token),
    }
    yield server, env, token
    server.close()


LINE = {"step": 25, "epoch": 1, "loss": 2.5, "lr": 0.03, "time_left_s": 90.7}


def test_progress_and_metrics_are_sent_with_the_token_of_the_moment(
    kubeflow: tuple[StatusServer, dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, env, token = kubeflow
    monkeypatch.setattr(job_status, "_EVERY_S", 0.01)
    told = open_job_status(env, num_steps=100)
    assert told is not None
    told.tell(LINE)
    assert server.came.wait(30)
    token.write_text("second")
    told.tell({"step": 100, "knn/top1": 0.5})
    told.close()
    first, last = server.bodies[0]["trainerStatus"], server.bodies[-1]["trainerStatus"]
    assert (first["progressPercentage"], first["estimatedRemainingSeconds"]) == (25, 90)
    assert {"name": "loss", "value": "2.5"} in first["metrics"]
    assert last["progressPercentage"] == 100
    # What this line does not say stays as it was.
    assert {"loss", "knn/top1"} <= {metric["name"] for metric in last["metrics"]}
    # Nothing is sent twice.
    assert len(server.bodies) == 2


def test_the_status_is_of_trainers_form() -> None:
    assert problems(status(LINE | {"note": "x", "a" * 65: 1.0}, 100), TRAINER_STATUS) == []
    assert status({"step": 7}, 3)["progressPercentage"] == 100


def test_a_server_that_refuses_or_is_gone_costs_a_line_and_no_run(
    kubeflow: tuple[StatusServer, dict[str, str], Path],
) -> None:
    server, env, _ = kubeflow
    for changed in (
        {"KUBEFLOW_TRAINER_SERVER_TOKEN": "/no/such/file"},
        {"KUBEFLOW_TRAINER_SERVER_URL": "https://127.0.0.1:1/"},
    ):
        told = open_job_status(env | changed, num_steps=100)
        assert told is not None
        told.tell(LINE)
        told.close()
    assert server.bodies == []


def test_elsewhere_there_is_nothing_to_send_to(kubeflow: tuple[StatusServer, dict[str, str], Path]) -> None:
    _, env, _ = kubeflow
    for name in env:
        assert open_job_status({other: env[other] for other in env if other != name}, num_steps=1) is None
