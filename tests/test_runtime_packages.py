"""ONNX Runtime is one module in two packages: whoever replaced the one by the other has its version all the same."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import onnxruntime
import pytest

from export.pipeline import versions
from export.verdicts import run_versions
from runtime.packages import installed_version

Ask = Callable[[str], str]


@pytest.fixture
def gpu_package_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an environment after pip uninstall onnxruntime, pip install onnxruntime-gpu."""
    real: Ask = importlib.metadata.version

    def version(package: str) -> str:
        if package == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.31.1" if package == "onnxruntime-gpu" else real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_installed_version_is_the_modules() -> None:
    assert installed_version("onnxruntime") == onnxruntime.__version__
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        installed_version("a-package-nobody-has")


@pytest.mark.usefixtures("gpu_package_only")
def test_the_package_for_gpus_alone_is_enough() -> None:
    assert installed_version("onnxruntime") == "1.31.1"
    assert versions(["onnxruntime"])["onnxruntime"] == "1.31.1"
    assert run_versions("onnxruntime")["onnxruntime"] == "1.31.1"
    assert run_versions("onnxruntime-cuda")["onnxruntime-gpu"] == "1.31.1"
