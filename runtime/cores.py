"""How many threads of computation this process has cores for."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Return how many physical cores the process may keep busy, at least 1.

    Counted are the CPUs its affinity allows, two threads of one core as one; a container's CPU quota (cgroup v2 or v1)
    bounds them, rounded down: a thread beyond it is stopped by the kernel in the middle of a batch. ONNX Runtime's own
    default counts the machine's cores, whatever the process may use of them.
    """
    cores = physical_cores()
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores() -> int:
    """Return the cores that the process' affinity allows, two threads of one core counting as one."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = _CPUS / f"cpu{cpu}/topology/thread_siblings_list"
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    return len(siblings)


def cpu_quota() -> float | None:
    """Return the smallest CPU quota of the process' control groups, in CPUs; None where there is none."""
    quotas = []
    for line in _text(_OWN_CGROUPS).splitlines():
        parts = line.split(":", 2)
        if len(parts) < 3:
            continue
        controllers, path = parts[1].split(","), parts[2]
        if controllers == [""]:
            roots, read = [_CGROUPS, _CGROUPS / "unified"], _quota_v2
        elif "cpu" in controllers:
            names = [",".join(controllers), ",".join(reversed(controllers)), "cpu"]
            roots, read = [_CGROUPS / name for name in dict.fromkeys(names)], _quota_v1
        else:
            continue
        for root in roots:
            # Inside a container the group it sees as its own may stand at the root: the path then leads nowhere.
            own = root / path.lstrip("/")
            quotas += [read(folder) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return min((q for q in quotas if q is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_text(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period"))
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
