"""The builder: graphs really compiled by TensorRT-RTX for GPUs that are not here, bad graphs, and large ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export import builder
from export.builder import Built, Target, build_engine, resolve_target
from export.engine_types import int8_share
from export.precision import Precision
from export.profiles import PRESETS, Profile, parse_profiles
from runtime.bundle import Bundle
from runtime.errors import (
    EngineError,
    InputError,
    OutputError,
)
from runtime.files import sha256_file
from tests.fake_device import H100, L4, FakeCuda
from tests.qdq import Form, quantize
from tests.rtx import RTX, build

# `make engine` builds all precisions for all three, and CI ends with it.
TARGETS = [pytest.param("sm80", marks=pytest.mark.slow), "sm89", pytest.param("sm120", marks=pytest.mark.slow)]


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
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_really_builds(narrow_bundle: Bundle, tmp_path: Path, preset: str) -> None:
    """One plan for all buckets of a preset, the one for a single long text included."""
    profiles = parse_profiles(preset, narrow_bundle.manifest.contract.max_tokens)
    assert profiles[: len(PRESETS[preset])] == PRESETS[preset]
    plan = tmp_path / "plan.engine"
    built = build_engine(narrow_bundle.path("graphs/fp16.onnx"), plan, RTX, "fp16", profiles, Target("sm89"))
    assert built.size_bytes == plan.stat().st_size > 2 * 6_000_000
    assert "28 matrix products in fp16" in built.flags


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
