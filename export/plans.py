"""What every weight of a narrow graph was multiplied with, kept beside the graph so that its steps can be retraced.

An npz file without pickles: `<weight>|<side>` for the four parts of a `Shift`, `undo|<result>` for the exponents that
undo a shift.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.external_data import Shift
from export.rescale import RescalePlan
from runtime.bundle import Bundle, FileRecord, GraphRecord, check_hash, record_file
from runtime.errors import BundleError
from runtime.files import write_atomic

_SIDES = ("rows", "columns", "row_factors", "column_factors")
_UNDO = "undo"


def write_plan(root: Path, precision: str, plan: RescalePlan) -> FileRecord:
    """Write graphs/<precision>.plan.npz under `root` and return its record. Raises OutputError."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for weight, shift in plan.shifts.items():
        for side in _SIDES:
            values = getattr(shift, side)
            if values is not None:
                # Exponents of a shift fit a byte many times over: float32 itself has 254.
                arrays[f"{weight}|{side}"] = values.astype(np.int16 if values.dtype.kind == "i" else np.float32)
    arrays |= {f"{_UNDO}|{name}": np.array(exponent, np.int64) for name, exponent in plan.undo.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    file = f"graphs/{precision}.plan.npz"
    write_atomic(root / file, buffer.getvalue())
    return record_file(root, file)


def read_plan(bundle: Bundle, graph: GraphRecord) -> RescalePlan | None:
    """Return the plan a graph was written by; None where none is kept. Raises BundleError for a damaged file."""
    if graph.plan is None:
        return None
    check_hash(bundle, graph.plan)
    path = bundle.path(graph.plan.file)
    plan, sides = RescalePlan(), dict[str, dict[str, NDArray[np.generic]]]()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                name, _, side = key.partition("|")
                if name == _UNDO:
                    plan.undo[side] = int(arrays[key])
                else:
                    values = arrays[key]
                    sides.setdefault(name, {})[side] = values.astype(np.int64) if values.dtype.kind == "i" else values
        plan.shifts |= {name: Shift(**parts) for name, parts in sides.items()}  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}.", cure="Export the checkpoint again.") from error
    return plan
