"""Credentials of buckets, found as the clouds' own tools find them.

What obstore finds by itself is left to it: keys and tokens in the environment, web identities and containers' roles,
which it renews, Google's service accounts and logins. Here is what it does not read, such as profiles of AWS, and the
refusal to ask a machine's metadata service where there is none.
"""

import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

__all__ = ["Credentials", "find_credentials", "has_expired"]

_KEPT_FOR: Final = timedelta(minutes=10)
"""How long obstore may use what a provider gave: botocore renews 15 minutes before an end, obstore asks 5 before."""
_METADATA: Final = "http://169.254.169.254"
_METADATA_S: Final = 2.0
_EXPIRED = re.compile(r"\b(ExpiredToken\w*|TokenRefreshRequired)\b")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """How a store signs its requests."""

    provider: Callable[[], Any] | None = None
    """Gives new ones when obstore asks; None: obstore finds its own."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings of the store that come with them, such as a profile's region."""
    are_fixed: bool = False
    """Whether they cannot change while this process runs, as those in its environment."""


def find_credentials(url: str) -> Credentials:
    """Return the credentials that an address is opened with.

    Args:
        url: of a bucket, or of a web server, which has none.

    Raises:
        ValueError: there are none, a profile is not there, or what reads it is not installed.
    """
    finders = {"s3": _of_aws, "gs": _of_google, "az": _of_azure}
    finder = finders.get(url.partition("://")[0])
    return finder(url) if finder else Credentials()


def has_expired(error: Exception) -> bool:
    """Return whether a store says that the credentials were good once."""
    return _EXPIRED.search(str(error)) is not None


def _of_aws(url: str) -> Credentials:
    if _is_set("AWS_SKIP_SIGNATURE", "AWS_ACCESS_KEY_ID"):
        return Credentials(are_fixed=True)
    profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    # As botocore: a profile that is named comes first, then the machine's identity, then the default profile.
    if profile:
        return _of_profile(url, profile)
    if _is_set("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") or _is_set(
        "AWS_CONTAINER_CREDENTIALS_FULL_URI"
    ):
        return Credentials()
    files = [
        os.environ.get(name) or str(Path(usual).expanduser())
        for name, usual in (
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
            ("AWS_CONFIG_FILE", "~/.aws/config"),
        )
    ]
    if any(Path(file).is_file() for file in files):
        return _of_profile(url, None)
    _refuse_unconfigured(
        url,
        address=os.environ.get("AWS_METADATA_ENDPOINT", _METADATA),
        ways="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
        "AWS_SKIP_SIGNATURE=true",
    )
    return Credentials()


def _of_profile(url: str, profile: str | None) -> Credentials:
    try:
        return _AwsProfile(url, profile).credentials
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot open {url} with {_named(profile)}: {error.name} is not installed; "
            "pip install 'moco-fast[aws]', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None


def _named(profile: str | None) -> str:
    return f"profile {profile} of AWS" if profile else "the default profile of AWS"


