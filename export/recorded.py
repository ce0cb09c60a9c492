"""PyTorch's ids and vectors, recorded in the cache: PyTorch itself is loaded when the first one is missing.

Recorded under the hashes of everything PyTorch reads and the versions of what computes. What is new is written every
few texts, whole, so a pass that was interrupted resumes; a file that is not what was written is removed and its part
computed again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.cache import explain_cache_errors
from export.checkpoint import reference_files
from export.hub import Location
from export.reference import Reference, reference_versions
from runtime.bundle import Source, fingerprint
from runtime.files import cache_folder, sha256_text, write_atomic

CHUNK_VECTORS = 16
_CHUNK_S = 5.0
_SUFFIX = ".vectors"


class _Chunk(msgspec.Struct):
    """Token ids by the hash of limit and text; float32 little-endian vectors and layer states by that of the ids."""

    ids: dict[str, list[int]] = {}
    vectors: dict[str, bytes] = {}
    states: dict[str, tuple[int, bytes]] = {}


class RecordedReference:
    """Stands for a `Reference` of the same checkpoint. `computed` counts the vectors PyTorch was asked for.

    A context manager: leaving it records what is new, also after an error.
    """

    def __init__(self, location: Location, source: Source, *, cache: Path | None = None) -> None:
        """Read what is recorded. `location` holds the files of `source`, byte for byte.

        Raises MissingExtraError without torch or transformers.
        """
        self.location = location
        self.versions = reference_versions()
        self.computed = 0
        files = [f"{f.file}:{f.sha256}" for f in reference_files(source)]
        key = fingerprint(["reference 1", *sorted(files), *(f"{k} {v}" for k, v in sorted(self.versions.items()))])
        self._folder = (cache or cache_folder()) / "reference" / key
        self._model: Reference | None = None
        self._known = _Chunk()
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            self._read(path)
        self._new = _Chunk()
        self._written_s = time.monotonic()

    def __enter__(self) -> RecordedReference:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._record()

    @property
    def model(self) -> Reference:
        """PyTorch's model, loaded now if it was not."""
        if self._model is None:
            self._model = Reference(self.location)
        return self._model

    def tokenize(self, text: str, max_tokens: int) -> list[int]:
        """Return the ids transformers gives a rendered text, truncated to `max_tokens`."""
        key = sha256_text(f"{max_tokens} {text}")
        if key not in self._known.ids:
            self._known.ids[key] = self._new.ids[key] = self.model.tokenize(text, max_tokens)
        return self._known.ids[key]

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return PyTorch's vector of one text, float32 [dim]. Raises OutputError when it cannot be recorded."""
        key = _key(ids)
        if key not in self._known.vectors:
            vector = self.model.embed(ids)
            self.computed += 1
            self._known.vectors[key] = self._new.vectors[key] = vector.astype("<f4").tobytes()
            due = time.monotonic() - self._written_s > _CHUNK_S
            if due or len(self._new.vectors) >= CHUNK_VECTORS:
                self._record()
        return np.frombuffer(self._known.vectors[key], "<f4").astype(np.float32)

    def layer_states(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the last token's states, float32 [layers + 1, dim]."""
        key = _key(ids)
        if key not in self._known.states:
            states = self.model.layer_states(ids)
            self._known.states[key] = self._new.states[key] = len(states), states.astype("<f4").tobytes()
        rows, data = self._known.states[key]
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(rows, -1)

    def hidden(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the final-norm hidden states of one text, float32 [tokens, dim]; these are not recorded."""
        return self.model.hidden(ids)

    def _record(self) -> None:
        """Write what is new under the hash of its own bytes."""
        if self._new.ids or self._new.vectors or self._new.states:
            data = msgspec.msgpack.encode(self._new)
            with explain_cache_errors():
                write_atomic(self._folder / f"{hashlib.sha256(data).hexdigest()}{_SUFFIX}", data)
        self._new = _Chunk()
        self._written_s = time.monotonic()

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        if f"{hashlib.sha256(data).hexdigest()}{_SUFFIX}" != path.name:
            path.unlink(missing_ok=True)
            return
        chunk = msgspec.msgpack.decode(data, type=_Chunk)
        self._known.ids |= chunk.ids
        self._known.vectors |= chunk.vectors
        self._known.states |= chunk.states


def _key(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest()
