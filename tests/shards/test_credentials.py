"""Credentials as the clouds' tools have them, against a server on this machine that knows which keys are good."""

import hashlib
import http.server
import json
import os
import socket
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

import pytest

from shards.ground.errors import ExpiredError, UnrenewedError
from shards.storage import credentials
from shards.storage.stores import Folder

_EXPIRED = "<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"


class Cloud(http.server.BaseHTTPRequestHandler):
    """A bucket's objects for good keys, and the services of AWS and Google that give keys."""

    good: set[str]
    asked: list[str]
    """Key, or service, of each request."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path.startswith("/federation/credentials"):
            assert self.headers["x-amz-sso_bearer_token"] == "logged-in"
            self.asked.append("sso")
            expiration = int((time.time() + 3600) * 1000)
            keys = {"accessKeyId": "SSO", "secretAccessKey": "s", "sessionToken": "t", "expiration": expiration}
            return self._answer(200, json.dumps({"roleCredentials": keys}))
        signed = self.headers.get("Authorization", "")
        key = signed.partition("Credential=")[2].partition("/")[0] or signed
        self.asked.append(key)
        return self._answer(200, "an object") if key in self.good else self._answer(400, _EXPIRED)

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        fields = {name: values[0] for name, values in parse_qs(text or self.path.partition("?")[2]).items()}
        if self.path == "/google-token":
            self.asked.append("google")
            answer = {"access_token": "GOOGLE", "expires_in": 3600, "token_type": "Bearer"}
            return self._answer(200, json.dumps(answer | {"issued_token_type": "access_token"}))
        action = fields["Action"]
        self.asked.append(action)
        ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        return self._answer(
            200,
            f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><Credentials>'
            "<AccessKeyId>ROLE</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
            f"<Expiration>{ends}</Expiration></Credentials></{action}Result></{action}Response>",
        )

    def _answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A server, a home folder without credentials, and an environment without them; gives the server's address."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    Cloud.good, Cloud.asked = set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cloud)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def write_profiles(home, config, keys=""):
    (home / ".aws" / "config").write_text(config)
    (home / ".aws" / "credentials").write_text(keys)


def keys_of(profile, key):
    return f"[{profile}]\naws_access_key_id={key}\naws_secret_access_key=s\naws_session_token=t\n"


def test_a_profile_gives_keys_region_and_endpoint(cloud, tmp_path, monkeypatch):
    write_profiles(tmp_path, f"[profile team]\nregion=eu-west-1\nendpoint_url={cloud}\n", keys_of("team", "TEAM"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    Cloud.good = {"TEAM"}
    assert Folder("s3://bucket/x").read("y") == b"an object"
    assert credentials.find_credentials("s3://bucket/x").config == {"region": "eu-west-1", "endpoint": cloud}


def test_keys_in_the_environment_come_before_a_profile(cloud, tmp_path, monkeypatch):
    write_profiles(tmp_path, f"[profile team]\nendpoint_url={cloud}\n", keys_of("team", "TEAM"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    # That of the service alone is one of the variables, too.
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", cloud)
    Cloud.good = {"ENV"}
    assert Folder("s3://bucket/x").read("y") == b"an object"


def test_the_default_profile_is_used_where_none_is_named(cloud, tmp_path):
    write_profiles(tmp_path, f"[default]\nendpoint_url={cloud}\n", keys_of("default", "DEFAULT"))
    Cloud.good = {"DEFAULT"}
    assert Folder("s3://bucket/x").read("y") == b"an object"


def test_keys_that_are_renewed_in_their_file_go_on(cloud, tmp_path, monkeypatch):
    write_profiles(tmp_path, f"[profile team]\nendpoint_url={cloud}\n", keys_of("team", "OLD"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    Cloud.good = {"OLD"}
    folder = Folder("s3://bucket/x")
    assert folder.read("y") == b"an object"
    Cloud.good = {"NEW"}
    with pytest.raises(UnrenewedError, match=r"credentials have expired .*ExpiredToken.*logging in again"):
        folder.read("y")
    write_profiles(tmp_path, f"[profile team]\nendpoint_url={cloud}\n", keys_of("team", "NEW"))
    assert folder.read("y") == b"an object"
    assert Cloud.asked == ["OLD", "OLD", "OLD", "OLD", "NEW"]


def test_expired_keys_of_the_environment_are_an_error_at_once(cloud, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "OLD", "SECRET_ACCESS_KEY": "s", "ENDPOINT_URL": cloud}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(ExpiredError, match=r"s3://bucket/x/y: its credentials have expired .* in the environment"):
        Folder("s3://bucket/x").read("y")
    assert Cloud.asked == ["OLD"]


def test_a_command_that_gives_keys_is_run_once_while_they_are_good(cloud, tmp_path, monkeypatch):
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    keys = {"Version": 1, "AccessKeyId": "COMMAND", "SecretAccessKey": "s", "SessionToken": "t", "Expiration": ends}
    script = tmp_path / "give.py"
    script.write_text(f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\nprint({json.dumps(keys)!r})\n")
    write_profiles(tmp_path, f"[profile x]\nendpoint_url={cloud}\ncredential_process={sys.executable} {script}\n")
    monkeypatch.setenv("AWS_PROFILE", "x")
    Cloud.good = {"COMMAND"}
    folder = Folder("s3://bucket/x")
    assert [folder.read("y") for _ in range(5)] == [b"an object"] * 5
    assert (tmp_path / "runs").read_text() == "x"


def test_a_role_is_assumed_by_a_profile(cloud, tmp_path, monkeypatch):
    config = (
        f"[profile x]\nregion=eu-west-1\nendpoint_url={cloud}\nrole_arn=arn:aws:iam::1:role/r\nsource_profile=base\n"
    )
    write_profiles(tmp_path, config, keys_of("base", "BASE"))
    monkeypatch.setenv("AWS_PROFILE", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", cloud)
    Cloud.good = {"ROLE"}
    folder = Folder("s3://bucket/x")
    assert [folder.read("y") for _ in range(3)] == [b"an object"] * 3
    assert Cloud.asked == ["AssumeRole", "ROLE", "ROLE", "ROLE"]


def test_single_sign_on_and_its_end(cloud, tmp_path, monkeypatch):
    config = (
        f"[profile x]\nregion=eu-west-1\nendpoint_url={cloud}\nsso_start_url=https://start\nsso_region=eu-west-1\n"
        "sso_account_id=1\nsso_role_name=r\n"
    )
    write_profiles(tmp_path, config)
    monkeypatch.setenv("AWS_PROFILE", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", cloud)
    # Below the home that there was when botocore was imported.
    monkeypatch.setattr("botocore.credentials.SSOProvider._SSO_TOKEN_CACHE_DIR", str(tmp_path / ".aws/sso/cache"))
    Cloud.good = {"SSO"}
    with pytest.raises(UnrenewedError, match=r"cannot read s3://bucket/x/y: profile x of AWS: .* SSO Token"):
        Folder("s3://bucket/x").read("y")
    token = tmp_path / ".aws/sso/cache" / f"{hashlib.sha1(b'https://start').hexdigest()}.json"
    token.parent.mkdir(parents=True)
    ends = (datetime.now(UTC) + timedelta(hours=8)).strftime("%Y-%m-%dT%H:%M:%SZ")
    token.write_text(json.dumps({"accessToken": "logged-in", "expiresAt": ends}))
    assert Folder("s3://bucket/x").read("y") == b"an object"
    assert Cloud.asked == ["sso", "SSO"]


@pytest.mark.parametrize(
    "name",
    ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"],
)
def test_a_machine_s_identity_is_left_to_the_store_unless_a_profile_is_named(cloud, tmp_path, monkeypatch, name):
    write_profiles(tmp_path, "", keys_of("default", "DEFAULT"))
    monkeypatch.setenv(name, "/token")
    assert credentials.find_credentials("s3://bucket/x") == credentials.Credentials()
    monkeypatch.setenv("AWS_PROFILE", "default")
    assert credentials.find_credentials("s3://bucket/x").provider is not None


def test_a_federated_login_of_google(cloud, tmp_path, monkeypatch):
    (tmp_path / "subject").write_text("signed by a cluster")
    federated = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{cloud}/google-token",
        "credential_source": {"file": str(tmp_path / "subject")},
    }
    (tmp_path / "login.json").write_text(json.dumps(federated))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "login.json"))
    monkeypatch.setenv("GOOGLE_BASE_URL", cloud)
    Cloud.good = {"Bearer GOOGLE"}
    folder = Folder("gs://bucket/x")
    assert [folder.read("y") for _ in range(3)] == [b"an object"] * 3
    assert Cloud.asked == ["google", *["Bearer GOOGLE"] * 3]


def test_a_login_of_azure_is_taken_from_its_command_line(cloud, tmp_path, monkeypatch):
    (tmp_path / ".azure").mkdir()
    (tmp_path / ".azure" / "azureProfile.json").write_text("{}")
    command = tmp_path / "bin" / "az"
    command.parent.mkdir()
    ends = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%d %H:%M:%S.000000")
    command.write_text(
        f"#!/bin/sh\necho '{json.dumps({'accessToken': 'AZURE', 'expiresOn': ends, 'tokenType': 'Bearer'})}'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", cloud)
    Cloud.good = {"Bearer AZURE"}
    assert Folder("az://container/x").read("y") == b"an object"


@pytest.mark.parametrize(
    ("url", "way"),
    [
        ("s3://bucket/x", "AWS_ACCESS_KEY_ID .* AWS_PROFILE.* AWS_SKIP_SIGNATURE"),
        ("gs://bucket/x", "GOOGLE_APPLICATION_CREDENTIALS .*gcloud auth .* GOOGLE_SKIP_SIGNATURE"),
        ("az://container/x", "AZURE_STORAGE_ACCOUNT_KEY .*az login.* AZURE_SKIP_SIGNATURE"),
    ],
)
def test_without_credentials_the_error_says_how_to_give_some(cloud, monkeypatch, url, way):
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        monkeypatch.setattr(credentials, "_METADATA", "http://{}:{}".format(*unanswered.getsockname()))
        with pytest.raises(ValueError, match=f"cannot open {url}: no credentials are configured, .*{way}"):
            Folder(url)


def test_the_metadata_service_is_not_asked_where_something_is_configured(cloud, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError(arguments)

    monkeypatch.setattr(socket, "create_connection", refuse)
    write_profiles(tmp_path, "", keys_of("default", "DEFAULT"))
    credentials.find_credentials("s3://bucket/x")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    credentials.find_credentials("s3://bucket/x")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", "{}")
    credentials.find_credentials("gs://bucket/x")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=1")
    credentials.find_credentials("az://container/x")
    assert credentials.find_credentials("https://host/x") == credentials.Credentials()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("[profile team]\nregion=eu-west-1\n", "the default profile of AWS has no credentials; name another"),
        ("no ini file", "cannot open s3://bucket/x with the default profile of AWS: Unable to parse config file"),
        ("[default]\ncredential_process=echo no json\n", "its credential_process printed something else than JSON"),
        ("[default]\ncredential_process=/not/there\n", "No such file or directory: '/not/there'; name another"),
    ],
)
def test_profiles_that_give_nothing_are_refused(cloud, tmp_path, monkeypatch, config, problem):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    write_profiles(tmp_path, config)
    with pytest.raises(ValueError, match=problem):
        Folder("s3://bucket/x")


def test_a_profile_that_is_not_there_is_named(cloud, tmp_path, monkeypatch):
    write_profiles(tmp_path, "[profile team]\n")
    monkeypatch.setenv("AWS_PROFILE", "tema")
    with pytest.raises(ValueError, match=r"\(tema\) could not be found; name another profile with AWS_PROFILE"):
        Folder("s3://bucket/x")


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_a_file_that_is_none_of_google_s_is_refused(cloud, tmp_path, monkeypatch, text):
    (tmp_path / "login.json").write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "login.json"))
    with pytest.raises(ValueError, match=r"login\.json cannot be read as credentials of Google's; name another"):
        Folder("gs://bucket/x")


@pytest.mark.parametrize("kind", ["external_account", "of_another_kind"])
def test_a_login_of_google_that_is_not_whole_is_refused(cloud, tmp_path, monkeypatch, kind):
    (tmp_path / "login.json").write_text(json.dumps({"type": kind}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "login.json"))
    with pytest.raises(ValueError, match=r"cannot open gs://bucket/x: .*login\.json.*; name another file"):
        Folder("gs://bucket/x")


@pytest.mark.parametrize("address", ["localhost:9000", "nonsense", "http://", "http://[::1", "http://host:port"])
def test_an_endpoint_that_is_no_address_is_refused(cloud, monkeypatch, address):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL is .*, which is no address: write it as https://HOST"):
        Folder("s3://bucket/x")


@pytest.mark.parametrize(
    ("url", "names", "problem"),
    [
        ("s3://bucket/x", ["AWS_ACCESS_KEY_ID"], "SecretAccessKey; correct the credentials"),
        ("az://container/x", ["AZURE_STORAGE_ACCOUNT_KEY"], "set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_half_of_the_credentials_is_refused(cloud, monkeypatch, url, names, problem):
    for name in names:
        monkeypatch.setenv(name, "YWJj")
    with pytest.raises(ValueError, match=f"cannot open {url}: .*{problem}"):
        Folder(url)


@pytest.mark.parametrize(("hidden", "extra"), [("botocore", "aws"), ("google", "gcs")])
def test_what_is_not_installed_is_named(cloud, tmp_path, monkeypatch, hidden, extra):
    write_profiles(tmp_path, "", keys_of("default", "DEFAULT"))
    (tmp_path / "login.json").write_text('{"type": "external_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "login.json"))
    for module in [name for name in sys.modules if name.split(".")[0] == hidden or name == "obstore.auth.google"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ValueError, match=rf"{hidden}.* is not installed; pip install 'moco-fast\[{extra}\]'"):
        Folder({"aws": "s3://bucket/x", "gcs": "gs://bucket/x"}[extra])
