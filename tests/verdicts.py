"""Runs of parity on a bundle with two engines, and what they told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from calibration.texts import Text, verification_texts
from export.prove import prove_bundle
from runtime.bundle import EngineRecord
from runtime.policy import Policy

TEXTS = [t for t in verification_texts() if len(t.text) < 250][::25]
FP32, FP16 = "onnxruntime:fp32", "onnxruntime:fp16"


class Run:
    """One run of `prove_bundle`: its report and what it told."""

    def __init__(self, folder: Path, texts: list[Text] = TEXTS, **options: object) -> None:
        self.lines: list[str] = []
        options.setdefault("policy", Policy())  # the limits as they are now, where a test has changed them
        self.report = prove_bundle(folder, texts, tell=self.lines.append, **options)  # type: ignore[arg-type]
        self.kept = {e.engine: e.kept for e in self.report.engines}

    @property
    def compared(self) -> dict[str, str]:
        """Return who was compared again and why."""
        told = [line.removeprefix("comparing ") for line in self.lines if line.startswith("comparing ")]
        return dict(line.split(": ", 1) for line in told)

    @property
    def computed(self) -> int | None:
        """Return how many vectors PyTorch computed; None when no reference was needed."""
        told = [line for line in self.lines if line.startswith("reference: ")]
        return int(told[0].split()[1]) if told else None


def state(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(p): p.stat() for p in [folder, *folder.rglob("*")]}
    return {name: (s.st_ino, s.st_mtime_ns) for name, s in found.items()}


def forget(name: str) -> Callable[[EngineRecord], EngineRecord]:
    return lambda e: replace(e, parity=None) if e.full_name == name else e
