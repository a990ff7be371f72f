"""Small servers on this machine: a web server, and as much of Google's and Azure's storage as packing asks for."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

FAULTS = ("503", "reset", "short", "stall")


class Web(http.server.BaseHTTPRequestHandler):
    """Serves `files`, whole and by ranges.

    The first `remaining` reads of a name that has `broken` in it go wrong as `fault` says.
    """

    files: dict[str, bytes]
    release: threading.Event
    turns: threading.Lock
    fault = ""
    broken = ".jpg"
    remaining = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer_object(unquote(urlsplit(self.path).path).lstrip("/"))

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        if self.broken in name and self.is_turn() and not self.is_answered():
            return
        self.answer_object(name)

    def is_turn(self) -> bool:
        with self.turns:
            type(self).remaining -= 1
            return type(self).remaining >= 0

    def is_answered(self) -> bool:
        """Do what `fault` says; True where an answer is still given, a short one."""
        if self.fault.isdecimal():
            self.answer(int(self.fault), b"")
        elif self.fault == "stall":
            self.release.wait(20)
        self.close_connection = True
        return self.fault == "short"

    def answer_object(self, name: str) -> None:
        data = self.files.get(name)
        if data is None:
            self.answer(404, b"")
            return
        headers = {
            "ETag": f'"{hash(data)}"',
            "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
            "x-ms-blob-type": "BlockBlob",
        }
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", self.headers.get("x-ms-range", "")))
        if not found:
            self.answer(200, data, headers)
            return
        start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(206, data[start:end], headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/octet-stream"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            # Only a broken answer closes before it is whole.
            self.wfile.write(data[: len(data) // 2] if self.close_connection and self.fault == "short" else data)


class Cloud(Web):
    """Lists and takes objects as well, as either cloud asks; a name begins with its bucket or container."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "comp" in query or "list-type" in query:
            self.list_objects(parts.path.strip("/"), query.get("prefix", [""])[0], azure="comp" in query)
        else:
            super().do_GET()

    def list_objects(self, bucket: str, prefix: str, *, azure: bool) -> None:
        names = [n.removeprefix(f"{bucket}/") for n in self.files if n.startswith(f"{bucket}/{prefix}")]
        if azure:
            text = "".join(
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>Wed, 21 Oct 2015 07:28:00 GMT"
                f"</Last-Modified><Content-Length>{len(self.files[f'{bucket}/{name}'])}</Content-Length>"
                "<Content-Type>x</Content-Type></Properties></Blob>"
                for name in sorted(names)
            )
            text = f"<EnumerationResults><Blobs>{text}</Blobs><NextMarker /></EnumerationResults>"
        else:
            text = "".join(
                f"<Contents><Key>{escape(name)}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
                f"<Size>{len(self.files[f'{bucket}/{name}'])}</Size></Contents>"
                for name in sorted(names)
            )
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{text}</ListBucketResult>"
        self.answer(200, text.encode(), {"Content-Type": "application/xml"})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = unquote(urlsplit(self.path).path).lstrip("/")
        is_new_only = self.headers.get("x-goog-if-generation-match") == "0" or self.headers.get("If-None-Match") == "*"
        if is_new_only and name in self.files:
            self.answer(412 if "x-goog-if-generation-match" in self.headers else 409, b"")
            return
        self.files[name] = data
        self.answer(200 if "x-ms-blob-type" not in self.headers else 201, b"", {"ETag": f'"{hash(data)}"'})

    def do_DELETE(self) -> None:
        self.files.pop(unquote(urlsplit(self.path).path).lstrip("/"), None)
        self.answer(202, b"")

    def do_POST(self) -> None:
        # Azure deletes in batches: a multipart answer for each part of a multipart question.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        paths = re.findall(r"^DELETE (\S+) HTTP", body, re.MULTILINE)
        for path in paths:
            self.files.pop(unquote(urlsplit(path).path).lstrip("/"), None)
        parts = "".join(
            f"--b\r\nContent-Type: application/http\r\nContent-ID: {i}\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n\r\n"
            for i in range(len(paths))
        )
        self.answer(202, f"{parts}--b--\r\n".encode(), {"Content-Type": "multipart/mixed; boundary=b"})


@contextmanager
def serving(kind: type[Web], files: dict[str, bytes]) -> Iterator[tuple[str, type[Web]]]:
    """Serve some files; gives the address and the handler, whose attributes can be set."""
    handler = type("Handler", (kind,), {"files": files, "release": threading.Event(), "turns": threading.Lock()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        handler.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
