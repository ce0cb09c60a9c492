"""What the probe measured of every tensor, beside what was done about it in each graph."""

from __future__ import annotations

from export.calibrated import read_calibration
from export.report.data import Activation
from runtime.bundle import Bundle, GraphRecord


def activations(bundle: Bundle) -> list[Activation]:
    """Return one line per tensor in the order of the model; none for a bundle without calibrated graphs.

    Raises BundleError for a damaged calibration file.
    """
    treatments: dict[str, list[str]] = {}
    for graph in bundle.manifest.graphs:
        for tensor, treatment in _treatments(graph):
            treatments.setdefault(tensor, []).append(f"{graph.precision}: {treatment}")
    found = next((c for g in bundle.manifest.graphs if (c := read_calibration(bundle, g))), None)
    return [
        Activation(m.tensor, m.absmax, m.median_absmax, "; ".join(treatments.get(m.tensor, [])))
        for m in (found.tensors if found else [])
    ]


def _treatments(graph: GraphRecord) -> list[tuple[str, str]]:
    rescaled = [
        (r.tensor, f"rescaled in {r.channels} channels by up to 2^{r.largest_exponent}") for r in graph.rescaling
    ]
    if graph.quantization is None:
        return rescaled
    rounded = [
        (q.tensor, f"INT8 by {q.method}" + (f", smoothed {q.alpha:g}" if q.alpha is not None else ""))
        for q in graph.quantization.inputs
    ]
    excluded = [(x.tensor, f"left out of INT8 (impact {x.impact:.0e})") for x in graph.quantization.excluded]
    return [*rescaled, *rounded, *excluded]
