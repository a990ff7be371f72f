"""A process of ours beside this one: how it starts, ends, and is told to have died."""

import os
import signal
import subprocess
import sys
import traceback

__all__ = ["WorkerDiedError", "end_child", "explain_death", "portable", "start_child"]

_PATIENCE_S = 5


class WorkerDiedError(RuntimeError):
    """A process of ours ended without being told to."""


def start_child(module: str, descriptor: int) -> subprocess.Popen[bytes]:
    """Start `main(descriptor)` of a module in a fresh interpreter with one OpenMP thread.

    Fresh, because a fork would inherit the threads' locks, and torch's and CUDA's state.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(  # noqa: S603 - this interpreter, a module of ours
        [sys.executable, "-c", f"from {module} import main; main({descriptor})"],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        env=environment,
    )


def end_child(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that has been told to end; kill it if it does not."""
    try:
        process.wait(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def explain_death(process: subprocess.Popen[bytes], what: str) -> WorkerDiedError:
    """Wait for a process whose connection has broken, and say how it ended."""
    end_child(process)
    code = process.returncode
    if code >= 0:
        return WorkerDiedError(f"{what} {process.pid} ended with code {code}")
    hint = ": the machine may have run out of memory" if code == -signal.SIGKILL else ""
    return WorkerDiedError(f"{what} {process.pid} was killed by {signal.Signals(-code).name}{hint}")


def portable(error: Exception, where: str) -> Exception:
    """Give an error that survives the way to another process, with its traceback as a note."""
    # Its end says most, and packets are small.
    error.add_note(f"{where}:\n" + "".join(traceback.format_exception(error))[-8000:])
    error.__cause__ = error.__context__ = error.__traceback__ = None
    return error
