"""The TensorRT engine with doubles of GPU and library behind it, its batches, and what they must give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch, make_batch
from runtime.bundle import EngineRecord
from runtime.engines.cuda import Device
from runtime.engines.tensorrt import TensorRTEngine
from runtime.files import sha256_file
from runtime.settings import EngineSettings
from tests.fake_device import L4, FakeCuda, FakeTensorRT, Model, Profiles, write_plan

PROFILES: Profiles = [(1, 64), (8, 128), (8, 512), (1, 1024)]
DIM = 256
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
BACKENDS = list(VERSIONS)


def record_for(path: Path, backend: str, **changes: Any) -> EngineRecord:
    """A record as `f2rt build` writes it for an L4."""
    record = EngineRecord(
        name=f"{backend}:fp32",
        backend=backend,
        precision="fp32",
        file=f"engines/{path.name}",
        sha256=sha256_file(path),
        fingerprint="f" * 32,
        builder={"f2rt": "0.1.0", backend: VERSIONS[backend]},
        profiles=[f"{r}x{t}" for r, t in PROFILES],
        target="sm89",
    )
    return replace(record, **changes)


class Rig:
    """An engine with the doubles behind it."""

    def __init__(
        self, folder: Path, model: Model, backend: str = "tensorrt", *, profiles: Profiles = PROFILES,
        device: Device = L4, settings: EngineSettings = EngineSettings(), memory_bytes: int = 1 << 40,
        changes: dict[str, Any] | None = None, **plan: Any,
    ) -> None:  # fmt: skip
        self.path = folder / "plan.engine"
        write_plan(self.path, backend, profiles, DIM, **plan)
        self.record = record_for(self.path, backend, **(changes or {}))
        self.cuda = FakeCuda(device, memory_bytes=memory_bytes)
        self.library = FakeTensorRT(self.cuda, model, version=VERSIONS[backend])
        self._settings = settings

    def open(self) -> TensorRTEngine:
        library: Any = self.library
        return TensorRTEngine(self.path, self.record, self._settings, cuda=self.cuda, library=library)


def random_batch(lengths: list[int], *, width: int | None = None, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return make_batch([rng.integers(0, 15_000, n).tolist() for n in lengths], 15_984, width=width)


def alone(graph: Model, batch: Batch) -> NDArray[np.float32]:
    """Each row by itself and unpadded."""
    rows = zip(batch.input_ids, batch.lengths, strict=True)
    return np.concatenate([graph(ids[None, :n], np.ones((1, n), np.int64)) for ids, n in rows])
