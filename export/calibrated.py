"""What a bundle keeps of its calibration: digests of the texts, and what the probe measured of every tensor.

One file, `calibration-<hash>.json`, named after its content, shared by all graphs that were shaped by it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from calibration.statistics import Statistics
from calibration.texts import Text, normalized
from runtime.bundle import Bundle, FileRecord, GraphRecord, check_hash
from runtime.errors import BundleError
from runtime.files import write_atomic


@dataclass(frozen=True)
class Measured:
    """One tensor on calibration text: the largest magnitude of all channels, and of the median channel."""

    tensor: str
    absmax: float
    median_absmax: float


@dataclass(frozen=True)
class Calibration:
    """The content of the file. `digests` are those of `text_digest`, in the order of the texts."""

    texts_sha256: str
    tokens: int
    digests: list[str]
    tensors: list[Measured]


def text_digest(text: Text) -> str:
    """Return 16 hex digits of a text's normalized form; prompts do not count."""
    return hashlib.sha256(normalized(text.text).encode()).hexdigest()[:16]


def write_calibration(root: Path, calibration: Calibration) -> FileRecord:
    """Write the file under `root` and return its record. Raises OutputError."""
    data = msgspec.json.encode(calibration) + b"\n"
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"calibration-{sha256[:12]}.json"
    write_atomic(root / file, data)
    return FileRecord(file, sha256, len(data))


def read_calibration(bundle: Bundle, graph: GraphRecord) -> Calibration | None:
    """Return what shaped a graph; None for a graph that was not calibrated, or by a version that kept nothing.

    Raises BundleError for a file that is damaged or gone.
    """
    if graph.calibration is None:
        return None
    path = bundle.path(graph.calibration.file)
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle.", cure="Export the checkpoint again.")
    check_hash(bundle, graph.calibration)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} cannot be read: {error}.", cure="Export the checkpoint again.") from error


def measured_tensors(statistics: Statistics) -> list[Measured]:
    """Return one line per tensor the probe measured, in the order of the graph."""
    return [
        Measured(name, _short(float(channels.max())), _short(float(np.median(channels))))
        for name, channels in statistics.largest.items()
    ]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
