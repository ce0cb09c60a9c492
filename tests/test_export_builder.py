"""The builder: graphs really compiled by TensorRT-RTX for GPUs that are not here, their types, and bad graphs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export import builder, engine_types
from export.builder import Built, Target, build_engine, resolve_target
from export.engine_types import Layer, LayerLog, describe_layers, inspect_plan, int8_share, layers_of
from export.precision import Precision
from export.profiles import Profile
from runtime.bundle import Bundle
from runtime.errors import (
    EngineError,
    InputError,
    OutputError,
)
from runtime.files import sha256_file
from tests.fake_device import H100, L4, FakeCuda
from tests.qdq import Form, quantize

RTX = "tensorrt-rtx"
SMALL = (Profile(1, 64),)
TARGETS = ["sm80", "sm89", "sm120"]


def build(graph: Path, plan: Path, precision: str, target: str = "sm89", **options: Any) -> Built:
    return build_engine(graph, plan, RTX, precision, SMALL, Target(target), **options)


# --- what builds


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_rtx_builds_without_a_gpu(narrow_bundle: Bundle, tmp_path: Path, precision: Precision, target: str) -> None:
    seen: list[str] = []
    plan = tmp_path / "plan.engine"
    built = build(
        narrow_bundle.path(f"graphs/{precision}.onnx"),
        plan,
        precision,
        target,
        progress=lambda label, done, total: seen.append(label),
    )
    # At the least the weights are in it, at two bytes each.
    assert built.size_bytes == plan.stat().st_size > 2 * 6_000_000
    assert built.sha256 == sha256_file(plan)
    assert built.builder[RTX].startswith("1.7")
    assert f"28 matrix products in {precision}" in built.flags
    assert any(flag.startswith("compiled products: ") and precision in flag for flag in built.flags), built.flags
    assert seen
    assert list(tmp_path.iterdir()) == [plan]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", [Form.FLOAT16, Form.FLOAT32_NORMS])
def test_rtx_builds_int8(narrow_bundle: Bundle, tmp_path: Path, form: Form, target: str) -> None:
    """Both forms of Q/DQ compile to products that read int8, and the plan shrinks by the matrices' second bytes."""
    graph = tmp_path / "int8.onnx"
    assert quantize(narrow_bundle.path("graphs/fp16.onnx"), graph, form) == 28
    assert int8_share(graph) == 1.0
    built = build(graph, tmp_path / "int8.engine", "int8", target)
    assert "28 of 28 matrix products in int8, 100.0% of their weights" in built.flags
    (compiled,) = [flag for flag in built.flags if flag.startswith("compiled products: ")]
    # q, k, v are one product, gate and up another.
    assert compiled == "compiled products: 17 int8; of 28 that the graph has in int8, 28 are listed so"
    half = build(narrow_bundle.path("graphs/fp16.onnx"), tmp_path / "fp16.engine", "fp16", target)
    assert 2_000_000 < half.size_bytes - built.size_bytes < 3_000_000


def test_rtx_has_no_attention_kernel_for_a_float32_result(narrow_bundle: Bundle, tmp_path: Path) -> None:
    """Why the output of attention is cast to float16 before it is quantized."""
    graph = tmp_path / "int8.onnx"
    quantize(narrow_bundle.path("graphs/fp16.onnx"), graph, Form.FLOAT32_ATTENTION)
    with pytest.raises(EngineError, match="Attention operation was not supported by a dedicated kernel"):
        build(graph, tmp_path / "int8.engine", "int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.onnx", "int8.onnx.data"]


# --- types read back


