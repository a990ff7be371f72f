"""Two machines, as namespaces, train by README's command: a link is cut, a machine is lost, one goes on alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moco_fast import checkpoint
from moco_fast.training.state import read_lines, run_state
from tests.network import NetworkMachine, two_machines

ROOT = Path(__file__).parents[2]
STEPS, TIMEOUT_S = 60, 60
SMALL = f"""
    --model.encoder resnet18_quarter --data.batch-size 32 --views.size 32 --data.num-threads 1 --method.queue-size 64
    --run.steps {STEPS} --log.every-steps 1 --checkpoint.every-steps 2 --log.trackers --run.timeout-s {TIMEOUT_S}
"""


def printed() -> str:
    """Return README's command for several nodes."""
    after = (ROOT / "README.md").read_text().partition("**On several nodes**")[2]
    [block] = re.findall(r"\n\n((?:    .*\n)+)", after)[:1]
    return block.replace("\\\n", " ").strip()


class Cluster:
    """The machines, and a folder that they share."""

    def __init__(self, machines: tuple[NetworkMachine, NetworkMachine], folder: Path, shards: Path) -> None:
        self.machines, self.folder, self.out = machines, folder, folder / "shared" / "runs" / "first"
        config = Path("deploy") / "accelerate" / "multi-node.yaml"
        (folder / config).parent.mkdir(parents=True)
        (folder / config).write_text((ROOT / config).read_text() + "use_cpu: true\n")
        (folder / "shards").mkdir()
        (folder / "shards" / "train").symlink_to(shards)
        self._starts = 0

    def start(self, *machines: NetworkMachine) -> "list[subprocess.Popen[bytes]]":
        """Give README's command on machines, of two ranks each."""
        command = printed()
        numbers = f"--num_machines {len(machines)} --num_processes {2 * len(machines)}"
        for old, new in (("--num_machines 4 --num_processes 32", numbers), ("/shared/", f"{self.folder}/shared/")):
            assert old in command
            command = command.replace(old, new)
        command += " " + " ".join(SMALL.split())
        self._starts += 1
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
        env |= {"PATH": path, "OMP_NUM_THREADS": "1", "FIRST_NODE": machines[0].name}
        return [
            machine.start(
                ["bash", "-c", command],
                env=env | {"RANK_OF_THIS_NODE": str(rank)},
                cwd=self.folder,
                log=self.folder / f"start-{self._starts}-{machine.name}.log",
            )
            for rank, machine in enumerate(machines)
        ]

    def said(self) -> str:
        return "\n".join(f"{log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("start-*.log")))

    def wait_for_steps(self, more: int, launchers: "list[subprocess.Popen[bytes]]") -> int:
        """Wait until so many steps more are in the metrics; return the last one's number."""
        wanted = self.last_step() + more
        while self.last_step() < wanted:
            assert all(launcher.poll() is None for launcher in launchers), self.said()
            time.sleep(0.02)
        return self.last_step()

    def last_step(self) -> int:
        return max((line["step"] for line in read_lines(self.out / "metrics.jsonl") if "loss" in line), default=0)

    def world(self) -> int:
        return json.loads((self.out / "environment.json").read_text())["world_size"]

    def ends(self, launchers: "list[subprocess.Popen[bytes]]") -> list[int]:
        """Wait until launchers have ended by themselves; return their exit codes."""
        # torch's agent gives ranks 30 s to end; the rest is for a machine that is busy.
        return [launcher.wait(2 * TIMEOUT_S + 60) for launcher in launchers]


@pytest.mark.long
@pytest.mark.faults
def test_two_machines_lose_a_link_and_a_machine_and_go_on(packed_demo: Any, tmp_path: Path) -> None:
    with two_machines() as machines:
        first, second = machines
        cluster = Cluster(machines, tmp_path, packed_demo.train)
        both = cluster.start(first, second)
        cluster.wait_for_steps(4, both)
        assert cluster.world() == 4
        assert "network: gloo uses cable0, since first resolves to 127.0.1.1" in cluster.said()
        second.plug(is_in=False)
        assert 0 not in cluster.ends(both), cluster.said()
        assert run_state(cluster.out) == "failed"

        # One machine goes on with the same batches, of which its ranks take larger shares.
        alone = cluster.start(first)
        cluster.wait_for_steps(4, alone)
        assert cluster.world() == 2
        first.signal(alone[0], signal.SIGTERM)
        cluster.ends(alone)
        assert run_state(cluster.out) == "stopped"

        second.plug(is_in=True)
        both = cluster.start(first, second)
        cluster.wait_for_steps(4, both)
        second.kill()
        assert 0 not in cluster.ends(both), cluster.said()

    with two_machines() as machines:
        cluster.machines = machines
        both = cluster.start(*machines)
        assert cluster.ends(both) == [0, 0], cluster.said()
    lines = [line for line in read_lines(cluster.out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines] == list(range(32, 32 * STEPS + 1, 32))
    newest = checkpoint.find_newest(cluster.out / "checkpoints")
    assert newest is not None
    # 9 steps make an epoch of 288 samples, whatever the number of ranks was.
    assert checkpoint.load(newest).numbers["loader"] == {"epoch": STEPS // 9, "step": STEPS % 9}
    assert [start["world_size"] for start in read_lines(cluster.out / "starts.jsonl")] == [4, 2, 4, 4]
