"""Files that are whole or absent: hashing, atomic writes, and folders swapped into place.

A folder is built beside its target under a hidden name and exchanged with it in one system call, so a reader, or a
process killed at any instant, meets the old folder or the new one and never a mixture.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.errors import F2rtError, OutputError

_CHUNK_BYTES = 4 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_PART = ".part"
_STALE_S = 3600.0
_FULL_BYTES = 1 << 20


def cache_folder() -> Path:
    """Return where what can be made again is kept: $F2RT_CACHE, or f2rt in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("F2RT_CACHE") or Path(base) / "f2rt")


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the hex SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Turn an OSError raised while writing `target` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        free_bytes = _free_bytes(target)
        # numpy says of a write that came out short only that it did.
        short = error.errno is None and free_bytes is not None and free_bytes < _FULL_BYTES
        if short or error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = "" if free_bytes is None else f" ({free_bytes / 1e9:.2f} GB left)"
            raise OutputError(
                f"no room to write {target}: the disk is full{left}. Nothing was changed.",
                cure="Free some space or choose another folder.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"cannot write {target}: {error.strerror}. Nothing was changed.",
                cure="Choose a folder you may write to, or change its permissions.",
            ) from error
        raise OutputError(
            f"cannot write {target}: {error}. Nothing was changed.", cure="Check the path and the disk."
        ) from error


@contextlib.contextmanager
def explain_read_errors(source: Path, kind: type[F2rtError]) -> Iterator[None]:
    """Turn an OSError raised while reading `source` into an error of this kind; a write around it stays a write."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"cannot read {source}: {error.strerror or error}.", cure="Check that it is there, and the disk it lies on."
        ) from error


def copy_file(source: Path, target: Path, kind: type[F2rtError]) -> None:
    """Copy a file's bytes. Raises an error of this kind when `source` cannot be read, OSError for the target."""
    with explain_read_errors(source, kind):
        reading = source.open("rb")
    with reading, target.open("wb") as writing:
        while True:
            with explain_read_errors(source, kind):
                data = reading.read(_CHUNK_BYTES)
            if not data:
                return
            writing.write(data)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the path holds the old bytes or all the new ones. Raises OutputError."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; when the block ends well it takes the place of `path`, otherwise it is gone.

    Raises OutputError for an OSError in the block.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(path)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _remove_stale_parts(path: Path) -> None:
    """Remove what writers killed long ago left beside `path`."""
    for part in path.parent.glob(f".{path.name}.*{_PART}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _STALE_S:
                part.unlink()


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well it takes the target's place in one step.

    When the block raises, or the process dies, `target` is untouched. Leftovers of dead processes are removed by the
    next call for the same target. Raises OutputError when the place cannot be written.
    """
    target = target.absolute()
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        staging, lock = _locked_folder(target)
    try:
        with explain_write_errors(target):
            yield staging
            _sync_tree(staging)
            _put_in_place(staging, target)
            _sync(target.parent)
    finally:
        # After an exchange this name holds the old folder; after a failure, the unfinished new one.
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int]:
    """Create a staging folder and lock it: the lock lives exactly as long as its owner."""
    while True:
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.staging-"))
        staging.chmod(0o755)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(staging, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if staging.exists():  # not taken for a leftover before it was locked
                    return staging, lock
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Remove staging folders whose owner is gone; put back an old folder that a dead owner had moved aside."""
    if _aside(target).exists():
        if target.exists():
            shutil.rmtree(_aside(target), ignore_errors=True)
        else:
            _aside(target).rename(target)
    for staging in target.parent.glob(f".{target.name}.staging-*"):
        try:
            lock = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staging, ignore_errors=True)
        except BlockingIOError:
            continue  # its owner is alive
        finally:
            os.close(lock)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
        if libc.renameat2(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(target))
    # A file system without an exchange: two renames. Between them the old folder stands under a name of its own, and
    # the next call puts it back if the process died there.
    aside = _aside(target)
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _sync_tree(path: Path) -> None:
    """Wait until every file and folder is on the disk: after a power cut the new name must not hold empty files."""
    for entry in [*path.rglob("*"), path]:
        _sync(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int | None:
    for folder in [path, *path.parents]:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return None
