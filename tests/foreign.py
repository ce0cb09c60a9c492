"""Graphs of other tools for tests: taken in, changed, or cast to half precision."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from export.checkpoint import Checkpoint
from export.foreign import open_foreign
from export.pipeline import export_bundle
from runtime.bundle import Bundle

Stock = Callable[[str], Path]


def adopt(checkpoint: Checkpoint, source: Path, target: Path) -> Bundle:
    foreign = open_foreign(source, checkpoint.config)
    return export_bundle(checkpoint, target, [foreign.precision], foreign=foreign)


def edited(folder: Path, target: Path, change: Callable[[ir.Model], None]) -> Path:
    """Copy an export and change its model file; the data file stays as it is."""
    shutil.copytree(folder, target)
    model = ir.load(target / "model.onnx")
    change(model)
    ir.save(model, target / "model.onnx")
    return target


def node(kind: str, *inputs: ir.Value, **attributes: object) -> ir.Node:
    return ir.Node("", kind, list(inputs), ir.convenience.convert_attributes(attributes))


def half(source: Path, folder: Path) -> Path:
    """Convert an export to float16 with ONNX Runtime's own tool, as many published files were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(onnx.load(source / "model.onnx"))
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder
