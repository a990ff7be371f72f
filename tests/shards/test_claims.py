import threading

import pytest

from shards.ground.locks import locked
from shards.storage.claims import BucketClaims, LocalClaims
from shards.storage.stores import Folder


@pytest.fixture
def machine(bucket, tmp_path):
    """Makes the claims of a machine; `clock` gives its seconds, and no sign of life is sent but by `renew_s`."""

    def make(name, clock=lambda: 0.0, renew_s=1e6):
        (tmp_path / name).mkdir(exist_ok=True)
        return BucketClaims(Folder(bucket), "leases", tmp_path / name, renew_s=renew_s, expired_s=60, clock=clock)

    return make


def test_a_claim_is_held_by_one_process_of_a_folder(tmp_path):
    with LocalClaims(tmp_path).hold("x") as first, LocalClaims(tmp_path).hold("x") as second:
        assert (first, second) == (True, False)
        with LocalClaims(tmp_path).hold("y") as other:
            assert other
    with LocalClaims(tmp_path).hold("x") as third:
        assert third


def test_a_claim_is_held_by_one_machine_until_it_is_let_go(machine):
    one, two = machine("one"), machine("two")
    with one.hold("x") as first:
        for claims in (two, machine("one")):
            with claims.hold("x") as second:
                assert (first, second) == (True, False)
        with two.hold("y") as other:
            assert other
    with two.hold("x") as third, one.hold("x") as fourth:
        assert (third, fourth) == (True, False)


def die_with(claims, name):
    """Take a claim as a process does that is killed: its lease stays, its lock does not."""
    return claims._take(name)


def test_a_dead_holder_loses_its_claim_to_its_own_machine_at_once(machine):
    assert die_with(machine("one"), "x")
    with machine("one").hold("x") as is_ours:
        assert is_ours


def test_a_dead_holder_loses_its_claim_to_another_machine_after_a_minute(machine):
    now = [1000.0]
    two = machine("two", clock=lambda: now[0])
    assert die_with(machine("one"), "x")
    for seconds, expected in ((0, False), (59, False), (1, True)):
        now[0] += seconds
        with two.hold("x") as is_ours:
            assert is_ours == expected


def test_a_holder_that_gives_signs_of_life_keeps_its_claim(machine, bucket):
    now = [0.0]
    two = machine("two", clock=lambda: now[0])
    with machine("one", renew_s=0.01).hold("x") as first:
        assert first
        for _ in range(3):
            with two.hold("x") as second:
                assert not second
            before = Folder(bucket).read("leases/x-000001")
            while Folder(bucket).read("leases/x-000001") == before:
                pass
            now[0] += 61


def test_of_several_that_find_a_dead_holder_one_takes_over(machine):
    assert die_with(machine("dead"), "x")
    now, claims = [0.0], []
    for number in range(4):
        claims.append(machine(f"m{number}", clock=lambda: now[0]))
        with claims[-1].hold("x") as is_ours:
            assert not is_ours
    now[0], together, found = 61.0, threading.Barrier(4), []

    def take(each):
        together.wait(20)
        with each.hold("x") as is_ours:
            found.append(is_ours)
            together.wait(20)

    threads = [threading.Thread(target=take, args=(each,)) for each in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, False, False, True]


def test_a_lock_of_the_same_machine_is_enough_to_say_no(machine, tmp_path):
    claims = machine("one")
    with locked(tmp_path / "one" / "lock-x", holder="x"), claims.hold("x") as is_ours:
        assert not is_ours
