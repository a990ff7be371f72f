"""Kills a packing at each of its file operations in turn, and packs again; test_packer.py runs it.

Usage: packer_kills.py SOURCE REFERENCE FOLDER OPTIONS NUM_PARTS EVERY: options of PackConfig as JSON; 0 parts: all at
once; EVERY: 1, or that only one operation of so many is tried
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

from shards.config import PackConfig
from shards.images import encode
from shards.packing.finish import finish
from shards.packing.pack import pack

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill_at(operation: int, below: str) -> None:
    """Kill this process before its n-th operation on a file below a folder; a write is cut in half first."""
    left = operation

    def count() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and below in str(arguments[0]) and count():
            os.kill(os.getpid(), signal.SIGKILL)

    writev, fsync = os.writev, os.fsync

    def half_writev(fd, buffers):
        if count():
            whole = b"".join(buffers)
            os.write(fd, whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return writev(fd, buffers)

    def no_fsync(fd):
        if count():
            os.kill(os.getpid(), signal.SIGKILL)
        return fsync(fd)

    os.writev, os.fsync = half_writev, no_fsync
    sys.addaudithook(hook)


def pack_all(config: PackConfig, num_parts: int) -> None:
    """What a user would call, or an array job and its last step."""
    if not num_parts:
        pack(config)
        return
    for i in range(num_parts):
        pack(replace(config, part=f"{i}/{num_parts}"))
    finish(config.out, work_folder=config.work_folder)


def run(config: PackConfig, num_parts: int, operation: int | None) -> int:
    """Wait status of a child that packs."""
    child = os.fork()
    if not child:
        try:
            if operation is not None:
                kill_at(operation, config.out)
            pack_all(config, num_parts)
        except BaseException as error:
            print(f"operation {operation}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    source, reference, folder = sys.argv[1:4]
    options, num_parts, every = json.loads(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    out = Path(folder) / "out"
    expected = contents(Path(reference))
    # Its files are what is killed here; a process for codecs in each of the many that die would take half the time.
    encode.run_codecs = lambda function, limits, data, *arguments: function(data, *arguments)
    config = PackConfig(sources=(source,), out=str(out), workers=1, **options)
    operation = 1 - every
    while True:
        operation += every
        status = run(config, num_parts, operation)
        found = (
            {name: data for name, data in contents(out).items() if not name.startswith(".pack")} if out.exists() else {}
        )
        wrong = [name for name, data in found.items() if expected.get(name) != data]
        assert not wrong, f"killed at operation {operation}: partial {wrong}"
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert os.WEXITSTATUS(run(config, num_parts, None)) == 0, (
            f"could not go on after a kill at operation {operation}"
        )
        assert contents(out) == expected, f"differs after a kill at operation {operation}"
        shutil.rmtree(out)
    print(operation - 1)


if __name__ == "__main__":
    main()
