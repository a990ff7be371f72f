"""How a run's processes find each other: ranks set by hand, networks, and the launcher's restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moco_fast import checkpoint
from moco_fast.training.rendezvous import (
    _global_ipv6,
    address_towards,
    choose_interface,
    interfaces,
    local_ranks,
    resolve,
)
from moco_fast.training.state import read_lines, run_state

SLURM = {"WORLD_SIZE": "11", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, {}),
        ({"WORLD_SIZE": "1"}, {}),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {}),
        (SLURM, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}),
        ({**SLURM, "LOCAL_RANK": "2", "SLURM_NODEID": "1"}, {"LOCAL_WORLD_SIZE": "4"}),
    ],
)
def test_ranks_on_a_node_are_those_of_slurm_where_none_are_set(env: dict[str, str], expected: dict[str, str]) -> None:
    assert local_ranks(env) == expected


@pytest.mark.parametrize("known", [{}, {"SLURM_LOCALID": "1"}, {**SLURM, "SLURM_NODEID": "7"}, {"LOCAL_RANK": "1"}])
def test_ranks_without_a_place_on_their_node_are_told_what_to_set(known: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but LOCAL_.* set LOCAL_RANK to .*SLURM_LOCALID"):
        local_ranks({**known, "WORLD_SIZE": "2"})


TWO_NODES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first"}
NETWORKS = {"eth0": "10.0.0.5", "ib0": "192.168.1.5"}


def choose(
    env: dict[str, str], *, own: str | None = "127.0.1.1", first: str | None = "10.0.0.4", **found: dict[str, str]
) -> str | None:
    names = {os.uname().nodename: own, "first": first, "10.0.0.4": "10.0.0.4"}
    return choose_interface(
        env,
        address_of=lambda name: names[name],
        addresses=lambda: found.get("found", NETWORKS),
        towards=lambda address: {"10.0.0.4": "10.0.0.5"}.get(address),
    )


@pytest.mark.parametrize("own", ["127.0.1.1", "127.0.0.1", "::1", None])
def test_gloo_is_given_the_network_that_leads_to_the_first_node(own: str | None) -> None:
    for env in (dict(TWO_NODES), {**TWO_NODES, "MASTER_ADDR": "10.0.0.4"}):
        line = choose(env, own=own)
        assert env["GLOO_SOCKET_IFNAME"] == "eth0"
        assert line is not None
        assert "gloo uses eth0" in line


def test_a_first_node_whose_name_is_its_own_takes_its_only_network_or_asks() -> None:
    env = dict(TWO_NODES)
    assert choose(env, first="127.0.1.1", found={"eth1": "10.0.0.4"}) is not None
    assert env["GLOO_SOCKET_IFNAME"] == "eth1"
    with pytest.raises(ValueError, match=r"set GLOO_SOCKET_IFNAME .* here are eth0 \(10\.0\.0\.5\), ib0 \(192\.168"):
        choose(dict(TWO_NODES), first="127.0.1.1")
    with pytest.raises(ValueError, match="here are none but loopback"):
        choose(dict(TWO_NODES), first=None, found={})


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first"},
        {**TWO_NODES, "GLOO_SOCKET_IFNAME": "ib0"},
        {**TWO_NODES, "GLOO_SOCKET_IFNAME": "eth0,ib0"},
        {**TWO_NODES, "MASTER_ADDR": "127.0.0.1"},
        {**TWO_NODES, "MASTER_ADDR": "localhost"},
    ],
)
def test_gloo_is_left_alone_where_it_chooses_well(env: dict[str, str]) -> None:
    before = dict(env)
    assert choose(env) is None
    assert env == before
    assert choose(dict(TWO_NODES), own="10.0.0.5") is None


@pytest.mark.parametrize(
    ("named", "chosen"), [("ib", "ib0"), ("=ib0", "ib0"), ("^ib0", "eth0"), ("^=ib0", "eth0"), ("ib0,ib1", "ib0")]
)
def test_the_network_that_is_named_for_nccl_is_gloo_s_too(named: str, chosen: str) -> None:
    env = {**TWO_NODES, "NCCL_SOCKET_IFNAME": named}
    assert choose(env, first="127.0.1.1") is not None
    assert env["GLOO_SOCKET_IFNAME"] == chosen


@pytest.mark.parametrize("named", ["", "=ib", "^=ib", "^ib,eth", "en"])
def test_a_name_for_nccl_that_decides_nothing_leaves_the_question(named: str) -> None:
    with pytest.raises(ValueError, match=r"here are eth0 \(10\.0\.0\.5\), ib0 \(192\.168\.1\.5\)"):
        choose({**TWO_NODES, "NCCL_SOCKET_IFNAME": named}, first="127.0.1.1")


def test_an_interface_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME is eth0,eth7, .* has no interface eth7 .* here are eth0"):
        choose({**TWO_NODES, "GLOO_SOCKET_IFNAME": "eth0,eth7"})


def test_a_machine_with_ipv6_alone_has_its_addresses(tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    # Of Linux: address, index, prefix length, scope, flags, name.
    table.write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe8000000000000000fc00fffe000001 04 40 20 80     eth0\n"
        "fd000000000000000000000000000002 04 40 00 82     eth0\n"
    )
    assert _global_ipv6(table) == {"eth0": "fd00::2"}
    assert _global_ipv6(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"},
            "it tried the first node at 127.0.0.1 port {port}, which is 127.0.0.1, and offers interface lo",
        ),
        ({"MASTER_ADDR": "no-such-name.invalid", "GLOO_SOCKET_IFNAME": "nosuch0"}, "has no interface nosuch0"),
    ],
)
def test_a_rank_that_finds_no_other_says_where_it_looked_and_what_to_set(
    more: dict[str, str], says: str, packed_demo: Any, tmp_path: Path, warm_python: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Rank 1, since every rank has to say it.
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    options = ("--data.shards", str(packed_demo.train), "--run.out", str(tmp_path / "run"), "--run.timeout-s", "2")
    done = warm_python.run("-m", "moco_fast.train", "demo", *options, *SMALL, env=env | ranks | more)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert says.format(port=port) in error
    assert "GLOO_SOCKET_IFNAME" in error
    assert not (tmp_path / "run").exists()


def test_this_machine_has_addresses() -> None:
    assert resolve("127.0.0.1") == address_towards("127.0.0.1") == "127.0.0.1"
    assert resolve("no-such-name.invalid") is None
    assert not any(address.startswith("127.") for address in interfaces().values())


# Restarts --------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "deploy" / "accelerate"
SMALL = (
    *(
        "--model.encoder",
        "resnet18_quarter",
        "--data.batch-size",
        "16",
        "--views.size",
        "32",
        "--data.backend",
        "dali",
    ),
    *("--data.num-threads", "1", "--method.queue-size", "64", "--run.steps", "60", "--log.every-steps", "1"),
    *("--checkpoint.every-steps", "3", "--run.device", "cpu", "--log.trackers"),
)


def below(pid: int) -> Iterator[int]:
    """Give the processes that a process started, and those that these started."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from below(child)


