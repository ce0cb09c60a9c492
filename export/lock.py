"""One writer at a time: whoever changes a bundle holds its lock, so that no one's entry is lost.

The lock is an flock on `.<bundle>.lock` beside the bundle, since the bundle itself is exchanged as a whole. The kernel
drops it with its owner, however that one ends; the file goes when its owner is done, and a file left by a killed owner
is simply taken. Who only reads a bundle (serve, embed, inspect) needs no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import timestamp
from runtime.errors import OutputError
from runtime.files import explain_write_errors

WAIT_S = 3600.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Wait:
    """How long to wait for another process that changes the same bundle, in seconds; `tell` is told for whom."""

    seconds: float = WAIT_S
    tell: Callable[[str], None] = lambda message: None


@contextlib.contextmanager
def bundle_lock(folder: Path, command: str, wait: Wait = Wait(), doing: str = "changing") -> Iterator[None]:
    """Hold the lock of the bundle at `folder`, which need not exist yet, as `command`.

    Any folder can be held so; `doing` is the word for what its owner does to it. Raises OutputError when another
    process holds it for longer than `wait` allows, or the place cannot be written.
    """
    folder = folder.resolve()
    with explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        path, descriptor = _acquire(folder, command, wait, doing)
    try:
        yield
    finally:
        if path != folder:
            # While it is still held: whoever waits for this file sees that it is gone, and takes the next one.
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _acquire(folder: Path, command: str, wait: Wait, doing: str) -> tuple[Path, int]:
    """Return the locked path and its descriptor."""
    start = time.monotonic()
    told = False
    while True:
        path, descriptor = _open(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                if path != folder:
                    _sign(descriptor, command)
                return path, descriptor
            os.close(descriptor)  # its last owner removed it between our opening and locking it
            continue
        except BlockingIOError:
            owner = _owner(descriptor) if path != folder else ""
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if time.monotonic() - start >= wait.seconds:
            raise OutputError(
                f"{folder} is being changed by {owner or 'another f2rt'}; waited {wait.seconds:g} s for it.",
                cure="Let it finish, or stop it, and run this again; --wait SECONDS waits longer.",
            )
        if not told:
            wait.tell(f"waiting for {owner or 'another f2rt'}, which is {doing} {folder}")
            told = True
        time.sleep(_POLL_S)


def _open(folder: Path) -> tuple[Path, int]:
    """Open the lock file; the bundle itself where nothing can be written beside it, and so nothing be exchanged."""
    path = folder.parent / f".{folder.name}.lock"
    try:
        return path, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        if not folder.is_dir() or os.access(folder.parent, os.W_OK):
            raise
        return folder, os.open(folder, os.O_RDONLY)


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is the one that stands at `path` now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _sign(descriptor: int, command: str) -> None:
    """Say who holds the lock. Only words for whoever waits: on a full disk they are missing, and the lock holds."""
    now = timestamp()
    line = f"{command} (process {os.getpid()} on {socket.gethostname()}, since {now})"
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, line.encode(), 0)


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace")