def test_graph_of_another_precision_is_refused_before_compiling(narrow_bundle: Bundle, tmp_path: Path) -> None:
    """An engine that silently came out FP32 would run, and only be slow."""
    with pytest.raises(EngineError, match=r"matrix products of the graph are not fp16: .* DataType\.FLOAT"):
        build(narrow_bundle.path("graphs/fp32.onnx"), tmp_path / "x.engine", "fp16")
    with pytest.raises(EngineError, match=r"0 of 28 matrix products of the network are int8"):
        build(narrow_bundle.path("graphs/fp16.onnx"), tmp_path / "x.engine", "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["skip", "weights_only"])
def test_products_left_in_float16_are_counted(narrow_bundle: Bundle, tmp_path: Path, how: str) -> None:
    """Left out of INT8 as a whole, or with their matrices in int8 and the product in float16."""
    graph = tmp_path / "int8.onnx"
    left = {how: "layers.0.mlp.down_proj"}
    assert quantize(narrow_bundle.path("graphs/fp16.onnx"), graph, Form.FLOAT16, **left) == 27
    assert int8_share(graph) == pytest.approx(1 - 320 * 256 / 2_621_440, abs=1e-3)
    built = build(graph, tmp_path / "int8.engine", "int8")
    assert any(flag.startswith("27 of 28 matrix products in int8, 96.") for flag in built.flags), built.flags
    assert any("fp16" in flag and "int8" in flag for flag in built.flags), built.flags


def test_network_with_less_int8_than_the_graph_promises(
    narrow_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tmp_path / "int8.onnx"
    quantize(narrow_bundle.path("graphs/fp16.onnx"), graph, Form.FLOAT16, skip="down_proj")
    monkeypatch.setattr(engine_types, "int8_share", lambda path: 0.99)
    with pytest.raises(EngineError, match=r"the graph promises 99\.0%\. The first .*: layers\.0\.mlp\.down_proj"):
        build(graph, tmp_path / "int8.engine", "int8")


LISTING = (
    "Layers:\n"
    "Name: a, LayerType: gemm, Inputs: [ { Name: x, Datatype: {0}, Format: (Linear) Row major } ], Constants: "
    "[ { Name: w, Datatype: Half } ], Outputs: [ { Name: y, Datatype: Half } ], TacticName: t\n"
    "Name: b, LayerType: runtime_fusion, Inputs: [ { Name: r, Datatype: Float }, { Name: y, Datatype: Half } ], "
    "Constants: [  ], Outputs: [ { Name: z, Datatype: Float } ]\n"
    "Name: c, LayerType: kgen, Inputs: [ { Name: z, Datatype: Float } ], Constants: [  ], Outputs: [  ]\n"
)


def listed(kind: str) -> list[Layer]:
    log = LayerLog()
    log.add("something else")
    log.add(LISTING.replace("{0}", kind))
    log.add("the end")
    return log.layers()


def test_compiled_layers_in_float32_are_refused() -> None:
    assert listed("Half") == [
        Layer("a", "gemm", ("fp16",)),
        Layer("b", "runtime_fusion", ("fp32", "fp16")),
        Layer("c", "kgen", ("fp32",)),
    ]
    assert describe_layers(listed("Half"), "fp16") == "compiled products: 2 fp16"
    assert describe_layers(listed("Int8"), "int8") == "compiled products: 1 fp16, 1 int8"
    with pytest.raises(EngineError, match=r"multiplies in 1 fp16, 1 fp32, not in fp16; for example a"):
        describe_layers(listed("Float"), "fp16")
    with pytest.raises(EngineError, match=r"multiplies in 2 fp16, not in int8"):
        describe_layers(listed("Half"), "int8")
    assert "not read: the library does not list them" in describe_layers([], "fp16")
    kernels = [Layer("__myl_MulSum", "kgen", ("fp16",))] * 3
    assert "not read: none stands among 3 compiled layers" in describe_layers(kernels, "fp16")


INT8 = {"a.q": 30, "a.k": 10, "b": 58, "c": 2}


def compiled(name: str, kind: str) -> Layer:
    return Layer(name, "gemm", (kind,))


def test_int8_products_are_looked_for_by_name() -> None:
    joined = compiled("a.k+a.q_myl0_2", "int8")
    rest = [compiled("b_myl0_5", "int8"), Layer("__myl_CastMulCastFc_myl0_7", "runtime_fusion", ("fp16",))]
    told = describe_layers([joined, *rest], "int8", INT8)
    assert told.endswith("of 4 that the graph has in int8, 3 are listed so, 1 not by name (fused into other kernels)")
    # Another profile has its own kernels.
    second = [compiled("a.k [profile 1]+a.q [profile 1]_myl1_2", "int8"), compiled("c [profile 1]_myl1_4", "fp16")]
    told = describe_layers([joined, *rest, *second], "int8", INT8, 2)
    assert told.endswith(
        "of 8 that the graph has in int8, 5 are listed so, 1 otherwise, 2 not by name (fused into other kernels)"
    )
    # One product of another graph's name says nothing.
    assert describe_layers([joined], "int8", {"x": 1}).endswith(
        "0 are listed so, 1 not by name (fused into other kernels)"
    )


def test_int8_products_compiled_to_something_else_are_refused() -> None:
    """One of int8 is not enough: an engine that multiplies the rest in float16 is no INT8 engine."""
    layers = [compiled("a.k+a.q_myl0_2", "int8"), compiled("b_myl0_5", "fp16"), compiled("c_myl0_7", "fp16")]
    words = r"2 of 4 products .* 40\.0% of their weights are left, at least 95% must be; the first is b, in fp16"
    with pytest.raises(EngineError, match=words):
        describe_layers(layers, "int8", INT8)
    # In one of two profiles.
    other = [compiled("b [profile 1]_myl1_3", "fp16"), *[compiled(f"{name}_myl0_2", "int8") for name in INT8]]
    with pytest.raises(EngineError, match=r"1 of 5 products .* 63\.3% of their weights"):
        describe_layers(other, "int8", INT8, 2)


def test_listing_of_another_form_is_an_error(
    narrow_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerLog, "layers", lambda self: [])
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1\.7.* does not list the layers of x\.engine in a form"):
        build(narrow_bundle.path("graphs/fp16.onnx"), tmp_path / "x.engine", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_inspectors_json_is_read() -> None:
    """Both ways in which it spells a type; names alone say nothing."""
    text = """{"Layers": [
        {"Name": "a", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {"Name": "b", "LayerType": "gemm", "Inputs": [{"Name": "y", "Datatype": "Int8"}]},
        {"Name": "c", "LayerType": "kgen"}
    ], "Bindings": ["x"]}"""
    assert layers_of(text) == [Layer("a", "gemm", ("fp16",)), Layer("b", "gemm", ("int8",)), Layer("c", "kgen", ())]
    assert layers_of('{"Layers": ["a", "b"]}') == layers_of("no json") == layers_of("[]") == []


@pytest.mark.parametrize("check", ["describe_layers", "inspect_plan"])
def test_plan_that_fails_a_check_does_not_stay(
    narrow_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """No manifest would ever name it, and at 4B it is 8 GB."""

    def refuse(*arguments: object) -> str:
        raise EngineError("the compiled engine multiplies in fp32.")

    monkeypatch.setattr(builder, check, refuse)
    # Compiled for a GPU that has no driver here: to read the plan back is what fails.
    target = Target("sm89", L4 if check == "inspect_plan" else None)
    monkeypatch.setattr(builder._Build, "_set_capability", lambda self, config, target: None)
    with pytest.raises(EngineError, match="multiplies in fp32"):
        build_engine(narrow_bundle.path("graphs/fp16.onnx"), tmp_path / "x.engine", RTX, "fp16", SMALL, target)
    assert list(tmp_path.iterdir()) == []


class Inspected:
    """The library as `inspect_plan` uses it, on a GPU that takes every plan, or none."""

    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, kind: str, *, loads: bool = True) -> None:
        self.kind = kind
        self.loads = loads
        self.plan = b""

    def Runtime(self, logger: object) -> Inspected:  # noqa: N802  the library's name
        return self

    def deserialize_cuda_engine(self, plan: Any) -> Inspected | None:
        self.plan = bytes(plan)
        return self if self.loads else None

    num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return ["input_ids", "sentence_embedding"][index]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INT64" if name == "input_ids" else "FLOAT")

    def create_engine_inspector(self) -> Inspected:
        return self

    def get_engine_information(self, form: str) -> str:
        assert form == "json"
        layer = {"Name": "b_myl0_1", "LayerType": "gemm", "Inputs": [{"Name": "x", "Datatype": self.kind}]}
        return json.dumps({"Layers": [layer], "Bindings": []})


def test_plan_is_read_back_on_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"a plan")

    def inspect(library: Inspected, precision: str) -> str:
        return inspect_plan(library, object(), tmp_path / "x.engine", precision, INT8)  # type: ignore[arg-type]

    library = Inspected("Int8")
    told = inspect(library, "int8")
    assert library.plan == b"a plan"
    assert told == (
        "read back on the GPU: compiled products: 1 int8; of 4 that the graph has in int8, 1 are listed so, "
        "3 not by name (fused into other kernels); input_ids int64, sentence_embedding float"
    )
    with pytest.raises(EngineError, match=r"multiplies in 1 fp32, not in int8; for example b_myl0_1"):
        inspect(Inspected("Float"), "int8")
    with pytest.raises(EngineError, match=r"x\.engine was just compiled for this GPU and cannot be loaded on it"):
        inspect(Inspected("Int8", loads=False), "int8")


def test_libraries_have_what_reads_a_plan_back() -> None:
    """What the double above stands for."""
    rtx = pytest.importorskip("tensorrt_rtx")
    assert "JSON" in dir(rtx.LayerInformationFormat)
    wanted = {
        rtx.Runtime: ["deserialize_cuda_engine"],
        rtx.ICudaEngine: ["num_io_tensors", "get_tensor_name", "get_tensor_dtype", "create_engine_inspector"],
        rtx.EngineInspector: ["get_engine_information"],
    }
    for kind, names in wanted.items():
        assert set(names) <= set(dir(kind))


# --- the GPU of this machine, on a double


def test_target_of_this_machine_is_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "CudaRuntime", FakeCuda)
    target = resolve_target(RTX, None)
    assert (target.name, target.device) == ("sm89-nvidia-l4", L4)
    assert target.facts == {"gpu": "NVIDIA L4", "cuda driver": "13.0", "driver": "580.82.07"}
    monkeypatch.setattr(builder, "CudaRuntime", lambda: FakeCuda(H100))
    with pytest.raises(InputError, match=r"does not build for the GPU here \(NVIDIA H100 80GB HBM3, sm90\)"):
        resolve_target(RTX, None)


# --- bad graphs


def toy(path: Path, nodes: list[onnx.NodeProto], initializers: list[TensorProto] | None = None) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph(nodes, "g", [x], [y], initializers or [])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("my.domain", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())
    return path


def test_every_node_that_is_not_taken_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Bernoulli", ["a"], ["b"], name="chance"),
        helper.make_node("Det", ["b"], ["c"], name="determinant"),
        helper.make_node("FancyOp", ["c"], ["y"], name="ours", domain="my.domain"),
    ]
    with pytest.raises(EngineError) as caught:
        build(toy(tmp_path / "bad.onnx", nodes), tmp_path / "bad.engine", "fp16")
    message = str(caught.value)
    assert "node chance (Bernoulli): there is no such operator" in message
    assert "node determinant (Det): there is no such operator" in message
    assert "node ours (FancyOp): the node is not valid: " in message
    assert "Plugin not found" in message
    assert "fine" not in message
    assert "has to do without these nodes" in message


