"""Meeting of a run's processes: ranks that Slurm knows, the network that gloo uses, restarts by the launcher."""

import fcntl
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] - documented there
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from moco_fast.training.process import NotMetError

__all__ = ["INIT_METHOD", "address_towards", "choose_interface", "interfaces", "local_ranks", "meeting", "resolve"]

INIT_METHOD = "restartable://"
"""Of `torch.distributed.init_process_group`: env://, but ranks that were restarted do not find what the dead left."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def _meet(url: str, **options: Any) -> Generator[tuple[Store, int, int]]:
    """Give the store through which ranks find each other, this one's rank, and their number; see INIT_METHOD.

    torchrun's static rendezvous, which accelerate uses by default, keeps one store over all restarts (torch 2.15,
    distributed/elastic/rendezvous/static_tcp_rendezvous.py, `next_rendezvous`), and gloo then connects to the addresses
    of dead processes. On one node the launcher's count of restarts tells the stores apart.

    Raises:
        ValueError: several nodes are restarted by the static rendezvous, which cannot bring them together again.
    """
    # torch adds rank and world size as a query, where they are given, and writes the rest in another way.
    for store, rank, world_size in rendezvous(f"env://?{urlparse(url).query}", **options):
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        if restarts is not None and os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = PrefixStore(f"moco_fast/start-{restarts}", store)
        elif restarts is not None and store.add(f"moco_fast/starts-of-{rank}", 1) > 1:
            raise ValueError(
                "the launcher restarts several nodes, but its static rendezvous cannot bring them together again: give "
                "--rdzv_backend c10d to `accelerate launch` or torchrun, on every node"
            )
        yield store, rank, world_size


register_rendezvous_handler(INIT_METHOD.partition(":")[0], _meet)


def local_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """Return what a launcher would have set of LOCAL_RANK and LOCAL_WORLD_SIZE, where ranks were set by hand.

    Args:
        env: the environment; below `srun`, Slurm's variables say it.

    Raises:
        ValueError: neither says it.
    """
    missing = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in env]
    if int(env.get("WORLD_SIZE", "1")) == 1 or not missing:
        return {}
    of_slurm = {"LOCAL_RANK": env.get("SLURM_LOCALID"), "LOCAL_WORLD_SIZE": _tasks_on_this_node(env)}
    found = {name: value for name in missing if (value := of_slurm[name]) is not None}
    if len(found) < len(missing):
        raise ValueError(
            f"WORLD_SIZE is {env['WORLD_SIZE']}, but {' and '.join(missing)} missing, by which a process chooses its "
            "GPU and its share of the cores: set LOCAL_RANK to its number on its node (under srun: $SLURM_LOCALID) and "
            "LOCAL_WORLD_SIZE to the number of processes there, or start one `accelerate launch` per node"
        )
    return found


def _tasks_on_this_node(env: Mapping[str, str]) -> str | None:
    """Read `SLURM_STEP_TASKS_PER_NODE`, such as 4(x2),3: two nodes with 4 tasks and one with 3."""
    counts: list[str] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)) is not None:
            counts += [match[1]] * int(match[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def choose_interface(
    env: MutableMapping[str, str],
    *,
    address_of: Callable[[str], str | None],
    addresses: Callable[[], Mapping[str, str]],
    towards: Callable[[str], str | None],
) -> str | None:
    """Set GLOO_SOCKET_IFNAME where gloo would choose an address that other nodes cannot reach.

    gloo binds to what the hostname resolves to, which on Debian is often 127.0.1.1. The network is the one that
    NCCL_SOCKET_IFNAME names, else the one that leads to the first node, else the only one.

    Args:
        env: the environment, which is changed.
        address_of: resolves a name; None: it has no address.
        addresses: lists this machine's addresses, without loopback, by interface.
        towards: returns this machine's address from which it reaches another one.

    Returns:
        a line that says what was chosen; None: nothing had to be.

    Raises:
        NotMetError: it is not clear which network the nodes share, or GLOO_SOCKET_IFNAME names none of this machine's.
    """
    on_one_node = int(env.get("WORLD_SIZE", "1")) == int(env.get("LOCAL_WORLD_SIZE", "1"))
    master = env.get("MASTER_ADDR", "localhost")
    if on_one_node or master == "localhost" or _is_loopback(master):
        return None
    own = os.uname().nodename
    if (named := env.get("GLOO_SOCKET_IFNAME")) is not None:
        _check_named(named, addresses(), own)
        return None
    address = address_of(own)
    if address is not None and not _is_loopback(address):
        return None
    found = _of_nccl(env.get("NCCL_SOCKET_IFNAME", ""), addresses())
    first_node = address_of(master)
    if first_node is not None and not _is_loopback(first_node):
        used = towards(first_node)
        found = {name: each for name, each in found.items() if each == used} or found
    if len(found) != 1:
        raise NotMetError(
            f"the name of this machine, {own}, resolves to {address or 'nothing'}, which other nodes cannot reach: set "
            f"GLOO_SOCKET_IFNAME to the interface of the network that the nodes share; here are {_listed(found)}"
        )
    [name] = found
    env["GLOO_SOCKET_IFNAME"] = name
    return f"network: gloo uses {name}, since {own} resolves to {address or 'nothing'} (GLOO_SOCKET_IFNAME decides)"


def _check_named(named: str, found: Mapping[str, str], own: str) -> None:
    if unknown := [name for name in named.split(",") if name not in found and name != "lo"]:
        raise NotMetError(
            f"GLOO_SOCKET_IFNAME is {named}, but {own} has no interface {', '.join(unknown)} with an address: name the "
            f"one of the network that the nodes share; here are {_listed(found)}"
        )


def _of_nccl(named: str, found: Mapping[str, str]) -> Mapping[str, str]:
    """Return the interfaces that NCCL_SOCKET_IFNAME allows, all if none.

    It is a list of prefixes, or after `=` of whole names; `^` before either makes it a list of those that are not meant
    (NCCL's documentation of its environment variables).
    """
    mark = re.match(r"\^?=?", named)
    assert mark is not None
    names = [name for name in named[mark.end() :].split(",") if name]
    matches = str.__eq__ if "=" in mark[0] else str.startswith
    is_meant = {interface: any(matches(interface, name) for name in names) for interface in found}
    return {name: each for name, each in found.items() if is_meant[name] != ("^" in mark[0])} or found


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({each})" for name, each in found.items()) or "none but loopback"


@contextmanager
def meeting(env: Mapping[str, str]) -> Generator[None]:
    """Say, where the ranks cannot be connected in the block, which addresses were tried and what to set.

    Raises:
        NotMetError: in place of torch's, gloo's or NCCL's own error.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if int(env.get("WORLD_SIZE", "1")) == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise NotMetError(_not_met(error, env)) from error


def _not_met(error: RuntimeError, env: Mapping[str, str]) -> str:
    own, master, port = os.uname().nodename, env.get("MASTER_ADDR", "localhost"), env.get("MASTER_PORT", "?")
    reason = str(error).strip().partition("\n")[0][:200]
    named = env.get("GLOO_SOCKET_IFNAME")
    offered = f"interface {named}" if named else f"{own}, which is {resolve(own) or 'no address'}"
    return (
        f"rank {env.get('RANK', '?')} of {env['WORLD_SIZE']} did not find the others ({reason}): it tried the first "
        f"node at {master} port {port}, which is {resolve(master) or 'no address'}, and offers {offered}. If others "
        "reach these by another address, give it as --main_process_ip, and the interface of the network that the nodes "
        f"share as GLOO_SOCKET_IFNAME and, on GPUs, NCCL_SOCKET_IFNAME; here are {_listed(interfaces())}"
    )


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def resolve(name: str) -> str | None:
    """Return the first address of a name."""
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def address_towards(address: str) -> str | None:
    """Return this machine's address from which it reaches another one; sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def interfaces() -> dict[str, str]:
    """Return this machine's addresses by interface, without loopback: IPv4, or IPv6 where there is no other."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # It has no address.
            address = socket.inet_ntoa(answer[20:24])
            if not _is_loopback(address):
                found[name] = address
    return _global_ipv6() | found


def _global_ipv6(table: Path = Path("/proc/net/if_inet6")) -> dict[str, str]:
    """Return addresses of global scope; Linux gives each line address, index, prefix length, scope, flags and name."""
    lines = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return {line[5]: str(ipaddress.IPv6Address(int(line[0], 16))) for line in lines if line[3] == "00"}
