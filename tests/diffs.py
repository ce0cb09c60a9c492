"""Two bundles compared, as the tests of `f2rt diff` do it, and the lines that say what changed."""

from __future__ import annotations

from typing import Any

from calibration.texts import Text, verification_texts
from export.compare import choose, compare_bundles
from export.diff import Change
from export.diff_report import DiffReport
from runtime.bundle import Bundle

SHORT = [t for t in verification_texts() if len(t.text) < 300]
TEXTS = SHORT[::12]
FP32, INT8 = "onnxruntime:fp32", "onnxruntime:int8"


def compared(a: Bundle, b: Bundle, texts: list[Text] = TEXTS, **options: Any) -> DiffReport:
    return compare_bundles(a, b, choose(texts, "the test"), **options)


def said(changes: list[Change]) -> dict[str, tuple[str, str, str]]:
    return {f"{c.section}: {c.what}": (c.a, c.b, c.reach) for c in changes}
