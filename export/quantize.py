"""From measured statistics to the one plan that all INT8 graphs of a checkpoint follow.

Search the grid of every group, measure what each costs, leave out what is worth leaving out, fold the smoothing into
the weights, and rescale what float16 still has to hold. The plan is the same for the int8 and the uint8 form of the
graph, down to the bits of the scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.statistics import Statistics
from export.config import EncoderConfig
from export.external_data import NO_SHIFT, Shift
from export.int8 import Grid, QuantizationPlan, groups, kv_channels, row_scales, search, work
from export.rescale import RescalePlan, plan_rescaling
from export.sensitivity import choose_texts, exclusions, impacts
from export.weights import Weights, absmax, to_float32
from runtime.bundle import Exclusion, Quantization, QuantizedInput
from runtime.errors import InputError

DEFAULT_BUDGET = 0.9
# Raise it when the same measurements give another plan than before, or the plan another form for ONNX Runtime.
RULES = 2

Progress = Callable[[str, int, int], None]


def check_budget(budget: float) -> float:
    """Return the part of the work that stays INT8. Raises InputError outside 0 to 1."""
    if not 0 < budget <= 1:
        raise InputError(
            f"the INT8 budget is {budget:g}; it is the part of the matrix work that must stay INT8, above 0 and up "
            "to 1.",
            cure=f"Give for example --int8-budget {DEFAULT_BUDGET}.",
        )
    return budget


def plan_int8(
    config: EncoderConfig,
    weights: Weights,
    statistics: Statistics,
    graph: Path,
    sequences: Sequence[Sequence[int]],
    *,
    budget: float = DEFAULT_BUDGET,
    progress: Progress = lambda label, done, total: None,
) -> QuantizationPlan:
    """Decide everything INT8 needs. `graph` is the fp32 graph, `sequences` the token ids the probe saw.

    Raises InputError for a budget outside 0 to 1 or a probe without rows, EngineError when the graph does not run.
    """
    check_budget(budget)

    def read(name: str) -> NDArray[np.float32]:
        return to_float32(weights.read(name))

    found: dict[str, Grid] = {}
    every = groups(config)
    for done, group in enumerate(every):
        progress("INT8: search", done, len(every))
        found[group.input] = search(group, config, statistics, read)
    progress("INT8: search", len(every), len(every))
    impact = impacts(graph, config, list(found.values()), choose_texts(sequences), read, progress)
    tokens_per_text = sum(map(len, sequences)) / len(sequences)
    costs = {group.input: work(group, config, tokens_per_text) for group in every}
    left_out = exclusions(impact, costs, budget)
    for group in [g for g in every if g.input in left_out]:
        found[group.input] = search(group, config, statistics, read, weights_only=True)
    rescale = fold(config, found, statistics, weights)
    scales = {name: grid.scale for name, grid in found.items() if grid.scale is not None}
    record = Quantization(
        budget=budget,
        int8_share=round(sum(costs[n] for n in scales) / sum(costs.values()), 4),
        inputs=[
            QuantizedInput(n, found[n].alpha, found[n].method, scale, _short(found[n].error), _short(impact[n]))
            for n, scale in scales.items()
        ],
        excluded=[Exclusion(n, _short(impact[n]), round(costs[n] / sum(costs.values()), 4)) for n in left_out],
    )
    return QuantizationPlan(rescale, scales, _weight_scales(found, rescale, weights), record)


def _short(number: float) -> float:
    return float(f"{number:.3g}")


def fold(config: EncoderConfig, grids: Mapping[str, Grid], statistics: Statistics, weights: Weights) -> RescalePlan:
    """Return what every weight is multiplied with: smoothing factors, and powers of two for what float16 holds."""
    smoothing = smoothing_shifts(config, grids)

    @functools.cache
    def largest(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if name not in smoothing:
            return absmax(weights, name)
        magnitudes = np.abs(smoothing[name].apply(to_float32(weights.read(name))))
        return magnitudes.max(axis=1), magnitudes.max(axis=0)

    plan = plan_rescaling(config, statistics, largest, frozenset(grids))
    for name, factors in smoothing.items():
        exponents = plan.shifts.get(name, NO_SHIFT)
        plan.shifts[name] = replace(factors, rows=exponents.rows, columns=exponents.columns)
    return plan


def smoothing_shifts(config: EncoderConfig, grids: Mapping[str, Grid]) -> dict[str, Shift]:
    """Return the factors of every weight that smoothing touches: 1 / s where an input is made, s where it is read."""
    shifts: dict[str, Shift] = {}
    for name, grid in grids.items():
        layer, _, tensor = name.rpartition(".")
        makers = {"self_attn": f"{name}.v_proj.weight", "gated": f"{layer}.up_proj.weight"}
        maker = makers.get(tensor, f"{name}.weight")
        made = kv_channels(grid.factors, config) if tensor == "self_attn" else grid.factors
        shifts[maker] = replace(shifts.get(maker, NO_SHIFT), row_factors=np.reciprocal(made))
        for weight in grid.group.weights:
            shifts[weight] = replace(shifts.get(weight, NO_SHIFT), column_factors=grid.factors)
    return shifts


def _weight_scales(grids: Mapping[str, Grid], rescale: RescalePlan, weights: Weights) -> dict[str, NDArray[np.float32]]:
    names = [name for grid in grids.values() for name in grid.group.weights]
    return {
        name: row_scales(np.abs(rescale.shift(name).apply(to_float32(weights.read(name)))).max(axis=1))
        for name in names
    }
