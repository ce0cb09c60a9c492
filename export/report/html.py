"""report.html: one self-contained page, no script and no network, readable on a phone, dark and light."""

from __future__ import annotations

from dataclasses import dataclass

import jinja2

from export.gate import loss_points
from export.report import charts
from export.report.data import ParityReport
from export.report.terminal import describe_graph
from export.report.words import VERDICTS, distance, guilty_steps, headline, number, value_of

_LENGTH_ORDER = ("1-16", "17-64", "65-256", "257-1024", "1025-4096", "over 4096")
_KIND_ORDER = ("query", "document", "long", "code", "edge")
INVARIANCE = ("batch", "permuted", "padded", "repeat", "one thread")


@dataclass(frozen=True)
class Chart:
    """A picture with its title and what it shows, in a sentence."""

    title: str
    caption: str
    svg: str


def to_html(report: ParityReport) -> str:
    """Return the page. Everything in it comes from the report alone."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("export.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"distance": distance, "number": number, "loss": loss_points, "stamp": VERDICTS.__getitem__}
    return environment.get_template("report.html.j2").render(
        report=report,
        executed=charts.drawn_engines(report),
        charts=_charts(report),
        colours={e.engine: charts.colour_of(i) for i, e in enumerate(charts.drawn_engines(report))},
        steps=guilty_steps(report.stages),
        graphs=[(g, describe_graph(g)) for g in report.graphs],
        invariance=INVARIANCE,
        value_of=value_of,
        headline=headline,
    )


def _charts(report: ParityReport) -> list[Chart]:
    engines = charts.drawn_engines(report)
    drawn = [
        Chart("Distance from PyTorch", "1 - cosine of every text, run singly.", charts.spreads(engines)),
        Chart("By layer", "Where the error enters, on the golden texts.", charts.layers(report.stages)),
        Chart("By dimension", "The vector cut to each trained dimension.", charts.by_dimension(engines)),
        Chart("By length", "Texts by tokens.", charts.by_part(engines, "length", _LENGTH_ORDER)),
        Chart("By kind", "Queries, documents, code, edge cases.", charts.by_part(engines, "kind", _KIND_ORDER)),
        Chart("By language family", "The largest groups, texts in brackets.", charts.by_part(engines, "family")),
        Chart("By script", "The largest groups, texts in brackets.", charts.by_part(engines, "script")),
        Chart(
            "Activations",
            "Largest magnitude of every tensor on calibration text, down to that of its median channel.",
            charts.ranges(report.activations),
        ),
        Chart("Latency against precision", "An indication, taken while comparing.", charts.latencies(engines)),
    ]
    drawn = [c for c in drawn if c.svg]
    svgs = charts.unique_ids(c.svg for c in drawn)
    return [Chart(c.title, c.caption, svg) for c, svg in zip(drawn, svgs, strict=True)]
