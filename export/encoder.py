"""The encoder as an ONNX graph, written node by node from the checkpoint's shape.

Nothing is traced and no weight is read: the graph follows from the configuration. Standard operators of opset 23
only, so that every backend compiles the graph that was checked:

    token table -> layers x [RMSNormalization, q k v, RMSNormalization per head, RotaryEmbedding, causal GQA Attention,
    o, RMSNormalization, SwiGLU] -> RMSNormalization -> L2 normalization

with the layer as defined by Qwen3 (transformers, models/qwen3/modeling_qwen3.py). Two things differ from a
transcription, both exact:

* There is no padding mask. With right padding and causal attention no real token ever sees a pad.
* Only the last token leaves the last layer. So there, queries, the output projection and the MLP are computed for
  that one row per text; keys and values for all. That single query looks at all tokens left of it, which `is_causal`
  cannot say for a query cut out of its sequence: this layer alone takes the attention mask, [batch, 1, 1, sequence].

In the narrow precisions (fp16, bf16) weights and matrix products are narrow; the residual stream, every RMSNorm, the
rotation and the final normalization stay float32: Qwen3's residual stream reaches tens of thousands, its square does
not fit float16. Attention is Cast(q, k, v to float32) -> Attention -> Cast, which TensorRT compiles to a narrow kernel
that accumulates in float32. A `RescalePlan` moves powers of two between neighbours, see `export.rescale`.

In INT8 all matrices are int8 with a scale per output channel, and the inputs a `QuantizationPlan` names are rounded
(QuantizeLinear, DequantizeLinear) where they are made, once for all products that read them. Everything else is as in
fp16, or in float32 for ONNX Runtime on CPU, which fuses the integer products only for uint8 activations.

Shapes: B batch, S sequence, H heads, K kv heads, D head dim, N hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.config import EncoderConfig
from export.external_data import DataLayout
from export.int8 import QuantizationPlan
from export.precision import DATA_TYPES, Precision
from export.rescale import RescalePlan

OPSET = 23
IR_VERSION = 11
_SCALE_TYPES = (ir.DataType.FLOAT16, ir.DataType.FLOAT)
OUTPUT = "sentence_embedding"  # `embedding` clashes with a name inside the model and makes it invalid


def build_encoder(
    config: EncoderConfig,
    layout: DataLayout,
    *,
    producer_version: str,
    precision: Precision = Precision.FP32,
    plan: RescalePlan | None = None,
    quantization: QuantizationPlan | None = None,
    twin: bool = False,
) -> ir.Model:
    """Return the graph on `layout`. Inputs int64 [batch, sequence], output float32 [batch, N], unit length.

    With a plan the graph computes the same function from shifted weights, in any precision. `quantization`, with its
    own plan, is for INT8; `twin` asks for the form of ONNX Runtime on CPU, on the same layout and the same data.
    """
    stored = DATA_TYPES[precision]
    plan = plan or (quantization.rescale if quantization else RescalePlan())
    types = _Types(stored, ir.DataType.FLOAT if twin else stored, ir.DataType.UINT8 if twin else ir.DataType.INT8)
    builder = _Builder(config, layout, types, plan, quantization)
    output = builder.encoder()
    graph = ir.Graph(
        [builder.input_ids, builder.attention_mask],
        [output],
        nodes=builder.tape.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET},
        name="encoder",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="f2rt", producer_version=producer_version)


def rotary_tables(config: EncoderConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of position x inverse frequency, float32 [max_positions, D/2].

    Formula: inv_freq[i] = theta^(-2i/D) (RoFormer, Su et al. 2021, section 3.2.2), in float32 as transformers does.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    angles = np.arange(config.max_positions, dtype=np.float32)[:, None] * inv_freq[None, :]
    return np.cos(angles), np.sin(angles)


@dataclass(frozen=True)
class _Types:
    """Data types of the graph: of weights as stored, of matrix products, and of activations rounded to 8 bits."""

    stored: ir.DataType
    narrow: ir.DataType
    rounded: ir.DataType


class _Builder:
    """The state of one graph under construction."""

    def __init__(
        self,
        config: EncoderConfig,
        layout: DataLayout,
        types: _Types,
        plan: RescalePlan,
        quantization: QuantizationPlan | None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.types = types
        self.narrow_type = types.narrow
        self.plan = plan
        self.scales = quantization.scales if quantization else {}
        self.weight_scales = quantization.weight_scales if quantization else {}
        self.shapes = config.weight_shapes()
        self.tape = ir.tape.Tape()
        self.initializers: dict[str, ir.Value] = {}
        self.input_ids = _input("input_ids")
        self.attention_mask = _input("attention_mask")

    # --- leaves

    def weight(self, name: str, *, transposed: bool = False, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        shape, shift = self.shapes[name], self.plan.shift(name)
        value = self.layout.weight(name, shape, transposed=transposed, dtype=dtype, shift=shift)
        return self.initializers.setdefault(str(value.name), value)

    def scalar(self, name: str, number: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A scalar, kept inside the model file; equal names share one."""
        return self.small(name, np.array(number, dtype.numpy()))

    def ints(self, name: str, values: list[int] | int) -> ir.Value:
        """A small int64 constant, kept inside the model file; equal names share one."""
        return self.small(name, np.array(values, np.int64))

    def small(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small constant, kept inside the model file; equal names share one."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(tensor.dtype)
            self.initializers[name] = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        return self.initializers[name]

    def op(self, kind: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append one node called `name`, whose output has the same name."""
        value = self.tape.op(kind, list(inputs), attributes, name=name)
        value.name = f"{name}.out"
        return value

    # --- parts

    @property
    def is_narrow(self) -> bool:
        return self.narrow_type != ir.DataType.FLOAT

    def narrow(self, x: ir.Value, name: str) -> ir.Value:
        """Round a float32 value to the graph's narrow type; nothing in an fp32 graph."""
        return self.op("Cast", f"{name}.narrow", x, to=self.narrow_type) if self.is_narrow else x

    def widen(self, x: ir.Value, name: str) -> ir.Value:
        """Widen a narrow value to float32; nothing in an fp32 graph."""
        return self.op("Cast", f"{name}.wide", x, to=ir.DataType.FLOAT) if self.is_narrow else x

    def true(self, x: ir.Value, name: str) -> ir.Value:
        """Widen the result called `name` and undo the plan's shift of it."""
        x, exponent = self.widen(x, name), self.plan.exponent(name)
        if exponent == 0:
            return x
        return self.op("Mul", f"{name}.unscale", x, self.scalar(f"{name}.scale", 2.0**exponent))

    def norm(self, x: ir.Value, name: str, epsilon: float | None = None) -> ir.Value:
        epsilon = self.config.rms_norm_eps if epsilon is None else epsilon
        return self.op("RMSNormalization", name, x, self.weight(f"{name}.weight"), axis=-1, epsilon=epsilon)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Multiply a value made by `feed` with a matrix; the result is narrow."""
        if f"{name}.weight" in self.weight_scales:
            return self.op("MatMul", name, x, self.int8_matrix(f"{name}.weight"))
        return self.op("MatMul", name, x, self.weight(f"{name}.weight", transposed=True, dtype=self.narrow_type))

    def int8_matrix(self, name: str) -> ir.Value:
        """An int8 matrix [in, out] with a scale per output channel, widened to the narrow type."""
        scales = self.weight_scales[name]
        shape, shift = self.shapes[name], self.plan.shift(name)
        matrix = self.layout.weight(name, shape, transposed=True, dtype=ir.DataType.INT8, shift=shift, scales=scales)
        # Both types of the same numbers lie in the data file, so that either twin finds its own.
        placed = {t: self.layout.constant(f"{name}.scale.{t.name}", scales, t) for t in _SCALE_TYPES}
        for value in (matrix, placed[self.narrow_type]):
            self.initializers.setdefault(str(value.name), value)
        inputs = [matrix, placed[self.narrow_type]]
        if self.types.rounded == ir.DataType.UINT8:
            # ONNX Runtime, where it turns a matrix to uint8 (see `runtime.engines.onnxruntime`), wants each to have its
            # own zero points.
            inputs.append(self.small(f"{name}.zero_point", np.zeros(scales.shape, np.int8)))
        return self.op("DequantizeLinear", f"{name}.wide", *inputs, axis=1)

    def feed(self, x: ir.Value, name: str, *, wide: bool, label: str | None = None) -> ir.Value:
        """Prepare the input called `name` of matrix products: rounded to INT8 or narrowed; `wide` says x is float32.

        `label` names the nodes where the same input is prepared twice.
        """
        label = label or name
        if name not in self.scales:
            return self.narrow(x, label) if wide else x
        source = ir.DataType.FLOAT if wide else self.narrow_type
        scale = self.scalar(f"{name}.scale.{source.name}", self.scales[name], source)
        zero = 128 if self.types.rounded == ir.DataType.UINT8 else 0
        zero_point = self.scalar(f"zero_point.{self.types.rounded.name}", zero, self.types.rounded)
        rounded = self.op("QuantizeLinear", f"{label}.rounded", x, scale, zero_point)
        scale = self.scalar(f"{name}.scale.{self.narrow_type.name}", self.scales[name], self.narrow_type)
        return self.op("DequantizeLinear", f"{label}.grid", rounded, scale, zero_point)

    def rotated_heads(self, x: ir.Value, attention: str, side: str, heads: int, position_ids: ir.Value) -> ir.Value:
        """Project, normalize per head and rotate: [B, S, N] narrow -> [B, S, heads x D] float32."""
        name, d = f"{attention}.{side}_norm", self.config.head_dim
        projection = f"{attention}.{side}_proj"
        x = self.widen(self.linear(x, projection), projection)
        # x may be 2^-e of the true projection: with epsilon x 4^-e the norm gives the true result.
        epsilon = self.config.rms_norm_eps * 4.0 ** -self.plan.exponent(projection)
        split = self.op("Reshape", f"{name}.split", x, self.ints(f"shape.heads_{heads}", [0, 0, heads, d]))
        normed = self.norm(split, name, epsilon)
        flat = self.op("Reshape", f"{name}.merge", normed, self.ints(f"shape.flat_{heads}", [0, 0, heads * d]))
        return self.op("RotaryEmbedding", f"{name}.rotary", flat, self.cos, self.sin, position_ids, num_heads=heads)

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, name: str, *, last: bool) -> ir.Value:
        """Attend; q and k are float32, v is narrow, and so is the result."""
        c = self.config
        exponent = self.plan.exponent(f"{name}.q_norm") + self.plan.exponent(f"{name}.k_norm")
        heads = {"q_num_heads": c.heads, "kv_num_heads": c.kv_heads, "scale": c.head_dim**-0.5 * 2.0**exponent}
        # Narrow once and wide again: the pair is what TensorRT reads as a narrow kernel with float32 accumulation.
        q = self.widen(self.narrow(q, f"{name}.q"), f"{name}.q")
        k = self.widen(self.narrow(k, f"{name}.k"), f"{name}.k")
        v = self.widen(v, f"{name}.v")
        mask = [self.key_mask] if last else []
        mixed = self.op("Attention", name, q, k, v, *mask, is_causal=0 if last else 1, **heads)
        return self.narrow(mixed, name)

    def mlp(self, x: ir.Value, layer: str) -> ir.Value:
        """Return down(silu(gate(x)) * up(x)), narrow; silu(g) = g * sigmoid(g)."""
        gate = self.linear(x, f"{layer}.mlp.gate_proj")
        up = self.linear(x, f"{layer}.mlp.up_proj")
        rescued = self.plan.exponent(f"{layer}.mlp.gate_proj") != 0
        if rescued:  # a gate beyond the narrow range: its sigmoid needs the true value
            gate, up = self.true(gate, f"{layer}.mlp.gate_proj"), self.widen(up, f"{layer}.mlp.up_proj")
        sigmoid = self.op("Sigmoid", f"{layer}.mlp.sigmoid", gate)
        silu = self.op("Mul", f"{layer}.mlp.silu", gate, sigmoid)
        gated = self.op("Mul", f"{layer}.mlp.gated", silu, up)
        gated = self.feed(gated, f"{layer}.mlp.gated", wide=rescued)
        return self.linear(gated, f"{layer}.mlp.down_proj")

    def layer(self, x: ir.Value, index: int) -> ir.Value:
        """One decoder layer on the float32 residual stream; the last one returns [B, 1, N], the pooled token's row."""
        c, layer = self.config, f"layers.{index}"
        attention = f"{layer}.self_attn"
        last = index == c.layers - 1
        wide, name = self.norm(x, f"{layer}.input_layernorm"), f"{layer}.input_layernorm"
        normed = self.feed(wide, name, wide=True)
        queried, query_positions = normed, self.position_ids
        if last:
            x = self.op("GatherND", "pool.residual", x, self.last_index, batch_dims=1)
            # Rounded after it was gathered: a product and its rounding must stand side by side to be fused.
            pooled = self.op("GatherND", "pool.query", wide, self.last_index, batch_dims=1)
            queried = self.feed(pooled, name, wide=True, label="pool.query")
            query_positions = self.last_position
        q = self.rotated_heads(queried, attention, "q", c.heads, query_positions)
        k = self.rotated_heads(normed, attention, "k", c.kv_heads, self.position_ids)
        v = self.linear(normed, f"{attention}.v_proj")
        mixed = self.feed(self.attention(q, k, v, attention, last=last), attention, wide=False)
        projected = self.true(self.linear(mixed, f"{attention}.o_proj"), f"{attention}.o_proj")
        x = self.op("Add", f"{attention}.residual", x, projected)
        normed = self.norm(x, f"{layer}.post_attention_layernorm")
        grown = self.mlp(self.feed(normed, f"{layer}.post_attention_layernorm", wide=True), layer)
        return self.op("Add", f"{layer}.mlp.residual", x, self.true(grown, f"{layer}.mlp.down_proj"))

    def encoder(self) -> ir.Value:
        self._shared()
        table = self.weight("embed_tokens.weight", dtype=self.types.stored)
        tokens = self.op("Gather", "embed_tokens", table, self.input_ids)
        if self.types.stored != self.narrow_type:
            tokens = self.op("Cast", "embed_tokens.cast", tokens, to=self.narrow_type)
        x = self.true(tokens, "embed_tokens")
        for index in range(self.config.layers):
            x = self.layer(x, index)
        pooled = self.op("Squeeze", "pool", self.norm(x, "norm"), self.ints("axis.1", [1]))
        output = self.op("LpNormalization", "normalize", pooled, axis=-1, p=2)
        output.name = OUTPUT
        output.shape = ir.Shape(["batch", self.config.hidden_size])
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return output

    def _shared(self) -> None:
        """What all layers use: rotary tables and positions, and where the last token stands."""
        cos, sin = rotary_tables(self.config)
        self.cos = self.layout.constant("rotary.cos", cos)
        self.sin = self.layout.constant("rotary.sin", sin)
        self.initializers |= {"rotary.cos": self.cos, "rotary.sin": self.sin}
        one = self.ints("one", 1)
        shape = self.op("Shape", "input_shape", self.input_ids)
        width = self.op("Gather", "width", shape, one)
        positions = self.op("Range", "positions", self.ints("zero", 0), width, one)
        # Explicitly [B, S]: RotaryEmbedding without it bakes one batch size into the graph.
        self.position_ids = self.op("Expand", "position_ids", positions, shape)
        length = self.op("ReduceSum", "length", self.attention_mask, self.ints("axis.1", [1]), keepdims=1)
        self.last_position = self.op("Sub", "last_position", length, one)  # [B, 1]
        self.last_index = self.op("Unsqueeze", "last_index", self.last_position, self.ints("axis.2", [2]))
        real = self.op("Cast", "real_tokens", self.attention_mask, to=ir.DataType.BOOL)
        self.key_mask = self.op("Unsqueeze", "key_mask", real, self.ints("axes.1_2", [1, 2]))  # [B, 1, 1, S]


def _input(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