def process_of(launcher: subprocess.Popen[str], rank: int) -> int:
    return next(pid for pid in below(launcher.pid) if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def wait_for_step(out: Path, step: int, launchers: list[subprocess.Popen[str]]) -> None:
    while not any(line["step"] >= step for line in read_lines(out / "metrics.jsonl")):
        assert all(launcher.poll() is None for launcher in launchers), launchers[0].communicate()[1]
        time.sleep(0.02)


def launch(*command: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def check_that_it_went_on(out: Path, said: str) -> None:
    [step] = [int(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith("continuing ")]
    assert step >= 3
    assert step % 3 == 0
    lines = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["samples"] for line in lines] == list(range(16, 16 * 61, 16))
    assert run_state(out) == "finished"
    newest = checkpoint.find_newest(out / "checkpoints")
    assert newest is not None
    assert checkpoint.load(newest).numbers["loader"] == {"epoch": 3, "step": 60 - 3 * 18}


@pytest.mark.slow
@pytest.mark.faults
def test_after_a_kill_of_one_rank_the_launcher_continues_the_run(packed_demo: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--data.shards", str(packed_demo.train), "--run.out", str(out), *SMALL)
    config = ("--config_file", str(CONFIGS / "cpu-2.yaml"), "--max_restarts", "1")
    launcher = launch("accelerate.commands.launch", *config, "-m", "moco_fast.train", "demo", *options)
    wait_for_step(out, 5, [launcher])
    os.kill(process_of(launcher, 1), signal.SIGKILL)
    _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said
    check_that_it_went_on(out, said)


@pytest.mark.long
@pytest.mark.faults
def test_after_the_loss_of_a_node_the_others_continue_the_run(packed_demo: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--data.shards", str(packed_demo.train), "--run.out", str(out), *SMALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agents = ("--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "2", "--local_addr", "127.0.0.1")
    conf = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    meeting = (*agents, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf")
    train = ("-m", "moco_fast.train", "demo", *options)
    nodes = [launch("torch.distributed.run", *meeting, conf + is_host, *train) for is_host in ("true", "false")]
    wait_for_step(out, 5, nodes)
    left, lost = nodes
    for pid in (lost.pid, *below(lost.pid)):
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    _, said = left.communicate(timeout=240)
    assert left.returncode == 0, said
    check_that_it_went_on(out, said)


# A job script's srun: two tasks on one node, with Slurm's variables and nothing of a launcher's.
SRUN = """#!/bin/sh
pids=
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \\
        SLURM_STEP_TASKS_PER_NODE=2 "$@" &
    pids="$pids $!"
done
for pid in $pids; do wait $pid || exit 1; done
"""


@pytest.mark.slow
def test_ranks_set_by_hand_under_srun_are_one_run(packed_demo: Any, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    out = tmp_path / "run"
    options = ["--data.shards", str(packed_demo.train), "--run.out", str(out), *SMALL, "--run.steps", "4"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    by_hand = f"RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    command = [str(srun), "sh", "-c", f'{by_hand} exec "$0" -m moco_fast.train demo "$@"', sys.executable, *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "RANK", "WORLD_"))}
    done = subprocess.run(
        command, env=env | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    environment = json.loads((out / "environment.json").read_text())
    assert (environment["world_size"], environment["hosts"]) == (2, [os.uname().nodename] * 2)
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert run_state(out) == "finished"
