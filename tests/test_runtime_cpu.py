"""What the CPU can do decides how 8-bit products are made exact, and at what speed."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import cpu
from runtime.engines.onnxruntime import session_options

AVX2 = "fpu sse4_1 avx avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"
EXACT = "session.x64quantprecision"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    cpu.cpu_facts.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None) -> None:
    """Stand on a CPU with these flags; None: on a system without /proc/cpuinfo."""
    file = tmp_path / "cpuinfo"
    if flags is not None:
        other = "processor\t: 1\nmodel name\t: Other\nflags\t\t: none\n"
        file.write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n\n{other}")
    monkeypatch.setattr(cpu, "_CPUINFO", file)
    cpu.cpu_facts.cache_clear()


@pytest.mark.parametrize(
    ("flags", "wide"),
    [
        (AVX2, False),
        (AVX512, False),
        (f"{AVX2} avx_vnni", True),
        (f"{AVX512} avx_vnni", False),  # the library then takes the AVX-512 kernel, which has no VNNI
        (f"{AVX512} avx512_vnni", True),
        (f"{AVX512} avx512_vnni avx_vnni amx_tile amx_int8 amx_bf16", True),
        (f"{AVX512} amx_tile amx_int8", False),  # no CPU; the library may be refused AMX, and then has AVX-512 only
        (f"{AVX2} avx512_vnni", False),  # a masked CPU: without the rest of AVX-512 the library has AVX2
        (None, False),
    ],
)
def test_products_are_rewritten_only_where_they_would_saturate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, wide: bool
) -> None:
    """Rewritten ones have no kernels with VNNI or AMX, and are no more exact than those."""
    on(monkeypatch, tmp_path, flags)
    assert cpu.has_wide_int8_products() is wide
    assert asked(exact=True) is not wide
    assert asked(exact=False) is False


@pytest.mark.parametrize(
    ("machine", "flags", "fast"),
    [
        ("x86_64", AVX2, False),
        ("AMD64", AVX512, False),  # as Windows spells it
        ("x86_64", None, False),
        ("x86_64", f"{AVX512} avx512_vnni", True),
        ("aarch64", "asimd asimddp", True),
        ("arm64", None, True),
    ],
)
def test_int8_is_expected_to_be_faster_than_fp32_but_on_x86_without_vnni(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, flags: str | None, fast: bool
) -> None:
    on(monkeypatch, tmp_path, flags)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert cpu.has_fast_int8_products() is fast


def asked(*, exact: bool) -> bool:
    try:
        return session_options(1, exact=exact).get_session_config_entry(EXACT) == "1"
    except RuntimeError:  # the library's answer for an entry nobody set
        return False


def test_facts_are_the_first_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch, tmp_path, AVX2)
    assert (cpu.cpu_facts()["model name"], cpu.cpu_facts()["processor"]) == ("A CPU", "0")
    assert cpu.cpu_extensions() == set(AVX2.split())
    on(monkeypatch, tmp_path / "nowhere", None)
    assert (cpu.cpu_facts(), cpu.cpu_extensions()) == ({}, frozenset())


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="needs an x86 Linux")
def test_this_cpu_is_read() -> None:
    assert "sse2" in cpu.cpu_extensions()
