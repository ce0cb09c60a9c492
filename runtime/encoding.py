"""Vectors as bytes and back: little-endian, row-major. Shared by services and clients; knows no wire protocol."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError


class OutputDType(StrEnum):
    """How the values of a vector travel."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    BINARY = "binary"


def encode(vectors: NDArray[np.float32], dtype: OutputDType) -> tuple[bytes, NDArray[np.float32] | None]:
    """Return the bytes of float32 [rows, dim], and for INT8 the scale of each row (float32 [rows]).

    INT8 is symmetric per row: q = round(v / scale), scale = max|v| / 127. BINARY keeps the sign: one bit each, 1 where
    v > 0, the first value in the highest bit, rows padded to whole bytes.
    """
    if dtype is OutputDType.FLOAT32:
        return vectors.astype("<f4", copy=False).tobytes(), None
    if dtype is OutputDType.FLOAT16:
        return vectors.astype("<f2").tobytes(), None
    if dtype is OutputDType.BINARY:
        return np.packbits(vectors > 0, axis=1).tobytes(), None
    largest = np.abs(vectors).max(axis=1)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(vectors / scales[:, None]).astype(np.int8).tobytes(), scales


def decode(
    data: bytes, rows: int, dim: int, dtype: OutputDType, scales: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Undo `encode`: float32 [rows, dim]; BINARY gives -1 and 1. Raises InputError when the byte count is wrong."""
    width = {OutputDType.FLOAT32: 4 * dim, OutputDType.FLOAT16: 2 * dim, OutputDType.INT8: dim}.get(dtype, -(-dim // 8))
    if len(data) != rows * width:
        raise InputError(
            f"{len(data)} bytes are not {rows} rows of {dim} {dtype} values ({rows * width} bytes).",
            cure="Client and server do not fit together: update the older one.",
        )
    if dtype is OutputDType.FLOAT32:
        return np.frombuffer(data, "<f4").reshape(rows, dim).astype(np.float32, copy=False)
    if dtype is OutputDType.FLOAT16:
        return np.frombuffer(data, "<f2").reshape(rows, dim).astype(np.float32)
    if dtype is OutputDType.BINARY:
        bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(rows, width), axis=1, count=dim)
        return bits.astype(np.float32) * 2 - 1
    if scales is None:
        raise InputError("int8 values came without their scales.", cure="Update the server.")
    return np.frombuffer(data, np.int8).reshape(rows, dim).astype(np.float32) * scales[:, None]
