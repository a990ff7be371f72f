"""Stores: bytes of local files and of objects in buckets or on web servers, behind one small interface."""

import io
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from shards.ground.errors import ExpiredError, PackError, RefusedError, UnrenewedError
from shards.storage.credentials import find_credentials, has_expired

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

__all__ = [
    "ByteFile",
    "Folder",
    "SeekableFile",
    "absolute",
    "check_url",
    "is_url",
    "open_bytes",
    "open_folder",
    "split_sets",
    "split_url",
]

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "http", "https")
CLIENT_OPTIONS: "ClientConfig" = {"timeout": "60s", "connect_timeout": "10s"}
RETRIES: "RetryConfig" = {"max_retries": 6, "retry_timeout": timedelta(minutes=3)}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Variables that send a scheme's requests elsewhere; plain http there is the user's decision."""
_REFUSAL = re.compile(r"status code: (4(?!08|29)\d\d [\w ']+)")
"""What a web server says for good: not "too slow" (408) or "too many" (429)."""
_UNRENEWED = re.compile(r"External \w+ credential provider: \w+: (.*)")
"""What obstore says where a provider of credentials failed."""
_WINDOW_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 20
_UPLOAD_BYTES = 16 << 20


def is_url(path: str) -> bool:
    """Return whether a source or target is not on this machine."""
    return path.partition("://")[0] in SCHEMES and "://" in path


def absolute(path: str) -> str:
    """Return an absolute path, with links unresolved; a URL is returned unchanged."""
    return path if is_url(path) else str(Path(path).absolute())


def split_sets(paths: str) -> tuple[str, ...]:
    """Split several paths or URLs with commas between them; a path that exists is one path, whatever its name."""
    if os.path.exists(paths):  # noqa: PTH110 - Path.exists raises where they are too long for a name
        return (paths,)
    return tuple(part for part in paths.split(",") if part) or (paths,)


def check_url(url: str) -> None:
    """Refuse URLs that hold a secret: they end up in the manifest. Raises ValueError."""
    parts = urlsplit(url)
    if parts.password or parts.username or parts.query:
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        raise ValueError(
            f"{shown}: leave user, password and query out of the address, since it is written into the manifest; "
            "give credentials through the environment (AWS_ACCESS_KEY_ID and so on)"
        )


def split_url(url: str) -> tuple[str, str]:
    """Return (address of the folder, name of the object in it)."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return folder, name


class ByteFile(Protocol):
    """A file that is read by ranges."""

    size: int

    def read(self, start: int, count: int) -> bytes:
        """Return the `count` bytes, or fewer at the end. Raises OSError or PackError."""
        ...


