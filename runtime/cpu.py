"""What the processor is and what it can do, as the kernel says."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_AVX512_CORE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


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
    """Whether ONNX Runtime's kernels for uint8 x int8 add products in 32 bits here: those with VNNI or AMX.

    Without these an x86 adds them in pairs in 16 bits, which saturate. The order of choice is that of its MLAS
    library (platform.cpp): AMX, AVX512-VNNI, AVX-512 without VNNI, AVX-VNNI, AVX2. False where the CPU is unknown.
    """
    found = cpu_extensions()
    if {"amx_tile", "amx_int8"} <= found or "avx512_vnni" in found:
        return True
    return "avx_vnni" in found and not found >= _AVX512_CORE
