"""An unchanged input writes nothing; a changed one writes exactly what depends on it, and the command says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from calibration.texts import calibration_texts, texts_sha256, verification_texts, write_lines
from export.build import add_engine
from export.changes import difference
from export.checkpoint import Checkpoint
from export.cli import app
from export.config import EncoderConfig
from export.encoder import build_encoder, rotary_tables
from export.external_data import DataLayout, Shift, write
from export.hub import locate
from export.int8 import QuantizationPlan
from export.precision import Precision
from export.profiles import Profile
from export.rescale import RescalePlan
from runtime.bundle import Bundle, EngineRecord
from runtime.files import sha256_file
from tests.project import (
    ALL,
    BF16,
    FP16,
    FP32,
    SAME,
    Project,
    change_card,
    change_config_for_others,
    change_prompt,
    change_texts,
    change_theta,
    change_tokenizer,
    change_weight,
    shorten,
    state,
)
from tests.tiny import write_tiny


@pytest.mark.parametrize(
    ("change", "written", "reason", "fingerprint_stays", "verdicts_stay"),
    [
        (change_weight, ALL, "weights changed", False, False),
        (change_texts, {FP16, BF16}, "calibration texts changed", True, True),
        (change_tokenizer, {FP16, BF16}, "tokenizer.json changed", False, False),
        (change_prompt, {FP16, BF16}, "prompts changed", False, False),
        (shorten, {FP16, BF16}, "token limit (256 to 100) changed", False, False),
        (change_theta, ALL, "config.json changed", True, False),
        (change_config_for_others, set(), "", True, False),
        (change_card, set(), "", True, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_exactly_what_depends_on_a_change_is_written(
    project: Project,
    change: Callable[[Project], None],
    written: set[str],
    reason: str,
    fingerprint_stays: bool,
    verdicts_stay: bool,
) -> None:
    """Other calibration texts give this checkpoint the same plan and so the same bytes: the verdict stays with them."""
    before = project.bundle
    inodes = {name: before.path(name + ".data").stat().st_ino for name in ALL}
    change(project)
    found = project.export()
    assert found == {name: ("wrote", reason) if name in written else ("kept", SAME) for name in ALL}
    after = project.bundle
    same_inode = {name for name in ALL if after.path(name + ".data").stat().st_ino == inodes[name]}
    assert same_inode == ALL - written  # what is kept is the very file
    assert (after.manifest.fingerprint == before.manifest.fingerprint) == fingerprint_stays
    assert set(project.verdicts().values()) == {verdicts_stay}
    assert after.path("parity/report.json").exists() == verdicts_stay
    for graph in after.manifest.graphs:
        for file in graph.files:
            assert sha256_file(after.path(file.file)) == file.sha256
    touched = state(project.folder)
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    assert state(project.folder) == touched  # and now nothing has changed


def test_nothing_changed_touches_nothing(project: Project) -> None:
    before = state(project.folder)
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    project.precisions = "bf16,fp16,fp32"
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    assert state(project.folder) == before
    assert [p.name for p in project.folder.parent.iterdir() if p.name.startswith(".")] == []


def test_force_writes_everything_and_keeps_no_verdict(project: Project) -> None:
    project.options = ["--force"]
    assert project.export() == dict.fromkeys(ALL, ("wrote", "--force was given"))
    assert set(project.verdicts().values()) == {False}


def test_precisions_come_and_go(project: Project) -> None:
    project.precisions = "fp32"
    assert project.export() == {FP32: ("kept", SAME)}
    assert sorted(p.name for p in (project.folder / "graphs").iterdir()) == ["fp32.onnx", "fp32.onnx.data"]
    assert project.verdicts() == {"onnxruntime:fp32": True}
    project.precisions = "fp32,bf16"
    assert project.export() == {FP32: ("kept", SAME), BF16: ("wrote", "the bundle had none")}
    project.precisions = "fp16"  # fp32 is only needed for the probe, and does not stay
    assert project.export() == {FP16: ("wrote", "the bundle had none")}
    assert sorted(p.name for p in (project.folder / "graphs").iterdir()) == [
        "fp16.onnx",
        "fp16.onnx.data",
        "fp16.plan.npz",
    ]


def test_another_version_of_f2rt_keeps_graphs_that_it_would_write_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(project.folder)
    monkeypatch.setattr("runtime.__version__", "99.0")
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    assert state(project.folder) == before


def other_tables(config: EncoderConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    cos, sin = rotary_tables(config)
    return np.nextafter(cos, np.float32(2)), sin


@pytest.mark.parametrize(
    ("name", "value", "written", "reason"),
    [
        ("export.encoder.IR_VERSION", 12, ALL, "this f2rt writes another graph"),
        ("export.encoder.rotary_tables", other_tables, ALL, "this f2rt writes another graph"),
        ("export.changes.DATA_FORMAT", 99, ALL, "data format (1 to 99) changed"),
        ("export.changes.RULES", 99, {FP16, BF16}, "rescaling rules (1 to 99) changed"),
    ],
)
def test_a_version_of_f2rt_that_writes_others(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, value: object, written: set[str], reason: str
) -> None:
    monkeypatch.setattr(name, value)
    found = project.export()
    assert found == {n: ("wrote", reason) if n in written else ("kept", SAME) for n in ALL}


def test_bytes_of_a_graph_are_those_of_the_recorded_format(tmp_path: Path) -> None:
    """When this fails the bytes of a layout changed: raise DATA_FORMAT in export/external_data.py, then the hashes."""
    checkpoint = Checkpoint.open(locate(str(write_tiny(tmp_path / "tiny"))))
    up, down = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"
    exponents = np.arange(48) % 5 - 2
    plan = RescalePlan({up: Shift(rows=-exponents), down: Shift(columns=exponents)})
    shapes = checkpoint.config.weight_shapes()
    scales = {n: np.full(shape[0], 2.0**-9, np.float32) for n, shape in shapes.items() if n.endswith("_proj.weight")}
    quantization = QuantizationPlan(plan, {"layers.0.input_layernorm": 0.125}, scales)
    found = {}
    for precision in Precision:
        layout = DataLayout("x")
        int8 = quantization if precision is Precision.INT8 else None
        build_encoder(checkpoint.config, layout, producer_version="", precision=precision, plan=plan, quantization=int8)
        found[precision.value] = write(layout, checkpoint.weights, tmp_path / "x", lambda count: None)[:16]
    assert found == {
        "fp32": "6f55cbb79e00d017",
        "fp16": "40ab877a14aee17e",
        "bf16": "7f6ad3f9642e1e90",
        "int8": "3b332bddd9d626e7",
    }


def test_reasons_in_words() -> None:
    old = {"weights": "a" * 64, "budget": "0.9", "graph structure": "x"}
    assert difference(old, dict(old)) is None
    assert difference(old, old | {"weights": "b" * 64, "graph structure": "y"}) == "weights changed"
    assert difference(old, old | {"budget": "0.95"}) == "budget (0.9 to 0.95) changed"
    assert difference(old, old | {"seed": "1", "weights": "b" * 64}) == "weights and seed (none to 1) changed"
    assert difference(old, old | {"graph structure": "y"}) == "this f2rt writes another graph"
    assert difference(old, {"weights": "a" * 64, "graph structure": "x"}) == "budget (0.9 to none) changed"


def test_int8_depends_on_its_budget_and_keeps_both_graphs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = "graphs/int8.onnx"
    project.precisions = "fp32,fp16,int8"
    project.options = ["--int8-budget", "0.5"]
    assert project.export()[int8] == ("wrote", "the bundle had none")
    project.prove()
    before = state(project.folder)
    assert project.export()[int8] == ("kept", SAME)
    assert state(project.folder) == before
    (project.folder / "graphs/int8-uint8.onnx").unlink()
    damaged = ("wrote", "graphs/int8-uint8.onnx is missing")
    assert project.export() == {FP32: ("kept", SAME), FP16: ("kept", SAME), int8: damaged}
    change_card(project)  # a new manifest, and so a new folder: the twin is carried with the rest
    assert project.export()[int8] == ("kept", SAME)
    for file in project.bundle.graph("int8").files:
        assert sha256_file(project.folder / file.file) == file.sha256
    assert set(project.verdicts().values()) == {True}
    project.options = ["--int8-budget", "0.6"]
    budget = ("wrote", "INT8 budget (0.5 to 0.6) changed")
    assert project.export() == {FP32: ("kept", SAME), FP16: ("kept", SAME), int8: budget}
    monkeypatch.setattr("export.changes.INT8_RULES", 99)
    assert project.export()[FP16] == ("kept", SAME)
    change_texts(project)
    assert project.export()[int8] == ("wrote", "calibration texts changed")


def compiled(bundle: Bundle) -> list[EngineRecord]:
    return [e for e in bundle.manifest.engines if e.target]


def test_compiled_engines_outlive_what_does_not_concern_them(mini: Path, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(mini, project.checkpoint)
    project.texts.write_bytes(write_lines(calibration_texts()[:20]))
    project.precisions = "fp32,fp16"
    project.export()
    built = add_engine(project.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89").record
    project.prove()
    # The tokenizer changes what vectors mean, not what the engine was compiled from.
    change_tokenizer(project)
    assert project.export()[FP16] == ("wrote", "tokenizer.json changed")
    (engine,) = compiled(project.bundle)
    assert (engine.sha256, engine.parity) == (built.sha256, None)
    assert engine.fingerprint != built.fingerprint
    assert sha256_file(project.folder / engine.file) == built.sha256
    again = add_engine(project.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89")
    assert (again.built, again.reason) == (False, SAME)
    # Other weights do.
    change_weight(project)
    assert project.export()[built.file] == ("dropped", "the fp16 graph changed")
    assert compiled(project.bundle) == []
    assert not (project.folder / built.file).exists()
    built = add_engine(project.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89").record
    (project.folder / built.file).unlink()
    assert project.export()[built.file] == ("dropped", "it is missing or was changed")
    built = add_engine(project.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89").record
    project.precisions = "fp32"
    assert project.export()[built.file] == ("dropped", "fp16 was not asked for")


def test_calibration_is_read_once_for_all(project: Project) -> None:
    """A user's file of the shipped texts is the same calibration: it is the texts that count, not their file."""
    project.texts.write_bytes(write_lines(calibration_texts()))
    project.export()
    assert project.bundle.graph("fp16").calibration_sha256 == texts_sha256(calibration_texts())
    project.texts.unlink()
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    project.texts.write_bytes(write_lines(verification_texts()))
    before = state(project.folder)
    done = CliRunner().invoke(
        app, ["export", str(project.checkpoint), "--out", str(project.folder), "--calibration", str(project.texts)]
    )
    assert done.exit_code == 2
    assert state(project.folder) == before