class _LocalFile:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def read(self, start: int, count: int) -> bytes:
        data = os.pread(self._fd, count, start)
        while len(data) < min(count, self.size - start):
            more = os.pread(self._fd, count - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


class _RemoteFile:
    def __init__(self, url: str) -> None:
        folder, self._name = split_url(url)
        self._folder = open_folder(folder)
        self.size = self._folder.size(self._name)

    def read(self, start: int, count: int) -> bytes:
        count = min(count, self.size - start)
        return self._folder.read_range(self._name, start, count) if count > 0 else b""


def open_bytes(path: str) -> ByteFile:
    """Open a local path or a URL for reading by ranges; the newest 64 stay open."""
    if is_url(path):
        return _open_remote(path)
    status = os.stat(path)  # noqa: PTH116 - once for each image that is read from an archive
    return _open_local(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _open_local(path: str, identity: tuple[int, ...]) -> ByteFile:
    # A file that was replaced since is another file.
    del identity
    return _LocalFile(path)


@lru_cache(maxsize=64)
def _open_remote(url: str) -> ByteFile:
    return _RemoteFile(url)


class SeekableFile(io.RawIOBase):
    """A ByteFile with the interface of Python's own files, read in windows: for headers and directories.

    Args:
        file: what to read.
        window: bytes fetched at a time.
    """

    def __init__(self, file: ByteFile, window: int = _WINDOW_BYTES) -> None:
        super().__init__()
        self.file = file
        self._window = window
        self._at = 0
        self._start, self._buffer = 0, b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the current offset."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill a buffer from the current offset."""
        view = memoryview(buffer).cast("B")
        data = self.read_at(self._at, len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def read_at(self, start: int, count: int) -> bytes:
        """Return the bytes at an offset, without moving."""
        inside = start - self._start
        if inside < 0 or inside + count > len(self._buffer):
            self._start, inside = start, 0
            self._buffer = self.file.read(start, max(count, self._window))
        return self._buffer[inside : inside + count]


class Folder:
    """A bucket's prefix or a web server's folder.

    Args:
        url: its address.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url
        self._store, self._has_fixed_credentials = _connect(url)

    def objects(self) -> Iterator[tuple[str, int]]:
        """Return (name, size) of every object below, in the store's order, which for buckets is that of the names."""
        import obstore

        try:
            for chunk in obstore.list(self._store, chunk_size=1000):  # pyright: ignore[reportUnknownMemberType] - half-typed
                for meta in chunk:
                    yield meta["path"], meta["size"]
        except Exception as error:
            raise self._explain("list", "", error) from None

    def size(self, name: str) -> int:
        """Return the bytes of an object. Raises FileNotFoundError or PackError."""
        import obstore

        return self._ask("read", name, lambda store: obstore.head(store, name)["size"])

    def read(self, name: str) -> bytes:
        """Return a whole object. Raises FileNotFoundError or PackError."""
        import obstore

        return self._ask("read", name, lambda store: bytes(obstore.get(store, name).bytes()))

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """Return some bytes of an object. Raises FileNotFoundError or PackError."""
        import obstore

        data = self._ask("read", name, lambda store: bytes(obstore.get_range(store, name, start=start, length=count)))
        self._refuse_short(name, start, count, len(data))
        return data

    def stream(self, name: str, start: int, count: int) -> Iterator[memoryview]:
        """Give some bytes of an object as they arrive; a connection that breaks is taken up again.

        Raises:
            FileNotFoundError: there is no such object.
            PackError: the store does not answer, or gives fewer bytes.
        """
        import obstore

        found = self._ask(
            "read", name, lambda store: obstore.get(store, name, options={"range": (start, start + count)})
        )
        num_bytes = 0
        try:
            for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                num_bytes += len(chunk)
                yield memoryview(chunk)
        except Exception as error:
            raise self._explain("read", name, error) from None
        self._refuse_short(name, start, count, num_bytes)

    def put(self, name: str, data: bytes | Path, *, only_if_new: bool = False) -> bool:
        """Write an object, whole or not at all; False where it was there and `only_if_new`. Raises PackError."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        more: Any = {"mode": "create"} if only_if_new else {"chunk_size": _UPLOAD_BYTES}
        try:
            self._ask("write", name, lambda store: obstore.put(store, name, data, **more))
        except AlreadyExistsError:
            return False
        return True

    def chunks(self, name: str) -> Iterator[bytes]:
        """Give a whole object, chunk by chunk. Raises FileNotFoundError or PackError."""
        import obstore

        stream = self._ask("read", name, lambda store: obstore.get(store, name).stream())
        try:
            for chunk in stream:
                yield bytes(chunk)
        except Exception as error:
            raise self._explain("read", name, error) from None

    def download(self, name: str, path: Path) -> None:
        """Copy an object to a local file. Raises FileNotFoundError, without a file, or PackError."""
        chunks = self.chunks(name)
        first = next(chunks, b"")
        with path.open("wb") as file:
            for chunk in chain((first,), chunks):
                file.write(chunk)

    def delete(self, names: list[str]) -> None:
        """Remove objects. Raises PackError."""
        import obstore

        with suppress(FileNotFoundError):
            self._ask("remove", "", lambda store: obstore.delete(store, names))

    def _refuse_short(self, name: str, start: int, count: int, given: int) -> None:
        if given != count:
            raise PackError(f"{self.url}/{name} gave {given} of {count} bytes at {start}: run the same command again")

    def _ask(self, verb: str, name: str, request: "Callable[[ObjectStore], T]") -> T:
        """Ask the store, once more where credentials may have been renewed since it was opened.

        Raises:
            FileNotFoundError: there is no such object.
            PackError: the store does not answer, or refuses.
        """
        from obstore.exceptions import AlreadyExistsError

        try:
            try:
                return request(self._store)
            except Exception as error:
                if self._has_fixed_credentials or not has_expired(error):
                    raise
                self._store, _ = _connect(self.url)
                return request(self._store)
        except AlreadyExistsError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such object", f"{self.url}/{name}") from None
        except Exception as error:
            raise self._explain(verb, name, error) from None

    def _explain(self, verb: str, name: str, error: Exception) -> PackError:
        # The libraries' messages are many lines; the first says what happened.
        reason = str(error).strip().partition("\n")[0][:300]
        where = f"{self.url}/{name}" if name else self.url
        if has_expired(error):
            expired = f"cannot {verb} {where}: its credentials have expired ({reason})"
            if self._has_fixed_credentials:
                return ExpiredError(f"{expired}. Set new ones in the environment and run the same command again")
            return UnrenewedError(f"{expired}. Renew them, as by logging in again")
        if unrenewed := _UNRENEWED.search(reason):
            return UnrenewedError(f"cannot {verb} {where}: {unrenewed[1]}. Fix this and run the same command again")
        message = f"cannot {verb} {where}: {reason}. Fix this and run the same command again"
        refusal = _REFUSAL.search(reason) if self.url.startswith("http") else None
        return RefusedError(message, refusal[1]) if refusal else PackError(message)


open_folder = lru_cache(maxsize=64)(Folder)


def _is_web(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _connect(url: str) -> "tuple[ObjectStore, bool]":
    """Return a store, and whether its credentials cannot change. Raises ValueError."""
    from obstore.store import from_url

    credentials = find_credentials(url)
    options = CLIENT_OPTIONS.copy()
    endpoints = {name: os.environ.get(name, "") for name in _ENDPOINTS.get(url.partition(":")[0], ())}
    endpoints["endpoint_url"] = credentials.config.get("endpoint", "")
    for name, address in endpoints.items():
        if address and not _is_web(address):
            raise ValueError(f"cannot open {url}: {name} is {address}, which is no address: write it as https://HOST")
    if any(address.startswith("http://") for address in (url, *endpoints.values())):
        options["allow_http"] = True
    more: dict[str, Any] = {"client_options": options, "retry_config": RETRIES}
    if credentials.provider:
        more["credential_provider"] = credentials.provider
    try:
        store = from_url(url, **more, **credentials.config)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        no_account = "set AZURE_STORAGE_ACCOUNT_NAME to the name of the storage account"
        hint = no_account if "Account must be" in reason else "correct the credentials that it is opened with"
        raise ValueError(f"cannot open {url}: {reason}; {hint}") from None
    return store, credentials.are_fixed
