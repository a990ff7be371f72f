"""Python processes that begin with torch imported: real ones, with signals, kills and exit codes, 6 s of CPU cheaper.

A server that has imported what takes long forks for every command; each process has a parent of its own that waits for
it. What an interpreter does before it imports torch and after its last line is not seen: tests of that start their own.
"""

import atexit
import gc
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

IMPORTED = ("torch", "torchvision", "timm", "accelerate", "torch.utils.tensorboard", "nvidia.dali.fn")
_MAX_BYTES = 1 << 20


class WarmProcess:
    """A process, with what tests use of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], pid: int, ending: int, outputs: Sequence[int]) -> None:
        self.args, self.pid, self._ending, self._code = args, pid, ending, b""
        self._said = [b"", b""]
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in enumerate(outputs)]
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        for thread in (*self._readers, self._waiter):
            thread.start()

    def _read(self, number: int, output: int) -> None:
        with os.fdopen(output, "rb") as file:
            self._said[number] = file.read()

    def _wait(self) -> None:
        with os.fdopen(self._ending, "rb") as file:
            self._code = file.read()

    @property
    def returncode(self) -> int | None:
        """As Popen's: None while it runs, and the signal that ended it as a negative number."""
        return int(self._code) if self._code else None

    def poll(self) -> int | None:
        """Return the code if the process has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the code when the process has ended."""
        self._waiter.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it said, when it has ended and no descendant of its own can say more."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise TimeoutExpired(self.args, timeout or 0)
        return self._said[0].decode(), self._said[1].decode()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):  # it has just ended
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class WarmPython:
    """Starts processes; use `start_python` and `run_python` of conftest.py."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P: the folder of this file holds folders with our packages' names.
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env)
        theirs.close()

    def start(self, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> WarmProcess:
        """Start `python WORDS`: -m and a module, -c and a program, or a script's path; then their arguments."""
        args = [str(word) for word in words]
        job = {"words": args, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(self._ours, [pickle.dumps(job)], [writable for _, writable in pipes])
        for _, writable in pipes:
            os.close(writable)
        readable = [readable for readable, _ in pipes]
        pid = int(os.read(readable[2], 20))
        return WarmProcess(args, pid, readable[2], readable[:2])

    def run(
        self, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300
    ) -> CompletedProcess[str]:
        """Run `python WORDS` to its end."""
        process = self.start(*words, env=env, cwd=cwd)
        try:
            out, err = process.communicate(timeout)
        except TimeoutExpired:
            process.kill()
            raise
        return CompletedProcess(process.args, process.wait(), out, err)

    def close(self) -> None:
        """End the server; processes that it started go on."""
        self._ours.close()
        self._server.wait()


def serve(connection: socket.socket) -> list[str]:
    """Fork for each job; in the process that is to do it, return its words. The server itself never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the parents of jobs are not waited for
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MAX_BYTES, 3)
        if not message:
            os._exit(0)
        *outputs, ending = descriptors
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = os.fork()
            if job == 0:
                os.close(ending)
                return _become(pickle.loads(message), outputs)
            _wait_for(job, outputs, ending)
        for each in descriptors:
            os.close(each)


def _wait_for(job: int, outputs: Sequence[int], ending: int) -> None:
    for each in outputs:
        os.close(each)
    os.write(ending, b"%20d" % job)  # as many bytes as are read of it: the code comes through the same pipe
    _, status = os.waitpid(job, 0)
    os.write(ending, b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(job: dict[str, object], outputs: Sequence[int]) -> list[str]:
    """Make this process what it would be if it had been started with the job's words."""
    for number, each in zip((1, 2), outputs, strict=True):
        os.dup2(each, number)
        os.close(each)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    return job["words"]


def _do(kind: str, *words: str) -> int:
    """Do what a job's words say and return the exit code."""
    is_script = not kind.startswith("-")
    sys.path.insert(0, str(Path(kind).parent if is_script else Path.cwd()))
    sys.argv = [kind, *words] if is_script else [kind, *words[1:]]
    try:
        if kind == "-m":
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif is_script:
            runpy.run_path(kind, run_name="__main__")
        else:
            exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve; and in each process that is forked, do what was asked for."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        __import__(name)
    gc.freeze()  # what it looks at would be copied
    code = _do(*serve(connection))
    # As an interpreter ends, but for taking apart all that was imported, which takes as long as importing it.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
