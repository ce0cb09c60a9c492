"""ONNX Runtime: runs the bundle's graph on CPU. Input and output as in the bundle's ONNX contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtime.batch import Batch
from runtime.errors import EngineError
from runtime.settings import EngineSettings

_OUTPUT = "sentence_embedding"


class OnnxRuntimeEngine:
    """One session on one graph."""

    def __init__(self, path: Path, *, name: str, precision: str, fingerprint: str, settings: EngineSettings) -> None:
        """Load the graph. Raises EngineError with the library's words when it cannot be loaded."""
        self.name = name
        self.precision = precision
        self.fingerprint = fingerprint
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Of products with 8-bit weights alone: the largest blocks the kernel takes, a quarter faster than its default.
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "-1")
        # Spinning threads keep a core busy between requests; a server shares its cores with gRPC and tokenization.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spin else "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions share no base class
            raise EngineError(
                f"ONNX Runtime cannot load {path}: {error}",
                cure="Export the checkpoint again with this f2rt.",
            ) from error

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Return float32 [rows, dim]. Raises EngineError when the library fails or a value is not finite."""
        feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        try:
            (vectors,) = self._session.run([_OUTPUT], feeds)
        except Exception as error:
            raise EngineError(
                f"{self.name} failed on a batch of {batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}: {error}",
                cure="Try a smaller batch; report it when one text alone fails.",
            ) from error
        return np.asarray(vectors, np.float32)

    def close(self) -> None:
        """Drop the session."""
        del self._session
