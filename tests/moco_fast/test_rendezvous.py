"""How a run's processes find each other: ranks set by hand, and networks."""

import os

import pytest

from moco_fast.training.rendezvous import address_towards, choose_interface, interfaces, local_ranks, resolve

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
        {**TWO_NODES, "MASTER_ADDR": "127.0.0.1"},
        {**TWO_NODES, "MASTER_ADDR": "localhost"},
    ],
)
def test_gloo_is_left_alone_where_it_chooses_well(env: dict[str, str]) -> None:
    before = dict(env)
    assert choose(env) is None
    assert env == before
    assert choose(dict(TWO_NODES), own="10.0.0.5") is None


def test_this_machine_has_addresses() -> None:
    assert resolve("127.0.0.1") == address_towards("127.0.0.1") == "127.0.0.1"
    assert resolve("no-such-name.invalid") is None
    assert not any(address.startswith("127.") for address in interfaces().values())
