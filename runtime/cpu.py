"""What the processor is and what it can do, as the kernel says."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_X86 = {"x86_64", "amd64", "i386", "i686", "x86"}
_AVX512_CORE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@functools.cache
def cpu_facts() -> dict[str, str]:
    """Return /proc/cpuinfo's lines for the first processor; empty where there is no such file."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in reversed(pairs)}


def cpu_extensions() -> frozenset[str]:
    """Return the instruction sets the kernel offers, by its names (avx2, avx512_vnni, ...); empty where unknown."""
    return frozenset(cpu_facts().get("flags", "").split())


def has_wide_int8_products() -> bool:
    """Whether ONNX Runtime's kernels for uint8 x int8 are known to add products in 32 bits here: VNNI and AMX do.

    Without these an x86 adds them in pairs in 16 bits, which saturate. The library chooses in this order (platform.cpp
    of its MLAS): AMX, AVX512-VNNI, AVX-512 without VNNI, AVX-VNNI, AVX2. AMX counts only beside AVX512-VNNI, as every
    CPU has it: a process may be refused AMX's registers. False on other architectures, where nothing depends on it,
    and where there is no /proc/cpuinfo.
    """
    found = cpu_extensions()
    if found >= _AVX512_CORE:
        return "avx512_vnni" in found
    return "avx_vnni" in found


def has_fast_int8_products() -> bool:
    """Whether products with 8-bit weights are expected to be faster than float32's.

    On an x86 without VNNI they are not: exact ones took 0.95 to 1.07 times as long as float32's (bench int8-speed, 0.6B
    shape). Other architectures have instructions of their own for them.
    """
    return has_wide_int8_products() or platform.machine().lower() not in _X86
