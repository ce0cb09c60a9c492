"""The 8-bit forms that ONNX Runtime's own tools make of our fp32 graph: what an INT8 export is measured against.

Each is made in a process of its own, which takes its memory along when it ends: python -m bench.other_forms KIND GRAPH
OUT [SEQUENCES]. Matrix products alone are changed, weights have a scale per output channel where the tool can.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DYNAMIC, STATIC, WEIGHTS = "dynamic", "static", "weights"
NAMES = {
    DYNAMIC: "ORT dynamic int8",
    STATIC: "ORT static Q/DQ",
    WEIGHTS: "ORT MatMulNBits",
}
WHAT = {
    DYNAMIC: "quantize_dynamic, MatMul, per channel",
    STATIC: "quantize_static, MatMul, per channel, ranges from smallest to largest on the same calibration texts, "
    "uint8 activations as the tool advises for this CPU",
    WEIGHTS: "MatMulNBitsQuantizer: 8-bit weights, symmetric, blocks of 128; at accuracy level 4, the fast one, the "
    "kernel rounds activations to int8 as well, block by block",
}
_BLOCK = 128
_ROOT = Path(__file__).resolve().parents[1]


def make_form(kind: str, graph: Path, folder: Path, sequences: Sequence[Sequence[int]] = ()) -> Path:
    """Write `kind` of the fp32 graph to `folder`/model.onnx and return that path.

    `sequences` are the token ids that static ranges are taken from. Raises RuntimeError with the tool's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / "sequences.json"
    given.write_text(json.dumps([list(s) for s in sequences]))
    out = folder / "model.onnx"
    paths = [str(path.absolute()) for path in (graph, out, given)]
    command = [sys.executable, "-W", "ignore", "-m", "bench.other_forms", kind, *paths]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{NAMES[kind]} cannot be made of {graph}:\n{done.stderr[-2000:]}")
    return out


class _Reader:
    """Feeds for `quantize_static`, one text each."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._rest = iter(sequences)

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        ids = next(self._rest, None)
        if ids is None:
            return None
        row = np.array([ids], np.int64)
        return {"input_ids": row, "attention_mask": np.ones_like(row)}


def _dynamic(graph: Path, out: Path, sequences: Sequence[Sequence[int]]) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(graph, out, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=True)


def _static(graph: Path, out: Path, sequences: Sequence[Sequence[int]]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        graph,
        out,
        _Reader(sequences),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        # The results of products stay float32, as in ours: rounding them as well would be worse and no faster.
        extra_options={
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
        },
    )


def _weights(graph: Path, out: Path, sequences: Sequence[Sequence[int]]) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(graph),
        bits=8,
        block_size=_BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)


if __name__ == "__main__":
    makers = {DYNAMIC: _dynamic, STATIC: _static, WEIGHTS: _weights}
    makers[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
