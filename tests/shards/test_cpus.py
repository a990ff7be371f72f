import os

import pytest

from shards.ground.cpus import available_cpus


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    def write(**files: str):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return write


def test_the_whole_machine_where_nothing_limits(cgroup):
    assert available_cpus(cgroup=cgroup()) == 64
    assert available_cpus(8, cgroup=cgroup()) == 8
    assert available_cpus(100, cgroup=cgroup()) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu_dot_max": "max 100000"}, 64),
        ({"cpu_dot_max": "250000 100000"}, 2),
        ({"cpu_dot_max": "50000 100000"}, 1),
        ({"cpu__cpu_dot_cfs_quota_us": "400000", "cpu__cpu_dot_cfs_period_us": "100000"}, 4),
        ({"cpu__cpu_dot_cfs_quota_us": "-1", "cpu__cpu_dot_cfs_period_us": "100000"}, 64),
        ({"cpuset_dot_cpus_dot_effective": "0-3,8,10-11"}, 7),
    ],
)
def test_limits_of_the_container(cgroup, files, expected):
    assert available_cpus(cgroup=cgroup(**files)) == expected


def test_affinity_of_this_rank_alone_is_not_divided_again(cgroup, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert available_cpus(8, cgroup=cgroup()) == 8
    assert available_cpus(32, cgroup=cgroup()) == 2
