"""Graphs compiled by TensorRT-RTX for a GPU that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.builder import Built, Target, build_engine
from export.profiles import Profile

RTX = "tensorrt-rtx"
SMALL = (Profile(1, 64),)


def build(graph: Path, plan: Path, precision: str, target: str = "sm89", **options: Any) -> Built:
    """Compile a graph for single texts of up to 64 tokens."""
    return build_engine(graph, plan, RTX, precision, SMALL, Target(target), **options)
