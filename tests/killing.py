"""Kills a process with SIGKILL at each of its changes of the file system, and looks at what it leaves.

A test's script runs in a process of its own and calls `at_every_change`; the test reads what it found with `run`. No
thread may have been started before, since only the calling thread goes on in a forked child: a script that needs
PyTorch or an engine uses it in `act` alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlsym")


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in _CHANGES


def kill_at(point: int) -> None:
    """Kill this process just before its `point`-th change of the file system from now on."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _is_change(event, arguments):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def at_every_change(
    prepare: Callable[[int], None], act: Callable[[int], None], check: Callable[[], dict[str, object]]
) -> None:
    """Run `act` in a child per point, killed there, until one lives to its end; print what `check` finds after each.

    `prepare` and `act` get the point's number; `check` raises when what the child left behind is broken.
    """
    point, status = 0, -1
    while status != 0:
        point += 1
        prepare(point)
        child = os.fork()
        if child == 0:
            try:
                kill_at(point)
                act(point)
                os._exit(0)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"point": point, "status": status, **check()}), flush=True)


def run(script: str, *arguments: object, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a script that calls `at_every_change`; every child but the last must have been killed, the last must be well.

    Returns what was found after each point.
    """
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr  # `check` raised: what was left is broken
    points: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [os.WTERMSIG(p["status"]) for p in points[:-1]] == [signal.SIGKILL] * (len(points) - 1), points
    assert points[-1]["status"] == 0
    return points
