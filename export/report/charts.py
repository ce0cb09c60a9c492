"""The report's pictures as SVG that follows the page: its text is text, its colours are the page's CSS variables.

Drawn by matplotlib without its global state. Every chart returns "" where there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from export.report.data import Activation, EngineReport, ParityReport, Stage

# Matplotlib knows no CSS variables: it draws in these colours, which nothing else has, and they are replaced.
_INK, _FAINT = "#010203", "#040506"
_SERIES = tuple(f"#0{i}0a0b" for i in range(1, 8))
_VARIABLES = {_INK: "--ink", _FAINT: "--faint"} | {colour: f"--series-{i}" for i, colour in enumerate(_SERIES, 1)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "f2rt",
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_WIDTH = 4.6
_FLOAT16_MAX = 65504.0
# A cosine that is 1 to the last bit has no logarithm.
_FLOOR = 1e-16
_PARTS_SHOWN = 18


def colour_of(index: int) -> str:
    """Return the CSS variable of a series."""
    return f"var(--series-{index % len(_SERIES) + 1})"


def spreads(engines: Sequence[EngineReport]) -> str:
    """How 1 - cosine of single texts is spread, a line per engine."""
    drawn = [(i, e) for i, e in enumerate(engines) if e.spread is not None and any(e.spread.counts)]
    if not drawn:
        return ""
    figure, axes = _figure(2.7)
    for index, engine in drawn:
        assert engine.spread is not None
        s = engine.spread
        edges = [10 ** (s.low + s.step * i) for i in range(len(s.counts) + 1)]
        axes.stairs(s.counts, edges, color=_colour(index), label=engine.engine, linewidth=1.6)
        axes.stairs(s.counts, edges, color=_colour(index), fill=True, alpha=0.15)
    _log(axes.xaxis)
    filled = [p for _, e in drawn if e.spread for p, count in enumerate(e.spread.counts) if count]
    spread = drawn[0][1].spread
    assert spread is not None
    axes.set_xlim(
        10 ** (spread.low + spread.step * (min(filled) - 1)), 10 ** (spread.low + spread.step * (max(filled) + 2))
    )
    axes.set_xlabel("1 - cosine to PyTorch (smaller is better)")
    axes.set_ylabel("texts")
    _legend(figure, 3)
    return _svg(figure)


def by_part(engines: Sequence[EngineReport], by: str, order: Sequence[str] = ()) -> str:
    """Mean and worst 1 - cosine of each part of a grouping; parts in `order`, or the largest first."""
    rows: dict[str, int] = {}
    for engine in engines:
        for part in engine.parts:
            if part.by == by:
                rows[part.name] = max(rows.get(part.name, 0), part.rows)
    names = [n for n in order if n in rows] or sorted(rows, key=lambda n: (-rows[n], n))[:_PARTS_SHOWN]
    found = {
        (i, p.name): (1 - p.cosine_mean, 1 - p.cosine_min) for i, e in enumerate(engines) for p in e.parts if p.by == by
    }
    return _ranges(
        [f"{n} ({rows[n]})" for n in names], [[found.get((i, n)) for n in names] for i in range(len(engines))]
    )


def by_dimension(engines: Sequence[EngineReport]) -> str:
    """Mean and worst 1 - cosine at each Matryoshka dimension; the whole vector is the last."""
    names = list(dict.fromkeys(c.name for e in engines for c in e.checks if c.name.startswith("dim ")))
    names = [*sorted(names, key=lambda n: int(n.split()[1])), "single"]
    values = [
        [next(((1 - c.cosine_mean, 1 - c.cosine_min) for c in e.checks if c.name == name), None) for name in names]
        for e in engines
    ]
    return _ranges(["whole vector" if n == "single" else n for n in names], values)


def layers(stages: Sequence[Stage]) -> str:
    """How far the pooled token's state is from PyTorch's after each layer, a line per stage."""
    drawn = [s for s in stages if s.layers]
    if not drawn:
        return ""
    figure, axes = _figure(3.2)
    for index, stage in enumerate(drawn):
        values = [e.rms or float("nan") for e in stage.layers]
        axes.plot(values, color=_colour(index), label=stage.name, marker="o", markersize=3, linewidth=1.4)
    _log(axes.yaxis)
    names = [e.layer.removeprefix("layer ").replace("embedding", "emb") for e in drawn[0].layers]
    step = -(-len(names) // 12)
    axes.set_xticks(range(0, len(names), step), [n.split()[0] for n in names[::step]])
    axes.set_xlabel("after layer (the last one with the final norm)")
    axes.set_ylabel("relative error, RMS")
    _legend(figure, 2)
    return _svg(figure)


def ranges(activations: Sequence[Activation]) -> str:
    """Largest magnitude of every tensor on calibration text, and what was done about it."""
    if not activations:
        return ""
    figure, axes = _figure(2.7)
    kinds = ("untouched", "INT8", "left out of INT8", "rescaled")
    for index, kind in enumerate(kinds):
        chosen = [(x, a) for x, a in enumerate(activations) if _kind(a) == kind]
        if not chosen:
            continue
        places = [x for x, _ in chosen]
        axes.vlines(
            places,
            [max(a.median_absmax, 1e-6) for _, a in chosen],
            [max(a.absmax, 1e-6) for _, a in chosen],
            color=_colour(index),
            linewidth=1.2,
        )
        axes.plot(places, [max(a.absmax, 1e-6) for _, a in chosen], "o", markersize=3, color=_colour(index), label=kind)
    axes.axhline(_FLOAT16_MAX, color=_INK, linewidth=0.8, linestyle="--")
    axes.annotate("float16 ends at 65504", (0, _FLOAT16_MAX), xytext=(2, -9), textcoords="offset points", color=_INK)
    _log(axes.yaxis)
    axes.set_xlabel("tensor, in the order of the model")
    axes.set_ylabel("largest magnitude")
    _legend(figure, 4)
    return _svg(figure)


def _kind(activation: Activation) -> str:
    for word, kind in (("left out", "left out of INT8"), ("INT8", "INT8"), ("rescaled", "rescaled")):
        if word in activation.treatment:
            return kind
    return "untouched"


def latencies(engines: Sequence[EngineReport]) -> str:
    """Time of one text of 128 tokens against the mean distance from PyTorch, a point per engine."""
    drawn = []
    for index, engine in enumerate(engines):
        timed = next((t for t in engine.latency if (t.rows, t.tokens) == (1, 128)), None)
        if timed is not None and engine.checks:
            drawn.append((index, engine, timed.p50_ms, max(1 - engine.checks[0].cosine_mean, _FLOOR)))
    if not drawn:
        return ""
    figure, axes = _figure(2.8)
    for index, engine, p50_ms, distance in drawn:
        axes.plot([p50_ms], [distance], "o", markersize=8, color=_colour(index), label=engine.engine)
    _log(axes.yaxis)
    axes.set_xlim(0, 1.25 * max(p50_ms for _, _, p50_ms, _ in drawn))
    axes.margins(y=0.2)
    axes.set_xlabel("ms for one text of 128 tokens, median, on the machine of the comparison")
    axes.set_ylabel("1 - mean cosine")
    _legend(figure, 3)
    return _svg(figure)


def _ranges(names: Sequence[str], values: Sequence[Sequence[tuple[float, float] | None]]) -> str:
    """A row per name with, for each series, a dot at the first value and a line to the second."""
    series = [(i, row) for i, row in enumerate(values) if any(v is not None for v in row)]
    if not names or not series:
        return ""
    figure, axes = _figure(0.6 + 0.155 * max(len(names), 4) * max(1.0, 0.6 * len(series)))
    for place, (index, row) in enumerate(series):
        offset = (place - (len(series) - 1) / 2) * 0.6 / len(series)
        points = [(y + offset, *v) for y, v in enumerate(row) if v is not None]
        heights = [p[0] for p in points]
        means, worst = ([max(p[k], _FLOOR) for p in points] for k in (1, 2))
        axes.hlines(heights, means, worst, color=_colour(index), linewidth=1.2)
        axes.plot(means, heights, "o", markersize=3.5, color=_colour(index))
        axes.plot(worst, heights, "|", markersize=5, color=_colour(index))
    _log(axes.xaxis)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("1 - cosine: dot mean, bar worst")
    return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        return figure, figure.add_subplot()


def _log(axis: Axis) -> None:
    """Make an axis logarithmic; its labels are plain text, which takes a tenth of the time of set mathematics."""
    (axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(_power))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float, _: int | None = None) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    return {0: "1", 1: "10"}.get(exponent, f"10{str(exponent).translate(_SUPERSCRIPTS)}")


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=7.5, labelcolor=_INK)


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # The page scales it; a fixed width in points would not fit a phone.
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r'<svg \1width="100%" ', text, count=1)


def unique_ids(charts: Iterable[str]) -> list[str]:
    """Return the charts with ids of their own: in one page the clip paths of one would cut another."""
    done = []
    for number, chart in enumerate(charts):
        chart = re.sub(r'\bid="([^"]+)"', rf'id="c{number}-\1"', chart)
        chart = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#c{number}-", chart)
        done.append(chart)
    return done


def drawn_engines(report: ParityReport) -> list[EngineReport]:
    """Return the engines that were executed: the series of every chart, in this order."""
    return [e for e in report.engines if e.checks]
