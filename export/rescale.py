"""FP16 that cannot overflow: which tensors are multiplied by which powers of two, and why.

Float16 ends at 65504 and loses bits below 2^-14. Where a measured activation comes within a margin of the first, or a
whole row or column of a weight sinks toward the second, a power of two is moved to the neighbour that undoes it. The
function of the model does not change: multiplying by a power of two is exact, and each shift has its counterpart:

    norm weight x 2^-e        its consumers' columns x 2^e         per channel
    v_proj rows x 2^-e        o_proj columns x 2^e                 per kv channel, for all queries of its group
    up_proj rows x 2^-e       down_proj columns x 2^e              per channel; bounds silu(gate) * up
    q_proj, k_proj rows x 2^-e   epsilon of q_norm, k_norm x 4^-e  RMSNorm divides the scale out again
    q_norm, k_norm x 2^-e     attention scale x 2^e                after the rotation
    o_proj, down_proj, gate_proj rows, token table x 2^-e    the result x 2^e, once it is float32

Knows shapes and statistics; not graphs and not files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibration.statistics import Statistics
from export.config import EncoderConfig
from export.external_data import NO_SHIFT, Shift
from runtime.bundle import Rescaling

# Raise it when the same measurements give another plan than before: narrow graphs are then written again.
RULES = 1
FLOAT16_MAX = 65504.0
# Calibration sees a sample: nothing measured may come nearer to the end of the range than this factor.
SAFETY_FACTOR = 16.0
ACTIVATION_LIMIT = FLOAT16_MAX / SAFETY_FACTOR
# Above this a weight's products could pass the limit by themselves; below, its small values lose bits.
WEIGHT_CEILING = 1024.0
WEIGHT_FLOOR = 2.0**-10

Exponents = NDArray[np.int64]
WeightAbsmax = Callable[[str], tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass
class RescalePlan:
    """The shift of every weight and the undoing of every result; empty means: nothing is changed."""

    shifts: dict[str, Shift] = field(default_factory=dict)
    undo: dict[str, int] = field(default_factory=dict)
    lines: list[Rescaling] = field(default_factory=list)

    def shift(self, weight: str) -> Shift:
        """Return the powers of two a weight is multiplied with."""
        return self.shifts.get(weight, NO_SHIFT)

    def exponent(self, name: str) -> int:
        """Return e: the result called `name` is 2^-e of the true one."""
        return self.undo.get(name, 0)


def plan_rescaling(
    config: EncoderConfig,
    statistics: Statistics,
    weight_absmax: WeightAbsmax,
    smoothed: frozenset[str] = frozenset(),
) -> RescalePlan:
    """Decide the plan from measured activations and the checkpoint's weights.

    `weight_absmax(name)` gives the largest magnitude per row and per column of a weight [out, in]. The inputs of
    matrix products named in `smoothed` are in range already, by other means. Raises KeyError for statistics that lack
    a tensor.
    """
    return _Planner(config, statistics, weight_absmax, smoothed).plan()


class _Planner:
    def __init__(
        self, config: EncoderConfig, statistics: Statistics, weight_absmax: WeightAbsmax, smoothed: frozenset[str]
    ) -> None:
        self._config = config
        self._smoothed = smoothed
        self._statistics = statistics
        self._weight_absmax = weight_absmax
        self._result = RescalePlan()
        self._rows: dict[str, Exponents] = {}
        self._columns: dict[str, Exponents] = {}

    def plan(self) -> RescalePlan:
        self._result_scale("embed_tokens", "embed_tokens.weight")
        for index in range(self._config.layers):
            self._layer(f"layers.{index}")
        for name in self._rows | self._columns:
            self._result.shifts[name] = Shift(self._rows.get(name), self._columns.get(name))
        return self._result

    def _layer(self, layer: str) -> None:
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = [f"{attention}.{x}_proj.weight" for x in "qkv"]
        self._channels(f"{layer}.input_layernorm", f"{layer}.input_layernorm.weight", qkv)
        gate_up = [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
        self._channels(f"{layer}.post_attention_layernorm", f"{layer}.post_attention_layernorm.weight", gate_up)
        self._values(attention)
        self._gated(mlp)
        for side in "qk":
            self._result_scale(f"{attention}.{side}_proj", f"{attention}.{side}_proj.weight")
            self._rotated(f"{attention}.{side}_norm")
        for name in (f"{attention}.o_proj", f"{mlp}.gate_proj", f"{mlp}.down_proj"):
            self._result_scale(name, f"{name}.weight")

    def _channels(self, activation: str, producer: str, consumers: list[str]) -> None:
        """Balance a norm's output against the columns of the matrices that read it."""
        if activation in self._smoothed:
            return
        largest = self._statistics.absmax(activation)
        columns = np.max([self._weight_absmax(name)[1] for name in consumers], axis=0)
        exponents = balance(largest, columns)
        self._move(activation, exponents, largest, [producer], consumers)

    def _values(self, attention: str) -> None:
        """Balance v_proj's rows against o_proj's columns; one kv channel feeds a column of each query head."""
        if attention in self._smoothed:
            return
        c = self._config
        largest = self._statistics.absmax(f"{attention}.v_proj")
        o_columns = self._weight_absmax(f"{attention}.o_proj.weight")[1]
        grouped = o_columns.reshape(c.kv_heads, c.heads // c.kv_heads, c.head_dim).max(axis=1).reshape(-1)
        exponents = balance(largest, grouped)
        repeated = np.repeat(exponents.reshape(c.kv_heads, 1, c.head_dim), c.heads // c.kv_heads, axis=1).reshape(-1)
        self._move(f"{attention}.v_proj", exponents, largest, [f"{attention}.v_proj.weight"], [])
        if exponents.any():
            self._add(self._columns, f"{attention}.o_proj.weight", repeated)

    def _gated(self, mlp: str) -> None:
        """Balance silu(gate) * up, and up itself, against down_proj's columns."""
        if f"{mlp}.gated" in self._smoothed:
            return
        largest = np.maximum(self._statistics.absmax(f"{mlp}.gated"), self._statistics.absmax(f"{mlp}.up_proj"))
        exponents = balance(largest, self._weight_absmax(f"{mlp}.down_proj.weight")[1])
        self._move(f"{mlp}.gated", exponents, largest, [f"{mlp}.up_proj.weight"], [f"{mlp}.down_proj.weight"])

    def _rotated(self, norm: str) -> None:
        """Bound q or k as they enter attention; the attention scale undoes it."""
        largest = float(self._statistics.absmax(f"{norm}.rotary").max())
        exponent = max(0, _ceil_log2(largest / ACTIVATION_LIMIT))
        if exponent:
            self._add(self._rows, f"{norm}.weight", np.full(self._config.head_dim, -exponent))
            self._result.undo[norm] = exponent
            self._note(norm, 1, exponent, f"reaches {largest:.3g} as it enters attention")

    def _result_scale(self, name: str, weight: str) -> None:
        """Bound a result that is widened to float32 right away, where one multiplication undoes the shift."""
        largest = float(self._statistics.absmax(name).max())
        heaviest = self._heaviest(weight)
        exponent = max(_ceil_log2(largest / ACTIVATION_LIMIT), _ceil_log2(heaviest / WEIGHT_CEILING), 0)
        if exponent == 0 and 0 < heaviest < WEIGHT_FLOOR:
            exponent = _ceil_log2(heaviest / WEIGHT_FLOOR)
        if exponent:
            rows = self._weight_absmax(weight)[0].shape[0]
            self._add(self._rows, weight, np.full(rows, -exponent))
            self._result.undo[name] = exponent
            self._note(name, rows, exponent, f"reaches {largest:.3g}; its weights reach {heaviest:.3g}")

    def _heaviest(self, weight: str) -> float:
        """Return the largest magnitude of a weight after the column shifts planned so far."""
        columns = self._weight_absmax(weight)[1].astype(np.float64)
        shift = self._columns.get(weight)
        return float((columns if shift is None else np.ldexp(columns, shift.astype(np.int32))).max())

    def _move(
        self,
        activation: str,
        exponents: Exponents,
        largest: NDArray[np.float32],
        producers: list[str],
        consumers: list[str],
    ) -> None:
        if not exponents.any():
            return
        for name in producers:
            self._add(self._rows, name, -exponents)
        for name in consumers:
            self._add(self._columns, name, exponents)
        extreme = int(exponents[np.argmax(np.abs(exponents))])
        reason = f"reaches {largest.max():.3g} (limit {ACTIVATION_LIMIT:.0f}) or meets weights outside their range"
        self._note(activation, int(np.count_nonzero(exponents)), extreme, reason)

    def _add(self, store: dict[str, Exponents], name: str, exponents: Exponents) -> None:
        store[name] = store[name] + exponents if name in store else exponents

    def _note(self, tensor: str, channels: int, exponent: int, reason: str) -> None:
        self._result.lines.append(Rescaling(tensor, channels, exponent, reason))


def balance(activation: NDArray[np.float32], weight: NDArray[np.float32]) -> Exponents:
    """Return e per channel so that activation x 2^-e and weight x 2^e both stay in range; 0 where they are already.

    Magnitudes, [channels] each. Where both cannot be satisfied the activation wins: it would overflow, the weight
    only lose bits.
    """
    heavy = _ceil_log2_array(activation / ACTIVATION_LIMIT)
    light = np.where(weight > 0, _ceil_log2_array(WEIGHT_FLOOR / np.where(weight > 0, weight, 1)), 0)
    exponents = np.maximum(np.maximum(heavy, light), 0)
    excess = np.where(weight > 0, _ceil_log2_array(np.where(weight > 0, weight, 1) / WEIGHT_CEILING), 0)
    room = -heavy  # how far the activation may grow
    down = np.minimum(np.maximum(excess, 0), np.maximum(room, 0))
    result: Exponents = np.where(exponents > 0, exponents, -down).astype(np.int64)
    return result


def _ceil_log2(ratio: float) -> int:
    return math.ceil(math.log2(ratio)) if ratio > 0 else -64


def _ceil_log2_array(ratio: NDArray[np.floating]) -> Exponents:
    with np.errstate(divide="ignore"):
        exponents = np.ceil(np.log2(ratio.astype(np.float64)))
    return np.clip(exponents, -64, 64).astype(np.int64)
