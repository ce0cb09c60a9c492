"""INT8 from calibration text: how each matrix product's input is smoothed, and on which grid it is rounded.

The products of one *group* share an input: q, k, v; o; gate, up; down. An activation is rounded with one scale for the
whole tensor, so its outlier channels take the resolution from all others. SmoothQuant (Xiao et al. 2023, section 4)
moves them into the weights, which have a scale per output channel: with s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),

    x W^T = (x / s) (W diag(s))^T

and 1 / s is folded into what makes x, so that nothing is computed for it: a norm's weight, v_proj's rows (equal for all
query heads of a kv head), up_proj's rows. Alpha and the range are not fixed but searched for each group, on rows that
the probe kept, by the error of the products themselves.

Knows shapes, statistics and weights; not graphs and not files. `export.sensitivity` decides which groups stay out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibration.statistics import Rows, Statistics
from export.config import EncoderConfig
from export.rescale import ACTIVATION_LIMIT, RescalePlan
from runtime.bundle import Quantization

LARGEST = 127  # of a weight; an activation may also be -128
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
RATIOS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
RANGE_PERCENTILES = (99.99, 99.9)
# One row that goes wrong is one text that goes wrong: the worst row counts besides the mean.
_WORST_ROW_WEIGHT = 0.05
# Smoothed inputs end here: far from float16's limits on either side.
_TARGET = 16.0
_NOTHING = 1e-30  # magnitudes up to here count as zero
_LEAST_ROWS, _MOST_ROWS = 128, 1024
_BLOCK_VALUES = 1 << 16  # of a matrix, rounded together
_ROW_PRODUCTS = 4e9  # multiplications one candidate may take

Vector = NDArray[np.float32]
ReadMatrix = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True)
class Group:
    """Matrix products with one input. `matrices` are node names; `pooled` those computed for one token per text."""

    input: str
    matrices: tuple[str, ...]
    pooled: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """The checkpoint's names of the matrices."""
        return tuple(f"{name}.weight" for name in self.matrices)


@dataclass(frozen=True)
class Grid:
    """How one input is rounded: divided by `factors` [channels] (folded away), then by `scale`, a float16 number.

    Without a scale only the matrices are INT8. `method` says how the range was chosen, `error` is the products'
    relative squared error on the probe's rows.
    """

    group: Group
    factors: Vector
    scale: float | None
    alpha: float | None
    method: str
    error: float


@dataclass(frozen=True)
class QuantizationPlan:
    """What the graph rounds to INT8: activation scales by input, weight scales by weight, float32 [out].

    All scales are float16 numbers. `rescale` holds what weights are multiplied with, smoothing included.
    """

    rescale: RescalePlan
    scales: dict[str, float] = field(default_factory=dict)
    weight_scales: dict[str, Vector] = field(default_factory=dict)
    record: Quantization | None = None