def _explained(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"its credential_process printed something else than JSON ({error})"
    return str(error)


class _AwsProfile:
    """A profile of AWS: keys, roles, single sign-on and commands (`credential_process`), by botocore."""

    def __init__(self, url: str, profile: str | None) -> None:
        from botocore.exceptions import BotoCoreError  # pyright: ignore[reportMissingTypeStubs] - it has none

        self._url, self._profile = url, profile
        try:
            settings, region = self._open()
        except (BotoCoreError, OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"cannot open {url} with {_named(profile)}: {_explained(error)}; name another profile with "
                "AWS_PROFILE, or write this one with `aws configure`"
            ) from None
        config: dict[str, Any] = {}
        if region and not _is_set("AWS_REGION", "AWS_DEFAULT_REGION"):
            config["region"] = region
        if settings.get("endpoint_url") and not _is_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
            config["endpoint"] = settings["endpoint_url"]
        of_s3: Any = settings.get("s3")
        if isinstance(of_s3, Mapping) and cast("Mapping[str, Any]", of_s3).get("addressing_style") == "virtual":
            config["virtual_hosted_style_request"] = True
        self.credentials = Credentials(provider=self, config=config)

    def _open(self) -> tuple[Mapping[str, Any], str | None]:
        """Read the files, which may have been written since; return the profile's settings and its region."""
        import botocore.session  # pyright: ignore[reportMissingTypeStubs] - it has none

        session: Any = botocore.session.Session(profile=self._profile)
        self._credentials: Any = session.get_credentials()
        if self._credentials is None:
            raise ValueError(
                f"cannot open {self._url}: {_named(self._profile)} has no credentials; name another with AWS_PROFILE, "
                "write it with `aws configure`, or set AWS_SKIP_SIGNATURE=true for a public bucket"
            )
        return session.get_scoped_config(), session.get_config_variable("region")

    def __call__(self) -> dict[str, Any]:
        """Return keys that are good for `_KEPT_FOR`.

        Raises:
            ValueError: there are none, or the login has ended.
        """
        from botocore.credentials import RefreshableCredentials  # pyright: ignore[reportMissingTypeStubs] - it has none
        from botocore.exceptions import BotoCoreError  # pyright: ignore[reportMissingTypeStubs] - it has none

        try:
            if not isinstance(self._credentials, RefreshableCredentials):
                self._open()
            keys: Any = self._credentials.get_frozen_credentials()
        except (BotoCoreError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{_named(self._profile)}: {_explained(error)}") from None
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _KEPT_FOR,
        }


def _of_google(url: str) -> Credentials:
    if _is_set("GOOGLE_SKIP_SIGNATURE", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH") or _is_set(
        "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN"
    ):
        return Credentials(are_fixed=True)
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    file = Path(named or "~/.config/gcloud/application_default_credentials.json").expanduser()
    if not named and not file.is_file():
        _refuse_unconfigured(
            url,
            address=f"http://{os.environ.get('GCE_METADATA_HOST', urlsplit(_METADATA).netloc)}",
            ways="set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or run `gcloud auth "
            "application-default login`; for a public bucket GOOGLE_SKIP_SIGNATURE=true",
        )
        return Credentials()
    try:
        kind = json.loads(file.read_text())["type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"cannot open {url}: {file} cannot be read as credentials of Google's; name another file with "
            "GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    if kind in ("service_account", "authorized_user"):
        return Credentials()
    try:
        import google.auth
        from google.auth import credentials as of_google
        from obstore.auth.google import GoogleCredentialProvider
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot open {url} with {file}, which is of the kind {kind}: {error.name} is not installed; "
            "pip install 'moco-fast[gcs]'"
        ) from None
    auth: Any = google.auth  # Half-typed, as what it gives.
    scoped: Any = of_google
    with warnings.catch_warnings():
        # It warns of files that strangers gave; this is the user's own, as google.auth.default would find it.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            loaded, _ = auth.load_credentials_from_file(str(file))
        except auth.exceptions.GoogleAuthError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"cannot open {url}: {reason}; name another file with GOOGLE_APPLICATION_CREDENTIALS"
            ) from None
    # Not given above, where they would make it ask Google for the project's name.
    scopes = ["https://www.googleapis.com/auth/devstorage.read_write"]
    return Credentials(provider=GoogleCredentialProvider(scoped.with_scopes_if_required(loaded, scopes)))


def _of_azure(url: str) -> Credentials:
    keys = ("SKIP_SIGNATURE", "STORAGE_ACCOUNT_KEY", "STORAGE_ACCESS_KEY", "STORAGE_MASTER_KEY", "STORAGE_SAS_KEY")
    more = ("STORAGE_SAS_TOKEN", "STORAGE_TOKEN", "STORAGE_USE_EMULATOR")
    if _is_set(*(f"AZURE_{name}" for name in keys + more)):
        return Credentials(are_fixed=True)
    renewed = ("CLIENT_SECRET", "STORAGE_CLIENT_SECRET", "FEDERATED_TOKEN_FILE", "USE_AZURE_CLI")
    machine = ("MSI_ENDPOINT", "IDENTITY_ENDPOINT", "OBJECT_ID", "MSI_RESOURCE_ID")
    if _is_set(*(f"AZURE_{name}" for name in renewed + machine)):
        return Credentials()
    home = Path(os.environ.get("AZURE_CONFIG_DIR") or Path("~/.azure").expanduser())
    if (home / "azureProfile.json").is_file() and shutil.which("az"):
        return Credentials(config={"use_azure_cli": True})
    _refuse_unconfigured(
        url,
        address=_METADATA,
        ways="set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or run `az login`; for a public container "
        "AZURE_SKIP_SIGNATURE=true",
    )
    return Credentials()


def _is_set(*names: str) -> bool:
    return any(os.environ.get(name) for name in names)


def _refuse_unconfigured(url: str, *, address: str, ways: str) -> None:
    """Refuse where nothing is configured and this machine has no metadata service that would give credentials.

    Outside of a cloud its address often answers nothing at all, and a store would try for minutes.
    """
    parts = urlsplit(address)
    with suppress(OSError), socket.create_connection((parts.hostname, parts.port or 80), timeout=_METADATA_S):
        return
    raise ValueError(f"cannot open {url}: no credentials are configured, and this machine has none of its own; {ways}")
