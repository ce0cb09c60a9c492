"""Which numbers an engine really computes with: an engine that silently came out FP32 would run, and only be slow.

Read back at two points. The parsed network says what the builder was asked for, on any machine. The compiled layers say
what it made of it: their types stand in the builder's log, and where a GPU is at hand in the engine itself.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from runtime.engines.tensorrt_library import Library
from runtime.errors import EngineError

if TYPE_CHECKING:  # without the library installed these are Any; the tests check against the real ones
    import tensorrt

_PRODUCTS = {"gemm", "matmul", "matrix_multiply", "runtime_fusion"}  # the compiler's names, in small letters
_TYPES = {
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "float": "fp32",
    "fp32": "fp32",
}
_NARROW = {"fp16": "fp16", "bf16": "bf16", "int8": "fp16"}  # what an int8 graph's other products are
_LAYER = re.compile(
    r"Name: (?P<name>[^\n]*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>[^\n]*?)\], (?:Constants|Outputs): "
)
# A compiled product's name: those of the graph's products that became one, for every profile but the first with its
# number, and where in the plan it is.
_PLACE = re.compile(r"_myl\d+_\d+$")
_NAME = re.compile(r"(?P<name>.*?)(?: \[profile (?P<profile>\d+)\])?")
# In builds of the bundled checkpoint for sm80, sm89 and sm120, in buckets from 1x1 to 8x512, every int8 product of the
# graph was listed by name and read int8. A compiler may still choose otherwise for a small one.
LEAST_INT8 = 0.95
_DATATYPE = re.compile(r"Datatype: (\w+)")


@dataclass(frozen=True)
class Layer:
    """A compiled layer: its name, kind in small letters, and the types of its inputs (fp32, fp16, bf16, int8)."""

    name: str
    kind: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """What a parsed network promises: a line for the manifest, and the sizes of the int8 products' matrices by name."""

    flag: str
    int8: dict[str, int] = field(default_factory=dict)


class LayerLog:
    """Picks the listing of compiled layers out of everything a builder says."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, message: str) -> None:
        """Take one message of the log; all but the listing is dropped."""
        if "LayerType: " in message:
            self._text = message

    def layers(self) -> list[Layer]:
        """Return the layers listed; none when the library does not list them in a form that is known."""
        return [
            Layer(m["name"], m["kind"].lower(), _types(_DATATYPE.findall(m["inputs"])))
            for m in _LAYER.finditer(self._text)
        ]


# --- the network, before it is compiled


def check_network(trt: Library, network: tensorrt.INetworkDefinition, precision: str, graph: Path) -> Network:
    """Compare the types of a parsed network's matrix products with what the graph's precision promises.

    For int8, a product counts where both its operands come from DequantizeLinear, weighted by the size of its matrix;
    the share must be what the graph file says, and no product may be in float32. Raises EngineError.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    products = [x for x in layers if x.type == trt.LayerType.MATRIX_MULTIPLY]
    narrow = {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}[_NARROW[precision]]
    wrong = [x for x in products if x.get_output(0).dtype != narrow]
    if not products or wrong:
        first = f"{wrong[0].name} is {wrong[0].get_output(0).dtype}" if wrong else "it has no matrix product"
        raise EngineError(
            f"{len(wrong)} of {len(products)} matrix products of the graph are not {_NARROW[precision]}: {first}.",
            cure=f"The graph is not a {precision} graph: export the checkpoint again.",
        )
    if precision != "int8":
        return Network(f"{len(products)} matrix products in {precision}")
    sources = {x.get_output(o).name: x for x in layers for o in range(x.num_outputs)}
    sizes = [_matrix_size(x) for x in products]
    quantized = [all(_is_dequantized(trt, sources, x.get_input(i).name) for i in (0, 1)) for x in products]
    here = sum(size for size, is_int8 in zip(sizes, quantized, strict=True) if is_int8) / max(sum(sizes), 1)
    promised = int8_share(graph)
    if not any(quantized) or here < promised - 1e-6:
        loose = next((x.name for x, is_int8 in zip(products, quantized, strict=True) if not is_int8), "none")
        raise EngineError(
            f"{sum(quantized)} of {len(products)} matrix products of the network are int8, {here:.1%} of their "
            f"weights; the graph promises {promised:.1%}. The first that is not: {loose}.",
            cure="Each needs QuantizeLinear and DequantizeLinear on its input and a DequantizeLinear on its int8 "
            "matrix: export the checkpoint again with --precision int8.",
        )
    return Network(
        f"{sum(quantized)} of {len(products)} matrix products in int8, {here:.1%} of their weights",
        {x.name: size for x, size, is_int8 in zip(products, sizes, quantized, strict=True) if is_int8},
    )


def int8_share(graph: Path) -> float:
    """Return which part of a graph's matrices, by size, is multiplied in int8: input and matrix both dequantized."""
    total = quantized = 0
    for node in ir.load(graph).graph:
        if node.op_type != "MatMul":
            continue
        producers = [value.producer() if value is not None else None for value in node.inputs]
        matrix = node.inputs[1]
        is_int8 = all(p is not None and p.op_type == "DequantizeLinear" for p in producers)
        if producers[1] is not None and producers[1].op_type == "DequantizeLinear":  # also where the input is float16
            matrix = producers[1].inputs[0]
        constant = matrix.const_value if matrix is not None else None
        size = constant.size if constant is not None else 0
        total += size
        quantized += size * is_int8
    return quantized / total if total else 0.0


