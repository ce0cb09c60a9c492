"""What the runtime reads of a GPU's driver, as far as that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.engines.cuda import Device, driver_version

OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (builder@host)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Thu Feb 22 01:44:30 UTC 2024\n"


@pytest.mark.parametrize(("text", "version"), [(OPEN, "580.82.07"), (CLOSED, "550.54"), ("", ""), ("no number", "")])
def test_the_drivers_version_is_read(tmp_path: Path, text: str, version: str) -> None:
    source = tmp_path / "version"
    source.write_text(text)
    assert driver_version(source) == version
    assert driver_version(tmp_path / "none") == ""


def test_kernels_belong_to_the_driver_where_it_is_known() -> None:
    known, unknown = Device("L4", (8, 9), 1, "13.0", "580.82.07"), Device("L4", (8, 9), 1, "13.0")
    assert (known.software, unknown.software) == ("580.82.07", "13.0")
