"""The precisions a graph can have. One graph file per precision; builders and reports use the same names."""

from __future__ import annotations

from enum import StrEnum

import onnx_ir as ir

from runtime.errors import InputError


class Precision(StrEnum):
    """Numbers of a graph's weights and matrix products."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


DATA_TYPES = {
    Precision.FP32: ir.DataType.FLOAT,
    Precision.FP16: ir.DataType.FLOAT16,
    Precision.BF16: ir.DataType.BFLOAT16,
    Precision.INT8: ir.DataType.FLOAT16,  # of what is not rounded to INT8
}


def parse_precisions(text: str) -> list[Precision]:
    """Read a comma-separated list without repetition. Raises InputError naming what there is."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = ", ".join(Precision)
    unknown = [name for name in names if name not in list(Precision)]
    if unknown or not names:
        raise InputError(
            f"there is no precision {unknown[0]!r}." if unknown else "no precision was given.",
            cure=f"This version makes: {known}.",
        )
    return [Precision(name) for name in names]