def _matrix_size(product: tensorrt.ILayer) -> int:
    """Return the number of weights of a product: the last two dimensions of its second operand."""
    shape = list(product.get_input(1).shape)[-2:]
    return int(shape[0]) * int(shape[1]) if all(n > 0 for n in shape) else 0


def _is_dequantized(trt: Library, sources: dict[str, tensorrt.ILayer], name: str) -> bool:
    """Walk back over layers that move values without changing them."""
    moving = {trt.LayerType.SHUFFLE, trt.LayerType.SQUEEZE, trt.LayerType.UNSQUEEZE, trt.LayerType.IDENTITY}
    layer = sources.get(name)
    while layer is not None and layer.type in moving:
        layer = sources.get(layer.get_input(0).name)
    return layer is not None and layer.type == trt.LayerType.DEQUANTIZE


# --- the layers, after it was compiled


def describe_layers(
    layers: Sequence[Layer], precision: str, int8: Mapping[str, int] = MappingProxyType({}), profiles: int = 1
) -> str:
    """Check the types of compiled matrix products and return a line for the manifest.

    `int8` are the graph's int8 products with the sizes of their matrices; each is compiled once for each of `profiles`.
    Raises EngineError when a product multiplies float32, when none multiplies in the graph's precision, or when less
    than LEAST_INT8, by size, of those of `int8` that are listed by name read int8. What is not listed by name is told.
    """
    if not layers:
        return "types of the compiled layers not read: the library does not list them"
    products = [layer for layer in layers if layer.kind in _PRODUCTS and layer.inputs]
    if not products:
        return f"types of the matrix products not read: none stands among {len(layers)} compiled layers"
    # A fusion also adds the float32 residual: what it multiplies is its narrowest input.
    counts = Counter(_narrowest(layer.inputs) for layer in products)
    found = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    if counts["fp32"] or not counts[precision]:
        first = next((layer.name for layer in products if _narrowest(layer.inputs) == "fp32"), products[0].name)
        raise EngineError(
            f"the compiled engine multiplies in {found}, not in {precision}; for example {first}.",
            cure="An engine like this is slow: report it with the versions of graph and library.",
        )
    told = f"; {_check_int8(products, int8, profiles)}" if int8 else ""
    return f"compiled products: {found}{told}"


def _check_int8(products: Sequence[Layer], int8: Mapping[str, int], profiles: int) -> str:
    """Compare what is listed by name with the int8 products of the graph, and say how many could be. See above."""
    seen: dict[tuple[str, str], str] = {}
    for layer in products:
        for part in _PLACE.sub("", layer.name).split("+"):
            match = _NAME.fullmatch(part)
            if match is not None and match["name"] in int8:
                seen[match["name"], match["profile"] or "0"] = _narrowest(layer.inputs)
    others = [(name, kind) for (name, _), kind in seen.items() if kind != "int8"]
    listed = sum(int8[name] for name, _ in seen)
    share = 1 - sum(int8[name] for name, _ in others) / listed if listed else 1.0
    if share < LEAST_INT8:
        raise EngineError(
            f"{len(others)} of {len(seen)} products that the graph has in int8 were compiled to something else, and "
            f"{share:.1%} of their weights are left, at least {LEAST_INT8:.0%} must be; the first is {others[0][0]}, "
            f"in {others[0][1]}.",
            cure="An engine like this is slow: report it with the versions of graph and library.",
        )
    promised = len(int8) * profiles
    line = f"of {promised} that the graph has in int8, {len(seen) - len(others)} are listed so"
    line += f", {len(others)} otherwise" if others else ""
    unseen = promised - len(seen)
    return line + (f", {unseen} not by name (fused into other kernels)" if unseen else "")


def inspect_plan(
    trt: Library,
    logger: tensorrt.ILogger,
    plan: Path,
    precision: str,
    int8: Mapping[str, int] = MappingProxyType({}),
    profiles: int = 1,
) -> str:
    """Load a plan on the GPU at hand and read layers and tensors back through the engine inspector.

    Returns a line for the manifest. Raises EngineError when it cannot be loaded, and as `describe_layers` does.
    """
    runtime = trt.Runtime(logger)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"{plan.name} was just compiled for this GPU and cannot be loaded on it.", cure="Report it with the log."
        )
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    tensors = ", ".join(f"{name} {engine.get_tensor_dtype(name).name.lower()}" for name in names)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return f"read back on the GPU: {describe_layers(layers_of(text), precision, int8, profiles)}; {tensors}"


def layers_of(text: str) -> list[Layer]:
    """Read the inspector's JSON; layers that are only names, or JSON of another form, give nothing."""
    try:
        entries = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [
        Layer(
            str(entry.get("Name")), str(entry.get("LayerType")).lower(), _types(map(_type_of, entry.get("Inputs", [])))
        )
        for entry in entries
        if isinstance(entry, dict)
    ]


def _type_of(tensor: Any) -> str:
    """Return the word for a tensor's type: a field of its own, or within "Row major linear FP16 format"."""
    if not isinstance(tensor, dict):
        return ""
    text = next((str(value) for key, value in tensor.items() if "datatype" in key.lower()), "")
    return next((word for word in re.findall(r"\w+", text) if word.lower() in _TYPES), "")


def _types(words: Any) -> tuple[str, ...]:
    return tuple(_TYPES[word.lower()] for word in words if word.lower() in _TYPES)


def _narrowest(types: Sequence[str]) -> str:
    return min(types, key=["int8", "fp16", "bf16", "fp32"].index)
