"""Tensors on disk: safetensors, one file or sharded, read piece by piece from a memory map.

Knows names, shapes and dtypes; not what a tensor is for. A pickle is never opened.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from runtime.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ABSMAX_ROWS = 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, under which name, and what it is. `dtype` is a safetensors name such as BF16."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class Weights:
    """The tensors of a checkpoint under their bare names: a leading `model.` is dropped."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files. Raises CheckpointError for missing, damaged or pickled weights."""
        self.files = _weight_files(folder)
        self._tensors: dict[str, TensorInfo] = {}
        for file, keys in self.files.items():
            for info in _read_header(file, keys):
                name = info.key.removeprefix("model.")
                if name in self._tensors:
                    raise CheckpointError(
                        f"{file} holds {info.key}, and {self._tensors[name].key} stands in {self._tensors[name].file}.",
                        cure="Keep one of the two: with and without `model.` they mean the same tensor.",
                    )
                self._tensors[name] = info

    def names(self) -> list[str]:
        """Return all bare names."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return what is known of a tensor; raises KeyError."""
        return self._tensors[name]

    def rows(self, name: str, chunk_rows: int) -> Iterator[NDArray[np.generic]]:
        """Yield a tensor in pieces of at most `chunk_rows` rows, in its own dtype.

        The file is mapped anew for each piece and unmapped after it, so what was read does not stay resident.
        """
        info = self._tensors[name]
        for start in range(0, info.shape[0], chunk_rows):
            with _reading(info), safe_open(info.file, "np") as file:
                piece = file.get_slice(info.key)[start : min(start + chunk_rows, info.shape[0])]
            yield piece

    def read(self, name: str) -> NDArray[np.generic]:
        """Return a whole tensor in its own dtype. Raises CheckpointError when it cannot be read any more."""
        info = self._tensors[name]
        with _reading(info), safe_open(info.file, "np") as file:
            tensor: NDArray[np.generic] = file.get_tensor(info.key)
        return tensor


@contextlib.contextmanager
def _reading(info: TensorInfo) -> Iterator[None]:
    """Say which tensor and file could not be read: the caller may be writing at the time, and is not at fault."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read {info.key} from {info.file}: {error}.",
            cure="Check that the file is there and was not changed meanwhile, and the disk it lies on.",
        ) from error


def absmax(weights: Weights, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the largest magnitude in each row and each column of a matrix, float32 [rows] and [columns]."""
    rows, columns = [], np.zeros(weights.info(name).shape[-1], np.float32)
    for piece in weights.rows(name, _ABSMAX_ROWS):
        magnitudes = np.abs(to_float32(piece))
        rows.append(magnitudes.max(axis=1))
        columns = np.maximum(columns, magnitudes.max(axis=0))
    return np.concatenate(rows), columns


def to_float32(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Widen bfloat16, float16 or float32 to float32; exact."""
    if values.dtype == ml_dtypes.bfloat16:
        # A bfloat16 is the upper half of a float32: shifting is exact and several times faster than a cast.
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Return each file with the keys it must hold, or None where any will do."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            by_file: dict[Path, list[str] | None] = {}
            for key, name in sorted(weight_map.items()):
                keys = by_file.setdefault(folder / Path(name).name, [])
                assert keys is not None
                keys.append(key)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{index} is not a safetensors index: {error!r}.", cure="Download it again."
            ) from error
        missing = sorted(f.name for f in by_file if not f.is_file())
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(by_file)} shards named in {index} are missing: {', '.join(missing[:5])}.",
                cure="Download them into the same folder.",
            )
        return by_file
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds a pickle ({', '.join(pickles[:3])}); a pickle can run code: it is not read.",
            cure="Convert it: model.save_pretrained(folder, safe_serialization=True).",
        )
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}.",
        cure="Give the folder of a checkpoint in safetensors form.",
    )


def _read_header(file: Path, keys: list[str] | None) -> list[TensorInfo]:
    try:
        with safe_open(file, "np") as handle:
            there = set(handle.keys())
            absent = sorted(set(keys or ()) - there)
            if absent:
                raise CheckpointError(
                    f"{file} does not hold {absent[0]}, though the index says so ({len(absent)} tensors are missing).",
                    cure="Download the shard again.",
                )
            slices = {key: handle.get_slice(key) for key in sorted(there if keys is None else keys)}
            infos = [TensorInfo(file, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}.", cure="Download it again.") from error
    for info in infos:
        if info.dtype not in _DTYPES and not info.key.endswith("inv_freq"):
            raise CheckpointError(
                f"{info.key} in {file} is {info.dtype}; f2rt reads {', '.join(_DTYPES)}.",
                cure="Give the unquantized checkpoint.",
            )
    return infos