def groups(config: EncoderConfig) -> list[Group]:
    """Return all groups in the order of the graph."""
    found = []
    for index in range(config.layers):
        layer, last = f"layers.{index}", index == config.layers - 1
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = tuple(f"{attention}.{x}_proj" for x in "qkv")
        for name, matrices in (
            (f"{layer}.input_layernorm", qkv),
            (attention, (f"{attention}.o_proj",)),
            (f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
            (f"{mlp}.gated", (f"{mlp}.down_proj",)),
        ):
            pooled = () if not last else qkv[:1] if matrices == qkv else matrices
            found.append(Group(name, matrices, pooled))
    return found


def work(group: Group, config: EncoderConfig, tokens_per_text: float) -> float:
    """Return the group's multiplications per token of text."""
    shapes = config.weight_shapes()
    return sum(
        float(np.prod(shapes[f"{name}.weight"])) / (tokens_per_text if name in group.pooled else 1.0)
        for name in group.matrices
    )


def search(
    group: Group, config: EncoderConfig, statistics: Statistics, read: ReadMatrix, *, weights_only: bool = False
) -> Grid:
    """Choose smoothing and range of one group by the error of its products on the probe's rows.

    `read(name)` gives a weight, float32 [out, in]. With `weights_only` the input is left as it is. Raises InputError
    when the probe kept no rows.
    """
    trial = _Trial(group, config, statistics, [read(name) for name in group.weights])
    smoothed = [trial.grid(alpha, "max", None if weights_only else 1.0) for alpha in (None, *ALPHAS)]
    best = min(smoothed, key=lambda g: g.error)
    if not weights_only:
        ratios = [(f"percentile {p}", trial.percentile_ratio(best.factors, p)) for p in RANGE_PERCENTILES]
        ratios += [(f"mse {ratio}", ratio) for ratio in RATIOS]
        best = min((best, *(trial.grid(best.alpha, *method) for method in ratios)), key=lambda g: g.error)
    return trial.normalized(best)


class _Trial:
    """One group's rows, weights and true products, against which candidates are measured."""

    def __init__(
        self, group: Group, config: EncoderConfig, statistics: Statistics, matrices: Sequence[NDArray[np.float32]]
    ) -> None:
        self._group = group
        self._config = config
        self._statistics = statistics
        self._matrices = matrices
        self._rows = _choose_rows(statistics.rows(group.input), sum(m.size for m in matrices))
        self._largest = np.maximum(self._tied(statistics.absmax(group.input)), np.float32(_NOTHING))
        self._columns = self._tied(np.max([np.abs(m).max(axis=0) for m in matrices], axis=0))
        products = [self._rows.sampled @ m.T for m in matrices], [self._rows.peaks @ m.T for m in matrices]
        self._products = products
        # A row's error counts against its own length and the usual one: neither vast nor tiny rows rule.
        usual = [max(float((p * p).sum(axis=1).mean()), _NOTHING) for p in products[0]]
        self._norms = [[(p * p).sum(axis=1) + u for p, u in zip(part, usual, strict=True)] for part in products]
        self._rounded: tuple[float | None, list[NDArray[np.float32]]] | None = None

    def grid(self, alpha: float | None, method: str, ratio: float | None) -> Grid:
        """Measure one candidate: the range is `ratio` of the largest magnitude; None leaves the input as it is."""
        factors = self._factors(alpha)
        scale = None if ratio is None else float((self._largest / factors).max()) * ratio / LARGEST
        rounded = self._rounded_matrices(alpha, factors)
        relative: list[NDArray[np.float32]] = []
        for rows, products, norms in zip(
            (self._rows.sampled, self._rows.peaks), self._products, self._norms, strict=True
        ):
            found = rows / factors if scale is None else round_to(rows / factors, scale)
            errors = [
                ((found @ matrix.T - product) ** 2).sum(axis=1) / norm
                for matrix, product, norm in zip(rounded, products, norms, strict=True)
            ]
            relative.append(np.mean(errors, axis=0))
        error = float(relative[0].mean() + _WORST_ROW_WEIGHT * np.concatenate(relative).max())
        return Grid(self._group, factors, scale, alpha, method, error)

    def percentile_ratio(self, factors: Vector, percentile: float) -> float:
        """Return the percentile of all smoothed magnitudes as a part of the largest."""
        value = float(np.percentile(np.abs(self._rows.sampled / factors), percentile))
        return max(value, _NOTHING) / float((self._largest / factors).max())

    def normalized(self, grid: Grid) -> Grid:
        """Multiply the factors by a power of two so that the smoothed input, and its producer, end near `_TARGET`.

        The scale is rounded to float16: one number serves graphs of every type.
        """
        exponent = self._normalizer(grid)
        factors = np.ldexp(grid.factors, exponent).astype(np.float32)
        smallest = float(np.finfo(np.float16).smallest_normal)
        scale = None if grid.scale is None else max(float(np.float16(np.ldexp(grid.scale, -exponent))), smallest)
        return dataclasses.replace(grid, factors=factors, scale=scale)

    def _normalizer(self, grid: Grid) -> int:
        largest = float((self._largest / grid.factors).max())
        if largest <= _NOTHING:  # a dead layer: whatever it is multiplied with stays zero
            return 0
        exponent = int(np.ceil(np.log2(largest / _TARGET)))
        # What attention averages, and what the gate multiplies, may be larger than the result.
        name = self._group.input
        source = {"self_attn": f"{name}.v_proj", "gated": f"{name.removesuffix('gated')}up_proj"}
        producer = source.get(name.rpartition(".")[2])
        if producer is not None:
            factors = kv_channels(grid.factors, self._config) if name.endswith("self_attn") else grid.factors
            made = float((self._statistics.absmax(producer) / factors).max())
            exponent = max(exponent, int(np.ceil(np.log2(max(made, _NOTHING) / ACTIVATION_LIMIT))))
        return exponent

    def _factors(self, alpha: float | None) -> Vector:
        if alpha is None:
            return np.ones_like(self._largest)
        columns = np.maximum(self._columns, np.float32(_NOTHING))
        logs = alpha * np.log2(self._largest.astype(np.float64)) - (1 - alpha) * np.log2(columns.astype(np.float64))
        seen = (self._largest > _NOTHING) & (self._columns > 0)
        centre = float(np.median(logs[seen])) if seen.any() else 0.0
        # A channel that is never seen, or never read, has no say.
        return np.exp2(np.where(seen, np.clip(logs - centre, -24, 24), 0.0)).astype(np.float32)

    def _rounded_matrices(self, alpha: float | None, factors: Vector) -> list[NDArray[np.float32]]:
        """Return the smoothed matrices rounded to INT8 with a scale per row; the last ones are kept."""
        if self._rounded is None or self._rounded[0] != alpha:
            self._rounded = alpha, [round_rows(m, factors) for m in self._matrices]
        return self._rounded[1]

    def _tied(self, channels: Vector) -> Vector:
        """For o_proj's input take the largest of the channels that one channel of v_proj feeds."""
        return repeat_kv(kv_channels(channels, self._config), self._config) if self._is_attention else channels

    @property
    def _is_attention(self) -> bool:
        return self._group.input.endswith("self_attn")


def kv_channels(channels: Vector, config: EncoderConfig) -> Vector:
    """Return for each channel of v_proj the largest of the attention channels it feeds, [kv heads x D]."""
    c = config
    largest: Vector = channels.reshape(c.kv_heads, c.heads // c.kv_heads, c.head_dim).max(axis=1)
    return largest.reshape(-1)


def repeat_kv(channels: Vector, config: EncoderConfig) -> Vector:
    """Repeat [kv heads x D] for every query head, [heads x D]."""
    c = config
    repeated: Vector = np.repeat(channels.reshape(c.kv_heads, 1, c.head_dim), c.heads // c.kv_heads, axis=1)
    return repeated.reshape(-1)


def round_to(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Round an activation to its grid: integers -128 to 127 times `scale`."""
    integers = np.clip(np.rint(values * np.float32(1 / scale)), -LARGEST - 1, LARGEST)
    rounded: NDArray[np.float32] = integers * np.float32(scale)
    return rounded


def row_scales(largest: Vector) -> Vector:
    """Return the scale of each output channel whose largest weight is given, float32 holding float16 numbers.

    Rounded up, so that no weight is cut off; below 2^-20, where float16 has few digits left, all are 2^-20.
    """
    exact = np.maximum(largest / np.float32(LARGEST), np.float32(2**-20))
    scales = exact.astype(np.float16)
    low = scales.astype(np.float32) < exact
    scales[low] = np.nextafter(scales[low], np.float16(np.inf))
    wide: Vector = scales.astype(np.float32)
    return wide


def round_rows(matrix: NDArray[np.float32], factors: Vector | None = None) -> NDArray[np.float32]:
    """Round a matrix [out, in] to INT8 with a scale per row, and widen it again.

    With `factors` [in] it is smoothed first. A few rows at a time, which then stay in the processor's cache: a search
    rounds every matrix a dozen times.
    """
    rounded = np.empty_like(matrix)
    count = max(1, _BLOCK_VALUES // max(1, matrix.shape[1]))
    magnitudes = np.empty((count, matrix.shape[1]), np.float32)
    for start in range(0, len(matrix), count):
        block = rounded[start : start + count]
        np.multiply(matrix[start : start + count], np.float32(1) if factors is None else factors, out=block)
        largest = np.abs(block, out=magnitudes[: len(block)]).max(axis=1, keepdims=True)
        scales = np.maximum(largest / np.float32(LARGEST), np.float32(_NOTHING))
        np.divide(block, scales, out=block)
        np.rint(block, out=block)
        np.multiply(block, scales, out=block)
    return rounded


def _choose_rows(rows: Rows, products_per_row: int) -> Rows:
    """Thin the sampled rows out so that a candidate stays affordable; the peaks stay, up to as many."""
    most = int(np.clip(_ROW_PRODUCTS / products_per_row, _LEAST_ROWS, _MOST_ROWS))
    step = -(-len(rows.sampled) // most)
    return Rows(rows.sampled[::step], rows.peaks[:most])
