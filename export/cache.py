"""The folder where f2rt keeps what is dear to compute, and the hashes of files it has read before.

A hash is taken from here only while device, inode, size, and both times of a file are what they were when it was read;
a file changed within the last moments before that is not entered, since its times could not show another change.
Nothing here is needed: an entry that is missing, damaged or cannot be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from runtime.errors import OutputError
from runtime.files import cache_folder, sha256_text, write_atomic

_CHUNK_BYTES = 8 << 20
# Longer than the steps in which any file system counts time.
_SETTLED_NS = 3_000_000_000


class _Entry(msgspec.Struct):
    """What a file was when it was hashed. Times in nanoseconds since 1970."""

    path: str
    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int
    sha256: str = ""


@contextlib.contextmanager
def explain_cache_errors() -> Iterator[None]:
    """Say of an OutputError that it is the cache which cannot be written, and how to choose another."""
    try:
        yield
    except OutputError as error:
        raise OutputError(
            f"f2rt's cache: {error.message}", cure="Free some space, or point F2RT_CACHE to another folder."
        ) from error


def cached_sha256(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Return the hex SHA-256 of a file's bytes, reading it only when it may have changed since it was last read.

    `advance` is told the number of bytes done. Raises OSError when the file cannot be read.
    """
    now = _describe(path)
    place = cache_folder() / "hashes" / f"{sha256_text(now.path)}.json"
    known = _read(place)
    if known is not None and msgspec.structs.replace(known, sha256="") == now:
        advance(now.size_bytes)
        return known.sha256
    start_ns = time.time_ns()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    settled = max(now.modified_ns, now.changed_ns) + _SETTLED_NS < start_ns
    if settled and _describe(path) == now:
        with contextlib.suppress(OutputError):
            write_atomic(place, msgspec.json.encode(msgspec.structs.replace(now, sha256=digest.hexdigest())))
    return digest.hexdigest()


def _describe(path: Path) -> _Entry:
    found = path.stat()
    return _Entry(str(path.absolute()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(place: Path) -> _Entry | None:
    try:
        return msgspec.json.decode(place.read_bytes(), type=_Entry)
    except (OSError, msgspec.DecodeError):
        return None
