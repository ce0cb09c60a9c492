"""ONNX Runtime: runs the bundle's graph, on CPU or on an NVIDIA GPU. Input and output as in the bundle's ONNX contract.

Asked for the GPU, the library takes the CPU without a word when CUDA cannot be loaded, and for single operators when
CUDA has no kernel. Both are errors here: what answers is what was asked for.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtime.batch import Batch
from runtime.cores import usable_cores
from runtime.cpu import has_wide_int8_products
from runtime.engines.buckets import Bucket
from runtime.engines.working_memory import WorkingMemory
from runtime.errors import (
    EngineError,
    F2rtError,
    MissingExtraError,
    NotExecutableError,
    OutOfMemoryError,
    first_line,
    is_out_of_memory,
)
from runtime.settings import EngineSettings

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA}

_SPIN_US = 2000
_OUTPUT = "sentence_embedding"
# What must not run on the CPU beside a GPU. Shapes and indices are computed there on purpose.
_HEAVY = {"Attention", "Gemm", "MatMul", "MatMulNBits", "FusedMatMul", "GroupQueryAttention", "MultiHeadAttention"}


class OnnxRuntimeEngine:
    """One session on one graph."""

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        precision: str,
        fingerprint: str,
        settings: EngineSettings,
        provider: str = CPU,
        exact: bool = False,
    ) -> None:
        """Load the graph; `exact` is for one with 8-bit weights that have zero points, see `session_options`.

        Raises EngineError with the library's words when it cannot be loaded; MissingExtraError and NotExecutableError
        when CUDA was asked for and is not to be had.
        """
        self.name = name
        self.precision = precision
        self.fingerprint = fingerprint
        self.max_tokens: int | None = None
        self.buckets: Sequence[Bucket] = ()
        options = session_options(settings.threads, exact=exact)
        options.inter_op_num_threads = 1
        # Of products with 8-bit weights alone: the largest blocks the kernel takes, a quarter faster than its default.
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "-1")
        # Threads that spin have the next operator without being woken. By default they keep a core busy for another
        # 50 ms after a run, which network and tokenization need: here they wait for the next batch only.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spin else "0")
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        if provider == CUDA:
            _require_cuda_package()
            _preload_cuda()
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            chosen = [(provider, _cuda_options(precision))] if provider == CUDA else [provider]
            self._session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:  # the library's exceptions share no base class
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"there is not enough memory to load {path}: {first_line(error)}",
                    cure="Free memory, or choose a smaller engine.",
                ) from error
            raise EngineError(
                f"ONNX Runtime cannot load {path}: {error}",
                cure="Export the checkpoint again with this f2rt.",
            ) from error
        if provider == CUDA:
            check_placement(name, self._session)
        self._memory = WorkingMemory() if provider == CPU else None
        # Only sessions whose CPU memory comes from an arena take this: ours have one, it is the library's default.
        self._giving_back = onnxruntime.RunOptions()
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Return float32 [rows, dim], finite or not. Raises EngineError when the library fails, OutOfMemoryError.

        The library keeps the memory of the largest batch there was; on CPU what has not been needed for a while goes
        back to the system.
        """
        feeds = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        excessive = self._memory is not None and self._memory.is_excessive(*batch.input_ids.shape)
        try:
            (vectors,) = self._session.run([_OUTPUT], feeds, self._giving_back if excessive else None)
        except Exception as error:
            if is_out_of_memory(error):
                shape = f"{batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}"
                raise OutOfMemoryError(
                    f"{self.name} has not enough memory for a batch of {shape}: {first_line(error)}",
                    cure="Free memory, or send smaller batches.",
                ) from error
            raise EngineError(
                f"{self.name} failed on a batch of {batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}: {error}",
                cure="Try a smaller batch; report it when one text alone fails.",
            ) from error
        return np.asarray(vectors, np.float32)

    def close(self) -> None:
        """Drop the session."""
        del self._session


def session_options(threads: int = 0, *, exact: bool = False) -> onnxruntime.SessionOptions:
    """Return what every session has here: `threads`, 0 for one per usable core.

    Without VNNI the kernels for uint8 x int8 add pairs of products in 16 bits, which saturate. On such a CPU `exact`
    has the library take the weights as uint8, too, whose kernels add in 32 bits and are as fast. It rewrites the zero
    points for this, and fails at the first run of a graph where an int8 matrix has none of its own. With VNNI or AMX
    the products are exact as they are, and the rewritten ones have no such kernels. The library would rewrite them
    there as well, so it is asked only where it helps.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = 3
    if exact and not has_wide_int8_products():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def cuda_obstacle() -> F2rtError | None:
    """Return why ONNX Runtime cannot use a GPU here as far as that shows without a session, or None."""
    try:
        _require_cuda_package()
    except F2rtError as error:
        return error
    return None


def check_placement(name: str, session: onnxruntime.InferenceSession) -> None:
    """Make sure that a session asked for CUDA has it, for everything that costs time.

    Raises NotExecutableError when CUDA could not be loaded, EngineError naming the nodes that were put on the CPU.
    """
    providers = session.get_providers()
    if CUDA not in providers:
        raise NotExecutableError(
            f"{name} cannot use CUDA here: ONNX Runtime {onnxruntime.__version__} would run on "
            f"{', '.join(providers)} instead.",
            cure="It needs an NVIDIA driver, CUDA and cuDNN of the versions it was built for: see nvidia-smi, and "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'.",
        )
    strays = [
        f"{node.name} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != CUDA
        for node in part.get_nodes()
        if node.op_type in _HEAVY
    ]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} has no CUDA kernel for {len(strays)} nodes of {name} and would "
            f"run them on the CPU: {', '.join(strays[:3])}{more}.",
            cure="Choose another precision, or the onnxruntime engine.",
        )


def _cuda_options(precision: str) -> dict[str, str]:
    """By default the library rounds the inputs of float32 products to TF32's 10 bits: not what fp32 says."""
    return {"use_tf32": "0" if precision == "fp32" else "1"}


def _require_cuda_package() -> None:
    if CUDA not in onnxruntime.get_available_providers():
        raise MissingExtraError(
            f"the ONNX Runtime installed here ({onnxruntime.__version__}) is the package without CUDA.",
            cure="Both packages are one module, so replace it: pip uninstall onnxruntime, then pip install "
            "'onnxruntime-gpu[cuda,cudnn]'.",
        )


def _preload_cuda() -> None:
    """Load CUDA and cuDNN from where pip put them. What is missing the library prints; `check_placement` says it."""
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
