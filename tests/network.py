"""Two machines in one: network namespaces with a cable between them, each with a hostname of its own.

Needs root, `ip` (iproute2), `setpriv`, `unshare` and `nsenter` (util-linux). As Debian sets machines up, a hostname
resolves to 127.0.1.1 on its own machine and to a real address on the other.
"""

import os
import signal
import subprocess
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["NetworkMachine", "two_machines"]

_NAMES, _ADDRESSES, _INTERFACE = ("first", "second"), ("10.213.0.1", "10.213.0.2"), "cable0"


class NetworkMachine:
    """A machine, which is a process that holds its namespaces; its processes end with it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = _NAMES[number], _ADDRESSES[number]
        hosts = folder / f"hosts-{number}"
        other = 1 - number
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{_ADDRESSES[other]} {_NAMES[other]}\n")
        begin = f"mount --bind {hosts} /etc/hosts; hostname {self.name}; ip link set lo up; echo; exec sleep infinity"
        # It ends with what started it, however that ends.
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--kill-child",
            "--fork",
            "--mount-proc",
        ]
        self._holder = subprocess.Popen([*command, "sh", "-ec", begin], stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise RuntimeError("no namespaces can be made: this needs root, iproute2 and util-linux")
        self.pid = _child_of(self._holder.pid)

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> "subprocess.Popen[bytes]":
        """Start a command there, which says what it says into a file."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", f"--wd={cwd}"]
        with log.open("ab") as said:
            return subprocess.Popen([*inside, *command], env=dict(env), stdout=said, stderr=said)

    @staticmethod
    def signal(process: "subprocess.Popen[bytes]", number: int) -> None:
        """Send a signal to a command that was started here: what was started stays outside, and passes none on."""
        os.kill(_child_of(process.pid), number)

    def plug(self, *, is_in: bool) -> None:
        """Plug the cable in, or pull it out."""
        self._run("ip", "link", "set", _INTERFACE, "up" if is_in else "down")
        if is_in:
            self._run("ip", "address", "replace", f"{self.address}/24", "dev", _INTERFACE)

    def _run(self, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.pid), "--net", *command], check=True)

    def kill(self) -> None:
        """End the machine and all that runs on it, at once and without a word."""
        if self._holder.poll() is None:
            # The first process of a PID namespace takes all others with it.
            os.kill(self.pid, signal.SIGKILL)
            self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()


def _child_of(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@contextmanager
def two_machines() -> Generator[tuple[NetworkMachine, NetworkMachine]]:
    """Give two machines with a cable between them."""
    with tempfile.TemporaryDirectory() as folder:
        machines: list[NetworkMachine] = []
        try:
            machines += [NetworkMachine(0, Path(folder))]
            machines += [NetworkMachine(1, Path(folder))]
            first, second = machines
            ends = [f"name {_INTERFACE} netns {first.pid}", f"name {_INTERFACE} netns {second.pid}"]
            cable = f"ip link add {ends[0]} type veth peer {ends[1]}"
            subprocess.run(cable.split(), check=True)
            for machine in machines:
                machine.plug(is_in=True)
            yield first, second
        finally:
            for machine in machines:
                machine.kill()
