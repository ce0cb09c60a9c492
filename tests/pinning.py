"""A pytest plugin: each of pytest-xdist's workers computes on CPUs of its own.

Without it every worker starts a thread per core of the machine, and they wait for each other. It is loaded with `-p`,
not from conftest: libraries count the CPUs when they are imported.
"""

from __future__ import annotations

import os

_WORKER, _WORKERS = (os.environ.get(f"PYTEST_XDIST_WORKER{suffix}", "") for suffix in ("", "_COUNT"))

if _WORKER and hasattr(os, "sched_setaffinity"):
    _cpus = sorted(os.sched_getaffinity(0))
    _number, _count = int(_WORKER.removeprefix("gw")), min(int(_WORKERS), len(_cpus))
    os.sched_setaffinity(0, _cpus[_number % _count :: _count])
