"""An engine's cosines, taken apart: by language family, script, length, kind and prompt; and how they are spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from export.report.data import Part, Spread
from export.samples import Sample, family

_LENGTHS = (16, 64, 256, 1024, 4096)
_LOW, _HIGH, _STEP = -16.0, 0.5, 0.25


def length_bucket(tokens: int) -> str:
    """Return the range of token counts a text falls into."""
    lower = 1
    for upper in _LENGTHS:
        if tokens <= upper:
            return f"{lower}-{upper}"
        lower = upper + 1
    return f"over {_LENGTHS[-1]}"


def parts(samples: Sequence[Sample], cosines: NDArray[np.float64]) -> list[Part]:
    """Group the cosines of single texts [texts], the least favourable part of each grouping first."""
    found: dict[tuple[str, str], list[float]] = {}
    for sample, cosine in zip(samples, cosines.tolist(), strict=True):
        for key in _keys(sample):
            found.setdefault(key, []).append(cosine)
    rows = [Part(by, name, len(c), min(c), float(np.mean(c))) for (by, name), c in found.items()]
    return sorted(rows, key=lambda p: (p.by, p.cosine_mean))


def _keys(sample: Sample) -> Iterator[tuple[str, str]]:
    yield "family", family(sample.text)
    yield "script", sample.text.script
    yield "length", length_bucket(len(sample.ids))
    yield "kind", sample.text.kind
    yield "prompt", sample.text.prompt or "none"


def spread(cosines: NDArray[np.float64]) -> Spread:
    """Count 1 - cosine in steps of a quarter of a decade, from 1e-16 up."""
    steps = round((_HIGH - _LOW) / _STEP)
    logs = np.log10(np.clip(1 - cosines, 10**_LOW, None))
    places = np.clip(((logs - _LOW) / _STEP).astype(int), 0, steps - 1)
    return Spread(_LOW, _STEP, np.bincount(places, minlength=steps).tolist())