def test_node_with_types_that_do_not_fit_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], name="widen", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["y"], name="mixed"),
    ]
    with pytest.raises(EngineError, match=r"node mixed \(MatMul\): .*must have same input types"):
        build(toy(tmp_path / "bad.onnx", nodes), tmp_path / "bad.engine", "fp16")


def test_a_hundred_bad_nodes_do_not_fill_the_screen(tmp_path: Path) -> None:
    names = [f"v{i}" for i in range(100)]
    nodes = [
        helper.make_node("Bernoulli", [a], [b], name=f"n{i}")
        for i, (a, b) in enumerate(zip(["x", *names], [*names, "y"], strict=True))
    ]
    with pytest.raises(EngineError, match=r"node n19 \(Bernoulli\): [^;]*; and 81 more"):
        build(toy(tmp_path / "bad.onnx", nodes), tmp_path / "bad.engine", "fp16")


def test_unreadable_graph(narrow_copy: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot read x\.onnx: .*missing or damaged"):
        build(tmp_path / "x.onnx", tmp_path / "x.engine", "fp16")
    data = narrow_copy.path("graphs/fp16.onnx.data")
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(EngineError, match=r"cannot read fp16\.onnx: .*embed_tokens\.weight.*missing or damaged"):
        build(narrow_copy.path("graphs/fp16.onnx"), tmp_path / "x.engine", "fp16")


# --- large graphs


def matrix(name: str, rows: int, columns: int, offset: int) -> TensorProto:
    """A float16 matrix that lies in w.data."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=[rows, columns])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", str(offset)), ("length", str(2 * rows * columns))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def chain(path: Path, tensors: list[TensorProto]) -> Path:
    """The input through one product after the other."""
    names = ["x", *(f"v{i}" for i in range(1, len(tensors))), "y"]
    nodes = [
        helper.make_node("MatMul", [names[i], tensor.name], [names[i + 1]], name=f"product{i}")
        for i, tensor in enumerate(tensors)
    ]
    return toy(path, nodes, tensors)


def build_chain(graph: Path, plan: Path) -> Built:
    """As `build`, for a graph with one input of 64 columns."""
    original = builder._Build._profile

    def profile(self: Any, made_by: Any, network: Any, profile: Profile) -> Any:
        shapes = made_by.create_optimization_profile()
        shapes.set_shape("x", (1, 64), (profile.rows, 64), (profile.rows, 64))
        return shapes

    builder._Build._profile = profile  # type: ignore[method-assign]
    try:
        return build(graph, plan, "fp16")
    finally:
        builder._Build._profile = original  # type: ignore[method-assign]


def test_weights_beyond_two_gigabytes_are_found(tmp_path: Path) -> None:
    """A data file of 3 GB with a hole in it: offsets do not fit 31 bits, nor 32. The plan holds what lies there."""
    rng = np.random.default_rng(0)
    far = 3 << 30
    numbers = rng.standard_normal((64, 64)).astype(np.float16)
    with (tmp_path / "w.data").open("wb") as file:
        file.write(np.eye(64, dtype=np.float16).tobytes())
        file.seek(far)
        file.write(numbers.tobytes())
    graph = chain(tmp_path / "far.onnx", [matrix("near", 64, 64, 0), matrix("far", 64, 64, far)])
    build_chain(graph, tmp_path / "far.engine")
    plan = (tmp_path / "far.engine").read_bytes()
    here = [numbers.tobytes(), np.ascontiguousarray(numbers.T).tobytes()]
    assert any(block in plan for block in here)


@pytest.mark.slow
def test_graph_above_two_gigabytes_really_builds(tmp_path: Path) -> None:
    """2.3 GB of weights that are not zero; takes 10 GB of memory and of disk."""
    columns = 9_000_000
    rng = np.random.default_rng(0)
    with (tmp_path / "w.data").open("wb") as file:
        for _ in range(2 * 64):
            file.write(rng.integers(0, 15_000, columns, dtype=np.uint16).tobytes())
    tensors = [matrix("wide", 64, columns, 0), matrix("back", columns, 64, 2 * 64 * columns)]
    built = build_chain(chain(tmp_path / "large.onnx", tensors), tmp_path / "large.engine")
    assert built.size_bytes > 2_300_000_000
    assert built.sha256 == sha256_file(tmp_path / "large.engine")


def test_disk_full_is_said(narrow_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sees no exception of ours; the error is the disk's all the same."""

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    class Full:
        write = full

    original = builder.plan_writer
    monkeypatch.setattr(builder, "plan_writer", lambda trt, file: original(trt, Full()))  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"the disk is full .*Nothing was changed"):
        build(narrow_bundle.path("graphs/fp16.onnx"), tmp_path / "x.engine", "fp16")
    assert list(tmp_path.iterdir()) == []
