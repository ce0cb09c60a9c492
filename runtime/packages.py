"""Which version of a package is installed here. ONNX Runtime is one module in two packages, for CPU and for GPU."""

from __future__ import annotations

import importlib.metadata

_ALSO_AS = {"onnxruntime": "onnxruntime-gpu"}


def installed_version(package: str) -> str:
    """Return a version; for `onnxruntime` that of whichever of its two packages is installed.

    Where both are, which the README warns of, it is the CPU's. Raises importlib.metadata.PackageNotFoundError when it
    is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package not in _ALSO_AS:
            raise
        return importlib.metadata.version(_ALSO_AS[package])
