"""The types of an engine: of the graph before it is compiled, and of its layers afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export import builder, engine_types
from export.builder import Target, build_engine
from export.engine_types import Layer, LayerLog, describe_layers, inspect_plan, int8_share, layers_of
from runtime.bundle import Bundle
from runtime.errors import (
    EngineError,
)
from tests.fake_device import L4
from tests.qdq import Form, quantize
from tests.rtx import RTX, SMALL, build

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
