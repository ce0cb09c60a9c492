"""How many threads there are cores for: from the affinity, and from a container's quota as the kernel writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import cores
from runtime.cores import cpu_quota, physical_cores, usable_cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /sys/fs/cgroup; `own` beside it for /proc/self/cgroup."""
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    return tmp_path / "cgroup"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_no_quota(groups: Path) -> None:
    assert cpu_quota() is None
    write(groups.parent / "own", "0::/user.slice/x.scope")
    write(groups / "user.slice/cpu.max", "max 100000")
    assert cpu_quota() is None
    assert usable_cores() == physical_cores()


def test_the_smallest_quota_of_a_group_and_those_above_it(groups: Path) -> None:
    write(groups.parent / "own", "0::/kubepods/pod/container")
    write(groups / "kubepods/pod/container/cpu.max", "max 100000")
    write(groups / "kubepods/pod/cpu.max", "250000 100000")
    write(groups / "kubepods/cpu.max", "6400000 100000")
    assert cpu_quota() == 2.5


def test_a_container_sees_its_own_group_as_the_root(groups: Path) -> None:
    write(groups.parent / "own", "0::/")
    write(groups / "cpu.max", "150000 100000")
    assert cpu_quota() == 1.5


def test_the_older_hierarchy(groups: Path) -> None:
    write(groups.parent / "own", "12:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/docker/1")
    write(groups / "cpu,cpuacct/docker/1/cpu.cfs_quota_us", "-1")
    write(groups / "cpu,cpuacct/docker/1/cpu.cfs_period_us", "100000")
    assert cpu_quota() is None
    write(groups / "cpu,cpuacct/cpu.cfs_quota_us", "300000")  # the container's, where the path leads nowhere
    write(groups / "cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert cpu_quota() == 3


@pytest.mark.parametrize(("listed", "mounted"), [("cpuacct,cpu", "cpu,cpuacct"), ("cpu,cpuacct", "cpu")])
def test_the_older_hierarchy_under_another_name(groups: Path, listed: str, mounted: str) -> None:
    write(groups.parent / "own", f"4:{listed}:/docker/1")
    write(groups / mounted / "docker/1/cpu.cfs_quota_us", "200000")
    write(groups / mounted / "docker/1/cpu.cfs_period_us", "100000")
    assert cpu_quota() == 2


def test_lines_that_say_nothing(groups: Path) -> None:
    write(groups.parent / "own", "\nnonsense\n0::/x")
    write(groups / "x/cpu.max", "100000 0")
    write(groups / "unified/x/cpu.max", "300000 100000")
    assert cpu_quota() == 3


@pytest.mark.parametrize(("quota", "expected"), [(0.4, 1), (1.9, 1), (2.0, 2), (64.0, 8)])
def test_a_quota_is_rounded_down_and_bounded_by_the_cores(
    quota: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "physical_cores", lambda: 8)
    assert usable_cores() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_a_process_bound_to_one_cpu_has_one_core() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
