"""Stages: the step and the layer where an error enters are named, for real graphs with a fault put in."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.texts import verification_texts
from export.activations import activations
from export.checkpoint import Checkpoint
from export.external_data import Shift
from export.layers import graph_states, layer_names, shifted_states
from export.plans import read_plan, write_plan
from export.reference import Reference
from export.report.data import LayerError, Stage
from export.report.words import guilty_steps
from export.rescale import RescalePlan
from export.samples import golden_of, make_samples
from export.stages import FOREIGN, NOTHING_SHIFTED, follow, guilty
from runtime.bundle import Bundle, open_bundle, record_file, write_manifest
from runtime.errors import BundleError
from runtime.golden import Golden
from runtime.policy import Policy


@pytest.fixture(scope="module")
def golden(narrow_bundle: Bundle, reference: Reference) -> Golden:
    texts = [t for t in verification_texts() if 40 < len(t.text) < 160][::60]
    samples, _ = make_samples(reference, narrow_bundle.manifest.contract, texts, lambda *_: None)
    return golden_of(samples)


def stages_of(bundle: Bundle, reference: Reference, golden: Golden) -> dict[str, Stage]:
    return {s.name: s for s in follow(bundle, reference, golden, Policy(), lambda *_: None)}


def test_sound_graphs_pass_and_what_cannot_run_says_why(
    narrow_bundle: Bundle, reference: Reference, golden: Golden
) -> None:
    stages = stages_of(narrow_bundle, reference, golden)
    assert stages["fp32 graph"].verdict == stages["fp16 graph"].verdict == "pass"
    assert stages["fp32 graph"].layers[-1].rms < 1e-5 < stages["fp16 graph"].layers[-1].rms < 1e-2
    assert [e.layer for e in stages["fp16 graph"].layers] == layer_names(4)
    assert stages["bf16 graph"].verdict == "pass"
    assert stages["fp16 graph"].layers[-1].rms < stages["bf16 graph"].layers[-1].rms < 1e-1
    assert stages["rescaled for fp16, in float32"].reason == NOTHING_SHIFTED


def test_the_states_are_those_of_pytorch(narrow_bundle: Bundle, reference: Reference, golden: Golden) -> None:
    ids = golden.ids[:3]
    found = graph_states(narrow_bundle.path("graphs/fp32.onnx"), 4, ids)
    expected = np.stack([reference.layer_states(i) for i in ids])
    assert found.shape == expected.shape == (3, 5, 256)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    # And the last state is what the vector is made of.
    np.testing.assert_allclose(expected[0, -1], reference.hidden(ids[0])[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_layer_with_a_damaged_weight_is_guilty(
    narrow_copy: Bundle, reference: Reference, golden: Golden, layer: int
) -> None:
    path = narrow_copy.path("graphs/fp32.onnx")
    model = onnx.load(path, load_external_data=False)
    name = f"layers.{layer}.mlp.down_proj.weight.transposed"
    place = {
        e.key: int(e.value)
        for t in model.graph.initializer
        if t.name == name
        for e in t.external_data
        if e.key != "location"
    }
    with narrow_copy.path("graphs/fp32.onnx.data").open("r+b") as file:
        file.seek(place["offset"])
        values = np.frombuffer(file.read(place["length"]), np.float32)
        file.seek(place["offset"])
        file.write((values * np.float32(1.5)).tobytes())
    stage = stages_of(narrow_copy, reference, golden)["fp32 graph"]
    assert stage.verdict == "fail"
    assert stage.guilty.startswith(f"layer {layer}:")


def test_a_shift_with_its_counterpart_changes_nothing_and_one_without_does(
    checkpoint: Checkpoint, reference: Reference, golden: Golden
) -> None:
    """up_proj rows x 2^-3 against down_proj columns x 2^3 is exact; alone it is another model."""
    up, down = "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"
    channels = checkpoint.config.weight_shapes()[up][0]
    both = RescalePlan({up: Shift(rows=np.full(channels, -3)), down: Shift(columns=np.full(channels, 3))})
    alone = RescalePlan({up: Shift(rows=np.full(channels, -3))})
    plain, same, other = (
        shifted_states(checkpoint.config, checkpoint.weights, plan, golden.ids[:2])
        for plan in (RescalePlan(), both, alone)
    )
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(other[:, 2:] - plain[:, 2:]).max() > 0.1
    np.testing.assert_array_equal(other[:, :2], plain[:, :2])


def test_a_plan_is_read_back_as_it_was_written(narrow_copy: Bundle) -> None:
    shift = Shift(np.array([1, -2, 0]), None, np.array([0.5, 2, 1], np.float32), None)
    plan = RescalePlan({"a.weight": shift}, {"layers.0.mlp.down_proj": 4})
    record = write_plan(narrow_copy.folder, "fp16", plan)
    graph = replace(narrow_copy.graph("fp16"), plan=record)
    found = read_plan(narrow_copy, graph)
    assert found is not None
    assert found.undo == plan.undo
    back = found.shifts["a.weight"]
    np.testing.assert_array_equal(back.rows, shift.rows)  # type: ignore[arg-type]
    np.testing.assert_array_equal(back.row_factors, shift.row_factors)  # type: ignore[arg-type]
    assert back.columns is None
    assert back.column_factors is None
    narrow_copy.path(record.file).write_bytes(b"PK damaged")
    with pytest.raises(BundleError, match="SHA-256"):
        read_plan(narrow_copy, graph)
    assert read_plan(narrow_copy, narrow_copy.graph("fp32")) is None


def test_a_foreign_graph_is_not_followed(narrow_copy: Bundle, reference: Reference, golden: Golden) -> None:
    from runtime.bundle import Origin

    graph = narrow_copy.graph("fp32")
    origin = Origin("given.onnx", "someone", [], "last_hidden_state", [], [])
    manifest = replace(narrow_copy.manifest, graphs=[replace(graph, origin=origin)])
    write_manifest(narrow_copy.folder, manifest)
    (stage,) = stages_of(open_bundle(narrow_copy.folder), reference, golden).values()
    assert (stage.verdict, stage.reason) == ("not_executed", FOREIGN)


def test_guilt_is_where_the_error_grows_most_and_infinity_is_guilty_at_once() -> None:
    def errors(*values: float | None) -> list[LayerError]:
        return [LayerError(f"layer {i}", v, v) for i, v in enumerate(values)]

    assert guilty(errors(0.1, 0.2, 0.9)).startswith("layer 2: the error grows from 2.0e-01 to 9.0e-01 there, 78%")
    assert guilty(errors(0.1, None, None)).startswith("layer 1: the first with values")
    assert guilty(errors(0.0, 0.0)) == ""


def test_the_guilty_step_is_the_one_that_adds_most() -> None:
    def stage(name: str, precision: str, rms: float | None) -> Stage:
        return Stage(name, precision, "pass", layers=[LayerError("first", 9.0, 9.0), LayerError("last", rms, rms)])

    fp32 = stage("fp32 graph", "fp32", 1e-6)
    idle = Stage("rescaled for fp16", "fp16", "not_executed", reason="no plan")
    assert guilty_steps([fp32]) == []
    assert guilty_steps([fp32, idle, stage("fp16 graph", "fp16", 1e-3)]) == [
        "fp16: the largest step is fp16 graph, from 1.0e-06 to 1.0e-03"
    ]
    smoothed = [stage("smoothed", "int8", 0.05), stage("int8 graph", "int8", 0.06), stage("uint8 form", "int8", 0.05)]
    assert guilty_steps([fp32, *smoothed]) == ["int8: the largest step is smoothed, from 1.0e-06 to 5.0e-02"]
    broken = [stage("smoothed", "int8", None), stage("int8 graph", "int8", None)]
    assert guilty_steps([fp32, *broken]) == ["int8: the largest step is smoothed, from 1.0e-06 to inf"]


def test_activations_come_from_the_bundle_itself(narrow_bundle: Bundle, tmp_path: Path) -> None:
    found = {a.tensor: a for a in activations(narrow_bundle)}
    assert {"embed_tokens", "layers.0.mlp.gated", "layers.3.mlp.residual"} <= set(found)
    assert all(0 < a.median_absmax <= a.absmax for a in found.values())
    copy = open_bundle(Path(shutil.copytree(narrow_bundle.folder, tmp_path / "copy")))
    record = copy.graph("fp16").calibration
    assert record is not None
    copy.path(record.file).write_bytes(b"{}" + b" " * (record.size_bytes - 2))
    with pytest.raises(BundleError, match="SHA-256"):
        activations(copy)
    assert record_file(narrow_bundle.folder, record.file) == record
